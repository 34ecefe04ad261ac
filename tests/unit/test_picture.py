"""What a notebook shows of explained images, read back pixel by pixel. Nothing is faked."""

import base64
import io
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from ais.backbones import load_backbone
from ais.explainer import Explainer, Explanation
from ais.heads import HeadEnsemble, RegressionHead
from ais.placement import cell_size
from ais.render import colorize
from tests.tiny import TINY

SIDE, COLUMN, ROW_TOP = 256, 256 + 8, 12 + 18 + 22


@pytest.fixture(scope="module")
def explanation() -> Explanation:
    """A landscape photograph, of which the ends are cut off, and a small square, which is seen whole."""
    torch.manual_seed(0)
    heads = HeadEnsemble([RegressionHead(TINY.embedding_size, hidden=8) for _ in range(2)])
    explainer = Explainer(load_backbone("tiny", weights="random", seed=3), heads)
    pixels = np.random.default_rng(0).integers(256, size=(300, 512, 3), dtype=np.uint8)
    return explainer([pixels, Image.new("RGB", (64, 64), (10, 200, 30))])


def test_three_views_side_by_side(explanation):
    shown = np.asarray(explanation.show().image)
    views = [shown[ROW_TOP : ROW_TOP + 150, 12 + column * COLUMN :][:, :SIDE] for column in range(3)]
    expected = Image.fromarray(np.asarray(explanation.images[0])).resize((256, 150), Image.Resampling.LANCZOS)
    np.testing.assert_array_equal(views[0], np.asarray(expected))
    brightest = np.unravel_index(int(explanation.heatmaps[0].argmax()), (8, 8))
    left, top, right, bottom = (float(edge) / 2 for edge in explanation.heatmap_boxes[0])  # 512 pixels in 256
    x, y = left + (brightest[1] + 0.5) / 8 * (right - left), top + (brightest[0] + 0.5) / 8 * (bottom - top)
    most = colorize(np.ones((1, 1), np.float32), "positive")[0, 0]
    assert np.abs(views[1][int(y), int(x)].astype(int) - most).max() < 12
    assert (views[1][:, 0] == 96).all()  # the centre crop sees a square: the ends are grey, and dim beside
    assert views[2][:, 0].max() < 0.4 * 255
    # A small image is enlarged, pixel by pixel.
    second = shown[ROW_TOP + 150 + 8 + 22 :]
    assert (second[:256, 12:268] == (10, 200, 30)).all()


@pytest.mark.parametrize("index", [0, 1])
def test_one_cell_is_drawn_to_scale(explanation, index):
    shown = np.asarray(explanation.show([index]).image)
    rows = 150 if index == 0 else 256
    heatmap = shown[ROW_TOP : ROW_TOP + rows, 12 + COLUMN : 12 + COLUMN + SIDE]
    black = np.argwhere((heatmap == 0).all(-1))
    height, width = black.max(0) - black.min(0)
    original = explanation.images[index]
    size = original.shape[1] if isinstance(original, np.ndarray) else original.width
    expected = np.array(cell_size((8, 8), explanation.heatmap_boxes[index].numpy())) * 256 / size
    np.testing.assert_allclose([width, height], expected, atol=1)  # whole pixels


def test_a_notebook_shows_it(explanation):
    picture = explanation.show()
    with Image.open(io.BytesIO(picture._repr_png_())) as image:
        assert image.size == picture.image.size
    tag = picture._repr_html_()
    assert base64.b64encode(picture._repr_png_()).decode() in tag
    scores, stds = explanation.scores, explanation.score_stds
    assert picture.alt == (
        "2 images, each with its heatmap, with an untrained backbone: "
        f"score {scores[0]:.4g} ± {stds[0]:.2g}; score {scores[1]:.4g} ± {stds[1]:.2g}. tiny, layer features.6"
    )
    assert f'alt="{picture.alt}"' in tag


def test_saving(explanation, tmp_path):
    explanation.show([1], side=64).save(tmp_path / "picture.png")
    with Image.open(tmp_path / "picture.png") as image:
        assert image.width == 640  # the legend, wider than the three views
        assert (np.asarray(image)[:, -12:] == 255).all()  # and whole


def test_more_than_fit_are_counted(explanation):
    repeated = {
        name: value[:1].expand(20, *value.shape[1:])
        for name, value in vars(explanation).items()
        if torch.is_tensor(value)
    }
    many = replace(explanation, **repeated, images=explanation.images[:1] * 20)
    assert many.show(side=16).alt.endswith("tiny, layer features.6; the first 8 of 20 images")
    assert "8 images" in many.show(side=16).alt


def test_what_cannot_be_shown(explanation):
    with pytest.raises(ValueError, match=r"images=\[2\]: give at least one position from 0 to 1"):
        explanation.show([2])
    with pytest.raises(ValueError, match="at least one"):
        explanation.show([])
    of_pixels = replace(explanation, images=())
    with pytest.raises(ValueError, match="was made of preprocessed pixels"):
        of_pixels.show()


def test_signed_maps_have_another_legend(explanation):
    signed = replace(explanation, weighting="signed")
    assert signed.show().image.tobytes() != explanation.show().image.tobytes()


def test_the_legend_of_one_importance_for_all_images_says_nothing_of_scores(explanation):
    """It may be of errors or of agreement with people; the heatmaps are the same in both pictures."""
    signed = replace(explanation, weighting="signed")
    given = replace(signed, ablated_scores=None)
    of_scores, of_importance = (np.asarray(shown.show().image).astype(int) for shown in (signed, given))
    changed = np.flatnonzero(np.abs(of_scores - of_importance).max((1, 2)))
    assert len(changed)
    assert changed.min() > ROW_TOP + 150 + 8 + 22 + 256, "below the pictures"


def test_it_needs_neither_a_plotting_library_nor_a_notebook():
    script = (
        "import sys, numpy as np, ais.picture as p\n"
        "e = p.Explained(np.zeros((9, 9, 3), np.uint8), 1.0, float('nan'), np.ones((2, 2), np.float32), "
        "np.array([0., 0, 9, 9]), np.array([0., 0, 9, 9]))\n"
        "p.draw([e], 'positive', 'x', own=True, untrained=False, side=32)._repr_html_()\n"
        "sys.exit(any(name in sys.modules for name in ('torch', 'ray', 'matplotlib', 'IPython')))"
    )
    subprocess.run([sys.executable, "-c", script], check=True)

"""Colours, overlays and PNG files, pixel by pixel."""

import io
import subprocess
import sys

import matplotlib
import numpy as np
import pytest
from PIL import Image

from ais.colours import colours
from ais.render import both_png, colorize, fit_within, heatmap_png, overlay, overlay_png, png, side_by_side

DARK_BLUE, YELLOW = [13, 8, 135], [240, 249, 33]  # the ends of matplotlib's plasma
BLUE, NEUTRAL, RED = [5, 48, 97], [247, 247, 247], [103, 0, 31]  # the ends and middle of its RdBu_r


def row(*values: float) -> np.ndarray:
    return np.array([values], dtype=np.float32)


@pytest.fixture
def image() -> np.ndarray:
    return np.random.default_rng(0).integers(256, size=(6, 8, 3), dtype=np.uint8)


@pytest.fixture
def heatmap() -> np.ndarray:
    values = np.linspace(0, 1, 48, dtype=np.float32).reshape(6, 8)
    values[:, 6:] = np.nan
    return values


def decode(data: bytes) -> tuple[np.ndarray, dict[str, str]]:
    with Image.open(io.BytesIO(data)) as file:
        assert file.format == "PNG"
        return np.asarray(file), dict(file.text)


def test_colours_of_the_ends_and_of_what_was_not_looked_at():
    assert colorize(row(0, 1, np.nan), "positive")[0].tolist() == [DARK_BLUE, YELLOW, [96] * 3]
    assert colorize(row(-1, 0, 1, np.nan), "signed")[0].tolist() == [BLUE, NEUTRAL, RED, [96] * 3]


@pytest.mark.parametrize(("weighting", "name"), [("positive", "plasma"), ("signed", "RdBu_r")])
def test_the_tables_are_those_of_matplotlib(weighting, name):
    shares = matplotlib.colormaps[name].resampled(255)(np.arange(255))[:, :3]
    assert colours(weighting).tolist() == np.rint(255 * shares).astype(int).tolist()


def test_positive_colours_grow_lighter_with_the_evidence():
    luma = colorize(np.linspace(0, 1, 100, dtype=np.float32)[None], "positive")[0] @ [0.299, 0.587, 0.114]
    assert (np.diff(luma) >= 0).all()


def test_signed_colours_say_the_sign():
    values = np.linspace(0.02, 1, 50, dtype=np.float32)[None]
    raises, lowers = colorize(values, "signed").astype(int), colorize(-values, "signed").astype(int)
    assert (raises[..., 0] > raises[..., 2]).all()
    assert (lowers[..., 0] < lowers[..., 2]).all()


@pytest.mark.parametrize(
    ("value", "weighting"), [(-0.1, "positive"), (1.1, "positive"), (-1.1, "signed"), (np.inf, "signed")]
)
def test_values_that_are_not_normalised_are_refused(value, weighting):
    with pytest.raises(ValueError, match=rf"holds {value:g}, outside"):
        colorize(row(0, value), weighting)


@pytest.mark.parametrize("weighting", ["positive", "signed"])
def test_overlay_without_evidence_is_the_image(image, weighting):
    assert np.array_equal(overlay(image, np.zeros((6, 8), np.float32), weighting), image)


def test_overlay_blends_by_the_absolute_value():
    image = np.full((1, 3, 3), 100, dtype=np.uint8)
    blended = overlay(image, row(-1, 0.5, 1), "signed", strength=0.6).astype(int)
    assert blended[0, 0].tolist() == [43, 69, 98]  # 0.4 · 100 + 0.6 · blue
    assert blended[0, 2].tolist() == [102, 40, 59]  # 0.4 · 100 + 0.6 · red
    half = colorize(row(0.5), "signed")[0, 0]
    assert blended[0, 1].tolist() == np.rint(70 + 0.3 * half).astype(int).tolist()


def test_overlay_shows_what_was_not_looked_at_dim_and_grey():
    image = np.array([[[200, 40, 90], [200, 40, 90]]], dtype=np.uint8)
    blended = overlay(image, row(np.nan, 0), "positive")
    assert blended[0, 0].tolist() == [33, 33, 33]  # 0.35 · (0.299 · 200 + 0.587 · 40 + 0.114 · 90)
    assert blended[0, 1].tolist() == [200, 40, 90]


def test_overlay_refuses_what_does_not_fit(image, heatmap):
    with pytest.raises(ValueError, match=r"\(6, 8\).*\(8, 6\)"):
        overlay(image, heatmap.T, "positive")
    with pytest.raises(ValueError, match="strength is 1"):
        overlay(image, heatmap, "positive", strength=1.5)
    with pytest.raises(ValueError, match="float32"):
        overlay(image.astype(np.float32), heatmap, "positive")


def test_side_by_side_is_image_overlay_and_heatmap(image, heatmap):
    picture = side_by_side(image, heatmap, "positive")
    assert picture.shape == (6, 3 * 8 + 2 * 4, 3)
    assert np.array_equal(picture[:, :8], image)
    assert (picture[:, 8:12] == 255).all()
    assert np.array_equal(picture[:, 12:20], overlay(image, heatmap, "positive"))
    assert (picture[:, 20:24] == 255).all()
    assert np.array_equal(picture[:, 24:], colorize(heatmap, "positive"))


def test_png_files_hold_the_pixels_and_the_text(image, heatmap):
    metadata = {"score": "3.25", "image": "s3://bucket/été/花.jpg", "untrained": "true"}
    for data, expected in (
        (heatmap_png(heatmap, "positive", metadata), colorize(heatmap, "positive")),
        (overlay_png(image, heatmap, "positive", metadata), overlay(image, heatmap, "positive")),
        (both_png(image, heatmap, "positive", metadata), side_by_side(image, heatmap, "positive")),
    ):
        pixels, text = decode(data)
        assert np.array_equal(pixels, expected)
        assert text == metadata


def test_equal_input_gives_equal_bytes(image):
    assert png(image, {"a": "1", "b": "2"}) == png(image.copy(), {"b": "2", "a": "1"})
    assert b"tEXta\x001" in png(image, {"a": "1"})


def test_a_file_name_that_is_no_text_is_kept_readable(image):
    name = b"caf\xe9.jpg".decode("utf-8", "surrogateescape")
    assert decode(png(image, {"image": name}))[1] == {"image": r"caf\udce9.jpg"}


@pytest.mark.parametrize("keyword", ["", "k" * 80, "花", "line\nbreak"])
def test_keywords_that_png_forbids_are_refused(image, keyword):
    with pytest.raises(ValueError, match="1 to 79 printable Latin-1"):
        png(image, {keyword: "text"})


def test_fit_within_shrinks_and_never_grows(image):
    assert fit_within(image, 8) is image
    assert fit_within(image, 4).shape == (3, 4, 3)
    assert fit_within(np.zeros((1, 1000, 3), np.uint8), 10).shape == (1, 10, 3)
    with pytest.raises(ValueError, match="max_side is 0"):
        fit_within(image, 0)


def test_fit_within_does_not_alias():
    stripes = np.zeros((64, 64, 3), dtype=np.uint8)
    stripes[:, ::2] = 255
    assert np.abs(fit_within(stripes, 16).astype(int) - 127.5).max() < 15


def test_fit_within_is_nearly_that_of_all_pixels():
    noise = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    smooth = Image.fromarray(noise).resize((1500, 1000), Image.Resampling.BICUBIC)
    exact = np.asarray(smooth.resize((300, 200), Image.Resampling.LANCZOS)).astype(int)
    shown = fit_within(smooth, 300)
    assert np.abs(shown - exact).max() <= 3
    assert np.abs(shown - exact).mean() < 0.5
    np.testing.assert_array_equal(fit_within(np.asarray(smooth), 300), shown)
    np.testing.assert_array_equal(fit_within(smooth, 1500), np.asarray(smooth))


def test_rendering_needs_neither_torch_nor_pyplot():
    program = (
        "import sys, numpy as np; from ais.render import colorize; colorize(np.zeros((2, 2), np.float32), 'signed');"
        "sys.exit(any(name in sys.modules for name in ('torch', 'ray', 'matplotlib')))"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0

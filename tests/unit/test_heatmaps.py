"""Weights, placement on the original image and display: hand-computed, and pixel by pixel against slow twins.

Nothing is faked.
"""

import io

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import ExifTags, Image

from ais.heatmaps import cell_size, heatmap_weights, normalise_for_display, place_on_image, weighted_maps
from ais.images import Geometry, decode_image


def _place_on_image_reference(
    heatmap: np.ndarray, box: tuple[float, float, float, float], size: tuple[int, int], shown: tuple[int, int]
) -> np.ndarray:
    """Slow, obvious twin of `place_on_image`: every pixel looks up the four cells around its centre."""
    (rows, columns), (left, top, right, bottom) = heatmap.shape, box
    placed = np.full(shown, np.nan)
    for i in range(shown[0]):
        for j in range(shown[1]):
            y, x = (i + 0.5) * size[0] / shown[0], (j + 0.5) * size[1] / shown[1]
            if not (top <= y <= bottom and left <= x <= right):
                continue
            v = min(max((y - top) / (bottom - top) * rows - 0.5, 0), rows - 1)
            u = min(max((x - left) / (right - left) * columns - 0.5, 0), columns - 1)
            v0, u0 = int(v), int(u)
            v1, u1 = min(v0 + 1, rows - 1), min(u0 + 1, columns - 1)
            above = heatmap[v0, u0] * (1 - (u - u0)) + heatmap[v0, u1] * (u - u0)
            below = heatmap[v1, u0] * (1 - (u - u0)) + heatmap[v1, u1] * (u - u0)
            placed[i, j] = above * (1 - (v - v0)) + below * (v - v0)
    return placed


def random_map(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(height, width)).astype(np.float32)


# Weights


def test_positive_weights_by_hand() -> None:
    importance = torch.tensor([[3.0, -2.0, 1.0, 0.0], [-1.0, -1.0, 0.0, 4.0]])
    expected = torch.tensor([[0.75, 0, 0.25, 0], [0, 0, 0, 1]])
    assert torch.equal(heatmap_weights(importance), expected)
    assert torch.equal(heatmap_weights(importance[0]), expected[0])


def test_signed_weights_by_hand() -> None:
    importance = torch.tensor([3.0, -2.0, 1.0, -2.0])
    assert torch.equal(heatmap_weights(importance, "signed"), torch.tensor([0.375, -0.25, 0.125, -0.25]))


@pytest.mark.parametrize(
    ("importance", "weighting"), [([0.0, 0.0], "positive"), ([0.0, 0.0], "signed"), ([-1.0, -2.0], "positive")]
)
def test_nothing_of_weight_gives_zero_and_no_nan(importance: list[float], weighting: str) -> None:
    weights = heatmap_weights(torch.tensor(importance), weighting)  # type: ignore[arg-type]
    assert torch.equal(weights, torch.zeros(2))
    assert torch.equal(weighted_maps(weights, torch.ones(1, 2, 3, 3)), torch.zeros(1, 3, 3))


@pytest.mark.parametrize("weighting", ["positive", "signed"])
def test_nan_is_no_weight_of_zero(weighting: str) -> None:
    weights = heatmap_weights(torch.tensor([[1.0, torch.nan], [1.0, 3.0]]), weighting)  # type: ignore[arg-type]
    assert weights[0].isnan().all()
    assert torch.equal(weights[1], torch.tensor([0.25, 0.75]))


@pytest.mark.parametrize("scale", [3e38, 1e-38, 1e-45])
def test_sums_beyond_float32_keep_their_weights(scale: float) -> None:
    weights = heatmap_weights(torch.tensor([[1.0, 1.0, 0.0, 1.0]]) * scale)
    torch.testing.assert_close(weights, torch.tensor([[1.0, 1.0, 0.0, 1.0]]) / 3)


def test_scaling_changes_no_bit_of_ordinary_weights() -> None:
    importance = torch.randn(50, 300, generator=torch.Generator().manual_seed(0))
    expected = importance / importance.abs().sum(-1, keepdim=True)
    assert torch.equal(heatmap_weights(importance, "signed"), expected)


def test_one_image_without_weight_leaves_the_others_alone() -> None:
    weights = heatmap_weights(torch.tensor([[-1.0, -1.0], [1.0, 3.0]]))
    assert torch.equal(weights, torch.tensor([[0.0, 0.0], [0.25, 0.75]]))


def test_heatmap_is_the_weighted_sum_of_rectified_maps() -> None:
    maps = torch.tensor([[[[1.0, -4.0]], [[2.0, 8.0]]], [[[0.0, 3.0]], [[-1.0, 1.0]]]])  # (2, 2, 1, 2)
    one_each = weighted_maps(torch.tensor([[0.25, 0.75], [1.0, -1.0]]), maps)
    assert torch.equal(one_each, torch.tensor([[[1.75, 6.0]], [[0.0, 2.0]]]))
    one_for_all = weighted_maps(torch.tensor([0.5, 0.5]), maps)
    assert torch.equal(one_for_all, torch.tensor([[[1.5, 4.0]], [[0.0, 2.0]]]))


# Placement


@pytest.mark.parametrize(
    ("cells", "box", "size", "shown"),
    [
        ((7, 7), (0, 0, 28, 28), (28, 28), None),
        ((7, 7), (12.5, 1.75, 43.25, 32.5), (36, 60), None),  # centre crop of a wide image, fractional
        ((8, 8), (1.3, 20.9, 28.2, 47.8), (70, 30), None),  # of a tall one
        ((14, 14), (0.0, -20.0, 60.0, 40.0), (20, 60), None),  # letterbox: beyond the image above and below
        ((7, 7), (-15.5, 0.0, 24.5, 40.0), (40, 9), None),  # left and right
        ((7, 7), (12.5, 1.75, 43.25, 32.5), (36, 60), (12, 20)),  # seen smaller
        ((7, 7), (12.5, 1.75, 43.25, 32.5), (36, 60), (13, 17)),  # and not by a whole factor
        ((7, 7), (2.0, 2.0, 8.0, 8.0), (10, 10), (40, 40)),  # and larger
        ((1, 1), (1.0, 1.0, 4.0, 4.0), (5, 6), None),
        ((1, 3), (0.0, 0.0, 6.0, 5.0), (5, 6), None),
        ((3, 5), (5.0, 5.0, 6.0, 6.0), (10, 10), None),  # a box of one pixel
    ],
)
def test_placement_equals_the_slow_twin(
    cells: tuple[int, int],
    box: tuple[float, float, float, float],
    size: tuple[int, int],
    shown: tuple[int, int] | None,
) -> None:
    """Float32 against float64; measured difference at most 3e-7."""
    heatmap = random_map(*cells)
    placed = place_on_image(heatmap, np.array(box), size, shown)
    assert placed.dtype == np.float32
    expected = _place_on_image_reference(heatmap, box, size, shown or size)
    np.testing.assert_allclose(placed, expected, rtol=0, atol=2e-6)
    assert np.isfinite(placed).any()


@pytest.mark.parametrize("size", [(28, 28), (30, 53), (7, 7), (3, 5)])
def test_placement_on_the_whole_image_is_torchs_interpolation(size: tuple[int, int]) -> None:
    heatmap = random_map(7, 7)
    placed = place_on_image(heatmap, np.array([0, 0, size[1], size[0]]), size)
    expected = F.interpolate(torch.from_numpy(heatmap)[None, None], size, mode="bilinear", align_corners=False)
    np.testing.assert_allclose(placed, expected[0, 0].numpy(), rtol=0, atol=2e-6)


def test_pixels_that_the_model_did_not_see_are_nan() -> None:
    placed = place_on_image(np.ones((7, 7), np.float32), np.array([10.0, 0.0, 30.0, 20.0]), (20, 40))
    assert np.isnan(placed[:, :10]).all()
    assert np.isnan(placed[:, 30:]).all()
    np.testing.assert_allclose(placed[:, 10:30], 1, rtol=0, atol=1e-6)


def test_what_the_model_saw_of_a_panorama_is_shown_however_thin() -> None:
    """A centre crop of 20 × 10,000 pixels, in a picture of 512: all that was seen is 1.024 pixels wide."""
    for left in (4990.0, 0.0, 9980.0, 4985.3):
        seen = np.array([left, 0, left + 20, 20], np.float32)
        placed = place_on_image(np.ones((7, 7), np.float32), seen, (20, 10_000), (1, 512))
        assert 1 <= np.isfinite(placed).sum() <= 2
    narrow = np.array([4991, 0, 4999, 20], np.float32)  # between two of the picture's columns
    placed = place_on_image(np.ones((7, 7), np.float32), narrow, (20, 10_000), (1, 512))
    assert np.flatnonzero(np.isfinite(placed[0])).tolist() == [255]


@pytest.mark.parametrize("cell", [(0, 0), (2, 5), (6, 6), (6, 0)])
@pytest.mark.parametrize("size", [(300, 500), (500, 300), (224, 224)])
def test_cell_lands_where_the_crop_took_it_from(cell: tuple[int, int], size: tuple[int, int]) -> None:
    """Centre crop of a non-square original: the heat of one cell peaks within that cell's part of the original."""
    _, box = Geometry(224, 256, "bilinear").apply(np.zeros((*size, 3), np.uint8))
    heatmap = np.zeros((7, 7), np.float32)
    heatmap[cell] = 1
    placed = place_on_image(heatmap, box, size)
    row, column = np.unravel_index(np.nanargmax(placed), size)
    side = min(size) * 224 / 256
    left, top = (size[1] - side) / 2, (size[0] - side) / 2
    np.testing.assert_allclose(box, [left, top, left + side, top + side], rtol=0, atol=1e-3)
    assert top + cell[0] * side / 7 <= row + 0.5 <= top + (cell[0] + 1) * side / 7
    assert left + cell[1] * side / 7 <= column + 0.5 <= left + (cell[1] + 1) * side / 7
    assert cell_size((7, 7), box) == pytest.approx((side / 7, side / 7), abs=1e-3)


@pytest.mark.parametrize("mode", ["center_crop", "letterbox"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_heat_covers_what_it_saw_under_every_exif_orientation(mode: str, orientation: int) -> None:
    """A bright square on a dark, non-square JPEG: a 7×7 map of its brightness falls on the square itself."""
    stored = np.zeros((160, 240, 3), np.uint8)
    stored[50:80, 150:180] = 255
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    file = io.BytesIO()
    Image.fromarray(stored).save(file, "JPEG", exif=exif, quality=95)
    image = decode_image(file.getvalue())
    assert image.shape[:2] == ((160, 240) if orientation <= 4 else (240, 160))
    pixels, box = Geometry(224, 224, "bilinear", mode=mode, pad_rgb=(0, 0, 0)).apply(image)  # type: ignore[arg-type]
    seen = pixels[..., 0].reshape(7, 32, 7, 32).mean((1, 3)).astype(np.float32)
    placed = np.nan_to_num(place_on_image(seen, box, image.shape[:2]))
    rows, columns = np.nonzero(image[..., 0] > 128)
    peak = np.unravel_index(placed.argmax(), placed.shape)
    cell = cell_size((7, 7), box)[0]
    assert abs(peak[0] - rows.mean()) <= cell
    assert abs(peak[1] - columns.mean()) <= cell
    weights = placed / placed.sum()
    assert abs((weights.sum(1) @ np.arange(len(weights))) - rows.mean()) < cell / 4
    assert abs((weights.sum(0) @ np.arange(weights.shape[1])) - columns.mean()) < cell / 4


# Display


def test_display_of_positive_maps_divides_by_the_maximum() -> None:
    shown = normalise_for_display(np.array([[0.0, 1.0], [2.0, np.nan]]))
    np.testing.assert_array_equal(shown, np.array([[0.0, 0.5], [1.0, np.nan]], np.float32))
    assert shown.dtype == np.float32


def test_display_of_signed_maps_keeps_zero_and_sign() -> None:
    shown = normalise_for_display(np.array([[0.0, 1.0], [-4.0, np.nan]]), "signed")
    np.testing.assert_array_equal(shown, np.array([[0.0, 0.25], [-1.0, np.nan]], np.float32))


@pytest.mark.parametrize("weighting", ["positive", "signed"])
def test_display_of_zero_stays_zero_and_nan_stays_nan(weighting: str) -> None:
    shown = normalise_for_display(np.array([[0.0, np.nan]]), weighting)  # type: ignore[arg-type]
    np.testing.assert_array_equal(shown, [[0, np.nan]])
    assert np.isnan(normalise_for_display(np.full((2, 2), np.nan), weighting)).all()  # type: ignore[arg-type]


def test_unknown_weighting_is_refused() -> None:
    for use in (
        lambda: heatmap_weights(torch.ones(2), "postive"),
        lambda: normalise_for_display(np.ones(2), "postive"),
    ):  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="weighting is 'postive': must be 'positive' or 'signed'"):
            use()

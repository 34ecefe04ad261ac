"""Where a heatmap belongs on its original image, and how it is made ready to be looked at.

Needs numpy only, so that what renders and writes pictures does not wait for torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

Weighting = Literal["positive", "signed"]


def check_weighting(weighting: str) -> None:
    """Refuse anything but a `Weighting` (ValueError)."""
    if weighting not in get_args(Weighting):
        raise ValueError(f"weighting is {weighting!r}: must be 'positive' or 'signed'")


@dataclass(frozen=True)
class HeatmapCells:
    """The grid of the heatmaps of one layer.

    Args:
        shape: ``(h, w)`` cells.
        extent: left, top, right, bottom edge of them in pixels of the model's input; see `ais.backbones.LayerInfo`.
        input_size: side of that input in pixels.
    """

    shape: tuple[int, int]
    extent: tuple[float, float, float, float]
    input_size: int

    def on_originals(self, boxes: np.ndarray) -> np.ndarray:
        """Where the cells lie on originals of which the model saw ``boxes (N, 4)``; see `heatmap_boxes`."""
        return heatmap_boxes(boxes, self.extent, self.input_size)


def heatmap_boxes(boxes: np.ndarray, extent: tuple[float, float, float, float], input_size: int) -> np.ndarray:
    """Where the heatmaps' cells lie on the originals.

    Args:
        boxes: ``(…, 4)`` left, top, right, bottom of what the model saw, in pixels of each original.
        extent: the same of the maps, in pixels of the model's input; see `ais.backbones.LayerInfo`.
        input_size: side of the model's input in pixels.

    Returns:
        ``(…, 4)`` float32; beyond ``boxes`` on one side and short of them on the other where a network's strided
        convolutions look off centre.
    """
    boxes = boxes.astype(np.float64)
    scale = np.tile((boxes[..., 2:] - boxes[..., :2]) / input_size, 2)
    return (np.tile(boxes[..., :2], 2) + scale * np.asarray(extent)).astype(np.float32)


def place_on_image(
    heatmap: np.ndarray,
    heatmap_box: np.ndarray,
    size: tuple[int, int],
    shown: tuple[int, int] | None = None,
    seen: np.ndarray | None = None,
) -> np.ndarray:
    """Upsample a heatmap bilinearly (half-pixel centres) to where it belongs on the original image.

    Args:
        heatmap: ``(h, w)``.
        heatmap_box: left, top, right, bottom of its cells in pixels of the original; may reach beyond it.
        size: ``(height, width)`` of the original.
        shown: ``(height, width)`` of the result, a scaled view of the whole original; the original's own by default.
        seen: left, top, right, bottom of what the model saw; ``heatmap_box`` by default. Between the outermost cells'
            centres and its edges the outermost cells go on.

    Returns:
        ``(height, width)`` float32, NaN where the model did not look.
    """
    left, top, right, bottom = (float(value) for value in heatmap_box)
    seen_left, seen_top, seen_right, seen_bottom = (float(v) for v in (heatmap_box if seen is None else seen))
    y, x = _pixel_centres(size[0], (shown or size)[0]), _pixel_centres(size[1], (shown or size)[1])
    rows = _interpolation(heatmap.shape[0], (y - top) / (bottom - top))
    columns = _interpolation(heatmap.shape[1], (x - left) / (right - left))
    placed = rows @ heatmap.astype(np.float32) @ columns.T
    placed[~_within(y, seen_top, seen_bottom), :] = np.nan
    placed[:, ~_within(x, seen_left, seen_right)] = np.nan
    return placed


def _within(centres: np.ndarray, first: float, last: float) -> np.ndarray:
    """Which shown pixels the model saw: at least one, of a view in which all that it saw is thinner than a pixel."""
    inside = (centres >= first) & (centres <= last)
    inside[np.abs(centres - (first + last) / 2).argmin()] = True
    return inside


def _pixel_centres(length: int, shown: int) -> np.ndarray:
    """Centres ``(shown,)`` of the shown pixels along a side, in pixels of the original."""
    return (np.arange(shown) + 0.5) * (length / shown)


def _interpolation(cells: int, places: np.ndarray) -> np.ndarray:
    """Bilinear interpolation along one side as a matrix.

    Args:
        cells: of the heatmap.
        places: ``(P,)``, 0 at the first cell's outer edge and 1 at the last one's.

    Returns:
        ``(P, cells)`` float32 weights of the cells.
    """
    position = np.clip(places * cells - 0.5, 0, cells - 1)
    lower = np.minimum(position.astype(int), max(cells - 2, 0))
    share = (position - lower).astype(np.float32)
    weights = np.zeros((len(places), cells), np.float32)
    index = np.arange(len(places))
    weights[index, lower] = 1 - share
    weights[index, np.minimum(lower + 1, cells - 1)] += share
    return weights


def normalise_for_display(heatmap: np.ndarray, weighting: Weighting = "positive") -> np.ndarray:
    """Divide by the maximum (positive) or the maximum absolute value (signed, so that zero stays zero).

    For display only; a map that is zero everywhere stays zero, and NaN stays NaN.

    Raises:
        ValueError: no such weighting.
    """
    check_weighting(weighting)
    values = heatmap if weighting == "positive" else np.abs(heatmap)
    finite = values[np.isfinite(values)]
    top = float(finite.max()) if finite.size else 0.0
    return (heatmap / top if top > 0 else np.where(np.isnan(heatmap), heatmap, 0)).astype(np.float32)


def cell_size(heatmap_shape: tuple[int, int], heatmap_box: np.ndarray) -> tuple[float, float]:
    """Width and height, in pixels of the original image, that one cell of the heatmap covers."""
    left, top, right, bottom = (float(value) for value in heatmap_box)
    return (right - left) / heatmap_shape[1], (bottom - top) / heatmap_shape[0]

"""From importance to a picture: weights × feature maps, placed on the original image without pretending to be sharper.

Everything is float32 at the layer's resolution until somebody looks; upsampling is bilinear with half-pixel centres.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from torch import Tensor

Weighting = Literal["positive", "signed"]


def heatmap_weights(importance: Tensor, weighting: Weighting = "positive") -> Tensor:
    """Turn importance scores into weights that sum to one (in absolute value).

    Args:
        importance: ``(…, C)`` AIS.
        weighting: ``"positive"``: ``max(AIS, 0)`` over its sum (Truong, Pesenti and Hasson, arXiv 2409.16292);
            ``"signed"``: AIS over the sum of its absolute values.

    Returns:
        ``(…, C)``; all zero where nothing has weight.
    """
    kept = importance.clamp(min=0) if weighting == "positive" else importance
    total = kept.abs().sum(-1, keepdim=True)
    return torch.where(total > 0, kept / torch.where(total > 0, total, 1), 0)


def weighted_maps(weights: Tensor, feature_maps: Tensor) -> Tensor:
    """Return the heatmaps ``(B, h, w)``: the weighted sum of the rectified maps.

    Args:
        weights: ``(C,)`` for all images or ``(B, C)``.
        feature_maps: ``(B, C, h, w)``.
    """
    return torch.einsum("bk,bkhw->bhw", weights.expand(len(feature_maps), -1), feature_maps.relu())


def place_on_image(
    heatmap: np.ndarray, box: np.ndarray, size: tuple[int, int], shown: tuple[int, int] | None = None
) -> np.ndarray:
    """Upsample a heatmap bilinearly (half-pixel centres) to where it belongs on the original image.

    Args:
        heatmap: ``(h, w)``.
        box: left, top, right, bottom of the heatmap in pixels of the original; may reach beyond it (letterbox).
        size: ``(height, width)`` of the original.
        shown: ``(height, width)`` of the result, a scaled view of the whole original; the original's own by default.

    Returns:
        ``(height, width)`` float32, NaN where the model did not look.
    """
    left, top, right, bottom = (float(value) for value in box)
    height, width = shown or size
    rows, row_in = _interpolation(heatmap.shape[0], top, bottom, size[0], height)
    columns, column_in = _interpolation(heatmap.shape[1], left, right, size[1], width)
    placed = rows @ heatmap.astype(np.float32) @ columns.T
    placed[~row_in, :] = np.nan
    placed[:, ~column_in] = np.nan
    return placed


def _interpolation(cells: int, start: float, end: float, length: int, shown: int) -> tuple[np.ndarray, np.ndarray]:
    """Bilinear interpolation along one side as a matrix.

    Returns:
        ``(shown, cells)`` float32 weights of the cells for each shown pixel, and ``(shown,)`` whether its centre is
        within ``start`` to ``end``.
    """
    centres = (np.arange(shown) + 0.5) * (length / shown)  # in pixels of the original
    inside = (centres >= start) & (centres <= end)
    position = np.clip((centres - start) / (end - start) * cells - 0.5, 0, cells - 1)
    lower = np.minimum(position.astype(int), max(cells - 2, 0))
    share = (position - lower).astype(np.float32)
    weights = np.zeros((shown, cells), np.float32)
    index = np.arange(shown)
    weights[index, lower] = 1 - share
    weights[index, np.minimum(lower + 1, cells - 1)] += share
    return weights, inside


def normalise_for_display(heatmap: np.ndarray, weighting: Weighting = "positive") -> np.ndarray:
    """Divide by the maximum (positive) or the maximum absolute value (signed, so that zero stays zero).

    For display only; a map that is zero everywhere stays zero, and NaN stays NaN.
    """
    values = heatmap if weighting == "positive" else np.abs(heatmap)
    finite = values[np.isfinite(values)]
    top = float(finite.max()) if finite.size else 0.0
    return (heatmap / top if top > 0 else np.where(np.isnan(heatmap), heatmap, 0)).astype(np.float32)


def cell_size(heatmap_shape: tuple[int, int], box: np.ndarray) -> tuple[float, float]:
    """Width and height, in pixels of the original image, that one cell of the heatmap covers."""
    left, top, right, bottom = (float(value) for value in box)
    return (right - left) / heatmap_shape[1], (bottom - top) / heatmap_shape[0]

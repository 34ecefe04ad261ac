"""From importance to a picture: weights × feature maps, placed on the original image without pretending to be sharper.

Everything is float32 at the layer's resolution until somebody looks; upsampling is bilinear with half-pixel centres.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ais.placement import (
    HeatmapCells,
    Weighting,
    cell_size,
    check_weighting,
    heatmap_boxes,
    normalise_for_display,
    place_on_image,
)

__all__ = [
    "HeatmapCells",
    "Weighting",
    "cell_size",
    "heatmap_boxes",
    "heatmap_weights",
    "normalise_for_display",
    "place_on_image",
    "weighted_maps",
]


def heatmap_weights(importance: Tensor, weighting: Weighting = "positive") -> Tensor:
    """Turn importance scores into weights that sum to one (in absolute value).

    Args:
        importance: ``(…, C)`` AIS.
        weighting: ``"positive"``: ``max(AIS, 0)`` over its sum (Truong, Pesenti and Hasson, arXiv 2409.16292);
            ``"signed"``: AIS over the sum of its absolute values.

    Returns:
        ``(…, C)``; all zero where nothing has weight, NaN where an importance is.

    Raises:
        ValueError: no such weighting.
    """
    check_weighting(weighting)
    kept = importance.clamp(min=0) if weighting == "positive" else importance
    # Dividing by a power of two loses no digits: it changes no weight but those whose sum would be infinite, or too
    # small to divide by.
    _, exponent = kept.abs().amax(-1, keepdim=True).frexp()
    kept = kept.ldexp(-exponent.clamp(-126, 126))
    total = kept.abs().sum(-1, keepdim=True)
    return kept / torch.where(total != 0, total, 1)


def weighted_maps(weights: Tensor, feature_maps: Tensor) -> Tensor:
    """Return the heatmaps ``(B, h, w)``: the weighted sum of the rectified maps.

    Args:
        weights: ``(C,)`` for all images or ``(B, C)``.
        feature_maps: ``(B, C, h, w)``.
    """
    return torch.einsum("bk,bkhw->bhw", weights.expand(len(feature_maps), -1), feature_maps.relu())

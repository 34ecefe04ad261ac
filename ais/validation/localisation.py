"""Do heatmaps point at what is known to matter? Only where the truth is known, as a mask for each image."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ais.agreement import top_membership
from ais.heatmaps import heatmap_boxes, place_on_image
from ais.metrics import pointing_chance, pointing_hit
from ais.validation.faithfulness import InputMaps


class Localisation(NamedTuple):
    """How well heatmaps of N images point at their masks.

    Args:
        hits: ``(N,)`` pointing game, see `ais.metrics.pointing_hit`.
        overlaps: ``(N,)`` intersection over union, see `mask_overlap`.
        chance: ``(N,)`` hit rate of a point drawn anywhere in what the model saw.
    """

    hits: np.ndarray
    overlaps: np.ndarray
    chance: np.ndarray


def localisation(maps: InputMaps, boxes: np.ndarray, input_size: int, masks: list[np.ndarray]) -> Localisation:
    """Place heatmaps on the originals and compare them with the masks.

    Args:
        maps: of N images.
        boxes: ``(N, 4)`` what the model saw, in pixels of the originals.
        input_size: side of the model's input.
        masks: N of ``(H, W)`` bool, of the originals' sizes.
    """
    heatmap_places = heatmap_boxes(boxes, maps.extent, input_size)
    rows = []
    for values, place, box, mask in zip(maps.values, heatmap_places, boxes, masks, strict=True):
        placed = place_on_image(values, place, mask.shape, seen=box)
        chance = pointing_chance(mask, np.isfinite(placed))
        rows.append((pointing_hit(placed, mask), mask_overlap(placed, mask), chance))
    hits, overlaps, chances = np.array(rows).T
    return Localisation(hits, overlaps, chances)


def mask_overlap(heatmap: np.ndarray, mask: np.ndarray) -> float:
    """Intersection over union of the mask and as many of the highest pixels, in [0, 1].

    Pixels that tie for the last places share them, so that a constant heatmap overlaps as pixels drawn at random.

    Args:
        heatmap: ``(H, W)``, NaN where the model did not look; such pixels are left out, of the mask too.
        mask: ``(H, W)``, True inside the object.

    Returns:
        NaN where the model looked at nothing of the mask.
    """
    looked_at = np.isfinite(heatmap)
    inside = mask[looked_at]
    count = int(inside.sum())
    if count == 0:
        return np.nan
    highest = top_membership(heatmap[None, looked_at].astype(np.float64), count)[0]
    common = float(highest[inside].sum())
    return common / (2 * count - common)

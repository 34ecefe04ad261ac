"""Which images of a run are shown: the ends, a sample, images across the range and near given scores."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ais.config import GalleryConfig
from ais.report.scores import Scores, shuffled


@dataclass(frozen=True)
class Shown:
    """Images of the gallery.

    Args:
        positions: of the images, highest score first.
        choices: name of each choice, and which images it is of.
        everything: whether this is the whole run.
    """

    positions: Sequence[int]
    choices: dict[str, frozenset[int]]
    everything: bool


def choose(scores: Scores, gallery: GalleryConfig) -> Shown:
    """Positions of the images to show; the whole run where it has no more images than would be chosen."""
    wanted = gallery.top + gallery.bottom + gallery.quantiles + gallery.sample + gallery.near_count * len(gallery.near)
    near = {f"near {value:g}": value for value in gallery.near}
    if scores.count <= wanted:
        positions = scores.smallest(lambda _, score: -score, scores.count)
        choices = {
            name: frozenset(scores.smallest(_distance_to(value), gallery.near_count)) for name, value in near.items()
        }
        return Shown(positions, choices, True)
    found = {
        "highest": scores.smallest(lambda _, score: -score, gallery.top),
        "lowest": scores.smallest(lambda _, score: score, gallery.bottom),
        "across the range": _at_quantiles(scores, gallery.quantiles),
        "random sample": scores.smallest(shuffled, gallery.sample),
    } | {name: scores.smallest(_distance_to(value), gallery.near_count) for name, value in near.items()}
    chosen = np.array(sorted({position for positions in found.values() for position in positions}), np.int64)
    order = np.lexsort((scores.ids[chosen], -scores.scores[chosen]))
    choices = {name: frozenset(positions) for name, positions in found.items() if positions}
    return Shown(chosen[order].tolist(), choices, False)


def _distance_to(value: float) -> Callable[[NDArray[np.int64], NDArray[np.float32]], NDArray]:
    return lambda _, score: np.abs(score.astype(np.float64) - value)


def _at_quantiles(scores: Scores, count: int) -> list[int]:
    """Positions of images at evenly spaced ranks, of equal scores the one with the smallest id."""
    if count == 0:
        return []
    values = scores.quantiles(np.linspace(0, 1, count).tolist() if count > 1 else [0.5])
    best: dict[float, tuple[int, int]] = {}
    for positions, ids, found in scores.chunks():
        order = np.lexsort((ids, found))
        order = order[np.isin(found[order], values)]
        distinct, first = np.unique(found[order], return_index=True)
        for value, index in zip(distinct.tolist(), order[first], strict=True):
            candidate = int(ids[index]), int(positions[index])
            best[value] = min(candidate, best.get(value, candidate))
    return [best[value][1] for value in dict.fromkeys(values.tolist())]

"""Intervals of similarity AIS that respect images: the pairs of a matrix are not independent, its images are.

Each image takes part in N - 1 pairs, so that an interval over pairs would be far too narrow. The delete-one jackknife
(Tukey 1958; Efron and Tibshirani, *An Introduction to the Bootstrap*, 1993, chapter 11) leaves out one image at a time,
with its whole row and column. The similarity of two other images does not depend on it, so that all N replicates follow
from the sums of a matrix less those of one row: N images, C maps, O(N²) a map as without them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, NamedTuple

import numpy as np
from scipy import stats

from ais.importance.similarity import (
    collective_ais_of,
    individual_ais_of,
    off_diagonal,
    pearson,
    upper_triangle,
)

# One image less must leave a correlation of more than two pairs (collective) or images (individual).
_LEAST_IMAGES = 5


class JackknifedAIS(NamedTuple):
    """Similarity AIS with its replicates.

    Args:
        ais: collective ``(C,)``, or individual ``(N, C)``.
        replicates: ``(N, C)`` AIS of the set without image j: collective, or the mean of the individual ones.
    """

    ais: np.ndarray
    replicates: np.ndarray

    @property
    def mean(self) -> np.ndarray:
        """AIS ``(C,)`` of the set."""
        return self.ais if self.ais.ndim == 1 else self.ais.mean(0)

    def interval(self, confidence: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
        """Ends ``(C,)`` of the jackknife interval, Student-t with N - 1 degrees; NaN for fewer than 5 images."""
        count = len(self.replicates)
        if count < _LEAST_IMAGES:
            nothing = np.full(self.replicates.shape[1], np.nan)
            return nothing, nothing
        spread = np.sqrt((count - 1) * self.replicates.var(0))
        reach = stats.t.ppf(0.5 + confidence / 2, count - 1) * spread
        return self.mean - reach, self.mean + reach


def jackknifed_ais(
    ablated: Iterable[np.ndarray], intact: np.ndarray, human: np.ndarray, level: Literal["collective", "individual"]
) -> JackknifedAIS:
    """Similarity AIS of every map and its replicates, in one pass over the ablated similarities.

    Args:
        ablated: parts ``(c, N, N)``, as `ais.importance.similarity.collective_ais_of` or ``individual_ais_of`` take.
        intact: ``(N, N)`` similarity with all maps.
        human: ``(N, N)``, checked by `ais.importance.similarity.check_human_matrix`.
        level: which of the two.
    """
    values, replicates = [], []
    if level == "collective":
        all_but = pairs_without_each(intact, human) ** 2
        for part in ablated:
            values.append(collective_ais_of([part], intact, human))
            replicates.append((all_but - pairs_without_each(part, human) ** 2).T)
    else:
        target = off_diagonal(human)
        all_but = others_without_each(off_diagonal(intact), target)
        for part in ablated:
            values.append(individual_ais_of([part], intact, human))
            lost = all_but - others_without_each(off_diagonal(part), target)  # (c, i, place of j in row i)
            replicates.append(_mean_of_the_others(lost).T)
    return JackknifedAIS(np.concatenate(values, axis=-1), np.concatenate(replicates, axis=-1))


def agreement_interval(
    similarity: np.ndarray, human: np.ndarray, confidence: float = 0.95
) -> tuple[float, float, float]:
    """Pearson correlation between the pairs of ``(N, N)`` and ``(N, N)``, and the ends of its jackknife interval."""
    value = pearson(upper_triangle(similarity), upper_triangle(human))
    replicates = pairs_without_each(similarity, human)[:, None]
    low, high = JackknifedAIS(np.atleast_1d(value), replicates).interval(confidence)
    return float(value), float(low[0]), float(high[0])


def _mean_of_the_others(lost: np.ndarray) -> np.ndarray:
    """From what image i ``(…, N, N - 1)`` has without image j, the mean over i ``(…, N)`` for each j."""
    count = lost.shape[-2]
    square = np.zeros((*lost.shape[:-1], count))
    square[..., ~np.eye(count, dtype=bool)] = lost.reshape(*lost.shape[:-2], -1)
    return square.sum(-2) / (count - 1)


def pairs_without_each(similarity: np.ndarray, human: np.ndarray) -> np.ndarray:
    """Pearson correlation ``(…, N)`` over the pairs of ``(…, N, N)`` and ``(N, N)`` that image j takes no part in."""
    count = similarity.shape[-1]
    off = ~np.eye(count, dtype=bool)
    pairs = count * (count - 1) / 2
    # Correlations do not change; sums of squares keep their digits.
    values = np.where(off, similarity - (similarity * off).sum((-2, -1), keepdims=True) / (2 * pairs), 0)
    target = np.where(off, human - human[off].mean(), 0)
    sums = [matrix.sum(-1) for matrix in (values, target, values**2, target**2, values * target)]
    left = [rows.sum(-1, keepdims=True) / 2 - rows for rows in sums]
    return _correlation(left, pairs - (count - 1))


def others_without_each(values: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Pearson correlation of ``(…, P)`` with ``(…, P)`` along the last axis without each of the P numbers in turn."""
    values = values - values.mean(-1, keepdims=True)
    target = target - target.mean(-1, keepdims=True)
    terms = (values, target, values**2, target**2, values * target)
    left = [term.sum(-1, keepdims=True) - term for term in terms]
    return _correlation(left, values.shape[-1] - 1)


def _correlation(sums: list[np.ndarray], count: float) -> np.ndarray:
    """Pearson correlation of ``count`` pairs from the sums of x, y, x², y² and x·y; 0 where one side is constant."""
    x, y, xx, yy, xy = sums
    norm = np.sqrt(np.maximum((xx - x**2 / count) * (yy - y**2 / count), 0))
    product = xy - x * y / count
    return np.divide(product, norm, out=np.zeros_like(product), where=norm != 0)  # NaN stays NaN

"""Whether scores drift: the distribution of one set of scores against another.

Two measures:

- **PSI**, the population stability index, ``Σ (q - p) ln(q / p)`` over ten bins with a tenth of the reference scores in
  each: its deciles are the edges, equal edges merge, the outer bins are open. Shares below 1e-4 count as 1e-4, so that
  an empty bin does not make it infinite. Below 0.1 is usually read as stable, above 0.25 as shifted. Where nothing
  shifted it is still ``(bins - 1) (1/n + 1/m)`` on average, which is stated beside it: few images give a large PSI.
- **KS**, the two-sample Kolmogorov-Smirnov distance, the largest difference between the distribution functions, and
  the probability of one as large between samples of one distribution (asymptotic, as ``scipy.stats.ks_2samp``). With
  millions of images the smallest shift is significant: judge by the distance, not by the probability.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

BINS = 10
_FLOOR = 1e-4
_KS_STEP = 1_000_000
LEVELS = (0.0, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 1.0)


def sorted_scores(pieces: Sequence[np.ndarray]) -> np.ndarray:
    """Join pieces of scores into one sorted float32 array, which the functions below take."""
    scores = np.concatenate(pieces) if pieces else np.empty(0, np.float32)
    scores.sort()
    return scores


def quantiles(scores: np.ndarray) -> dict[str, float] | None:
    """Quantiles at `LEVELS` of sorted scores (linear between ranks); ``None`` of no scores."""
    if len(scores) == 0:
        return None
    ranks = np.array(LEVELS) * (len(scores) - 1)
    low = np.floor(ranks).astype(np.int64)
    high = np.minimum(low + 1, len(scores) - 1)
    values = scores[low] + (ranks - low) * (scores[high].astype(np.float64) - scores[low])
    return {f"{level:g}": float(value) for level, value in zip(LEVELS, values, strict=True)}


@dataclass(frozen=True)
class Psi:
    """Population stability index.

    Args:
        value: of it.
        by_chance: what it is on average between samples of these sizes of one distribution.
        edges: between the bins; the outer bins are open.
        reference: share of the reference scores in each bin.
        current: share of the other scores in each bin.
    """

    value: float
    by_chance: float
    edges: list[float]
    reference: list[float]
    current: list[float]


def psi(reference: np.ndarray, current: np.ndarray, bins: int = BINS) -> Psi:
    """Population stability index of ``current`` against ``reference``, both sorted and not empty.

    Args:
        reference: ``(n,)`` scores whose quantiles are the edges of the bins.
        current: ``(m,)`` scores.
        bins: of the reference, with the same number of scores each; fewer where many scores are equal.
    """
    ranks = np.arange(1, bins) * len(reference) // bins
    edges = np.unique(reference[ranks])
    edges = edges[edges > reference[0]]  # nothing of the reference would lie below
    if len(edges) == 0:  # nearly all scores are one score: below it, at it, above it
        edges = np.array([reference[0], np.nextafter(reference[0], np.float32(np.inf))])
    p, q = (np.diff(np.searchsorted(scores, edges), prepend=0, append=len(scores)) for scores in (reference, current))
    p, q = p / len(reference), q / len(current)
    floored_p, floored_q = np.maximum(p, _FLOOR), np.maximum(q, _FLOOR)
    value = float(((floored_q - floored_p) * np.log(floored_q / floored_p)).sum())
    by_chance = len(edges) * (1 / len(reference) + 1 / len(current))
    return Psi(value, by_chance, edges.tolist(), p.tolist(), q.tolist())


@dataclass(frozen=True)
class Ks:
    """Two-sample Kolmogorov-Smirnov test: the distance, and the probability of one as large by chance."""

    distance: float
    p_value: float


def ks(reference: np.ndarray, current: np.ndarray) -> Ks:
    """Compare two sorted samples, neither empty, in bounded memory beside them.

    The distance equals that of ``scipy.stats.ks_2samp``, the probability its asymptotic one.
    """
    n, m = len(reference), len(current)
    distance = 0.0
    for points in (reference, current):
        for start in range(0, len(points), _KS_STEP):
            step = points[start : start + _KS_STEP]
            below = (
                np.searchsorted(reference, step, side="right") / n - np.searchsorted(current, step, side="right") / m
            )
            distance = max(distance, float(np.abs(below).max()))
    p_value = stats.kstwo.sf(distance, np.round(n * m / (n + m))) if n + m > 2 else 1.0  # one each say nothing
    return Ks(distance, float(np.clip(p_value, 0, 1)))


@dataclass(frozen=True)
class Comparison:
    """One set of scores against another.

    Args:
        images: in the set.
        psi: see `psi`.
        ks: see `ks`.
    """

    images: int
    psi: Psi
    ks: Ks

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "images": self.images,
            "psi": self.psi.value,
            "psi_by_chance": self.psi.by_chance,
            "ks": self.ks.distance,
            "ks_p_value": self.ks.p_value,
            "bins": {"edges": self.psi.edges, "reference": self.psi.reference, "current": self.psi.current},
        }


def compare(reference: np.ndarray, current: np.ndarray) -> Comparison | None:
    """Compare two sorted sets of scores; ``None`` where one is empty."""
    if len(reference) == 0 or len(current) == 0:
        return None
    return Comparison(len(current), psi(reference, current), ks(reference, current))


@dataclass(frozen=True)
class Thresholds:
    """Beyond which a run asks to be looked at; ``None``: never.

    Args:
        max_psi: of the new images, and of the whole collection, against the collection before.
        max_ks: likewise.
        max_error_share: of the new and changed images.
        max_gone_share: of the collection before.
        min_images: of fewer images than this nothing is judged.
    """

    max_psi: float | None
    max_ks: float | None
    max_error_share: float | None
    max_gone_share: float | None
    min_images: int


@dataclass(frozen=True)
class Shares:
    """A number of images among others."""

    count: int
    of: int

    @property
    def share(self) -> float:
        """Between 0 and 1; 0 of none."""
        return self.count / self.of if self.of else 0.0

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {"count": self.count, "of": self.of, "share": self.share}


@dataclass(frozen=True)
class Drift:
    """What a run finds against the one before.

    Args:
        new: the images that are new or changed, against the collection before; ``None`` where there are none, or none
            before.
        collection: the whole collection against the one before. Most images are usually in both, so its probability is
            of no use but its distances are.
        errors: images that could not be used, among the new and changed.
        gone: images that are missing, among those that were there before.
    """

    new: Comparison | None
    collection: Comparison | None
    errors: Shares
    gone: Shares

    def alarms(self, thresholds: Thresholds) -> list[str]:
        """What exceeds a threshold, each in a few words with the key to change."""
        found = []
        for what, comparison in (("new images", self.new), ("collection", self.collection)):
            if comparison is None or comparison.images < thresholds.min_images:
                continue
            measures = (
                ("PSI", "max_psi", comparison.psi.value, thresholds.max_psi),
                ("KS", "max_ks", comparison.ks.distance, thresholds.max_ks),
            )
            found += [
                f"{name} of the {what} is {value:.3g}, above drift.{key}={limit:g}"
                for name, key, value, limit in measures
                if limit is not None and value > limit
            ]
        shares = (
            ("new and changed images could not be used", "max_error_share", self.errors, thresholds.max_error_share),
            ("images of the collection are gone", "max_gone_share", self.gone, thresholds.max_gone_share),
        )
        found += [
            f"{one.count:,} of {one.of:,} {what} ({one.share:.1%}), above drift.{key}={limit:g}"
            for what, key, one, limit in shares
            if limit is not None and one.of >= thresholds.min_images and one.share > limit
        ]
        return found

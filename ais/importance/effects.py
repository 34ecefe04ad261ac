"""AIS of the objectives ``prediction`` and ``error``: what ablating each map does to scores, over a set of images.

C maps. ``s`` is an intact score, ``s_k`` the same with map k ablated, ``y`` the rating. Per image and map:

* effect on the score: ``s - s_k``; positive where the map raises the score;
* effect on the error: ``|s_k - y| - |s - y|``; positive where the map helps;
* dual: ``|s - s_k| · sign(|s_k - y| - |s - y|)``: how much the map moves the score, signed by whether that helps.

The AIS of a set is the mean over its images. Sums are float64 and add up to the same whatever batches, actors and order
they come in, to the last digits of float64.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import fsum

import numpy as np
from scipy.special import stdtrit  # not scipy.stats, which takes longer to import than a worker to add up

QUANTITIES = ("effect", "error_effect", "dual")


@dataclass(frozen=True)
class EffectSums:
    """Sums over some images, for every map.

    Args:
        images: how many; those without rating count for ``effect`` only.
        rated: how many have a rating.
        sums: ``(3, C)`` float64, of `QUANTITIES`.
        squares: ``(3, C)`` float64, of their squares.
    """

    images: int
    rated: int
    sums: np.ndarray
    squares: np.ndarray

    @classmethod
    def of(cls, scores: np.ndarray, effects: np.ndarray, ratings: np.ndarray | None = None) -> EffectSums:
        """Sum up one batch.

        Args:
            scores: ``(B,)`` intact.
            effects: ``(B, C)`` ``s - s_k``.
            ratings: ``(B,)``, NaN where an image has none; ``None`` if no image has.
        """
        effects = effects.astype(np.float64)
        quantities = np.zeros((3, *effects.shape))
        quantities[0] = effects
        rated = np.zeros(len(effects), bool) if ratings is None else np.isfinite(ratings)
        if ratings is not None and rated.any():
            intact = scores.astype(np.float64)[rated, None] - ratings[rated, None]
            error_effect = np.abs(intact - effects[rated]) - np.abs(intact)
            quantities[1, rated] = error_effect
            quantities[2, rated] = np.abs(effects[rated]) * np.sign(error_effect)
        return cls(len(effects), int(rated.sum()), quantities.sum(1), (quantities**2).sum(1))

    @classmethod
    def merge(cls, parts: list[EffectSums]) -> EffectSums:
        """Add up batches; exact, so that the order does not matter (Shewchuk 1997, ``math.fsum``)."""
        return cls(
            sum(part.images for part in parts),
            sum(part.rated for part in parts),
            _exact_sum([part.sums for part in parts]),
            _exact_sum([part.squares for part in parts]),
        )

    def mean(self, quantity: str) -> np.ndarray:
        """Mean over images ``(C,)`` of one of `QUANTITIES`."""
        index = QUANTITIES.index(quantity)
        return self.sums[index] / self._count(index)

    def interval(self, quantity: str, confidence: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
        """Student-t interval of the mean over images, two ``(C,)``; NaN for fewer than two images."""
        index = QUANTITIES.index(quantity)
        count = self._count(index)
        if count < 2:
            nothing = np.full(self.sums.shape[1], np.nan)
            return nothing, nothing
        mean = self.sums[index] / count
        variance = np.maximum(self.squares[index] - count * mean**2, 0) / (count - 1)
        reach = stdtrit(count - 1, 0.5 + confidence / 2) * np.sqrt(variance / count)
        return mean - reach, mean + reach

    def _count(self, index: int) -> int:
        return self.images if index == 0 else self.rated


def _exact_sum(arrays: list[np.ndarray]) -> np.ndarray:
    stacked = np.stack(arrays).reshape(len(arrays), -1)
    return np.array([fsum(column) for column in stacked.T]).reshape(arrays[0].shape)

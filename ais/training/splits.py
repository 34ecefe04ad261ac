"""Which rated images train, which stop the training, and which only the final metrics see."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ais.config import FitConfig
from ais.errors import RatingsError
from ais.ratings import Ratings

# Fewer pairs have no interval of a correlation.
_LEAST = 3


@dataclass(frozen=True)
class Split:
    """Rows of one head's training: ``train`` is fitted, ``validation`` decides when to stop; both ascending."""

    train: NDArray[np.intp]
    validation: NDArray[np.intp]


def draw_test_split(ratings: Ratings, fit: FitConfig) -> NDArray[np.bool_]:
    """Return ``(n,)`` bool: the test split, the same for every head.

    The rows that the table marks, or ``fit.test_share`` of them drawn by ``fit.seed``; at least three.
    """
    if ratings.splits is not None:
        return ratings.splits == "test"
    is_test = np.zeros(len(ratings), bool)
    order = np.random.default_rng([fit.seed, 0]).permutation(len(ratings))
    is_test[order[: _share(fit.test_share, len(ratings))]] = True
    return is_test


def variant_splits(pool: NDArray[np.intp], total: int, ratings: Ratings, fit: FitConfig) -> list[Split]:
    """Divide the images outside the test split into training and validation, once for every head.

    Where the table marks validation rows, every head stops by those. Otherwise head k draws ``fit.validation_share``
    of all images (of those outside the test split, where the table has splits), at least three, by ``fit.seed + k``.

    Args:
        pool: rows of ``ratings`` that are not test and could be read, ascending.
        total: rows of ``ratings`` that could be read, of which the share is taken where the table has no splits.
        ratings: the table.
        fit: seed, share and number of heads.

    Returns:
        splits whose rows count within ``pool``.

    Raises:
        RatingsError: too few images are left, or the training ratings of a head are all the same.
    """
    if ratings.splits is not None:
        total = len(pool)  # the table's test split is as large as it is
    marked = ratings.splits[pool] == "validation" if ratings.splits is not None else np.zeros(len(pool), bool)
    splits = []
    for variant in range(fit.variants):
        is_validation = marked
        if not marked.any():
            order = np.random.default_rng([fit.seed + variant, 1]).permutation(len(pool))
            is_validation = np.zeros(len(pool), bool)
            is_validation[order[: _share(fit.validation_share, total)]] = True
        split = Split(np.flatnonzero(~is_validation), np.flatnonzero(is_validation))
        _check(split, ratings.scores[pool], variant)
        splits.append(split)
    return splits


def _share(share: float, count: int) -> int:
    return max(_LEAST, round(share * count))


def _check(split: Split, scores: NDArray[np.float64], variant: int) -> None:
    if len(split.train) < _LEAST:
        raise RatingsError(
            f"{len(split.train)} images are left to train on beside {len(split.validation)} for validation; "
            "rate more, or lower fit.validation_share and fit.test_share"
        )
    if np.ptp(scores[split.train]) == 0:
        raise RatingsError(
            f"all {len(split.train)} training images of head {variant + 1} have the score {scores[split.train[0]]:g}; "
            "rate more images, or choose another fit.seed"
        )
    if len(split.validation) < _LEAST:
        raise RatingsError(
            f"{len(split.validation)} images are marked for validation, too few to stop by; mark at least {_LEAST}, or "
            "none to have them drawn"
        )

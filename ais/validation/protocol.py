"""The paper's protocol: do maps with a high AIS on some images carry the evidence on others?

Truong, Pesenti and Hasson (arXiv 2409.16292): in each of 5 folds × 8 seeds, rank the maps by their AIS on the training
images, add them from the top, stop where the *training* value is best, and compare the test value there with that of
all maps. Baselines, under the same stopping rule, are a random order and the reversed ranking. A map that is not added
is ablated.

N images, C maps, D embedding coordinates, J = folds × seeds fits, G numbers of maps on a curve. What the 40 fits of
2048 maps and 120 images take is measured in tests/benchmarks (`make bench`).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy.stats import rankdata

from ais.importance.cumulative import score_curve, similarity_curve
from ais.importance.effects import EffectSums
from ais.importance.similarity import collective_ais, collective_ais_of, pearson, upper_triangle
from ais.progress import ProgressLine
from ais.validation.intervals import Mean, corrected_mean

# 1 where larger is better.
MEASURES = {"RMSE": -1, "PLCC": 1, "SRCC": 1, "R²": 1}
ORDERS = ("ais", "random", "reversed")
_LEAST_TEST_IMAGES = 3


class Coordinates(NamedTuple):
    """What ablation does to the embeddings of N images, for a channelwise tail.

    Args:
        embeddings: ``(N, D)`` intact.
        replacements: ``(N, C)`` value of coordinate ``first + k`` with map k ablated.
        first: coordinate of map 0.
    """

    embeddings: np.ndarray
    replacements: np.ndarray
    first: int


class HeadWeights(NamedTuple):
    """A head as arrays.

    Args:
        hidden: weight ``(H, D)`` and bias ``(H,)``.
        output: weight ``(H,)`` and bias.
        target: mean and standard deviation of the training ratings.
    """

    hidden: tuple[np.ndarray, np.ndarray]
    output: tuple[np.ndarray, float]
    target: tuple[float, float]


@dataclass(frozen=True)
class OrderFits:
    """One way of ordering the maps, over all fits.

    Args:
        maps: ``(J,)`` number of maps with the best training value, at least 1.
        train: ``(J,)`` training value there.
        test: ``(J,)`` test value there.
        along: ``(J,)`` mean of the test value over the whole curve, every number of maps from 1 to C alike.
        curve: ``(G,)`` test value for each number of maps, mean over the fits.
    """

    maps: np.ndarray
    train: np.ndarray
    test: np.ndarray
    along: np.ndarray
    curve: np.ndarray


@dataclass(frozen=True)
class CumulativeCurve:
    """Outcome of the protocol for one measure.

    Args:
        measure: one of `MEASURES`.
        counts: ``(G,)`` numbers of maps on a curve, from 0 to C.
        orders: by name, of `ORDERS`.
        all_train: ``(J,)`` training value with all maps.
        all_test: ``(J,)`` test value with all maps.
        test_over_train: test images over training images in a fit.
    """

    measure: str
    counts: np.ndarray
    orders: dict[str, OrderFits]
    all_train: np.ndarray
    all_test: np.ndarray
    test_over_train: float

    def gain_over_all(self) -> Mean:
        """How much better the test value is with the chosen maps than with all; positive is better."""
        return self._gain(self.orders["ais"].test - self.all_test)

    def gain_over(self, order: str) -> Mean:
        """How much better the test value is where the ranking stops than where another order stops."""
        return self._gain(self.orders["ais"].test - self.orders[order].test)

    def gain_along(self, order: str) -> Mean:
        """The same for the mean over the whole curve, which depends on no stopping rule."""
        return self._gain(self.orders["ais"].along - self.orders[order].along)

    def _gain(self, differences: np.ndarray) -> Mean:
        return corrected_mean(MEASURES[self.measure] * differences, self.test_over_train)


# Training images (n,) → AIS (C,).
Rank = Callable[[np.ndarray], np.ndarray]
# Order (C,), training and test images → for each measure, the training and test value (2, G) along the curve.
Evaluate = Callable[[np.ndarray, np.ndarray, np.ndarray], dict[str, np.ndarray]]


def cross_validated_curve(
    images: int,
    counts: np.ndarray,
    rank: Rank,
    evaluate: Evaluate,
    folds: int = 5,
    seeds: int = 8,
    threads: int | None = None,
) -> dict[str, CumulativeCurve]:
    """Run the protocol for any ranking and any measures.

    Args:
        images: N.
        counts: ``(G,)`` ascending numbers of maps at which ``evaluate`` measures, from 0 to C.
        rank: the AIS of training images.
        evaluate: the curves of an order of the maps.
        folds: of each seed.
        seeds: repetitions, each of which deals the images into folds anew.
        threads: that fits run in; one for each core if not given.

    Raises:
        ValueError: a fold would have fewer than 3 images.
    """
    if images < _LEAST_TEST_IMAGES * folds:
        raise ValueError(
            f"{images} images in {folds} folds leave fewer than {_LEAST_TEST_IMAGES} to test on; "
            "validate with more images or fewer folds"
        )

    def fit(task: tuple[int, int]) -> dict[str, dict[str, np.ndarray]]:
        seed, fold = task
        train, test = fold_images(images, folds, seed, fold)
        ranking = np.argsort(-rank(train), kind="stable")
        shuffled = np.random.default_rng([seed, 1, fold]).permutation(len(ranking))
        orders = {"ais": ranking, "random": shuffled, "reversed": ranking[::-1]}
        return {name: evaluate(orders[name], train, test) for name in ORDERS}

    tasks = [(seed, fold) for seed in range(seeds) for fold in range(folds)]
    fits = []
    # NumPy lets go of the interpreter's lock.
    with (
        ThreadPoolExecutor(threads or os.cpu_count()) as pool,
        ProgressLine("fits", len(tasks), silent_s=1) as progress,
    ):
        for found in pool.map(fit, tasks):
            fits.append(found)
            progress.advance()
    return {
        measure: _gather(
            measure, counts, {name: np.stack([each[name][measure] for each in fits]) for name in ORDERS}, folds
        )
        for measure in fits[0]["ais"]
    }


def fold_images(images: int, folds: int, seed: int, fold: int) -> tuple[np.ndarray, np.ndarray]:
    """Training and test images of one fold, ascending; the folds of a seed test every image once."""
    parts = np.array_split(np.random.default_rng([seed, 0]).permutation(images), folds)
    test = np.sort(parts[fold])
    return np.setdiff1d(np.arange(images), test), test


def _gather(measure: str, counts: np.ndarray, curves: dict[str, np.ndarray], folds: int) -> CumulativeCurve:
    """Stop each of the ``(J, 2, G)`` curves at its best training value."""
    everything = curves["ais"][:, :, -1]
    orders = {}
    spans = np.diff(counts) / counts[-1]
    for name, curve in curves.items():
        stop = 1 + (MEASURES[measure] * curve[:, 0, 1:]).argmax(1)
        fit = np.arange(len(curve))
        orders[name] = OrderFits(
            maps=counts[stop],
            train=curve[fit, 0, stop],
            test=curve[fit, 1, stop],
            along=curve[:, 1, 1:] @ spans,
            curve=curve[:, 1].mean(0),
        )
    return CumulativeCurve(measure, counts, orders, everything[:, 0], everything[:, 1], 1 / (folds - 1))


# Order (C,) → predictions (N, G) of the head that sees only the first maps.
Predict = Callable[[np.ndarray], np.ndarray]


def number_grid(maps: int, numbers: int = 256) -> np.ndarray:
    """Return the numbers of maps ``(G,)`` to measure at: 0, and ``numbers`` evenly spaced ones, or all, up to C."""
    return np.unique(np.linspace(0, maps, min(maps, numbers) + 1).round().astype(int))


def ratings_protocol(
    coordinates: Coordinates,
    heads: Sequence[HeadWeights],
    scores: np.ndarray,
    effects: np.ndarray,
    ratings: np.ndarray,
    folds: int = 5,
    seeds: int = 8,
    numbers: int = 256,
) -> dict[str, CumulativeCurve]:
    """RMSE, PLCC and SRCC of a head that sees only the top maps, for a channelwise tail.

    Args:
        coordinates: of the rated images.
        heads: whose mean is the score.
        scores: ``(N,)`` intact.
        effects: ``(N, C)`` ``s - s_k``.
        ratings: ``(N,)``.
        folds: see `cross_validated_curve`.
        seeds: likewise.
        numbers: of maps on a curve, see `number_grid`.

    Raises:
        ValueError: there are too few images.
    """
    counts = number_grid(effects.shape[1], numbers)

    def predict(order: np.ndarray) -> np.ndarray:
        each = [
            score_curve(*coordinates, order, head.hidden, head.output, counts) * head.target[1] + head.target[0]
            for head in heads
        ]
        return np.mean(each, axis=0)

    return score_protocol(predict, counts, scores, effects, ratings, folds, seeds)


def score_protocol(
    predict: Predict,
    counts: np.ndarray,
    scores: np.ndarray,
    effects: np.ndarray,
    ratings: np.ndarray,
    folds: int = 5,
    seeds: int = 8,
    threads: int | None = None,
) -> dict[str, CumulativeCurve]:
    """RMSE, PLCC and SRCC of any model that sees only the top maps; they are ranked by their AIS for the error.

    Args:
        predict: what the model says with the first maps of an order, at each of ``counts``.
        counts: ``(G,)``, of `number_grid`.
        scores: ``(N,)`` intact.
        effects: ``(N, C)`` ``s - s_k``.
        ratings: ``(N,)``.
        folds: see `cross_validated_curve`.
        seeds: likewise.
        threads: likewise.

    Raises:
        ValueError: there are too few images.
    """

    def rank(train: np.ndarray) -> np.ndarray:
        return EffectSums.of(scores[train], effects[train], ratings[train]).mean("error_effect")

    def evaluate(order: np.ndarray, train: np.ndarray, test: np.ndarray) -> dict[str, np.ndarray]:
        predicted = predict(order).T  # (G, N)
        sides = [score_measures(predicted[:, rows], ratings[rows]) for rows in (train, test)]
        return {measure: np.stack([side[measure] for side in sides]) for measure in sides[0]}

    return cross_validated_curve(len(ratings), counts, rank, evaluate, folds, seeds, threads)


def score_measures(predicted: np.ndarray, ratings: np.ndarray) -> dict[str, np.ndarray]:
    """RMSE (rating units), PLCC and SRCC ``(G,)`` of predictions ``(G, n)`` of ratings ``(n,)``.

    A constant prediction has the correlation 0.
    """
    return {
        "RMSE": np.sqrt(((predicted - ratings) ** 2).mean(-1)),
        "PLCC": pearson(predicted, ratings),
        "SRCC": pearson(rankdata(predicted, axis=-1), rankdata(ratings)),
    }


def similarity_protocol(
    coordinates: Coordinates, human: np.ndarray, folds: int = 5, seeds: int = 8, numbers: int | None = None
) -> dict[str, CumulativeCurve]:
    """R² with people's similarity judgments of only the top maps, for a channelwise tail.

    They are ranked by their collective AIS. Only pairs within the training images rank and stop, only pairs within the
    test images test.

    Args:
        coordinates: of the images, in the order of the matrix.
        human: ``(N, N)``, checked by `ais.importance.similarity.check_human_matrix`.
        folds: see `cross_validated_curve`.
        seeds: likewise.
        numbers: of maps on a curve, see `number_grid`; every number of maps if not given.

    Raises:
        ValueError: there are too few images.
    """
    embeddings, replacements, first = coordinates

    def rank(train: np.ndarray) -> np.ndarray:
        return collective_ais(embeddings[train], replacements[train], first, human[np.ix_(train, train)])

    def evaluate(order: np.ndarray, train: np.ndarray, test: np.ndarray) -> dict[str, np.ndarray]:
        parts = [(rows, human[np.ix_(rows, rows)]) for rows in (train, test)]
        return {"R²": similarity_curve(*coordinates, order, parts, None if numbers is None else counts)}

    counts = number_grid(replacements.shape[1], numbers or replacements.shape[1])
    return cross_validated_curve(len(human), counts, rank, evaluate, folds, seeds)


def similarity_protocol_of(
    ablated: np.ndarray,
    intact: np.ndarray,
    along: Callable[[np.ndarray], np.ndarray],
    counts: np.ndarray,
    human: np.ndarray,
    folds: int = 5,
    seeds: int = 8,
    threads: int | None = None,
) -> dict[str, CumulativeCurve]:
    """The same for any tail, from similarities.

    Args:
        ablated: ``(C, N, N)`` with one map ablated in all images.
        intact: ``(N, N)`` with all maps.
        along: order ``(C,)`` → similarities ``(G, N, N)`` with only the first maps of it, at each of ``counts``.
        counts: ``(G,)``, of `number_grid`.
        human: ``(N, N)``.
        folds: see `cross_validated_curve`.
        seeds: likewise.
        threads: likewise.

    Raises:
        ValueError: there are too few images.
    """

    def rank(train: np.ndarray) -> np.ndarray:
        square = np.ix_(train, train)
        return collective_ais_of((part[square][None] for part in ablated), intact[square], human[square])

    def evaluate(order: np.ndarray, train: np.ndarray, test: np.ndarray) -> dict[str, np.ndarray]:
        similarities = along(order)
        curves = []
        for rows in (train, test):
            square = np.ix_(np.arange(len(similarities)), rows, rows)
            agreement = pearson(upper_triangle(similarities[square]), upper_triangle(human[np.ix_(rows, rows)]))
            curves.append(agreement**2)
        return {"R²": np.stack(curves)}

    return cross_validated_curve(len(human), counts, rank, evaluate, folds, seeds, threads)

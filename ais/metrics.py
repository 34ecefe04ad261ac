"""How well scores agree with ratings, and how well heatmaps point at what is known to matter."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import kendalltau, rankdata

# Keeps the temporaries of resampling near 10 MB however many images there are.
_RESAMPLED_VALUES_PER_CHUNK = 500_000


@dataclass(frozen=True)
class Interval:
    """A statistic and its bootstrap interval.

    Args:
        value: over all images; NaN where it is undefined.
        low: lower end of the interval; NaN where no resample defines the statistic.
        high: upper end of the interval; likewise.
        n: images.
        undefined_resamples: resamples left out of the interval because the statistic is undefined in them.
    """

    value: float
    low: float
    high: float
    n: int
    undefined_resamples: int

    def as_dict(self) -> dict[str, float | int | None]:
        """Return the fields as JSON values, with ``None`` for NaN."""
        return {
            "value": _json_number(self.value),
            "low": _json_number(self.low),
            "high": _json_number(self.high),
            "n": self.n,
            "undefined_resamples": self.undefined_resamples,
        }


def regression_metrics(
    predicted: ArrayLike,
    rated: ArrayLike,
    *,
    resamples: int = 1000,
    seed: int = 0,
    confidence: float = 0.95,
) -> dict[str, Interval]:
    """Compare predicted scores with ratings.

    Gives ``rmse`` (in rating units), ``plcc`` (Pearson), ``srcc`` (Spearman) and ``krcc`` (Kendall's tau-b), each
    with a percentile bootstrap interval over images (Efron and Tibshirani, *An Introduction to the Bootstrap*, 1993,
    chapter 13). All four use the same resamples. A correlation is undefined, and NaN, where the predictions or the
    ratings are constant; resamples in which that happens are left out of the interval and counted.

    Args:
        predicted: ``(n,)`` scores; may be constant, which leaves the correlations NaN.
        rated: ``(n,)`` ratings of the same images, not all the same.
        resamples: bootstrap resamples.
        seed: of the resampling.
        confidence: share of the bootstrap distribution inside the interval, between 0 and 1.

    Raises:
        ValueError: the lengths differ, n is below 3, a value is not finite, the ratings are constant, or an option is
            out of range.
    """
    x, y = np.asarray(predicted, dtype=np.float64), np.asarray(rated, dtype=np.float64)
    _check_pairs(x, y)
    if resamples < 1:
        raise ValueError(f"resamples is {resamples}; an interval needs at least 1")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is {confidence}; it lies between 0 and 1, such as 0.95")

    metrics = {"rmse": _rmse, "plcc": _pearson, "srcc": _spearman, "krcc": _kendall}
    resampled: dict[str, list[NDArray[np.float64]]] = {name: [] for name in metrics}
    random = np.random.default_rng(seed)
    at_once = max(1, _RESAMPLED_VALUES_PER_CHUNK // len(x))
    for done in range(0, resamples, at_once):
        picks = random.integers(len(x), size=(min(at_once, resamples - done), len(x)))
        for name, metric in metrics.items():
            resampled[name].append(metric(x[picks], y[picks]))
    return {
        name: _interval(metric(x, y), np.concatenate(resampled[name]), len(x), confidence)
        for name, metric in metrics.items()
    }


def pointing_hit(heatmap: NDArray[np.floating], mask: NDArray[np.bool_]) -> float:
    """Score one image of the pointing game: is the maximum of the heatmap inside the object?

    Zhang et al., *Top-Down Neural Attention by Excitation Backprop*, IJCV 126, 2018, without their tolerance of 15
    pixels. Tied maxima share the hit, so that a constant heatmap scores what pointing at random would.

    Args:
        heatmap: ``(H, W)``, NaN where the model did not look.
        mask: ``(H, W)``, True inside the object.

    Returns:
        Share of the tied maximal pixels that lie inside the mask, in [0, 1].

    Raises:
        ValueError: the shapes differ, or the heatmap is NaN everywhere.
    """
    _check_same_shape(heatmap, mask)
    if np.isnan(heatmap).all():
        raise ValueError("the heatmap is NaN everywhere: the model looked at no pixel of this image")
    return float(mask[heatmap == np.nanmax(heatmap)].mean())


def pointing_chance(mask: NDArray[np.bool_], looked_at: NDArray[np.bool_]) -> float:
    """Return the hit rate of pointing at random: the share of the looked-at pixels inside the object, in [0, 1].

    Args:
        mask: ``(H, W)``, True inside the object.
        looked_at: ``(H, W)``, True where the model looked.

    Raises:
        ValueError: the shapes differ, or no pixel was looked at.
    """
    _check_same_shape(looked_at, mask)
    if not looked_at.any():
        raise ValueError("no pixel was looked at, so there is no chance level")
    return float(mask[looked_at].mean())


def _rmse(x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.sqrt(np.mean((x - y) ** 2, axis=-1))


def _pearson(x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.float64]:
    """Correlate along the last axis; NaN where a side is constant."""
    x_centred, y_centred = x - x.mean(-1, keepdims=True), y - y.mean(-1, keepdims=True)
    # The mean of equal values can miss them by a rounding error, so that constancy is asked of the values themselves.
    constant = (np.ptp(x, axis=-1) == 0) | (np.ptp(y, axis=-1) == 0)
    norms = np.linalg.norm(x_centred, axis=-1) * np.linalg.norm(y_centred, axis=-1)
    products = np.sum(x_centred * y_centred, axis=-1)
    return np.divide(products, norms, out=np.full(norms.shape, np.nan), where=~constant & (norms > 0))


def _spearman(x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.float64]:
    return _pearson(rankdata(x, axis=-1), rankdata(y, axis=-1))


def _kendall(x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.float64]:
    taus = [kendalltau(*pair, variant="b").statistic for pair in zip(np.atleast_2d(x), np.atleast_2d(y), strict=True)]
    return np.reshape(taus, x.shape[:-1])


def _interval(value: NDArray[np.float64], resampled: NDArray[np.float64], n: int, confidence: float) -> Interval:
    defined = resampled[~np.isnan(resampled)]
    tail = (1 - confidence) / 2
    low, high = np.quantile(defined, [tail, 1 - tail]) if defined.size else (np.nan, np.nan)
    return Interval(float(value), float(low), float(high), n, undefined_resamples=resampled.size - defined.size)


def _json_number(value: float) -> float | None:
    return None if np.isnan(value) else value


def _check_pairs(predicted: NDArray[np.float64], rated: NDArray[np.float64]) -> None:
    if predicted.ndim != 1 or predicted.shape != rated.shape:
        raise ValueError(
            f"predicted has shape {predicted.shape} and rated {rated.shape}; both must be (n,), one value per image"
        )
    if len(rated) < 3:
        raise ValueError(f"{len(rated)} images are too few to compare scores with ratings; give at least 3")
    for name, values in (("predicted", predicted), ("rated", rated)):
        if not np.isfinite(values).all():
            index = int(np.flatnonzero(~np.isfinite(values))[0])
            raise ValueError(f"{name}[{index}] is {values[index]}; leave such images out")
    if np.ptp(rated) == 0:
        raise ValueError(f"all {len(rated)} ratings are {rated[0]:g}; agreement with a constant is undefined")


def _check_same_shape(first: NDArray, mask: NDArray) -> None:
    if first.shape != mask.shape:
        raise ValueError(f"the mask has shape {mask.shape}, the map {first.shape}; both must be (H, W) of one image")

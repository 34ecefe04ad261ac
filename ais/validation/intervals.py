"""Means with the 95% interval that their data allow, and what such an interval says."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Literal

import numpy as np
from scipy import stats

Outcome = Literal["shown", "not shown", "against", "not measured"]
# Of fewer, whatever the interval, nothing is said to be shown: its assumptions cannot be looked at.
ENOUGH_IMAGES = 8
_CONFIDENCE = 0.95


@dataclass(frozen=True)
class Mean:
    """A mean and its 95% interval.

    Args:
        value: NaN where nothing could be measured.
        low: lower end; NaN where there are too few values for an interval.
        high: upper end, likewise.
        n: values that went in.
    """

    value: float
    low: float
    high: float
    n: int

    @classmethod
    def of_images(cls, value: float, low: float, high: float, n: int) -> Mean:
        """The same over ``n`` images; without an interval where these are fewer than `ENOUGH_IMAGES`."""
        return cls(value, low, high, n) if n >= ENOUGH_IMAGES else cls(value, np.nan, np.nan, n)

    @property
    def outcome(self) -> Outcome:
        """Whether the interval lies above zero (shown), below (against), or holds it (not shown)."""
        if not np.isfinite([self.low, self.high]).all():
            return "not measured"
        return "shown" if self.low > 0 else "against" if self.high < 0 else "not shown"

    def as_dict(self) -> dict[str, float | int | None]:
        """Return the fields as JSON values, with ``None`` for NaN."""
        return {name: None if np.isnan(value) else value for name, value in asdict(self).items()}


def mean_over_images(values: np.ndarray, heads: np.ndarray | None = None, least_variance: float = 0.0) -> Mean:
    """Mean over images with its Student-t interval.

    Images that were compared with the same head are not independent: where ``heads`` are given, the interval is the
    wider of that and the one over heads, from the cluster-robust variance of Liang and Zeger, *Longitudinal Data
    Analysis Using Generalized Linear Models*, Biometrika 73, 1986, with H / (H - 1) and H - 1 degrees of freedom.

    Args:
        values: ``(N,)``; NaN where undefined, which leaves the image out.
        heads: ``(N,)`` which of some heads drawn by chance each image was compared with.
        least_variance: of a value, known from elsewhere: a sample in which a rare event never happens shows less.
    """
    kept = np.isfinite(values)
    defined = values[kept]
    count = len(defined)
    value = float(defined.mean()) if count else np.nan
    if count < 2:
        return Mean.of_images(value, np.nan, np.nan, count)
    reach = _quantile(count - 1) * np.sqrt(max(defined.var(ddof=1), least_variance) / count)
    if heads is not None:
        reach = np.maximum(reach, _reach_over_heads(defined - value, heads[kept]))
    return Mean.of_images(value, float(value - reach), float(value + reach), count)


def _reach_over_heads(centred: np.ndarray, heads: np.ndarray) -> float:
    sums = np.bincount(heads, weights=centred)[np.unique(heads)]
    if len(sums) < 2:
        return np.nan  # one head says nothing of others
    variance = len(sums) / (len(sums) - 1) * (sums**2).sum() / len(centred) ** 2
    return _quantile(len(sums) - 1) * float(np.sqrt(variance))


def mean_over_images_and_heads(values: np.ndarray) -> Mean:
    """Mean over images and heads, each image with each head; the interval holds the choice of both.

    Args:
        values: ``(R, N)`` of R heads drawn by chance; an image with a NaN is left out.
    """
    defined = values[:, np.isfinite(values).all(0)]
    over_images = mean_over_images(defined.mean(0))
    spread = defined.mean(1).std(ddof=1) / np.sqrt(len(defined)) if over_images.n else np.nan
    reach = np.hypot(over_images.high - over_images.value, _quantile(len(defined) - 1) * spread)
    return Mean(over_images.value, over_images.value - reach, over_images.value + reach, over_images.n)


def corrected_mean(differences: np.ndarray, test_over_train: float) -> Mean:
    """Mean over the fits of a repeated cross-validation, with an interval that respects that they overlap.

    The training sets of two folds share most of their images, so that the fits are not independent and the plain
    t-interval is far too narrow. The corrected resampled t-test of Nadeau and Bengio, *Inference for the
    Generalization Error*, Machine Learning 52, 2003, takes ``(1/J + n_test/n_train) · variance`` for the variance of
    the mean of J fits.

    Args:
        differences: ``(J,)`` one for each fit.
        test_over_train: ``n_test / n_train``, such as 0.25 for five folds.
    """
    fits = len(differences)
    value = float(differences.mean())
    if fits < 2:
        return Mean(value, np.nan, np.nan, fits)
    spread = np.sqrt((1 / fits + test_over_train) * differences.var(ddof=1))
    reach = _quantile(fits - 1) * float(spread)
    return Mean(value, value - reach, value + reach, fits)


def _quantile(degrees: int) -> float:
    return float(stats.t.ppf(0.5 + _CONFIDENCE / 2, degrees))

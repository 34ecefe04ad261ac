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


def mean_over_images(values: np.ndarray, least_variance: float = 0.0) -> Mean:
    """Mean over images with its Student-t interval.

    Args:
        values: ``(N,)``; NaN where undefined, which leaves the image out.
        least_variance: of a value, known from elsewhere: a sample in which a rare event never happens shows less.
    """
    defined = values[np.isfinite(values)]
    count = len(defined)
    value = float(defined.mean()) if count else np.nan
    if count < 2:
        return Mean.of_images(value, np.nan, np.nan, count)
    reach = _quantile(count - 1) * np.sqrt(max(defined.var(ddof=1), least_variance) / count)
    return Mean.of_images(value, float(value - reach), float(value + reach), count)


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

"""Means with the 95% interval that their data allow, and what such an interval says."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Literal

import numpy as np
from scipy import stats

Outcome = Literal["shown", "not shown", "against", "not measured"]
_CONFIDENCE = 0.95
_RESAMPLES = 2000


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

    @property
    def outcome(self) -> Outcome:
        """Whether the interval lies above zero (shown), below (against), or holds it (not shown)."""
        if not np.isfinite([self.low, self.high]).all():
            return "not measured"
        return "shown" if self.low > 0 else "against" if self.high < 0 else "not shown"

    def as_dict(self) -> dict[str, float | int | None]:
        """Return the fields as JSON values, with ``None`` for NaN."""
        return {name: None if np.isnan(value) else value for name, value in asdict(self).items()}


def bootstrap_mean(values: np.ndarray, seed: int = 0) -> Mean:
    """Mean over images with its percentile bootstrap interval.

    Efron and Tibshirani, *An Introduction to the Bootstrap*, 1993, chapter 13.

    Args:
        values: ``(N,)``; NaN where undefined, which leaves the image out.
        seed: of the resampling.
    """
    defined = values[np.isfinite(values)]
    value = float(defined.mean()) if len(defined) else np.nan
    if len(defined) < 2:
        return Mean(value, np.nan, np.nan, len(defined))
    picks = np.random.default_rng(seed).integers(len(defined), size=(_RESAMPLES, len(defined)))
    tail = (1 - _CONFIDENCE) / 2
    low, high = np.quantile(defined[picks].mean(1), [tail, 1 - tail])
    return Mean(value, float(low), float(high), len(defined))


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
    reach = float(stats.t.ppf(0.5 + _CONFIDENCE / 2, fits - 1) * spread)
    return Mean(value, value - reach, value + reach, fits)

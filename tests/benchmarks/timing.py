"""Ratios measured side by side: A B A B …, so that a machine that slows down slows both."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Ratio:
    """Ratio of two times over several paired runs.

    Args:
        median: of the ratios pair by pair.
        low: smallest.
        high: largest.
        numerator_s: median time of the first.
        denominator_s: median time of the second.
    """

    median: float
    low: float
    high: float
    numerator_s: float
    denominator_s: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f}–{self.high:.2f})"


def paired(numerator: Callable[[], object], denominator: Callable[[], object], runs: int = 5) -> Ratio:
    """Time two functions in turn, after one uncounted run of each."""
    numerator()
    denominator()
    pairs = [(_seconds(numerator), _seconds(denominator)) for _ in range(runs)]
    ratios = [a / b for a, b in pairs]
    return Ratio(
        statistics.median(ratios),
        min(ratios),
        max(ratios),
        statistics.median(a for a, _ in pairs),
        statistics.median(b for _, b in pairs),
    )


def _seconds(function: Callable[[], object]) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started

"""Ratios measured side by side: A B A B …, so that a machine that slows down slows both."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass


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

    def as_dict(self) -> dict[str, float]:
        """For the results, rounded to what a median of a few can say."""
        return {name: float(f"{value:.3g}") for name, value in asdict(self).items()}


def paired(
    numerator: Callable[[], object],
    denominator: Callable[[], object],
    runs: int = 5,
    clock: Callable[[], float] = time.process_time,
) -> Ratio:
    """Time two functions in turn, after one uncounted run of each.

    By default in processor seconds of this process: with one thread they are what the wall clock would show on a
    machine that does nothing else.
    """
    return compared([numerator], denominator, runs, clock)[0]


def compared(
    numerators: Sequence[Callable[[], object]],
    denominator: Callable[[], object],
    runs: int = 5,
    clock: Callable[[], float] = time.process_time,
) -> list[Ratio]:
    """Time several functions in turn with one that all of them are divided by; otherwise as `paired`."""
    functions = [*numerators, denominator]
    for function in functions:
        function()
    rounds = [[seconds(function, clock) for function in functions] for _ in range(runs)]
    *columns, below = zip(*rounds, strict=True)
    return [_ratio(above, below) for above in columns]


def _ratio(above: Sequence[float], below: Sequence[float]) -> Ratio:
    ratios = [a / b for a, b in zip(above, below, strict=True)]
    median = statistics.median
    return Ratio(median(ratios), min(ratios), max(ratios), median(above), median(below))


def seconds(function: Callable[[], object], clock: Callable[[], float] = time.process_time) -> float:
    """Time one call."""
    started = clock()
    function()
    return clock() - started

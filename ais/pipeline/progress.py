"""The progress of a stage whose rows are finished by actors."""

from __future__ import annotations

from typing import Any

import ray

from ais.pipeline.metrics import Meter, metrics
from ais.progress import ProgressLine


@ray.remote(num_cpus=0)
class Counter:
    """Counts rows as the actors finish them."""

    def __init__(self) -> None:
        self._rows = 0
        self._errors = 0

    def add(self, rows: int, errors: int) -> None:
        """Count finished rows, errors among them."""
        self._rows += rows
        self._errors += errors

    def read(self) -> tuple[int, int]:
        """Return rows and errors so far."""
        return self._rows, self._errors


class Progress(ProgressLine):
    """Prints how far a stage is while the block runs, and shows it to Prometheus; ``counter`` goes to the actors.

    Args:
        what: is counted, such as ``"images"``.
        total: to come.
        run: id of the run, if it is one; every line of a log carries it.
    """

    def __init__(self, what: str, total: int, run: str | None = None) -> None:
        self._actor: Any = Counter.remote()  # type: ignore[attr-defined]
        self._run = run
        self._label = run or what
        self.counter = Meter(self._actor, self._label)
        super().__init__(what, total)

    def _text(self, done: int, errors: int, last: bool = False) -> str:
        text = super()._text(done, errors, last)
        return f"{text} · run {self._run}" if self._run and not self._line.terminal else text

    def read(self) -> tuple[int, int]:
        """Return how many rows are finished, and how many errors are among them."""
        rows, errors = ray.get(self._actor.read.remote(), timeout=10)
        metrics().images_left.set(self._total - rows, {"run": self._label})
        return rows, errors

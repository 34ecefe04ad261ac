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
        run: id of the run, which every line of a log carries.
    """

    def __init__(self, what: str, total: int, run: str) -> None:
        self._actor: Any = Counter.remote()  # type: ignore[attr-defined]
        self.counter = Meter(self._actor, run)
        super().__init__(what, total)
        self._run = run
        if not self._line.terminal:
            self._what = f"{run}: {what}"

    def read(self) -> tuple[int, int]:
        """Return how many rows are finished, and how many errors are among them."""
        rows, errors = ray.get(self._actor.read.remote(), timeout=10)
        metrics().images_left.set(self._total - rows, {"run": self._run})
        return rows, errors

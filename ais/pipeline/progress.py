"""The progress of a stage whose rows are finished by actors."""

from __future__ import annotations

from typing import Any

import ray

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
    """Prints how far a stage is while the block runs; ``counter`` goes to the actors. Arguments as `ProgressLine`."""

    def __init__(self, what: str, total: int) -> None:
        self.counter: Any = Counter.remote()  # type: ignore[attr-defined]
        super().__init__(what, total)

    def read(self) -> tuple[int, int]:
        """Return how many rows are finished, and how many errors are among them."""
        rows, errors = ray.get(self.counter.read.remote(), timeout=10)
        return rows, errors

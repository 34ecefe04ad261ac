"""The progress of a stage whose rows are finished by actors."""

from __future__ import annotations

import time
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ais.pipeline.metrics import Meter, metrics
from ais.progress import ProgressLine, Standstill


@ray.remote(num_cpus=0)
class Counter:
    """Counts rows as the actors finish them."""

    def __init__(self) -> None:
        self._rows = 0
        self._errors = 0
        self._first: tuple[float, int] | None = None
        self._last = 0.0
        self._fitting: int | None = None

    def add(self, rows: int, errors: int) -> None:
        """Count finished rows, errors among them."""
        self._rows += rows
        self._errors += errors
        self._last = time.time()
        self._first = self._first or (self._last, self._rows)

    def out_of_memory(self, images: int) -> None:
        """Note how many images fit into one pass of a device that took no more; the least of all devices counts."""
        self._fitting = min(images, self._fitting or images)

    def read(self) -> tuple[int, int]:
        """Return rows and errors so far."""
        return self._rows, self._errors

    def pace(self, since: float) -> Pace | None:
        """Return when the first batch was there, seen from ``since``, and how fast the others followed."""
        if self._first is None:
            return None
        first, before = self._first
        after = self._last - first
        return Pace(first - since, (self._rows - before) / after if after > 0 else None, self._fitting)


@dataclass(frozen=True)
class Pace:
    """How a stage went, start-up and steady state apart.

    Args:
        first_s: seconds until the first batch was finished.
        per_s: rows a second from then on; ``None`` where there was one batch.
        fitting: rows in one pass of the network where memory took no more; ``None`` where all fitted.
    """

    first_s: float
    per_s: float | None
    fitting: int | None = None


class TaskProgress(ProgressLine):
    """Prints how far work in other processes is while the block runs; ``counter``, an actor, goes to it.

    Args:
        what: is counted, such as ``"images"``.
        total: to come.
        stall_minutes: the block is left when nothing was finished for so long, if it runs in the main thread; ``None``:
            never.

    Raises:
        RunError: on leaving the block, if it stood still.
    """

    def __init__(self, what: str, total: int, stall_minutes: float | None = None) -> None:
        # Beside the driver, and so no sooner dead than it.
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        self.counter: Any = Counter.options(scheduling_strategy=here).remote()  # type: ignore[attr-defined]
        self._standstill = Standstill(stall_minutes)
        super().__init__(what, total)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)
        self._standstill.refuse(kind, f"{self._seen[0]:,} of {self._total:,} {self._what}")

    def read(self) -> tuple[int, int]:
        """Return how many are finished, and how many errors are among them."""
        done, errors = ray.get(self.counter.read.remote(), timeout=10)
        self._standstill.note((done, errors))
        return done, errors


class Progress(TaskProgress):
    """The progress of images through the network, which Prometheus sees too; ``meter`` goes to the actors.

    Args:
        what: as `TaskProgress`.
        total: likewise.
        run: id of the run, if it is one; every line of a log carries it.
        stall_minutes: as `TaskProgress`.
    """

    def __init__(self, what: str, total: int, run: str | None = None, stall_minutes: float | None = None) -> None:
        super().__init__(what, total, stall_minutes)
        self._created = time.time()
        self._run = run
        self._label = run or what
        self.meter = Meter(self.counter, self._label)

    def _text(self, done: int, errors: int, last: bool = False) -> str:
        text = super()._text(done, errors, last)
        return f"{text} · run {self._run}" if self._run and not self._line.terminal else text

    def read(self) -> tuple[int, int]:
        """Return how many rows are finished, and how many errors are among them."""
        rows, errors = super().read()
        metrics().images_left.set(self._total - rows, {"run": self._label})
        return rows, errors

    def pace(self) -> Pace | None:
        """Return how it went so far; ``None`` before the first batch, or where the count is lost."""
        try:
            return ray.get(self.counter.pace.remote(self._created))
        except ray.exceptions.RayError:
            return None

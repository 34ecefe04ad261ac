"""One quiet line of progress, the same in a terminal and in a job's log."""

from __future__ import annotations

import sys
import threading
import time
from types import TracebackType
from typing import Any

import ray

_EVERY_S = {"terminal": 1.0, "log": 15.0}


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


class Progress:
    """Prints how far a stage is while the block runs; ``counter`` goes to the actors.

    In a terminal one line is redrawn; in a log a line is printed now and then, without control characters.

    Args:
        what: of the stage, such as ``"images"``.
        total: rows to come.
    """

    def __init__(self, what: str, total: int) -> None:
        self.counter: Any = Counter.remote()  # type: ignore[attr-defined]
        self._what = what
        self._total = total
        self._started = time.monotonic()
        self._first: tuple[float, int] | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Progress:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        if kind is None:
            rows, errors = ray.get(self.counter.read.remote())
            self._print(rows, errors, last=True)

    def _watch(self) -> None:
        terminal = sys.stdout.isatty()
        while not self._stop.wait(_EVERY_S["terminal" if terminal else "log"]):
            try:
                rows, errors = ray.get(self.counter.read.remote(), timeout=10)
            except Exception:  # progress is never a reason to fail
                continue
            self._print(rows, errors)

    def _print(self, rows: int, errors: int, last: bool = False) -> None:
        now = time.monotonic()
        if self._first is None and rows:
            self._first = (now, rows)
        if not rows:
            text = f"{self._what}: starting ({now - self._started:.0f} s)"
        else:
            text = f"{self._what}: {rows:,} of {self._total:,}"
            if errors:
                text += f" · {errors:,} errors"
            # The rate leaves out what came before the first count, which is mostly models being loaded.
            since, before = self._first or (now, rows)
            rate = (rows - before) / (now - since) if now > since and rows > before else rows / (now - self._started)
            text += f" · {rate:,.1f}/s"
            if rows < self._total:
                text += f" · {_duration((self._total - rows) / rate)} left"
        if sys.stdout.isatty():
            print(f"\r\x1b[2K{text}", end="\n" if last else "", flush=True)
        else:
            print(text, flush=True)


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"

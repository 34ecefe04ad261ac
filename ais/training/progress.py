"""A line on the terminal for every report of the training, the same in a terminal and in a job's log."""

from __future__ import annotations

import threading
from types import TracebackType
from typing import Any

import ray
from ray.train import UserCallback

from ais.config import FitConfig

_EVERY_S = 0.5


@ray.remote(num_cpus=0)
class _Lines:
    """Keeps lines until the driver fetches them: the callback runs in a process of Ray Train's own."""

    def __init__(self) -> None:
        self._lines: list[str] = []

    def add(self, line: str) -> None:
        self._lines.append(line)

    def take(self) -> list[str]:
        lines, self._lines = self._lines, []
        return lines


class _Callback(UserCallback):
    def __init__(self, lines: Any, fit: FitConfig) -> None:
        self._lines = lines
        self._fit = fit

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:  # noqa: ARG002
        """Say how far the fit is."""
        self._lines.add.remote(describe(metrics[0], self._fit))

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:  # noqa: ARG002
        """Say that a worker was lost."""
        ranks = ", ".join(map(str, sorted(worker_exceptions)))
        self._lines.add.remote(f"lost worker {ranks}; going on from the last checkpoint, if fit.max_failures allows")


def describe(metrics: dict[str, Any], fit: FitConfig) -> str:
    """Describe one report in a line, such as ``epoch 75/300 · validation RMSE 0.213 (best 0.209 at 61)``."""
    head = f"head {metrics['variant'] + 1} of {fit.variants} · " if fit.variants > 1 else ""
    stopped = " · stopped early" if metrics["done"] and metrics["epoch"] < fit.epochs else ""
    return (
        f"{head}epoch {metrics['epoch']}/{fit.epochs} · validation RMSE {metrics['validation_rmse']:.4g} "
        f"(best {metrics['best_rmse']:.4g} at {metrics['best_epoch']}){stopped}"
    )


class ProgressLines:
    """Prints the lines while the block runs; ``callback`` goes to Ray Train."""

    def __init__(self, fit: FitConfig) -> None:
        self._lines: Any = _Lines.remote()  # type: ignore[attr-defined]
        self.callback = _Callback(self._lines, fit)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> ProgressLines:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        if kind is None or issubclass(kind, Exception):  # not when the process is being ended
            self._print()

    def _watch(self) -> None:
        while not self._stop.wait(_EVERY_S):
            self._print()

    def _print(self) -> None:
        try:
            lines = ray.get(self._lines.take.remote(), timeout=10)
        except ray.exceptions.RayError:  # progress is never a reason to fail
            return
        for line in lines:
            print(line, flush=True)

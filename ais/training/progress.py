"""How far the fit is, from the processes of Ray Train to the terminal of the job."""

from __future__ import annotations

import threading
import time
from types import TracebackType
from typing import Any

import ray
from ray.train import UserCallback

from ais.config import FitConfig
from ais.progress import Line, Standstill, duration

_EVERY_S = 0.5


@ray.remote(num_cpus=0)
class _Reports:
    """Keeps reports until the driver fetches them: the callback runs in a process of Ray Train's own."""

    def __init__(self) -> None:
        self._reports: list[tuple[float, dict[str, Any] | str]] = []

    def add(self, report: dict[str, Any] | str) -> None:
        self._reports.append((time.time(), report))

    def take(self) -> list[tuple[float, dict[str, Any] | str]]:
        reports, self._reports = self._reports, []
        return reports


class _Callback(UserCallback):
    def __init__(self, reports: Any) -> None:
        self._reports = reports

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:  # noqa: ARG002
        """Say how far the fit is."""
        self._reports.add.remote(metrics[0])

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:  # noqa: ARG002
        """Say that a worker was lost."""
        ranks = ", ".join(map(str, sorted(worker_exceptions)))
        self._reports.add.remote(f"lost worker {ranks}; going on from the last checkpoint, if fit.max_failures allows")


def describe(metrics: dict[str, Any], fit: FitConfig, epochs_per_s: float | None = None) -> str:
    """Describe one report in a line, such as ``epoch 75/300 · validation RMSE 0.213 (best 0.209 at 61)``.

    Args:
        metrics: of the report.
        fit: how many heads and epochs there are.
        epochs_per_s: adds the rate, and the time left if no head stops early.
    """
    head = f"head {metrics['variant'] + 1} of {fit.variants} · " if fit.variants > 1 else ""
    stopped = " · stopped early" if metrics["done"] and metrics["epoch"] < fit.epochs else ""
    text = (
        f"{head}epoch {metrics['epoch']}/{fit.epochs} · validation RMSE {metrics['validation_rmse']:.4g} "
        f"(best {metrics['best_rmse']:.4g} at {metrics['best_epoch']}){stopped}"
    )
    if epochs_per_s is None or metrics["done"]:
        return text
    left = fit.epochs * (fit.variants - metrics["variant"]) - metrics["epoch"]
    return f"{text} · {epochs_per_s:,.1f} epochs/s · at most {duration(left / epochs_per_s)} left"


class ProgressLines:
    """Prints how far the fit is while the block runs, and a line that stays for every head that is finished.

    ``callback`` goes to Ray Train.

    Args:
        fit: how many heads and epochs there are.
        stall_minutes: the block is left when no worker reported for so long, if it runs in the main thread; ``None``:
            never.

    Raises:
        RunError: on leaving the block, if it stood still.
    """

    def __init__(self, fit: FitConfig, stall_minutes: float | None = None) -> None:
        self._fit = fit
        self._standstill = Standstill(stall_minutes)
        self._seen = 0
        self._last = "no epoch"
        self._reports: Any = _Reports.remote()  # type: ignore[attr-defined]
        self.callback = _Callback(self._reports)
        self._line = Line()
        self._first: tuple[float, int] | None = None
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
        self._line.close()
        self._standstill.refuse(kind, self._last)

    def _watch(self) -> None:
        while not self._stop.wait(_EVERY_S):
            self._print()

    def _print(self) -> None:
        try:
            reports = ray.get(self._reports.take.remote(), timeout=10)
        except ray.exceptions.RayError:  # progress is never a reason to fail
            return
        self._seen += len(reports)
        self._standstill.note(self._seen)
        for at, report in reports:
            if isinstance(report, str):
                self._line.keep(report)
                continue
            self._last = f"epoch {report['epoch']} of head {report['variant'] + 1}"
            if report["done"]:
                self._line.keep(describe(report, self._fit))
                self._first = None
            else:
                self._line.show(describe(report, self._fit, self._rate(at, report["epoch"])))

    def _rate(self, at: float, epoch: int) -> float | None:
        """Epochs a second since the first report of this head; None at that one."""
        if self._first is None or epoch <= self._first[1]:  # a lost worker goes back to the last checkpoint
            self._first = (at, epoch)
            return None
        since, before = self._first
        return (epoch - before) / (at - since) if at > since else None

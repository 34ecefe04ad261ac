"""Jobs in processes of their own, and signal 9 for them, their workers and their nodes (Linux: uses ``/proc``)."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from cluster.local import without_ray

ROOT = Path(__file__).parents[1]
FETCHING, SCORING = "MapBatches(FetchDecode)", "MapBatches(Explain)"
PATIENCE_S = 900  # only what hangs takes longer, on whatever machine


@dataclass(frozen=True)
class Process:
    """A process by id and start time, so that a later one of the same id is not taken for it."""

    pid: int
    started: int
    parent: int
    title: str

    @classmethod
    def of(cls, pid: int) -> Process | None:
        """The process of this id, if one is alive."""
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            title = Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ").strip()
        except (FileNotFoundError, ProcessLookupError):
            return None
        return None if fields[0] == "Z" else cls(pid, int(fields[19]), int(fields[1]), title)

    @property
    def alive(self) -> bool:
        """Whether it still is."""
        found = Process.of(self.pid)
        return found is not None and found.started == self.started

    def kill(self) -> None:
        """Signal 9."""
        if self.alive:
            os.kill(self.pid, signal.SIGKILL)


def descendants(pid: int) -> list[Process]:
    """Everything that a process started, and what that started."""
    everything = [Process.of(int(path.name)) for path in Path("/proc").iterdir() if path.name.isdigit()]
    found, parents = [], {pid}
    while new := [process for process in everything if process and process.parent in parents]:
        found += new
        parents = {process.pid for process in new}
    return found


def actors(stage: str, pids: Iterable[int]) -> list[Process]:
    """Those of some processes that are actors of a stage, as Ray titles them."""
    found = (Process.of(pid) for pid in pids)
    return [process for process in found if process and f"({stage})" in process.title]


def apart(variables: dict[str, str]) -> dict[str, str]:
    """Environment of a process that has nothing to do with the tests' own Ray."""
    return {**without_ray(os.environ), "PYTHONPATH": str(ROOT), **variables}


def joined() -> dict[str, str]:
    """Variables that lead a process to the Ray of the tests, started before (`local_ray`)."""
    import ray

    given = {name: value for name, value in os.environ.items() if name.startswith("RAY_")}  # the token is among them
    return given | {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}


class Job:
    """One start of a job as a user starts it, with the backbone ``tiny`` registered.

    Args:
        arguments: such as ``jobs/heatmaps.py images=…``.
        environment: variables that lead to a cluster and to a store.
        program: run instead of ``tests/run_tiny.py``.
    """

    def __init__(self, arguments: list[str], environment: dict[str, str], program: list[str] | None = None) -> None:
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed by end
        self._process = subprocess.Popen(
            [sys.executable, *(program or ["tests/run_tiny.py"]), *arguments],
            cwd=ROOT,
            env=apart(environment),
            stdout=self._log,
            stderr=subprocess.STDOUT,
        )
        self._family: list[Process] = []

    @property
    def pid(self) -> int:
        """Of the driver."""
        return self._process.pid

    @property
    def code(self) -> int | None:
        """Its exit code, ``None`` while it runs."""
        return self._process.poll()

    def wait_for(self, condition: Callable[[], bool]) -> None:
        """Wait until something has happened; the job must not end before."""
        end = time.monotonic() + PATIENCE_S
        while not condition():
            assert self.code is None, f"ended too early: {self.said()}"
            assert time.monotonic() < end, f"waited {PATIENCE_S} s: {self.said()}"
            time.sleep(0.02)

    def kill(self) -> None:
        """Kill the driver; a Ray that it started itself ends by itself, or with `end`."""
        self._family = descendants(self.pid)
        self._process.kill()
        self._process.wait()

    def said(self) -> str:
        """Everything that it printed so far."""
        self._log.seek(0)
        return self._log.read()

    def finish(self) -> int:
        """Wait for the end and return the exit code."""
        return self._process.wait(timeout=PATIENCE_S)

    def end(self) -> None:
        """Leave nothing of it behind."""
        if self.code is None:
            self.kill()
        for process in self._family:
            process.kill()
        self._log.close()

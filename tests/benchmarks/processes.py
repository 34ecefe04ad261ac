"""Processor seconds and memory of a command and everything that it starts, watched from outside."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Seen:
    """One look at all processes.

    Args:
        at: seconds since 1970.
        cpu_s: processor seconds so far, by kind of process; those that ended count on.
        bytes: of memory now, by kind of process. Of what processes share each is charged its part (PSS, Linux), so that
            the sum is what the machine gives.
    """

    at: float
    cpu_s: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    bytes: dict[str, int] = field(default_factory=lambda: defaultdict(int))


class Watched:
    """Run a command, and look at its processes twice a second.

    Args:
        command: arguments after the Python interpreter.
        env: environment.
    """

    def __init__(self, command: list[str], env: dict[str, str] | None = None) -> None:
        self.started = time.time()
        self._process = subprocess.Popen(
            [sys.executable, *command], cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        self.seen: list[Seen] = []
        self._cpu: dict[tuple[int, float], tuple[str, float]] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def wait(self) -> str:
        """Wait for the end and return what it printed.

        Raises:
            RuntimeError: it failed.
        """
        output, _ = self._process.communicate()
        self._stop.set()
        self._thread.join()
        if self._process.returncode:
            raise RuntimeError(f"exit code {self._process.returncode}:\n{output}")
        return output

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        if self._process.poll() is None:
            self._process.terminate()
            self._process.wait()

    def at(self, moment: float) -> Seen:
        """The last look before a moment."""
        return max((seen for seen in self.seen if seen.at <= moment), key=lambda seen: seen.at, default=self.seen[0])

    def _watch(self) -> None:
        root = psutil.Process(self._process.pid)
        while not self._stop.wait(0.5):
            look = Seen(time.time())
            try:
                processes = [root, *root.children(recursive=True)]
            except psutil.NoSuchProcess:
                return
            for process in processes:
                try:
                    with process.oneshot():
                        kind = _kind(process)
                        times = process.cpu_times()
                        self._cpu[process.pid, process.create_time()] = kind, times.user + times.system
                        look.bytes[kind] += process.memory_full_info().pss
                except psutil.Error:
                    continue
            for kind, seconds in self._cpu.values():
                look.cpu_s[kind] += seconds
            self.seen.append(look)


def _kind(process: psutil.Process) -> str:
    """What a process does, by its command line: Ray's actors write their stage there, other workers change theirs."""
    line = " ".join(process.cmdline())
    for mark, kind in (
        ("ais.decoding", "fetch"),
        ("FetchDecode", "fetch"),
        ("Explain", "score"),
        ("Score", "score"),
        ("raylet", "ray"),
        ("gcs_server", "ray"),
        ("jobs/", "driver"),
    ):
        if mark in line:
            return kind
    return "ray" if "ray" in line else "driver"

"""One quiet line of progress a stage, the same in a terminal and in a job's log.

    images: 1,200 of 30,000 · 3 errors · 41.3/s · 12 min left

In a terminal the line is redrawn; in a log it is printed now and then, without control characters.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import threading
import time
from contextlib import suppress
from types import TracebackType
from typing import Self

from ais.errors import RunError

_EVERY_S = {"terminal": 1.0, "log": 15.0}
_LAST_READS = 5


class Line:
    """A line of the terminal that is drawn again and again, or now and then a line of a log."""

    def __init__(self) -> None:
        self.terminal = sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
        self.every_s = _EVERY_S["terminal" if self.terminal else "log"]
        self._printed = time.monotonic()
        self._drawn = False

    def show(self, text: str) -> None:
        """Show the present state; a log takes it only if the last one is old enough."""
        now = time.monotonic()
        if self.terminal:
            # A line that wraps cannot be redrawn.
            print(f"\r\x1b[2K{text[: shutil.get_terminal_size().columns - 1]}", end="", flush=True)
            self._drawn = True
        elif now - self._printed >= self.every_s:
            print(text, flush=True)
            self._printed = now

    def keep(self, text: str) -> None:
        """Leave a line that stays; what comes next begins below it."""
        print(f"\r\x1b[2K{text}" if self._drawn else text, flush=True)
        self._drawn = False
        self._printed = time.monotonic()

    def close(self) -> None:
        """Let what comes next begin on a line of its own."""
        if self._drawn:
            print(flush=True)
        self._drawn = False


class Standstill:
    """Ends what the main thread waits for, as Ctrl-C does, when nothing has changed for too long.

    Ray has no other way to end an execution or a training from outside.

    Args:
        minutes: that it may stand still; ``None``: for ever, as where this is not made in the main thread.
    """

    def __init__(self, minutes: float | None) -> None:
        self._minutes = minutes if threading.current_thread() is threading.main_thread() else None
        self._moved: tuple[float, object] = time.monotonic(), None
        self._ended = False
        self._signal = signal.SIGINT
        if self._minutes and signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
            # As of what a script starts with &, which a terminal's Ctrl-C is not to end.
            self._signal = signal.SIGUSR1
            self._handler = signal.signal(self._signal, signal.default_int_handler)

    def note(self, seen: object) -> None:
        """Compare what is seen now with what was seen before; from any thread."""
        now = time.monotonic()
        since, before = self._moved
        if seen != before:
            self._moved = now, seen
        elif self._minutes and now - since > 60 * self._minutes and not self._ended:
            self._ended = True
            signal.pthread_kill(threading.main_thread().ident or 0, self._signal)

    def refuse(self, kind: type[BaseException] | None, done: str) -> None:
        """On leaving the block that waited, make an error of the interrupt, if it came from here.

        Args:
            kind: of the exception with which the block is left.
            done: how far it was, in words.

        Raises:
            RunError: it stood still.
        """
        if self._signal == signal.SIGUSR1:
            signal.signal(self._signal, self._handler)
        if self._ended and kind is KeyboardInterrupt:
            raise RunError(
                f"nothing was finished for {self._minutes:g} minutes, after {done}: see `ray status` for what the "
                "cluster waits for; what is written stays, and the same command continues; compute.stall_minutes=null "
                "waits for ever"
            ) from None


class ProgressLine:
    """Prints how far a stage is while the block runs; the work calls `advance`, or a subclass knows how far it is.

    Args:
        what: is counted, such as ``"images"``.
        total: to come.
        silent_s: a stage that took less leaves no line.
    """

    def __init__(self, what: str, total: int, *, silent_s: float = 0) -> None:
        self._what = what
        self._total = total
        self._silent_s = silent_s
        self._done = 0
        self._errors = 0
        self._seen = 0, 0
        self._started = time.monotonic()
        self._first: tuple[float, int] | None = None
        self._line = Line()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        if kind is None and time.monotonic() - self._started >= self._silent_s:
            for _ in range(_LAST_READS):  # the last counts of other processes may still be on their way
                if self._read_or_keep()[0] >= self._total:
                    break
                time.sleep(0.1)
            self._line.keep(self._text(*self._seen, last=True))
        else:
            self._line.close()  # an error message begins on a line of its own

    def advance(self, done: int = 1, errors: int = 0) -> None:
        """Count what is finished, errors among it; from the thread that works."""
        self._done += done
        self._errors += errors

    def read(self) -> tuple[int, int]:
        """Return how many are finished, and how many errors are among them."""
        return self._done, self._errors

    def _watch(self) -> None:
        while not self._stop.wait(_EVERY_S["terminal"]):
            done, errors = self._read_or_keep()
            if done < self._total or self._line.terminal:  # a log gets the last count once
                self._line.show(self._text(done, errors))

    def _read_or_keep(self) -> tuple[int, int]:
        with suppress(Exception):  # progress is never a reason to fail
            self._seen = self.read()
        return self._seen

    def _text(self, done: int, errors: int, last: bool = False) -> str:
        now = time.monotonic()
        if self._first is None and done:
            self._first = (now, done)
        if not done:
            return f"{self._what}: starting ({duration(now - self._started)})"
        text = f"{self._what}: {done:,} of {self._total:,}"
        if errors:
            text += f" · {errors:,} errors"
        # The rate leaves out what came before the first count, which is mostly models being loaded.
        since, before = self._first or (now, done)
        rate = (done - before) / (now - since) if now > since and done > before else done / (now - self._started)
        text += f" · {rate:,.1f}/s"
        if last:
            return f"{text} · {duration(now - self._started)}"
        return f"{text} · {duration((self._total - done) / rate)} left" if done < self._total else text


def duration(seconds: float) -> str:
    """Say a time in the unit that a reader would choose: ``48 s``, ``12 min``, ``3.4 h``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"

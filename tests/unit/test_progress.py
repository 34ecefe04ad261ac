"""The line of progress as a person and as a log sees it, through a real pseudo-terminal and a real pipe.

Nothing is faked but the pace: the lines are drawn every few milliseconds instead of every second.
"""

import os
import re
import subprocess
import sys

import pytest

from ais.config import FitConfig
from ais.progress import ProgressLine, duration
from ais.training.progress import describe

STAGE = """
import sys, time
from ais import progress
progress._EVERY_S = {"terminal": 0.02, "log": 0.05}
with progress.ProgressLine("images", 1200) as line:
    time.sleep(0.15)
    for _ in range(4):
        line.advance(300, errors=1)
        time.sleep(0.15)
    if "fail" in sys.argv:
        raise SystemExit("error: the cause")
print("next stage")
"""


def piped(*arguments: str) -> str:
    made = subprocess.run([sys.executable, "-c", STAGE, *arguments], capture_output=True, text=True, check=False)
    return made.stdout + made.stderr


def typed(*arguments: str, columns: int = 80, term: str = "xterm") -> str:
    """What a terminal of so many columns receives."""
    ours, theirs = os.openpty()
    environment = {**os.environ, "TERM": term, "COLUMNS": str(columns)}
    process = subprocess.Popen(
        [sys.executable, "-c", STAGE, *arguments], stdin=theirs, stdout=theirs, stderr=theirs, env=environment
    )
    os.close(theirs)
    received = b""
    while True:
        try:
            part = os.read(ours, 4096)
        except OSError:  # Linux: the other side has hung up
            break
        if not part:
            break
        received += part
    os.close(ours)
    process.wait()
    return received.decode().replace("\r\n", "\n")


def test_a_log_has_a_line_now_and_then_and_no_control_characters():
    text = piped()
    assert not re.search(r"[^\n\x20-\x7e·]", text)
    lines = text.splitlines()
    on_the_way = r"images: [369]00 of 1,200 · [123] errors · [\d,.]+/s · \d+ s left"
    assert any(re.fullmatch(on_the_way, line) for line in lines), lines
    assert re.fullmatch(r"images: 1,200 of 1,200 · 4 errors · [\d,.]+/s · \d+ s", lines[-2])
    assert lines[-1] == "next stage"


def test_a_terminal_has_one_line_that_is_redrawn():
    text = typed()
    rows = text.split("\n")
    assert len(rows) == 3, rows  # the stage, what comes next, and the end
    drawn = rows[0].split("\r\x1b[2K")
    assert len(drawn) > 4
    assert re.fullmatch(r"images: 1,200 of 1,200 · 4 errors · [\d,.]+/s · \d+ s", drawn[-1])
    assert rows[1] == "next stage"


def test_a_narrow_terminal_gets_no_line_that_wraps():
    *drawn, last = typed(columns=24).split("\n")[0].split("\r\x1b[2K")
    assert max(map(len, drawn)) == 23
    assert last.endswith(" s")  # the line that stays is whole


def test_a_terminal_without_control_sequences_is_treated_as_a_log():
    assert "\x1b" not in typed(term="dumb")


@pytest.mark.parametrize("see", [piped, typed])
def test_an_error_begins_on_a_line_of_its_own(see):
    assert see("fail").splitlines()[-1] == "error: the cause"


def test_counts_that_arrive_late_are_waited_for(capsys):
    class Late(ProgressLine):
        reads = 0

        def read(self):
            self.reads += 1
            return (7 if self.reads < 3 else 8), 0

    with Late("images", 8) as line:
        pass
    assert line.reads == 3
    assert capsys.readouterr().out.startswith("images: 8 of 8 · ")


def test_a_stage_that_may_be_silent_is_if_it_was_short(capsys):
    with ProgressLine("images", 1, silent_s=60) as line:
        line.advance()
    assert capsys.readouterr().out == ""


def test_durations():
    assert [duration(seconds) for seconds in (0, 89.4, 90, 5399, 5400, 36000)] == [
        "0 s", "89 s", "2 min", "90 min", "1.5 h", "10.0 h",
    ]  # fmt: skip


def test_an_epoch_in_a_line():
    metrics = {"variant": 1, "epoch": 75, "done": False, "validation_rmse": 0.2134, "best_rmse": 0.2, "best_epoch": 61}
    fit = FitConfig(variants=3)
    assert describe(metrics, fit, 30) == (
        "head 2 of 3 · epoch 75/300 · validation RMSE 0.2134 (best 0.2 at 61) · 30.0 epochs/s · at most 18 s left"
    )
    stopped = describe({**metrics, "variant": 0, "done": True}, FitConfig(), 30)
    assert stopped == "epoch 75/300 · validation RMSE 0.2134 (best 0.2 at 61) · stopped early"


STANDSTILL = """
import signal, sys, threading, time
if "ignored" in sys.argv:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
from ais.errors import RunError
from ais.progress import Standstill
before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGUSR1)
still = Standstill(0.002)
stop = threading.Event()
def watch():
    seen = 0
    while not stop.wait(0.01):
        seen = min(seen + 1, 20)
        still.note(seen)
thread = threading.Thread(target=watch)
thread.start()
started = time.monotonic()
try:
    time.sleep(60)
except KeyboardInterrupt as interrupt:
    stop.set()
    thread.join()
    try:
        still.refuse(type(interrupt), "2 of 9 images")
    except RunError as error:
        print(error)
assert 0.3 < time.monotonic() - started < 30
assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGUSR1)) == before
"""


@pytest.mark.parametrize("sigint", ["taken", "ignored"])
def test_what_stands_still_is_ended_where_a_script_started_it_in_the_background_too(sigint: str) -> None:
    """A shell without job control lets what it starts with & ignore Ctrl-C, and so whatever it starts in turn."""
    command = [sys.executable, "-c", STANDSTILL, sigint]
    made = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert made.returncode == 0, made.stderr
    assert made.stdout.startswith("nothing was finished for 0.002 minutes, after 2 of 9 images: see `ray status`")

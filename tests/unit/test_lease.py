"""The lock: real files, threads and processes, one of them stopped by a signal; clocks are real, and leases short.

The same on S3 is in ``tests/s3``. What is faked: a holder of another machine, as the file that it would leave.
"""

import json
import os
import pickle
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from fsspec.implementations.memory import MemoryFileSystem

import ais.lease
from ais.errors import LockedError, StorageError
from ais.lease import hold
from ais.storage import Folder, Storage
from tests.contention import contend

ROOT = Path(__file__).parents[2]
HOLDER = """
import sys, time
from ais.errors import LeaseLostError
from ais.lease import hold
from ais.storage import Storage
with hold(Storage().open(sys.argv[1]), lease_s=float(sys.argv[2])) as lease:
    print("holding", flush=True)
    for _ in sys.stdin:
        try:
            lease.check()
            print("mine", flush=True)
        except LeaseLostError as error:
            print(f"lost: {error}", flush=True)
"""


@pytest.fixture(params=["local", "memory"])
def folder(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Folder]:
    """A folder of a local filesystem, and of one where exclusive creation is fsspec's."""
    monkeypatch.setattr(ais.lease, "_SETTLE_S", 0.1)
    yield Storage().open(f"memory://{tmp_path}" if request.param == "memory" else str(tmp_path / "run"))
    MemoryFileSystem.store.clear()


class Holder:
    """A process that holds the lock and tells, when asked, whether it still does."""

    def __init__(self, folder: Folder, lease_s: float) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", HOLDER, folder.path, str(lease_s)],
            cwd=ROOT,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert self._line() == "holding"

    def _line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def ask(self) -> str:
        assert self.process.stdin is not None
        self.process.stdin.write("?\n")
        self.process.stdin.flush()
        return self._line()

    def __enter__(self) -> "Holder":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()


def leave_behind(folder: Folder, **record: Any) -> None:
    """The lock of a holder on another machine."""
    record = {"host": "elsewhere", "pid": 7, "machine": "other", "process": "1", "started": "then"} | record
    (folder / "lock" / "000004.json").write_text(json.dumps(record))


def names(folder: Folder) -> list[str]:
    return [file.path.rpartition("/")[2] for file in (folder / "lock").files()]


def test_one_holder_at_a_time_and_nothing_of_it_left(folder: Folder) -> None:
    with hold(folder, lease_s=30) as lease:
        lease.check()
        lease.renew()
        pickle.loads(pickle.dumps(lease.fence)).check()  # as it travels to workers
        assert names(folder) == ["000001.json"]
        with pytest.raises(LockedError, match=rf"lock' is held by process {os.getpid()} on ") as caught, hold(folder):
            pass
        assert caught.value.holder["pid"] == os.getpid()
        assert 0 < (caught.value.expires_at - datetime.now(UTC)).total_seconds() < 32
        again = pickle.loads(pickle.dumps(caught.value))
        assert (str(again), again.holder) == (str(caught.value), caught.value.holder)
        lease.check()
        with hold(folder, name="another", lease_s=30):
            lease.check()
    if not folder.local:  # the file stays, and says that it is nobody's
        assert json.loads((folder / "lock" / "000001.json").read_bytes())["released"]
    with hold(folder, lease_s=30) as lease:
        assert lease.fence.generation == (1 if folder.local else 2)
        assert len(names(folder)) == 1
    with pytest.raises(ZeroDivisionError), hold(folder):
        raise ZeroDivisionError
    assert folder.exists() != folder.local  # what was made for the lock alone goes with it
    with hold(folder / "run"):
        (folder / "run" / "file").write_text("")
    assert (folder / "run" / "lock").exists() != folder.local
    assert (folder / "run" / "file").exists()


def test_of_many_that_come_together_one_gets_it(folder: Folder) -> None:
    leave_behind(folder, lease_s=0)
    time.sleep(1.2)  # until it has expired
    got = contend(folder, 8, 30, 30)
    assert len(got) == 1
    assert got[0].generation == 5


def test_who_began_anew_beside_a_holder_leaves_nothing(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    """As after a look at a folder that its last holder was clearing away, while another counted on from it."""
    leave_behind(folder, lease_s=0)
    time.sleep(1.2)  # until it has expired
    look = ais.lease._generations
    with hold(folder) as lease:
        nothing: list[set[int]] = [set()]
        monkeypatch.setattr(ais.lease, "_generations", lambda place: nothing.pop() if nothing else look(place))
        with pytest.raises(LockedError), hold(folder):
            pass
        assert look(folder / "lock") == {lease.fence.generation}
        lease.check()


def test_taken_and_released_all_the_time(tmp_path: Path) -> None:
    """Whoever takes the lock while it is cleared away either gets it or is told who has it."""
    folder, inside = Storage().open(str(tmp_path / "run")), []
    outcomes: list[object] = []

    def contend() -> None:
        for _ in range(40):
            try:
                with hold(folder) as lease:
                    inside.append(lease)
                    assert inside == [lease]
                    inside.remove(lease)
                outcomes.append("held")
            except LockedError:
                outcomes.append("locked")
            except BaseException as error:
                outcomes.append(error)

    threads = [threading.Thread(target=contend) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [outcome for outcome in outcomes if outcome not in ("held", "locked")] == []
    assert outcomes.count("held") > 4
    with hold(folder):  # nothing of them is in the way
        pass


def test_a_lease_is_renewed(folder: Folder) -> None:
    with hold(folder, lease_s=0.6) as lease:
        time.sleep(2)  # more than the lease and the slack of a store's clock
        with pytest.raises(LockedError), hold(folder):
            pass
        lease.check()


def test_a_lease_of_another_machine_counts_until_it_expires(folder: Folder) -> None:
    leave_behind(folder, lease_s=0.5, job="raysubmit_1")
    with pytest.raises(LockedError, match="process 7 on elsewhere, job raysubmit_1, since then"), hold(folder):
        pass
    started, told = time.monotonic(), []
    with hold(folder, wait=True, lease_s=30, notice=told.append) as lease:
        assert [bool(re.match("waiting +at most [123] s .*process 7 on elsewhere", text)) for text in told] == [True]
        assert time.monotonic() - started > 0.5
        assert lease.fence.generation == 5
        assert names(folder) == ["000005.json"]


def test_waiting_ends_when_the_holder_shows_that_it_lives(folder: Folder) -> None:
    leave_behind(folder, lease_s=60)
    renewal = threading.Timer(1.5, lambda: leave_behind(folder, lease_s=60))
    renewal.start()
    with pytest.raises(LockedError), hold(folder, wait=True):
        pass
    renewal.join()


def test_a_file_that_is_not_understood_counts_for_a_while(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "lock" / "000001.json").write_bytes(b'{"host": "el')
    with pytest.raises(LockedError, match="an unknown host"), hold(folder):
        pass
    monkeypatch.setattr(ais.lease, "_UNKNOWN_LEASE_S", -5)
    with hold(folder):
        pass


@pytest.mark.skipif(sys.platform != "linux", reason="looks under /proc")
def test_a_killed_holder_of_this_machine_is_dead_at_once(tmp_path: Path) -> None:
    folder = Storage().open(str(tmp_path))
    with Holder(folder, 3600) as holder:
        for wait in (False, True):  # alive, which needs no waiting to see
            with pytest.raises(LockedError, match=f"process {holder.process.pid} on"), hold(folder, wait=wait):
                pass
        holder.process.kill()
        holder.process.wait()
        with hold(folder) as lease:
            lease.check()


def test_a_paused_holder_finds_out(tmp_path: Path) -> None:
    folder = Storage().open(str(tmp_path))
    with Holder(folder, 0.3) as holder:
        assert holder.ask() == "mine"
        holder.process.send_signal(signal.SIGSTOP)
        time.sleep(1.6)
        with hold(folder, lease_s=30) as lease:
            holder.process.send_signal(signal.SIGCONT)
            time.sleep(0.5)  # in which it would renew
            assert holder.ask().startswith("lost: the lock")
            assert f"taken over by process {os.getpid()} on" in holder.ask()
            lease.check()
            holder.process.communicate()  # it ends, and does not release what is no longer its own
            lease.check()
        assert not (folder / "lock").exists()


def test_a_filesystem_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", fail)
    folder = Storage().open(str(tmp_path))
    with hold(folder), pytest.raises(LockedError), hold(folder):
        pass
    assert list(tmp_path.iterdir()) == []


def test_where_nothing_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with (
        pytest.raises(StorageError, match=r"lock/000001\.json' cannot be written"),
        hold(Storage().open(str(tmp_path / "file"))),
    ):
        pass


def test_a_name_that_no_filesystem_takes(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="File name too long"), hold(Storage().open(str(tmp_path / ("x" * 300)))):
        pass

"""One writer at a time: a lock on a folder of any storage.

The lock is a lease. Its holder keeps one small file, ``<folder>/<name>/<generation>.json``, and renews it; the file of
the highest generation is the lock. Taking it means creating the file of the next generation, which a store does for one
of several contenders only: ``If-None-Match: *`` on S3 (what fsspec calls ``mode="create"`` there and for other stores),
a hard link on a local or network filesystem. So a lease that expired is taken over by one, whoever else tries.

A holder that was paused (a stopped process, a machine that slept) cannot know in time that its lease has run out. So
whoever writes asks the store first, with `Fence.check`; what was on its way in that moment may still arrive, and must
be harmless. Ages are differences between two times of the store, so clocks that disagree do not matter.

A renewal that a store is slow to take may arrive even later, when the lock was taken over and given back. In an object
store, which makes of it a file anew, the file that gave the lock back therefore stays, and says so: whatever is of a
lower generation is nobody's. On a filesystem a renewal changes a file that is there or fails, and nothing stays.

Stores that ignore conditions are found out when the lock is taken, and then the last writer wins: best effort, with a
pause before it is read back. fsspec's own fallback for filesystems without exclusive creation is of the same strength.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import re
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from ais.errors import LeaseLostError, LockedError, StorageError
from ais.storage import Folder, explain, tried

_FILE = re.compile(r"^([0-9]{6,})\.json$")
_ATTEMPTS, _PROBES = 100, 20
_RELEASED = "released"  # in the file of a lock that was given back
_SLACK_S = 1.0  # S3 tells times in whole seconds
_UNKNOWN_LEASE_S = 10.0  # of a file that is not understood, which may be just being written
_SETTLE_S = 2.0  # for writers who came at the same moment, in a store that ignores conditions
_TIMES = ("LastModified", "mtime", "updated", "last_modified", "modified", "created")


@dataclass(frozen=True)
class Fence:
    """What a holder's helpers need to know to ask whether the lock is still its own; travels to workers.

    Args:
        place: folder of the lock's files.
        generation: of the holder's file.
        token: in the holder's file.
    """

    place: Folder
    generation: int
    token: str

    def check(self) -> None:
        """Ask the store, in two small requests, whether the lock is still held.

        Raises:
            LeaseLostError: somebody else took it over.
            StorageError: the store does not answer.
        """
        generation = _highest(self.place)
        record = _read(self.place, generation) if generation == self.generation else None
        if record is None or record.get("token") != self.token:
            newer = _read(self.place, generation) if generation > self.generation else None
            by = f" by {_describe(newer)}" if newer else ""
            raise LeaseLostError(
                f"the lock {self.place.address!r} was taken over{by}: it had not been renewed in time, because this "
                "process or machine was paused; it writes nothing more"
            )


@dataclass
class Lease:
    """A lock that is held; renewed in the background until it is released.

    Args:
        fence: for whoever writes under the lock.
        lease_s: seconds without renewal after which others may take over.
        holder: what the lock's file says of the holder.
    """

    fence: Fence
    lease_s: float
    holder: dict[str, Any]
    _made: tuple[Path, ...] = field(default=(), repr=False)
    _stop: threading.Event = field(default_factory=threading.Event, repr=False)
    _thread: threading.Thread | None = field(default=None, repr=False)

    def check(self) -> None:
        """As `Fence.check`."""
        self.fence.check()

    def renew(self) -> None:
        """Start the lease's time anew.

        Raises:
            LeaseLostError: somebody else took it over.
            StorageError: the store does not answer.
        """
        self.fence.check()
        place = self.fence.place / _file_name(self.fence.generation)
        try:
            if place.local:
                os.utime(place.path)
            else:
                tried(lambda: place.filesystem.pipe_file(place.path, _encode(self.holder)))
        except FileNotFoundError:
            self.fence.check()
            raise
        except Exception as error:  # each filesystem raises its own kinds
            raise StorageError(
                f"{place.address!r} cannot be renewed: {explain(error)}; check the address and the access to it"
            ) from error

    def _start(self) -> None:
        self._thread = threading.Thread(target=self._keep, name="lease", daemon=True)
        self._thread.start()

    def _keep(self) -> None:
        wait = self.lease_s / 3
        while not self._stop.wait(wait):
            try:
                self.renew()
                wait = self.lease_s / 3
            except LeaseLostError:
                return  # whoever writes next is told
            except Exception:  # a store that cannot be reached may come back; until it does nobody can take over either
                wait = self.lease_s / 10

    def _release(self) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        # What remains in the way of this expires by itself.
        with suppress(Exception):
            self.fence.check()
            file = self.fence.place / _file_name(self.fence.generation)
            if file.local:
                file.remove()
            else:
                tried(lambda: file.filesystem.pipe_file(file.path, _encode({**self.holder, _RELEASED: True})))
            self.fence.place.remove_unfinished()
            for folder in self._made:  # those that nothing was put into
                folder.rmdir()


@contextmanager
def hold(
    folder: Folder,
    *,
    name: str = "lock",
    lease_s: float = 60.0,
    wait: bool = False,
    notice: Callable[[str], object] = lambda _: None,
) -> Iterator[Lease]:
    """Hold the lock of a folder while the block runs.

    A dead holder's lock is taken over at once where it can be seen that it is dead (the process was of this machine and
    is gone), otherwise when its lease has expired.

    Args:
        folder: need not exist.
        name: of the lock; its files are in ``<folder>/<name>``.
        lease_s: seconds without renewal after which others may take over; renewed three times as often.
        wait: watch a holder of whom nothing is known until it renews its lease, which shows that it lives, or its
            lease expires. Otherwise it counts as alive as long as its lease lasts.
        notice: is told once, before waiting, for whom.

    Raises:
        LockedError: somebody else holds it.
        StorageError: the lock cannot be read or written.
    """
    lease = _acquire(folder / name, lease_s, wait, notice)
    lease._start()
    try:
        yield lease
    finally:
        lease._release()


def _acquire(place: Folder, lease_s: float, wait: bool, notice: Callable[[str], object]) -> Lease:
    holder = {**_facts(), "token": uuid.uuid4().hex, "lease_s": lease_s}
    made = _missing_folders(Path(place.path)) if place.local else ()
    for _ in range(_ATTEMPTS):
        before = _generations(place)
        generation = max(before, default=0)
        if generation and not _await_free(place, generation, wait, notice):
            continue  # cleared away, so the count begins anew
        fence = Fence(place, generation + 1, str(holder["token"]))
        if not _create(place, _file_name(generation + 1), holder):
            continue
        if _is_alone(fence, before):
            for old in place.files("*.json"):
                if _generation(old) <= generation:
                    with suppress(OSError, StorageError):
                        old.remove()
            return Lease(fence, lease_s, holder, made)
        _withdraw(fence)
    raise StorageError(
        f"the lock {place.address!r} cannot be taken: something else is in its place, or it changes all the time; "
        "move away what is there, and start again"
    )


def _is_alone(fence: Fence, before: set[int]) -> bool:
    """Whether nobody else has the lock that was just taken.

    Where a holder clears its files away, one contender may count on from them while another begins anew.

    Args:
        fence: of who asks.
        before: generations that were there when it looked.
    """
    try:
        fence.check()
    except LeaseLostError:
        return False
    return not fence.place.local or not _generations(fence.place) - before - {fence.generation}


def _withdraw(fence: Fence) -> None:
    """Delete one's own file of a lock that another has: it would look like a holder that lives."""
    record = _read(fence.place, fence.generation)
    if record is not None and record.get("token") == fence.token:
        with suppress(OSError, StorageError):
            (fence.place / _file_name(fence.generation)).remove()


def _missing_folders(folder: Path) -> tuple[Path, ...]:
    """The folders that have to be made for this one, itself first even if it is there: it is the lock's own."""
    # Path.exists would raise where a folder may not be looked into; what is wrong is said when the lock is written.
    return (folder, *itertools.takewhile(lambda parent: not os.path.exists(parent), folder.parents))


def _await_free(place: Folder, generation: int, wait: bool, notice: Callable[[str], object]) -> bool:
    """Return True when the lock of this generation may be taken over, False when it is gone."""
    first: float | None = None
    failures = 0
    while True:
        record = _read(place, generation)
        if record is None:
            return False
        if _RELEASED in record or _is_dead(record):
            return True
        renewed = _modified(place / _file_name(generation))
        if renewed is None:
            return False
        try:
            left = renewed + _lease_s(record) + _SLACK_S - _store_now(place)
        except StorageError:
            failures += 1
            if failures == _PROBES:
                raise
            time.sleep(random.uniform(0, 0.05))  # its holder clears away just now
            continue
        if left < 0:
            return True
        if not wait or _is_alive(record) or (first is not None and renewed > first):
            expires = datetime.now(UTC) + timedelta(seconds=left)
            raise LockedError(place.address, _describe(record), record, expires)
        if first is None:
            first = renewed
            notice(f"waiting     at most {left:.0f} s to see whether {_describe(record)}, still writes here")
        time.sleep(min(left + 0.01, 1.0))


def _create(place: Folder, name: str, holder: dict[str, Any]) -> bool:
    """Create a file of the lock unless it exists; return whether this process did it."""
    file, data = place / name, _encode(holder)
    try:
        if file.local:
            return _link(Path(file.path), data)
        try:
            tried(lambda: file.filesystem.pipe_file(file.path, data, mode="create"))
            # A store that lets it be created twice does not know conditions.
            tried(lambda: file.filesystem.pipe_file(file.path, data, mode="create"))
            time.sleep(_SETTLE_S)
        except FileExistsError:
            pass
        except OSError:
            if _read(place, _generation(file)) is None:
                raise
    except Exception as error:  # each filesystem raises its own kinds
        raise StorageError(
            f"{file.address!r} cannot be written: {explain(error)}; check the address and the access to it"
        ) from error
    # A request that was sent again after its answer got lost finds its own file there.
    record = _read(place, _generation(file))
    return record is not None and record.get("token") == holder["token"]


def _link(final: Path, data: bytes) -> bool:
    partial = final.with_name(f".{final.name}.{uuid.uuid4().hex}.partial")
    try:
        try:
            final.parent.mkdir(parents=True, exist_ok=True)
            partial.write_bytes(data)
        except (FileNotFoundError, FileExistsError):  # its last holder clears away just now, or no folder is there
            return False
        try:
            os.link(partial, final)
        except (FileExistsError, FileNotFoundError):  # another has it, or as above
            return False
        except OSError:  # a filesystem without hard links
            try:
                with final.open("xb") as file:
                    file.write(data)
            except FileExistsError:
                return False
    finally:
        partial.unlink(missing_ok=True)
    return True


def _highest(place: Folder) -> int:
    """The highest generation there, 0 if there is none."""
    return max(_generations(place), default=0)


def _generations(place: Folder) -> set[int]:
    return {_generation(file) for file in place.files("*.json")} - {0}


def _read(place: Folder, generation: int) -> dict[str, Any] | None:
    """What the lock's file says; nothing if it cannot be understood, ``None`` if it is gone."""
    file = place / _file_name(generation)
    try:
        record = json.loads(file.read_bytes())
    except FileNotFoundError:
        return None
    except ValueError:
        record = {}
    except Exception as error:  # each filesystem raises its own kinds
        raise StorageError(
            f"{file.address!r} cannot be read: {explain(error)}; check the address and the access to it"
        ) from error
    return record if isinstance(record, dict) else {}


def _modified(file: Folder) -> float | None:
    """Time of the last change by the store's clock, in seconds since 1970; ``None`` if the file is gone."""
    try:
        file.filesystem.invalidate_cache()
        info = tried(lambda: file.filesystem.info(file.path))
    except FileNotFoundError:
        return None
    except Exception as error:  # each filesystem raises its own kinds
        raise StorageError(
            f"{file.address!r} cannot be read: {explain(error)}; check the address and the access to it"
        ) from error
    changed = next((info[key] for key in _TIMES if info.get(key)), None)
    if isinstance(changed, str):
        changed = datetime.fromisoformat(changed)
    if isinstance(changed, datetime):
        return changed.timestamp()
    if changed is None:
        raise StorageError(f"{file.address!r}: this store tells no times of change, so no lock can be held in it")
    return float(changed)


def _store_now(place: Folder) -> float:
    """The time by the store's clock: that of a file written now."""
    probe = place / f"probe-{uuid.uuid4().hex}"
    probe.write_bytes(b"")
    try:
        now = _modified(probe)
    finally:
        with suppress(Exception):
            probe.remove()
    if now is None:
        raise StorageError(f"{probe.address!r} is gone as soon as it is written; give an output that keeps its files")
    return now


def _generation(file: Folder) -> int:
    match = _FILE.match(file.path.rpartition("/")[2])
    return int(match[1]) if match else 0


def _file_name(generation: int) -> str:
    return f"{generation:06d}.json"


def _encode(holder: dict[str, Any]) -> bytes:
    return (json.dumps(holder, indent=2) + "\n").encode()


def _facts() -> dict[str, Any]:
    """Who holds the lock, for people, and for telling on the same machine whether it still lives."""
    pid = os.getpid()
    facts: dict[str, Any] = {
        "host": socket.gethostname(),
        "pid": pid,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    with suppress(KeyError, ValueError, TypeError):  # set by Ray in a submitted job's driver
        metadata = json.loads(os.environ["RAY_JOB_CONFIG_JSON_ENV_VAR"])["metadata"]
        facts["job"] = metadata["job_submission_id"]
    machine = _machine()
    return facts if machine is None else {**facts, "machine": machine, "process": _process(pid)}


def _machine() -> str | None:
    """Names what a process id means something in: this start of this kernel, and this namespace of processes."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None


def _process(pid: int | None) -> str | None:
    """When a process started, in the kernel's ticks, so that a later one of the same id is told apart."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]


def _lease_s(record: dict[str, Any]) -> float:
    given = record.get("lease_s")
    return float(given) if isinstance(given, int | float) else _UNKNOWN_LEASE_S


def _comparable(record: dict[str, Any]) -> bool:
    return record.get("process") is not None and record.get("machine") == _machine()


def _is_dead(record: dict[str, Any]) -> bool:
    return _comparable(record) and _process(record.get("pid")) != record["process"]


def _is_alive(record: dict[str, Any]) -> bool:
    return _comparable(record) and _process(record.get("pid")) == record["process"]


def _describe(record: dict[str, Any]) -> str:
    job = f", job {record['job']}" if record.get("job") else ""
    return (
        f"process {record.get('pid', '?')} on {record.get('host', 'an unknown host')}{job}, "
        f"since {record.get('started', '?')}"
    )

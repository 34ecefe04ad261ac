"""The folders of scheduled scoring: a series of runs for every model, and one view of the collection.

Layout::

    OUTPUT/latest.parquet            the collection, one row per image, as of the newest run; replaced atomically
    OUTPUT/latest.json               which run that is, where its snapshot lies, and when it was last checked
    OUTPUT/lock/                     held while a run is at work; in an object store a small file stays
    OUTPUT/series/SERIES/
        series.json                  state: the newest snapshot, and a run that is not finished
        runs/TICK/                   a run folder (`ais.runs`) of the images that were to be scored, and
            draft.parquet            while it is at work: the collection with open rows
            snapshot.parquet         the collection as this run left it; written once
            drift.json               how the scores moved

A *series* holds the runs of one model over one collection; its name is derived from both. A *tick* names a run.

**What readers see.** ``latest.parquet`` is one file, a copy of the newest snapshot, replaced by one rename or, in an
object store, by one server-side copy: whoever opens it gets the old one whole or the new one whole. Who has it open
meanwhile goes on reading the old one from a filesystem; in an object store, requests of fsspec and DuckDB name the ETag
that they began with, and fail rather than mix. A reader that must not fail, or whose client does not compare ETags,
takes the snapshot that ``latest.json`` names (itself one atomic write): snapshots are never written again.

**What survives a kill.** The order is: draft, run folder, results, snapshot, ``latest.parquet``, ``latest.json``,
``summary.json``, ``series.json``. The state moves last, so whatever came before it is done again from the same draft,
with the same outcome.
"""

from __future__ import annotations

import json
import os
import posixpath
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from ais.errors import RunError
from ais.lease import Fence
from ais.runs import Run
from ais.scoring.files import copy
from ais.storage import Folder, read_json, reading, tried

_UNITS = {"h": "hours", "d": "days", "w": "weeks"}


def tick_of(now: datetime) -> str:
    """Name a run by its time, in UTC, to the second: ``20261125T020000Z``."""
    return now.strftime("%Y%m%dT%H%M%SZ")


def duration(text: str) -> timedelta:
    """Read ``12h``, ``30d`` or ``8w``."""
    return timedelta(**{_UNITS[text[-1]]: int(text[:-1])})


@dataclass(frozen=True)
class Snapshot:
    """What a series knows of its newest snapshot.

    Args:
        run_id: of the run that wrote it.
        path: of the file, relative to OUTPUT.
        digest: of the listing it stands for.
        present: images with a score.
        failed: images that could not be used.
        gone: images that are not listed any more.
        retryable: of the failed ones, those that are worth another try.
        runs: run ids that rows come from.
        limits: on one image under which it was made; others may let failed images pass.
        finished_at: when its run finished, in ISO format.
    """

    run_id: str
    path: str
    digest: str
    present: int
    failed: int
    gone: int
    retryable: int
    runs: tuple[str, ...]
    limits: dict[str, Any]
    finished_at: str

    @classmethod
    def of(cls, record: dict[str, Any]) -> Snapshot:
        """Read it from JSON."""
        return cls(**{**record, "runs": tuple(record["runs"])})

    @property
    def error_share(self) -> float:
        """Share of the listed images that could not be used."""
        listed = self.present + self.failed
        return self.failed / listed if listed else 0.0


@dataclass(frozen=True)
class State:
    """Where a series stands; ``series.json``.

    Args:
        snapshot: the newest, if any.
        open: tick of the run that is not finished, if any; there is never more than one.
        newest: tick of the newest complete run, which may have found nothing to do.
    """

    snapshot: Snapshot | None = None
    open: str | None = None
    newest: str | None = None


class Series:
    """The runs of one model over one collection.

    Args:
        output: OUTPUT.
        name: of the series.
        fence: of the lock on OUTPUT under which it is written, if it is.
    """

    def __init__(self, output: Folder, name: str, fence: Fence | None = None) -> None:
        self.output = output
        self.name = name
        self._fence = fence
        self.folder = output / "series" / name

    def run(self, tick: str) -> Run:
        """The run folder of a tick; nothing is read or created."""
        return Run(self.folder / "runs" / tick, self._fence)

    def under(self, fence: Fence) -> Series:
        """The same, written only while the lock lasts."""
        return Series(self.output, self.name, fence)

    def check_lock(self) -> None:
        """Ask whether OUTPUT is still ours to write.

        Raises:
            LeaseLostError: somebody else took it over.
        """
        if self._fence is not None:
            self._fence.check()

    def relative(self, place: Folder) -> str:
        """Path below OUTPUT."""
        return posixpath.relpath(place.path, self.output.path)

    def state(self) -> State:
        """Read ``series.json``.

        Raises:
            RunError: it is not of this format.
        """
        record = read_json(self.folder / "series.json")
        if record is None:
            return State()
        try:
            given = record["snapshot"]
            return State(given and Snapshot.of(given), record["open"], record["newest"])
        except (KeyError, TypeError) as error:
            raise RunError(
                f"{(self.folder / 'series.json').address!r} is not usable: lacks {error}; "
                "delete it, and start the same command again"
            ) from error

    def write_state(self, state: State) -> None:
        """Replace ``series.json``."""
        self.check_lock()
        document = {"series": self.name, **asdict(state)}
        (self.folder / "series.json").write_text(json.dumps(document, indent=2) + "\n")

    def publish(self, snapshot: Snapshot, checked_at: datetime) -> None:
        """Make a snapshot of this series the collection's latest, unless it is that already.

        ``latest.parquet`` is replaced before ``latest.json``: what the pointer names is always there.
        """
        self.check_lock()
        pointer = self.output / "latest.json"
        latest = self.output / "latest.parquet"
        if (read_json(pointer) or {}).get("snapshot") != snapshot.path or not latest.exists():
            copy(self.output / snapshot.path, latest)
        document = {"series": self.name, **asdict(snapshot), "snapshot": snapshot.path}
        for internal in ("path", "digest", "runs", "retryable", "limits"):
            del document[internal]
        document["checked_at"] = checked_at.isoformat(timespec="seconds")
        pointer.write_text(json.dumps(document, indent=2) + "\n")

    def prune(self, before: datetime, built_on: set[str]) -> list[str]:
        """Delete what is older than ``before`` and not needed; return the ticks that lost something.

        Of a run that finished before then its snapshot goes, and the whole run if no row of the newest snapshot comes
        from it. Never touched: the newest snapshot, the newest complete run, a run that is not finished, and runs whose
        snapshots, paths relative to OUTPUT, are ``built_on``.

        Only under the lock. A run's summary goes last, so that an interrupted deletion is found again.
        """
        state = self.state()
        needed = set(state.snapshot.runs) if state.snapshot else set()
        kept = {state.open, state.newest, state.snapshot.run_id if state.snapshot else None}
        pruned = []
        for tick in _folders(self.folder / "runs"):
            run = self.run(tick)
            if tick in kept or self.relative(run.folder / "snapshot.parquet") in built_on:
                continue
            summary = run.summary()
            if summary is None or "finished_at" not in summary:  # of another version: its age is not known
                continue
            if datetime.fromisoformat(summary["finished_at"]) >= before:
                continue
            snapshot = run.folder / "snapshot.parquet"
            if tick not in needed:
                _remove_run(run)
                pruned.append(tick)
            elif snapshot.exists():
                snapshot.remove()
                pruned.append(tick)
        return pruned


def prune_all(output: Folder, before: datetime) -> list[str]:
    """`Series.prune` every series below OUTPUT; return ``series/tick`` of what lost something.

    Snapshots that ``latest.json`` names, or that a run which is not finished compares with, stay in every series.
    """
    every = [Series(output, name) for name in _folders(output / "series")]
    latest = read_json(output / "latest.json", ("snapshot",))
    built_on = {latest["snapshot"]} if latest else set()
    for series in every:
        tick = series.state().open
        record = series.run(tick).record() if tick else None
        if record is not None and record["before"]:
            built_on.add(record["before"]["snapshot"])
    return [f"{series.name}/{tick}" for series in every for tick in series.prune(before, built_on)]


def _folders(place: Folder) -> list[str]:
    """Names of the folders directly inside, sorted; none if it does not exist."""
    place.filesystem.invalidate_cache()
    try:
        with reading(place):
            entries = tried(lambda: place.filesystem.ls(place.path, detail=True))
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted(
        posixpath.basename(str(entry["name"]).rstrip("/")) for entry in entries if entry["type"] == "directory"
    )


def _remove_run(run: Run) -> None:
    filesystem = run.folder.filesystem
    filesystem.invalidate_cache()
    summary = (run.folder / "summary.json").path
    for path in sorted(tried(lambda: filesystem.find(run.folder.path))):
        if path != summary:
            Folder(filesystem, path).remove()
    if run.folder.local:
        for folder, _, _ in os.walk(run.folder.path, topdown=False):
            if folder != run.folder.path:
                Path(folder).rmdir()
    Folder(filesystem, summary).remove()
    if run.folder.local:
        Path(run.folder.path).rmdir()

"""Is a run, as it lies there, what was written, and all of it? And the way back where it is not."""

from __future__ import annotations

import posixpath
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa

from ais.errors import DamagedError, RunError
from ais.runs import SELECTED_PICTURES, Accounting, Run, Tally
from ais.shards import PNG_BYTES_KEY, PNG_KEY, PNG_SHA256_KEY, PictureTar, read_sealed
from ais.storage import Folder, reading, tried

_READERS = 4  # each holds one shard of results
_READ_BYTES = 2**20


@dataclass(frozen=True)
class Damage:
    """One thing that is not as it was written.

    Args:
        files: that have to go so that their images are done again.
        what: it is, to be read after the first file's name.
    """

    files: tuple[Folder, ...]
    what: str

    def __str__(self) -> str:
        return f"{self.files[0].address}: {self.what}"


@dataclass(frozen=True)
class Verification:
    """What reading a run back found.

    Args:
        accounting: every image that is listed, against every row.
        complete: ``summary.json`` is there and says the same.
        shards: files read.
        size: bytes read.
        damages: shards that are damaged, or that do not fit together.
        orphans: pictures that no shard of results names, and files that were never finished.
    """

    accounting: Accounting
    complete: bool
    shards: int
    size: int
    damages: list[Damage]
    orphans: list[Folder]

    @property
    def whole(self) -> bool:
        """Nothing is wrong, and nothing is left to do."""
        return self.complete and self.accounting.whole and not self.damages and not self.orphans


def verify(run: Run, watch: Callable[[int], None] = lambda _: None) -> Verification:
    """Read a run back, every byte of it; nothing is changed. Memory holds a shard a thread, and ten bytes an image.

    Checked are the seals of manifest, results and errors; the digests of the pictures that the results or the summary
    name, and the checksums inside all of them; that each image with a picture is a member of the tar that its row
    names, and no other is; that every listed image is in results or errors exactly once, under the address that it was
    listed with; and that the summary says the same.

    Args:
        run: may be unfinished, but nobody should be writing it.
        watch: is told after every file how many there were.

    Raises:
        RunError: there is no run, or its manifest is damaged: what it set out to do is not known.
        StorageError: a file cannot be read.
    """
    record = run.record()
    if record is None:
        raise RunError(f"there is no run at {run.folder.address!r}")
    reading = _Reading(run, record["images"], watch)
    reading.manifest()
    reading.results()
    reading.errors()
    reading.pictures()
    return reading.found()


class _Reading:
    """Reads one kind of file after the other and keeps what it finds."""

    def __init__(self, run: Run, listed: int, watch: Callable[[int], None]) -> None:
        self._run = run
        self._listed = listed
        self._watch = watch
        self._tally = Tally(listed)
        self._scored = np.zeros(listed, bool)
        self._addresses = np.zeros(listed, np.int64)  # their hashes
        self._named: dict[str, Folder] = {}  # pictures, and the shard of results that names them
        self._damages: list[Damage] = []
        self._orphans: list[Folder] = []
        self._shards = self._size = 0

    def manifest(self) -> None:
        """Check that it is whole; nothing can be said without it."""
        run, rows = self._run, 0
        for part, read in self._each(run.manifest.files("*.parquet"), _read_manifest):
            if isinstance(read, DamagedError):
                raise RunError(
                    f"{part.address!r} is damaged: {read}. What the run set out to do is no longer known; "
                    "start another, with another run_id or output"
                )
            if not np.array_equal(read.ids, np.arange(rows, rows + len(read.ids))):
                raise RunError(
                    f"{part.address!r} does not go on at image {rows:,}: a part of the manifest is missing; "
                    "bring it back, or start another run_id"
                )
            self._addresses[rows : rows + len(read.ids)] = read.addresses[: max(0, self._listed - rows)]
            rows += len(read.ids)
        if rows != self._listed:
            raise RunError(f"{run.manifest.address!r} has {rows:,} images, run.json says {self._listed:,}")

    def results(self) -> None:
        """Check them and their pictures."""
        for shard, read in self._each(self._run.results.files("*.parquet"), partial(_read_results, self._run)):
            if isinstance(read, DamagedError):
                self._damages.append(Damage((shard,), str(read)))
                continue
            if damage := read.damage or self._mistaken(read.ids, read.addresses):
                self._damages.append(Damage((shard, *read.pictures), damage))
            for pictures in read.pictures:
                other = self._named.setdefault(_name(pictures), shard)
                if other is not shard:
                    self._damages.append(Damage((shard,), f"it names the pictures of {other.address}"))
            self._tally.add_scored(read.ids)
            self._scored[read.ids[(read.ids >= 0) & (read.ids < self._listed)]] = True

    def errors(self) -> None:
        """Check them."""
        for shard, read in self._each(self._run.errors.files("*.parquet"), _read_errors):
            if isinstance(read, DamagedError):
                self._damages.append(Damage((shard,), str(read)))
            else:
                if damage := self._mistaken(read.rows["image_id"].to_numpy(), read.addresses):
                    self._damages.append(Damage((shard,), damage))
                self._tally.add_failed(read.rows)

    def _mistaken(self, ids: np.ndarray, addresses: np.ndarray) -> str:
        """Say which row is of another address than the manifest's; nothing if none is."""
        known = (ids >= 0) & (ids < self._listed)
        others = ids[known][self._addresses[ids[known]] != addresses[known]]
        return f"its image {others[0]} has another uri than the manifest's" if len(others) else ""

    def pictures(self) -> None:
        """Check those that stand for themselves, and find what belongs to nothing."""
        run, written = self._run, (self._run.summary() or {}).get(SELECTED_PICTURES)
        missing = set(written or ())
        for shard, read in self._each([*run.png.files("top-*.tar"), *run.png.files("bottom-*.tar")], _read_pictures):
            missing.discard(_name(shard))
            if isinstance(read, DamagedError):
                self._damages.append(Damage((shard,), str(read)))
            elif written is not None and written.get(_name(shard)) != [read.size, read.sha256]:
                self._damages.append(Damage((shard,), "it is not what was written: size or SHA-256 is another"))
            elif strangers := [name for name in read.names if not self._is_scored(name)]:
                self._damages.append(Damage((shard,), f"its member {strangers[0]} is of no image in results"))
        self._damages += [Damage((run.png / name,), "it is missing") for name in sorted(missing)]
        self._orphans += [tar for tar in run.png.files("part-*.tar") if _name(tar) not in self._named]
        for place in (run.folder, run.manifest, run.results, run.errors, run.png):
            self._orphans += place.files(".*.partial")

    def _is_scored(self, member: str) -> bool:
        image = member.removesuffix(".png")
        return image.isdecimal() and int(image) < self._listed and bool(self._scored[int(image)])

    def found(self) -> Verification:
        """All of it."""
        accounting = self._tally.accounting()
        complete = _says_the_same(self._run, accounting)
        return Verification(accounting, complete, self._shards, self._size, self._damages, self._orphans)

    def _each(self, shards: list[Folder], read: Callable[[Folder], Any]) -> Iterator[tuple[Folder, Any]]:
        """What reading each shard gives, in their order, a few at a time; a `DamagedError` where it is damaged."""

        def one(shard: Folder) -> Any:
            try:
                return read(shard)
            except DamagedError as error:
                return error

        with ThreadPoolExecutor(_READERS) as pool:
            for start in range(0, len(shards), 2 * _READERS):
                some = shards[start : start + 2 * _READERS]
                for shard, result in zip(some, pool.map(one, some), strict=True):
                    self._shards += 1
                    self._size += getattr(result, "size", 0)
                    self._watch(self._shards)
                    yield shard, result


def repair(run: Run, found: Verification) -> int:
    """Delete what is damaged, so that the next start does its images again; return how many files that were.

    Only under the lock. What is there twice and what is orphaned the next start clears away by itself.

    Raises:
        LeaseLostError: the run is no longer ours to write.
    """
    if found.whole:
        return 0
    run.reopen()  # first: whatever happens from here on, the run is no longer complete
    damaged = {file.path: file for damage in found.damages for file in damage.files if file.exists()}
    for file in damaged.values():
        file.remove()
    return len(damaged)


@dataclass(frozen=True)
class _Manifest:
    size: int
    ids: np.ndarray
    addresses: np.ndarray


@dataclass(frozen=True)
class _Results:
    size: int
    ids: np.ndarray
    addresses: np.ndarray
    pictures: tuple[Folder, ...]
    damage: str


@dataclass(frozen=True)
class _Errors:
    size: int
    rows: pa.Table
    addresses: np.ndarray


def _hashes(addresses: pa.ChunkedArray) -> np.ndarray:
    """64 bits for each address, the same within this process."""
    return np.fromiter(map(hash, addresses.to_pylist()), np.int64, len(addresses))


def _read_manifest(part: Folder) -> _Manifest:
    file, size = read_sealed(part)
    rows = file.read(columns=["image_id", "uri"])
    return _Manifest(size, rows["image_id"].to_numpy(), _hashes(rows["uri"]))


def _read_results(run: Run, shard: Folder) -> _Results:
    """Read a shard of results and the pictures that it names."""
    file, size = read_sealed(shard)
    metadata = {key.decode(): value.decode() for key, value in (file.schema_arrow.metadata or {}).items()}
    columns = [name for name in ("image_id", "uri", "png") if name in file.schema_arrow.names]
    rows = file.read(columns=columns)
    ids, addresses = rows["image_id"].to_numpy(), _hashes(rows["uri"])
    if metadata.get("ais.run_id", run.run_id) != run.run_id:
        return _Results(size, ids, addresses, (), f"it is of the run {metadata['ais.run_id']!r}")
    wanted = [] if "png" not in columns else [name is not None for name in rows["png"].to_pylist()]
    name = metadata.get(PNG_KEY)
    if name is None:
        return _Results(size, ids, addresses, (), "its rows name pictures that it does not" if any(wanted) else "")
    pictures = run.png / posixpath.basename(name)
    try:
        tar = _read_pictures(pictures)
    except FileNotFoundError:
        return _Results(size, ids, addresses, (pictures,), f"its pictures, png/{name}, are missing")
    except DamagedError as error:
        return _Results(size, ids, addresses, (pictures,), f"its pictures, png/{name}, are damaged: {error}")
    size += tar.size
    if str(tar.size) != metadata.get(PNG_BYTES_KEY) or tar.sha256 != metadata.get(PNG_SHA256_KEY):
        damage = f"its pictures, png/{name}, are not those that were written: size or SHA-256 is another"
    elif set(rows["png"].drop_null().unique().to_pylist()) - {name}:
        damage = "its rows name other pictures than it does"
    elif tar.names != [f"{image}.png" for image, has in zip(ids.tolist(), wanted, strict=True) if has]:
        damage = f"its pictures, png/{name}, are of other images than its rows"
    else:
        damage = ""
    return _Results(size, ids, addresses, (pictures,), damage)


def _read_errors(shard: Folder) -> _Errors:
    file, size = read_sealed(shard)
    rows = file.read(columns=["image_id", "uri", "stage", "reason"])
    return _Errors(size, rows, _hashes(rows["uri"]))


def _read_pictures(shard: Folder) -> PictureTar:
    with reading(shard):
        return tried(lambda: _stream_pictures(shard))


def _stream_pictures(shard: Folder) -> PictureTar:
    with shard.filesystem.open(shard.path, "rb", block_size=_READ_BYTES, cache_type="readahead") as file:
        tar = PictureTar(file)
        tar.read()
    return tar


def _name(file: Folder) -> str:
    return posixpath.basename(file.path)


def _says_the_same(run: Run, accounting: Accounting) -> bool:
    summary = run.summary()
    return summary is not None and (
        tuple(summary.get(key) for key in ("images", "scored", "failed", "errors"))
        == (accounting.listed, accounting.scored, accounting.failed, accounting.reasons)
    )

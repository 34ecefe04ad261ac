"""The run folder: what a run set out to do, what it has done, and whether that is all.

Layout (DESIGN section 4), one folder under ``<output>/runs``::

    config.yaml               the resolved configuration
    run.json                  identity, fingerprints, versions; written after the manifest, which is whole then
    manifest/part-*.parquet   image_id, uri, size, etag, mtime
    results/part-*.parquet    one row per scored image
    png/part-*.tar            <image_id>.png
    errors/part-*.parquet     one row per image that could not be used
    summary.json              written last; its presence means complete
    lock/                     while somebody writes here; in an object store a small file stays (`ais.lease`)

The results and errors are the record of what is done; there is no second book that could disagree with them. A shard
appears under its final name only when it is whole, and a results shard is the last file that its task writes: it names
its pictures, which count from then on.
"""

from __future__ import annotations

import json
import posixpath
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ais.errors import DamagedError, RunError
from ais.lease import Fence
from ais.listing import ListedImage
from ais.shards import PNG_KEY, damaged, read_ids, read_sealed, read_table, write_table
from ais.storage import Folder, Storage, read_json

_MANIFEST_ROWS = 100_000
_READERS, _READ_AHEAD = 16, 256

SELECTED_PICTURES = "selected_pictures"  # in summary.json: bytes and SHA-256 of the tars of top:N or bottom:N, by name

MANIFEST_SCHEMA = pa.schema(
    [
        pa.field("image_id", pa.int64(), nullable=False),
        pa.field("uri", pa.string(), nullable=False),
        pa.field("size", pa.int64()),
        pa.field("etag", pa.string()),
        pa.field("mtime", pa.float64()),
    ]
)
ERRORS_SCHEMA = pa.schema(
    [
        pa.field("image_id", pa.int64(), nullable=False),
        pa.field("uri", pa.string(), nullable=False),
        pa.field("etag", pa.string()),
        pa.field("stage", pa.string(), nullable=False),
        pa.field("reason", pa.string(), nullable=False),
        pa.field("error", pa.string(), nullable=False),
    ]
)

# Failures, as ``stage: reason``, in which the same bytes may fare better another time. Decoding and scoring depend on
# nothing but the bytes and the model, up to the memory that there is.
FLEETING = r"^fetch: |: out of memory$"


def failures(errors: pa.Table) -> pa.ChunkedArray:
    """Why each row of errors failed, as ``stage: reason``."""
    return pc.binary_join_element_wise(errors["stage"], errors["reason"], ": ")


def results_schema(heatmap_shape: tuple[int, int] | None, metadata: dict[str, str] | None = None) -> pa.Schema:
    """Schema of a results shard.

    Args:
        heatmap_shape: ``(h, w)`` of the heatmaps, at the layer's resolution; ``None``: scores only, without the columns
            ``heatmap_box``, ``heatmap`` and ``png``.
        metadata: what the results were made with, carried by every shard.
    """
    fields = [
        pa.field("image_id", pa.int64(), nullable=False),
        pa.field("uri", pa.string(), nullable=False),
        pa.field("etag", pa.string()),
        pa.field("width", pa.int32(), nullable=False),
        pa.field("height", pa.int32(), nullable=False),
        pa.field("box", pa.list_(pa.float32(), 4), nullable=False),
        pa.field("heatmap_box", pa.list_(pa.float32(), 4), nullable=False),
        pa.field("score", pa.float32(), nullable=False),
        pa.field("score_std", pa.float32()),
    ]
    if heatmap_shape is None:
        return pa.schema([field for field in fields if field.name != "heatmap_box"], metadata=metadata)
    fields += [
        pa.field("heatmap", pa.fixed_shape_tensor(pa.float32(), heatmap_shape), nullable=False),
        pa.field("png", pa.string()),
    ]
    return pa.schema(fields, metadata=metadata)


@dataclass(frozen=True)
class Accounting:
    """Whether every listed image is in results or in errors, exactly once.

    Args:
        listed: images of the manifest.
        scored: rows of results.
        failed: rows of errors.
        missing: listed images that are in neither.
        repeated: images that are there more than once.
        reasons: rows of errors by ``stage: reason``.
        foreign: rows of images that are not listed.
    """

    listed: int
    scored: int
    failed: int
    missing: int
    repeated: int
    reasons: dict[str, int]
    foreign: int = 0

    @property
    def whole(self) -> bool:
        """Nothing is missing and nothing is there twice."""
        return self.missing == self.repeated == self.foreign == 0 and self.scored + self.failed == self.listed


class Tally:
    """Counts images as their shards are read; a byte of memory for each that is listed.

    Args:
        listed: images of the manifest; ids are below it.
    """

    def __init__(self, listed: int) -> None:
        self._times = np.zeros(listed, np.uint8)
        self._scored = self._failed = self._foreign = 0
        self._reasons: Counter[str] = Counter()

    def add_scored(self, ids: np.ndarray) -> None:
        """Count a shard of results."""
        self._scored += len(ids)
        self._count(ids)

    def add_failed(self, rows: pa.Table) -> None:
        """Count a shard of errors, of which ``image_id, stage, reason`` are looked at."""
        self._failed += rows.num_rows
        self._count(rows["image_id"].to_numpy())
        counts = pc.value_counts(failures(rows)).to_pylist()
        self._reasons.update({count["values"]: count["counts"] for count in counts})

    def _count(self, ids: np.ndarray) -> None:
        known = ids[(ids >= 0) & (ids < len(self._times))]
        self._foreign += len(ids) - len(known)
        unique, times = np.unique(known, return_counts=True)
        self._times[unique] = np.minimum(2, self._times[unique] + np.minimum(2, times).astype(np.uint8))

    def accounting(self) -> Accounting:
        """What was counted so far."""
        missing, repeated = int((self._times == 0).sum()), int((self._times > 1).sum())
        reasons = dict(self._reasons.most_common())
        return Accounting(len(self._times), self._scored, self._failed, missing, repeated, reasons, self._foreign)


class Run:
    """One run folder.

    Args:
        folder: ``<output>/runs/<run_id>``.
        fence: of the lock under which it is written, if it is.
    """

    def __init__(self, folder: Folder, fence: Fence | None = None) -> None:
        self.folder = folder
        self._fence = fence
        self.manifest = folder / "manifest"
        self.results = folder / "results"
        self.errors = folder / "errors"
        self.png = folder / "png"

    @classmethod
    def at(cls, output: str, run_id: str, storage: Storage) -> Run:
        """Return the run of this name under an output address; nothing is read or created."""
        return cls(storage.open(output) / "runs" / run_id)

    @property
    def run_id(self) -> str:
        """Its name."""
        return posixpath.basename(self.folder.path)

    def check_lock(self) -> None:
        """Ask whether this run is still ours to write; to be called before anything is.

        Raises:
            LeaseLostError: somebody else took it over.
        """
        if self._fence is not None:
            self._fence.check()

    def record(self) -> dict[str, Any] | None:
        """Return ``run.json``, or ``None`` where no run was set out yet.

        Raises:
            RunError: it is damaged, or another file.
            StorageError: it cannot be read.
        """
        way_out = "bring it back, or give another run_id or output"
        return read_json(self.folder / "run.json", ("images", "listed_at"), way_out)

    def summary(self) -> dict[str, Any] | None:
        """Return ``summary.json``, or ``None`` where the run is not complete.

        Raises:
            As `record`.
        """
        return read_json(self.folder / "summary.json")

    def complete(self) -> dict[str, Any] | None:
        """Return ``summary.json`` if the run is complete: it is there, and so are all the shards that it counts."""
        summary = self.summary()
        if summary is None:
            return None
        counts = self.shard_counts()
        return None if any(counts[name] < there for name, there in summary.get("shards", {}).items()) else summary

    def reopen(self) -> None:
        """Take ``summary.json`` away from a run that has lost shards: shards of the second time count for nobody's.

        Only under the lock.
        """
        self.check_lock()
        summary = self.folder / "summary.json"
        if summary.exists():
            summary.remove()

    def shard_counts(self) -> dict[str, int]:
        """How many files of each kind there are."""
        kinds = {
            "results": (self.results, "*.parquet"),
            "errors": (self.errors, "*.parquet"),
            "png": (self.png, "*.tar"),
        }
        return {name: len(place.files(pattern)) for name, (place, pattern) in kinds.items()}

    def set_out(self, listing: Iterable[ListedImage], config_yaml: str, identity: dict[str, Any]) -> int:
        """Write the manifest, the configuration and, last, ``run.json``.

        Images get the ids 0, 1, 2, … in the order of the listing.

        Returns:
            how many images there are.

        Raises:
            RunError: the listing is empty, or there are results or errors already, of which only a ``run.json`` that is
                lost knew which images they are of.
        """
        self.check_lock()
        if any(self.shard_counts().values()):
            raise RunError(
                f"{self.folder.address!r} has results but no run.json, without which nobody knows what they are of; "
                "bring run.json back, or give another run_id or output"
            )
        for leftover in self.manifest.files():
            leftover.remove()  # of a listing that was interrupted
        count = 0
        for part, images in enumerate(_chunks(listing, _MANIFEST_ROWS)):
            columns = {
                "image_id": pa.array(np.arange(count, count + len(images))),
                "uri": [image.uri for image in images],
                "size": [image.size for image in images],
                "etag": [image.etag for image in images],
                "mtime": [image.mtime for image in images],
            }
            write_table(self.manifest / f"part-{part:05d}.parquet", pa.table(columns, schema=MANIFEST_SCHEMA))
            count += len(images)
        if count == 0:
            raise RunError("there are no images to work on; give a folder, glob or list that has some")
        (self.folder / "config.yaml").write_text(config_yaml)
        document = {"images": count, "listed_at": datetime.now(UTC).isoformat(timespec="seconds"), **identity}
        (self.folder / "run.json").write_text(json.dumps(document, indent=2) + "\n")
        return count

    def recover(self, listed: int) -> np.ndarray:
        """Clear away what killed starts left, and return ``(listed,)`` bool: which ids are in results or in errors.

        Only under the lock. Deletes shards with an image that another has too, whose other images are then not done
        (tasks outlive a killed driver by seconds, and may write beside the next one), pictures that no shard of results
        names, files that were never finished, and uploads that were never completed.

        Raises:
            RunError: a shard is damaged, or holds images that were not listed.
        """
        self.check_lock()
        done = np.zeros(listed, bool)
        named: set[str] = set()
        for place in (self.results, self.errors):
            for shard, ids, metadata in read_all_ids(place.files("*.parquet")):
                if not len(ids) or ids.min() < 0 or ids.max() >= listed:
                    raise RunError(
                        f"{shard.address!r} holds images that were not listed, or none; it is of another run"
                    )
                if done[ids].any() or len(np.unique(ids)) < len(ids):
                    shard.remove()
                else:
                    done[ids] = True
                    named.add(metadata.get(PNG_KEY, ""))
        for pictures in self.png.files("part-*.tar"):
            if posixpath.basename(pictures.path) not in named:
                pictures.remove()
        for place in (self.folder, self.manifest, self.results, self.errors, self.png):
            place.remove_unfinished()
        return done

    def retry_errors(self) -> int:
        """Take the images out of errors that may fare better another time (`FLEETING`); return how many.

        Only under the lock. The run is no longer complete then, and the next start does them again.

        Raises:
            RunError: a shard is damaged.
        """
        taken = 0
        for shard in self.errors.files("*.parquet"):
            try:
                rows = read_sealed(shard)[0].read()
            except DamagedError as error:
                raise damaged(shard, error) from error
            fleeting = pc.match_substring_regex(failures(rows), FLEETING)
            count = pc.sum(fleeting).as_py() or 0
            if not count:
                continue
            if not taken:
                self.reopen()
            taken += count
            if count == rows.num_rows:
                shard.remove()
            else:
                write_table(shard, rows.filter(pc.invert(fleeting)))
        return taken

    def account(self, listed: int) -> Accounting:
        """Count every image of the manifest in results and errors.

        Raises:
            RunError: a shard is damaged.
            StorageError: one cannot be read.
        """
        tally = Tally(listed)
        for _, ids, _ in read_all_ids(self.results.files("*.parquet")):
            tally.add_scored(ids)
        for shard in self.errors.files("*.parquet"):
            tally.add_failed(read_table(shard, ["image_id", "stage", "reason"]))
        return tally.accounting()

    def finish(self, summary: dict[str, Any]) -> None:
        """Write ``summary.json``, with the count of shards: the run is complete."""
        self.check_lock()
        summary = {**summary, "shards": self.shard_counts()}
        (self.folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")


def read_all_ids(shards: list[Folder]) -> Iterator[tuple[Folder, np.ndarray, dict[str, str]]]:
    """Read ``image_id`` and the footer's metadata of many shards, in their order, several at a time.

    Raises:
        RunError: one is not whole.
    """
    with ThreadPoolExecutor(_READERS) as pool:
        # A bounded number of them at a time: map would start all at once and keep what comes early.
        for start in range(0, len(shards), _READ_AHEAD):
            some = shards[start : start + _READ_AHEAD]
            for shard, (ids, metadata) in zip(some, pool.map(read_ids, some), strict=True):
                yield shard, ids, metadata


def _chunks(items: Iterable[ListedImage], size: int) -> Iterator[list[ListedImage]]:
    chunk: list[ListedImage] = []
    for item in items:
        chunk.append(item)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk

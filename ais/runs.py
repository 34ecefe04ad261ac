"""The run folder: what a run set out to do, what it has done, and whether that is all.

Layout (DESIGN section 4), one folder under ``<output>/runs``::

    config.yaml               the resolved configuration
    run.json                  identity, fingerprints, versions; written after the manifest, which is whole then
    manifest/part-*.parquet   image_id, uri, size, etag, mtime
    results/part-*.parquet    one row per scored image
    png/part-*.tar            <image_id>.png
    errors/part-*.parquet     one row per image that could not be used
    summary.json              written last; its presence means complete

The results and errors are the record of what is done; there is no second book that could disagree with them. A shard
appears under its final name only when it is whole, and a results shard is the last file that its task writes.
"""

from __future__ import annotations

import io
import json
import posixpath
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ais.errors import RunError, StorageError
from ais.lease import Fence
from ais.listing import ListedImage
from ais.storage import Folder, Storage

_MANIFEST_ROWS = 100_000
_ROW_GROUP = 4096  # what a reader has to fetch to see a few rows

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
    """

    listed: int
    scored: int
    failed: int
    missing: int
    repeated: int
    reasons: dict[str, int]

    @property
    def whole(self) -> bool:
        """Nothing is missing and nothing is there twice."""
        return self.missing == 0 and self.repeated == 0 and self.scored + self.failed == self.listed

    @property
    def error_share(self) -> float:
        """Share of the listed images that are in errors."""
        return self.failed / self.listed if self.listed else 0.0


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
        """Return ``run.json``, or ``None`` where no run was set out yet."""
        return _read_json(self.folder / "run.json")

    def summary(self) -> dict[str, Any] | None:
        """Return ``summary.json``, or ``None`` where the run is not complete."""
        return _read_json(self.folder / "summary.json")

    def set_out(self, listing: Iterable[ListedImage], config_yaml: str, identity: dict[str, Any]) -> int:
        """Write the manifest, the configuration and, last, ``run.json``.

        Images get the ids 0, 1, 2, … in the order of the listing.

        Returns:
            how many images there are.

        Raises:
            RunError: the listing is empty.
        """
        self.check_lock()
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

        Only for a run that nobody is writing. Deletes shards with an image that another has too, whose other images are
        then not done (tasks outlive a killed driver by seconds, and may write beside the next one), and orphaned PNG
        shards.
        """
        done = np.zeros(listed, bool)
        for place in (self.results, self.errors):
            for shard in place.files("*.parquet"):
                ids = read_column(shard, "image_id")
                if done[ids].any():
                    shard.remove()
                else:
                    done[ids] = True
        self.remove_orphans()
        return done

    def remove_orphans(self) -> int:
        """Delete PNG shards whose results shard was never written (their task was killed); return how many.

        Only for a run that nobody is writing.
        """
        whole = {_stem(shard) for shard in self.results.files("part-*.parquet")}
        orphans = [shard for shard in self.png.files("part-*.tar") if _stem(shard) not in whole]
        for shard in orphans:
            shard.remove()
        return len(orphans)

    def account(self, listed: int) -> Accounting:
        """Count every image of the manifest in results and errors."""
        times = np.zeros(listed, np.int32)
        reasons: Counter[str] = Counter()
        scored = failed = 0
        for shard in self.results.files("*.parquet"):
            ids = read_column(shard, "image_id")
            np.add.at(times, ids, 1)
            scored += len(ids)
        for shard in self.errors.files("*.parquet"):
            table = pq.read_table(io.BytesIO(shard.read_bytes()), columns=["image_id", "stage", "reason"])
            np.add.at(times, table["image_id"].to_numpy(), 1)
            failed += table.num_rows
            reasons.update(f"{row['stage']}: {row['reason']}" for row in table.to_pylist())
        return Accounting(
            listed, scored, failed, int((times == 0).sum()), int((times > 1).sum()), dict(reasons.most_common())
        )

    def finish(self, summary: dict[str, Any]) -> None:
        """Write ``summary.json``: the run is complete."""
        self.check_lock()
        (self.folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")


def write_table(place: Folder, table: pa.Table) -> None:
    """Write one Parquet file, whole or not at all."""
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd", row_group_size=_ROW_GROUP)
    place.write_bytes(sink.getvalue())


def read_column(shard: Folder, name: str) -> np.ndarray:
    """Read one column of a Parquet file without fetching the others.

    Raises:
        RunError: the file is not whole; nothing here writes such a file, so it was damaged later.
    """
    try:
        with shard.filesystem.open(shard.path, "rb") as file:
            return pq.read_table(file, columns=[name])[name].to_numpy()
    except (pa.ArrowInvalid, KeyError) as error:
        raise RunError(f"{shard.address!r} cannot be read: {error}; delete it and start the run again") from error


def _read_json(place: Folder) -> dict[str, Any] | None:
    try:
        return json.loads(place.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise StorageError(
            f"{place.address!r} cannot be read: {error}; check the address and the access to it"
        ) from error
    except ValueError as error:
        raise RunError(
            f"{place.address!r} is not JSON: {error}; it was damaged: delete it, and start the same command again"
        ) from error


def _stem(shard: Folder) -> str:
    return posixpath.basename(shard.path).split(".", 1)[0]


def _chunks(items: Iterable[ListedImage], size: int) -> Iterator[list[ListedImage]]:
    chunk: list[ListedImage] = []
    for item in items:
        chunk.append(item)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk

"""The source of a run: the manifest's rows that are not done yet, in units of a few batches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray.data
from ray.data import Dataset, Datasource, ReadTask
from ray.data.block import BlockMetadata
from ray.data.context import DataContext

from ais.errors import RunError
from ais.storage import Folder, explain, reading

_COLUMNS = ["image_id", "uri", "size", "etag", "mtime"]
_MOST_UNITS = 20_000
_ROW_BYTES = 200


class ManifestSource(Datasource):
    """Reads a manifest in units of whole batches, leaving out what is done.

    Used instead of ``ray.data.read_parquet`` and ``repartition``, whose listing and slicing tasks take one whole CPU
    each whatever they are told, so that on a machine of two cores nothing is left for them beside the actors and the
    pipeline waits for ever (Ray 2.60). Here every task takes the share it is given.

    Args:
        manifest: folder of ``part-*.parquet`` with the ids 0, 1, 2, … in order.
        done: ``(images,)`` bool.
        batch: images in one batch of the network.

    Raises:
        RunError: the manifest is damaged.
    """

    def __init__(self, manifest: Folder, done: np.ndarray, batch: int) -> None:
        super().__init__()
        self._done = done
        self._parts = [(part, _rows(part)) for part in manifest.files("*.parquet")]
        # So many images in one unit that the driver never holds more than a bounded number of them.
        self._unit = batch * max(1, -(-len(done) // (batch * _MOST_UNITS)))

    def estimate_inmemory_data_size(self) -> int:
        """Bytes of all rows, roughly."""
        return int((~self._done).sum()) * _ROW_BYTES

    def get_read_tasks(
        self,
        parallelism: int,  # noqa: ARG002 - Ray's signature, here and below
        per_task_row_limit: int | None = None,  # noqa: ARG002
        data_context: DataContext | None = None,  # noqa: ARG002
    ) -> list[ReadTask]:
        """One task for every unit that is not wholly done."""
        tasks = []
        first = 0
        for part, rows in self._parts:
            for start in range(0, rows, self._unit):
                stop = min(start + self._unit, rows)
                left = ~self._done[first + start : first + stop]
                if left.any():
                    count = int(left.sum())
                    metadata = BlockMetadata(count, count * _ROW_BYTES, None, None)
                    tasks.append(ReadTask(partial(_read, part, start, np.packbits(left), stop - start), metadata))
            first += rows
        return tasks


def manifest_rows(manifest: Folder, done: np.ndarray, batch: int, task_cpus: float) -> Dataset:
    """Return the rows of the manifest that are not done, as a dataset.

    Args:
        manifest: folder of the parts.
        done: ``(images,)`` bool.
        batch: images in one batch of the network.
        task_cpus: logical CPUs of one reading task.
    """
    source = ManifestSource(manifest, done, batch)
    units = max(1, len(source.get_read_tasks(-1)))
    return ray.data.read_datasource(source, override_num_blocks=units, num_cpus=task_cpus)


def versions_of(manifest: Folder, ids: np.ndarray) -> pa.Table:
    """Return the versions that some images were listed with: ``size, etag, mtime``, a row for each id, in their order.

    Args:
        manifest: folder of the parts.
        ids: ``(N,)``, no two the same.

    Raises:
        RunError: the manifest is damaged.
    """
    found = []
    for part in manifest.files("*.parquet"):
        with _whole(part), part.filesystem.open(part.path, "rb") as file:
            table = pq.read_table(file, columns=["image_id", "size", "etag", "mtime"])
        found.append(table.filter(pc.is_in(table["image_id"], pa.array(ids))))
    ascending = pa.concat_tables(found).drop_columns("image_id")
    return ascending.take(np.argsort(np.argsort(ids)))


@contextmanager
def _whole(part: Folder) -> Iterator[None]:
    """Say which part of the manifest is damaged; without it nobody knows what the run is of."""
    with reading(part):
        try:
            yield
        except (pa.ArrowException, KeyError) as error:
            raise RunError(
                f"{part.address!r} cannot be read: {explain(error)}; it says which images the run is of, and was "
                "damaged: bring it back, or give another run_id or output"
            ) from error


def _rows(part: Folder) -> int:
    with _whole(part), part.filesystem.open(part.path, "rb") as file:
        return int(pq.read_metadata(file).num_rows)


def _read(part: Folder, start: int, left: np.ndarray, rows: int) -> Iterable[pa.Table]:
    """Read ``rows`` rows from ``start`` on, touching only the row groups they are in."""
    with part.filesystem.open(part.path, "rb") as file:
        parquet = pq.ParquetFile(file)
        groups: list[int] = []
        before = skip = 0
        for group in range(parquet.num_row_groups):
            size = parquet.metadata.row_group(group).num_rows
            if before + size > start and before < start + rows:
                if not groups:
                    skip = start - before
                groups.append(group)
            before += size
        table = parquet.read_row_groups(groups, columns=_COLUMNS).slice(skip, rows)
    yield table.filter(pa.array(np.unpackbits(left, count=rows).astype(bool)))

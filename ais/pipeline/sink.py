"""What write tasks do. They need no torch, and do not wait for it to be imported."""

from __future__ import annotations

import hashlib
import uuid
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from ray.data import Datasink
from ray.data.block import Block, BlockAccessor
from ray.data.datasource.datasink import WriteResult

from ais.embeddings import EmbeddingCache
from ais.pipeline.columns import replace, unpack
from ais.placement import HeatmapCells
from ais.runs import ERRORS_SCHEMA, Run, results_schema
from ais.shards import PNG_BYTES_KEY, PNG_KEY, PNG_SHA256_KEY, tar_bytes, write_table

_CACHE_PART_ROWS = 1024
TIMED = ("fetch_s", "decode_s", "score_s", "explain_s", "render_s")


class RunSink(Datasink[dict[str, float]]):
    """Writes rows to a run folder so that a task killed anywhere leaves nothing that counts twice.

    Shards of errors and results are named after their write task, so a task that Ray runs again replaces what it wrote.
    Of each task the pictures are written first, under a name of this attempt alone, then the errors, then the results,
    which name the pictures that belong to them: an interrupted task leaves either rows of errors, which stand for
    themselves, or pictures that nothing names, which the next start removes.

    Args:
        run: where to.
        cells: of the heatmaps; ``None``: scores only.
        metadata: carried by every shard.
        shard_rows: images in one shard.
    """

    def __init__(self, run: Run, cells: HeatmapCells | None, metadata: dict[str, str], shard_rows: int) -> None:
        self._run = run
        self._cells = cells
        self._metadata = metadata
        self._shard_rows = shard_rows
        self.totals: Counter[str] = Counter()

    @property
    def min_rows_per_write(self) -> int:
        """Ray Data gathers this many rows for one task."""
        return self._shard_rows

    def write(self, blocks: Iterable[Block], ctx: Any) -> dict[str, float]:
        """Write the shards of one task; runs on a worker."""
        tables = [BlockAccessor.for_block(block).to_arrow() for block in blocks]
        tables = [table for table in tables if table.num_rows]
        if not tables:
            return {}
        table = pa.concat_tables(tables)
        name = f"part-{ctx.kwargs['write_uuid'][:8]}-{ctx.task_idx:06d}"
        failed = pc.not_equal(table["stage"], "")
        good, bad = table.filter(pc.invert(failed)), table.filter(failed)
        self._run.check_lock()
        attempt = f"{name}-{uuid.uuid4().hex[:8]}"
        shard = write_pngs(self._run, attempt, good) if "png" in good.column_names else None
        self._run.check_lock()  # writing pictures takes a while
        if bad.num_rows:
            write_table(self._run.errors / f"{name}.parquet", bad.select(ERRORS_SCHEMA.names).cast(ERRORS_SCHEMA))
        if good.num_rows:
            write_table(self._run.results / f"{name}.parquet", self._results(good, shard))
        return {column: float(pc.sum(table[column]).as_py()) for column in TIMED if column in table.column_names}

    def _results(self, good: pa.Table, shard: PngShard | None) -> pa.Table:
        metadata = self._metadata | (shard.metadata() if shard else {})
        schema = results_schema(self._cells.shape if self._cells else None, metadata)
        boxes = unpack(good["box"], (4,), np.float32)
        table = replace(good, [], box=pa.FixedSizeListArray.from_arrays(pa.array(boxes.ravel()), 4))
        if self._cells is not None:
            heatmaps = unpack(good["heatmap"], self._cells.shape, np.float32)
            pngs: pa.Array | pa.ChunkedArray = pa.nulls(good.num_rows, pa.string())
            if shard is not None:
                pngs = pc.if_else(pc.is_valid(good["png"]), shard.name, None)
            table = replace(
                table,
                [],
                heatmap_box=pa.FixedSizeListArray.from_arrays(pa.array(self._cells.on_originals(boxes).ravel()), 4),
                heatmap=pa.FixedShapeTensorArray.from_numpy_ndarray(heatmaps),
                png=pngs,
            )
        return pa.table([table[field.name].cast(field.type) for field in schema], schema=schema)

    def on_write_complete(self, write_result: WriteResult[dict[str, float]]) -> None:
        """Add up the seconds of the stages; runs on the driver."""
        for part in write_result.write_returns:
            self.totals.update(part)


@dataclass(frozen=True)
class Unreadable:
    """An image that has no embedding, and why."""

    uri: str
    stage: str
    reason: str
    error: str


def without_failed(table: pa.Table) -> tuple[pa.Table, list[Unreadable]]:
    """The rows that went well through all stages, and why the others did not."""
    failed = pc.not_equal(table["stage"], "")
    bad = table.filter(failed).select(["uri", "stage", "reason", "error"])
    return table.filter(pc.invert(failed)), [Unreadable(**row) for row in bad.to_pylist()]


class CacheSink(Datasink[list[Unreadable]]):
    """Writes embeddings to the cache and brings the rows that have none back to the driver.

    Args:
        cache: where to.
        embedding_size: D.
    """

    def __init__(self, cache: EmbeddingCache, embedding_size: int) -> None:
        self._cache = cache
        self._size = embedding_size
        self.unreadable: list[Unreadable] = []

    @property
    def min_rows_per_write(self) -> int:
        """Ray Data gathers this many rows for one task."""
        return _CACHE_PART_ROWS

    def write(self, blocks: Iterable[Block], ctx: Any) -> list[Unreadable]:
        """Write the part of one task; runs on a worker."""
        tables = [BlockAccessor.for_block(block).to_arrow() for block in blocks]
        tables = [table for table in tables if table.num_rows]
        if not tables:
            return []
        good, unreadable = without_failed(pa.concat_tables(tables))
        if good.num_rows:
            name = f"{ctx.kwargs['write_uuid'][:8]}-{ctx.task_idx:06d}"
            embeddings = unpack(good["embedding"], (self._size,), np.float32)
            self._cache.write(name, good["uri"].to_pylist(), good["version"].to_pylist(), embeddings)
        return unreadable

    def on_write_complete(self, write_result: WriteResult[list[Unreadable]]) -> None:
        """Gather the rows without embedding; runs on the driver."""
        for rows in write_result.write_returns:
            self.unreadable += rows


class PngSink(Datasink["tuple[int, PngShard | None]"]):
    """Writes only pictures: ``png/<prefix>-<task>.tar``; ``shards`` and how many ``failed`` are known at the end.

    Args:
        run: where to.
        prefix: of the shards' names.
        shard_rows: pictures in one shard.
    """

    def __init__(self, run: Run, prefix: str, shard_rows: int) -> None:
        self._run = run
        self._prefix = prefix
        self._shard_rows = shard_rows
        self.failed = 0
        self.shards: list[PngShard] = []

    @property
    def min_rows_per_write(self) -> int:
        """Ray Data gathers this many rows for one task."""
        return self._shard_rows

    def write(self, blocks: Iterable[Block], ctx: Any) -> tuple[int, PngShard | None]:
        """Write the shard of one task; runs on a worker."""
        tables = [BlockAccessor.for_block(block).to_arrow() for block in blocks]
        tables = [table for table in tables if table.num_rows]
        if not tables:
            return 0, None
        table = pa.concat_tables(tables)
        self._run.check_lock()
        shard = write_pngs(self._run, f"{self._prefix}-{ctx.task_idx:06d}", table)
        return table["png"].null_count, shard

    def on_write_complete(self, write_result: WriteResult[tuple[int, PngShard | None]]) -> None:
        """Put the tasks together; runs on the driver."""
        for failed, shard in write_result.write_returns:
            self.failed += failed
            if shard is not None:
                self.shards.append(shard)


@dataclass(frozen=True)
class PngShard:
    """A tar of pictures as it was written.

    Args:
        name: of the file.
        size: in bytes.
        sha256: in hexadecimal.
    """

    name: str
    size: int
    sha256: str

    def metadata(self) -> dict[str, str]:
        """What the shard of results that goes with it says of it."""
        return {PNG_KEY: self.name, PNG_BYTES_KEY: str(self.size), PNG_SHA256_KEY: self.sha256}


def write_pngs(run: Run, name: str, table: pa.Table) -> PngShard | None:
    """Write the ``png`` bytes of a table as one tar, readable by WebDataset; members are ``<image_id>.png``.

    Returns:
        the shard, or ``None`` if there was nothing to write.
    """
    rows = table.select(["image_id", "png"]).filter(pc.is_valid(table["png"]))
    if rows.num_rows == 0:
        return None
    names = (f"{image_id}.png" for image_id in rows["image_id"].to_pylist())
    data = tar_bytes(zip(names, rows["png"].to_pylist(), strict=True))
    (run.png / f"{name}.tar").write_bytes(data)
    return PngShard(f"{name}.tar", len(data), hashlib.sha256(data).hexdigest())

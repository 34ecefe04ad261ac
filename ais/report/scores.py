"""All scores of a run, however many: one pass over its shards, exact ranks and quantiles, memory that does not grow.

Scores and ids go from the shards to scratch files (12 bytes an image) and are then read back in chunks. A *position*
is the place of an image in the order of the shards. Scores that are not finite keep their position and are left out
of everything; ``undefined`` counts them.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from ais.errors import RunError
from ais.progress import ProgressLine
from ais.storage import Folder, reading

_CHUNK = 2**20
_READERS = 16
_COLUMNS = ["image_id", "score", "score_std"]


@dataclass(frozen=True)
class Scores:
    """The scores of a run.

    Args:
        shards: results files, in order.
        starts: ``(shards + 1,)`` position of the first image of each shard, and the number of images.
        ids: ``(N,)`` int64, on disk.
        scores: ``(N,)`` float32, on disk.
        undefined: scores that are not finite.
        mean_spread: mean of ``score_std`` over the images that have one; ``None`` where none has.
    """

    shards: Sequence[Folder]
    starts: NDArray[np.int64]
    ids: NDArray[np.int64]
    scores: NDArray[np.float32]
    undefined: int
    mean_spread: float | None

    @property
    def count(self) -> int:
        """Finite scores."""
        return len(self.scores) - self.undefined

    def chunks(self) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]]:
        """Yield positions, ids and finite scores, at most a million at a time."""
        for start in range(0, len(self.scores), _CHUNK):
            scores, ids = _read_chunk(self.scores, start), _read_chunk(self.ids, start)
            finite = np.isfinite(scores)
            yield start + np.flatnonzero(finite), ids[finite], scores[finite] + np.float32(0)  # no negative zero

    def smallest(self, key: Callable[[NDArray[np.int64], NDArray[np.float32]], NDArray], count: int) -> list[int]:
        """Positions of the ``count`` images with the smallest key, smallest first; ties by id.

        Args:
            key: of ids and scores ``(n,)``, numbers ``(n,)``.
            count: at most this many.
        """
        best: list[tuple[Any, int, int]] = []
        for positions, ids, scores in self.chunks():
            keys = key(ids, scores)
            order = np.lexsort((ids, keys))[:count]
            found = [(keys[i].item(), int(ids[i]), int(positions[i])) for i in order]
            best = heapq.nsmallest(count, best + found)
        return [position for _, _, position in best]

    def quantiles(self, shares: Sequence[float]) -> NDArray[np.float32]:
        """Return for each share the score at the rank nearest to it, exactly: 0 the lowest, 1 the highest.

        Two passes of counting: by the upper half of the scores' bits, then by the lower half where a rank falls.

        Raises:
            ValueError: there are no scores.
        """
        if self.count == 0:
            raise ValueError("there are no finite scores")
        ranks = np.rint(np.asarray(shares, np.float64) * (self.count - 1)).astype(np.int64)
        upper = np.zeros(2**16, np.int64)
        for _, _, scores in self.chunks():
            upper += np.bincount(_ordered_bits(scores) >> 16, minlength=2**16)
        ends = np.cumsum(upper)
        wanted = np.searchsorted(ends, ranks, side="right")
        lower = {half: np.zeros(2**16, np.int64) for half in set(wanted.tolist())}
        for _, _, scores in self.chunks():
            bits = _ordered_bits(scores)
            for half, counts in lower.items():
                counts += np.bincount(bits[bits >> 16 == half] & 0xFFFF, minlength=2**16)
        found = [
            half << 16 | np.searchsorted(np.cumsum(lower[half]), rank - (ends[half] - upper[half]), side="right")
            for half, rank in zip(wanted.tolist(), ranks, strict=True)
        ]
        return _from_ordered_bits(np.array(found, np.uint32))

    def below_and_above(self, values: NDArray[np.float32]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """How many scores are lower, and how many higher, than each of ``values (n,)``."""
        distinct, place = np.unique(np.asarray(values, np.float32), return_inverse=True)
        at_least, more_than = (np.zeros(len(distinct) + 1, np.int64) for _ in range(2))
        for _, _, scores in self.chunks():
            at_least += np.bincount(np.searchsorted(distinct, scores, side="right"), minlength=len(distinct) + 1)
            more_than += np.bincount(np.searchsorted(distinct, scores, side="left"), minlength=len(distinct) + 1)
        below = np.cumsum(at_least)[:-1]
        return below[place], (self.count - np.cumsum(more_than)[:-1])[place]

    def histogram(self, edges: NDArray[np.float64]) -> NDArray[np.int64]:
        """Count the scores between edges ``(bins + 1,)``; the last bin holds its upper edge."""
        counts = np.zeros(len(edges) - 1, np.int64)
        for _, _, scores in self.chunks():
            counts += np.histogram(scores, edges)[0]
        return counts

    def rows(self, positions: Sequence[int], columns: Sequence[str]) -> pa.Table:
        """Read whole rows of a few images, in the order given; only the row groups they are in are fetched."""
        order = np.asarray(positions, np.int64)
        shard_of = np.searchsorted(self.starts, order, side="right") - 1
        tables, places = [], []
        with ThreadPoolExecutor(_READERS) as pool:
            groups = [(index, np.flatnonzero(shard_of == index)) for index in np.unique(shard_of)]
            read = [
                pool.submit(_read_rows, self.shards[index], order[members] - self.starts[index], columns)
                for index, members in groups
            ]
            for (_, members), table in zip(groups, read, strict=True):
                tables.append(table.result())
                places.append(members)
        whole = pa.concat_tables(tables)
        return whole.take(np.argsort(np.concatenate(places)))


def read_scores(shards: Sequence[Folder], scratch: Path) -> Scores:
    """Stream ids and scores of results shards to two files in ``scratch``.

    Raises:
        RunError: a shard is damaged or gone.
        StorageError: its store does not give it.
    """
    starts, undefined, spread, spread_count = [0], 0, 0.0, 0
    id_file, score_file = scratch / "ids", scratch / "scores"
    with (
        id_file.open("wb") as ids,
        score_file.open("wb") as scores,
        ThreadPoolExecutor(_READERS) as pool,
        ProgressLine("shards", len(shards), silent_s=5) as progress,
    ):
        for table in _in_order(pool, _read_columns, shards):
            score = table["score"].to_numpy()
            ids.write(np.ascontiguousarray(table["image_id"].to_numpy(), np.int64).tobytes())
            scores.write(np.ascontiguousarray(score, np.float32).tobytes())
            undefined += int((~np.isfinite(score)).sum())
            spreads = table["score_std"].drop_null().to_numpy()
            spreads = spreads[np.isfinite(spreads)]
            spread, spread_count = spread + float(spreads.sum(dtype=np.float64)), spread_count + len(spreads)
            starts.append(starts[-1] + table.num_rows)
            progress.advance()
    empty = starts[-1] == 0  # which cannot be mapped
    return Scores(
        shards,
        np.array(starts),
        np.empty(0, np.int64) if empty else np.memmap(id_file, np.int64, "r"),
        np.empty(0, np.float32) if empty else np.memmap(score_file, np.float32, "r"),
        undefined,
        spread / spread_count if spread_count else None,
    )


def shuffled(ids: NDArray[np.int64], scores: NDArray[np.float32]) -> NDArray[np.uint64]:
    """Key of a random sample that depends on the ids alone, so that it is the same every time (SplitMix64)."""
    del scores
    with np.errstate(over="ignore"):
        x = ids.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _read_chunk(array: NDArray, start: int) -> NDArray:
    """Read a part of an array on disk; what is read through its map would stay in memory."""
    if not isinstance(array, np.memmap):
        return array[start : start + _CHUNK]
    assert array.filename is not None
    return np.fromfile(array.filename, array.dtype, _CHUNK, offset=start * array.itemsize)


def _ordered_bits(scores: NDArray[np.float32]) -> NDArray[np.uint32]:
    """Unsigned integers in the order of the finite floats whose bits they are."""
    bits = np.ascontiguousarray(scores, np.float32).view(np.uint32)
    return np.where(bits >> 31, ~bits, bits | np.uint32(1 << 31))


def _from_ordered_bits(bits: NDArray[np.uint32]) -> NDArray[np.float32]:
    return np.where(bits >> 31, bits & np.uint32((1 << 31) - 1), ~bits).view(np.float32)


def _read_columns(shard: Folder) -> pa.Table:
    with reading(shard):
        try:
            # Without a cache, which reads on into the heatmaps: of a shard of 1.2 MB, 0.12 MB are fetched, in two
            # requests.
            with shard.filesystem.open(shard.path, "rb", cache_type="none") as file:
                return pq.read_table(file, columns=_COLUMNS)
        except (pa.ArrowException, OSError) as error:
            raise RunError(f"{shard.address!r} cannot be read: {error}; delete it, and start the run again") from error


def _read_rows(shard: Folder, rows: NDArray[np.int64], columns: Sequence[str]) -> pa.Table:
    with reading(shard):
        try:
            return read_rows(shard, rows, columns)
        except (pa.ArrowException, OSError) as error:
            raise RunError(f"{shard.address!r} cannot be read: {error}; delete it, and start the run again") from error


def read_rows(shard: Folder, rows: NDArray[np.int64], columns: Sequence[str]) -> pa.Table:
    """Rows of one Parquet file in the order given; only the row groups they are in are fetched."""
    with shard.filesystem.open(shard.path, "rb", cache_type="none") as file:
        parquet = pq.ParquetFile(file)
        sizes = [parquet.metadata.row_group(index).num_rows for index in range(parquet.num_row_groups)]
        starts = np.cumsum([0, *sizes])
        group_of = np.searchsorted(starts, rows, side="right") - 1
        groups = np.unique(group_of)
        table = parquet.read_row_groups(groups.tolist(), columns=list(columns))
    kept = np.cumsum([0, *(sizes[group] for group in groups)])
    return table.take(rows - starts[group_of] + kept[np.searchsorted(groups, group_of)])


def _in_order(
    pool: ThreadPoolExecutor, function: Callable[[Folder], pa.Table], shards: Sequence[Folder]
) -> Iterator[pa.Table]:
    """Results in the order of the shards, with a bounded number read ahead."""
    waiting: deque[Future[pa.Table]] = deque()
    for shard in shards:
        waiting.append(pool.submit(function, shard))
        if len(waiting) > 2 * _READERS:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()

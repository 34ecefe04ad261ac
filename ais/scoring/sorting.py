"""Tables sorted by address, of any size, in bounded memory: sorted on disk, walked through side by side.

Addresses compare by their UTF-8 bytes, as Arrow sorts them (Python's strings compare in the same order).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

_RUN_ROWS = 500_000  # sorted in memory at once
_STEP_ROWS = 16_384  # of each run in memory while runs are merged


def sort_by_uri(tables: Iterable[pa.Table], scratch: Path, run_rows: int = _RUN_ROWS) -> Iterator[pa.Table]:
    """Sort tables of one schema by ``uri``; rows of the same address keep their order.

    The input is read whole before this returns, and lies in sorted runs below ``scratch`` until the iterator is done.
    In memory are ``run_rows`` rows, then 16,384 rows of every run.

    Args:
        tables: with a column ``uri``, nowhere null.
        scratch: an existing folder of this machine, with room for everything.
        run_rows: rows sorted in memory at once.
    """
    runs: list[Path] = []
    pending: list[pa.Table] = []
    count = 0

    def spill() -> None:
        table = pa.concat_tables(pending)
        table = table.take(pc.sort_indices(table, sort_keys=[("uri", "ascending")]))
        runs.append(scratch / f"run-{len(runs):05d}.arrow")
        with pa.OSFile(str(runs[-1]), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table, max_chunksize=_STEP_ROWS)

    for table in tables:
        for start in range(0, table.num_rows, run_rows):
            piece = table.slice(start, run_rows)
            if count + piece.num_rows > run_rows:
                spill()
                pending, count = [], 0
            pending.append(piece)
            count += piece.num_rows
    if count:
        spill()
    pending.clear()
    return _merged(runs)


def _merged(runs: list[Path]) -> Iterator[pa.Table]:
    for pieces in side_by_side([_read_run(run) for run in runs]):
        table = pa.concat_tables(pieces)  # in the order of the input, which a stable sort keeps
        yield table.take(pc.sort_indices(table, sort_keys=[("uri", "ascending")]))
    for run in runs:
        run.unlink()


def _read_run(run: Path) -> Iterator[pa.Table]:
    with pa.OSFile(str(run), "rb") as file:  # not mapped: its pages would count as this process's memory
        reader = pa.ipc.open_file(file)
        for index in range(reader.num_record_batches):
            yield pa.Table.from_batches([reader.get_batch(index)])


def first_of_each(tables: Iterable[pa.Table], repeated: Callable[[int], None]) -> Iterator[pa.Table]:
    """Leave only the first row of each address.

    Args:
        tables: sorted; all rows of an address are in the same table.
        repeated: is told how many rows are left out.
    """
    for table in tables:
        uris = table["uri"].combine_chunks()
        again = pc.equal(uris[1:], uris[:-1])
        if pc.any(again).as_py():
            kept = table.filter(pa.concat_arrays([pa.array([True]), pc.invert(again)]))
            repeated(table.num_rows - kept.num_rows)
            yield kept
        else:
            yield table


def side_by_side(sources: list[Iterator[pa.Table]]) -> Iterator[list[pa.Table]]:
    """Walk through sorted sources together: each step gives one table of every source, of the same range of addresses.

    All rows of one address come in the same step, and the addresses of a step come after those of the step before.

    Args:
        sources: each an iterator over tables that are sorted within and after each other; holds one table of each at a
            time (more only where one address fills them). A source of no tables at all gives steps of no use: give an
            empty table for its schema.
    """
    cursors = [_Cursor(source) for source in sources]
    while True:
        lasts = [cursor.last for cursor in cursors if cursor.last is not None]
        if not lasts:
            return
        bound = min(lasts)
        yield [cursor.take(bound) for cursor in cursors]


class _Cursor:
    """The table at hand of one source; ``last`` is its last address, ``None`` at the end."""

    def __init__(self, source: Iterator[pa.Table]) -> None:
        self._source = source
        self._table: pa.Table = pa.table({"uri": pa.array([], pa.string())})
        self._empty: pa.Table | None = None
        self.last: str | None = None
        self._advance()

    def _advance(self) -> None:
        self.last = None
        for table in self._source:
            if self._empty is None:
                self._empty = table.slice(0, 0)
            if table.num_rows:
                self._table, self.last = table, table["uri"][-1].as_py()
                return

    def take(self, bound: str) -> pa.Table:
        """Rows up to this address."""
        pieces: list[pa.Table] = []
        while self.last is not None:
            if self.last > bound:
                count = pc.sum(pc.less_equal(self._table["uri"], bound)).as_py()
                pieces.append(self._table.slice(0, count))
                self._table = self._table.slice(count)
                break
            pieces.append(self._table)
            self._advance()
        if pieces:
            return pa.concat_tables(pieces)
        assert self._empty is not None, "a source without a table"
        return self._empty

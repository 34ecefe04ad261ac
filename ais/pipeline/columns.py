"""Arrays as columns of an Arrow table between stages, without copies."""

from __future__ import annotations

import math

import numpy as np
import pyarrow as pa


def pack(array: np.ndarray) -> pa.FixedSizeBinaryArray:
    """Make a column of ``(N, …)``: one fixed-size binary value a row, sharing the array's memory."""
    array = np.ascontiguousarray(array)
    width = array.itemsize * math.prod(array.shape[1:])
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(width), len(array), [None, pa.py_buffer(array)])


def unpack(column: pa.ChunkedArray, shape: tuple[int, ...], dtype: type) -> np.ndarray:
    """Return the ``(N, *shape)`` array of a column made by `pack`; read-only."""
    whole = column.combine_chunks() if column.num_chunks != 1 else column.chunk(0)
    if isinstance(whole, pa.ChunkedArray):  # of no chunks at all
        return np.empty((0, *shape), dtype)
    width = whole.type.byte_width
    data = memoryview(whole.buffers()[1])[whole.offset * width : (whole.offset + len(whole)) * width]
    return np.frombuffer(data, dtype).reshape(len(whole), *shape)


def replace(table: pa.Table, drop: list[str], **columns: object) -> pa.Table:
    """Return the table without ``drop`` and with further columns (replaced where the name exists)."""
    table = table.drop_columns([name for name in (*drop, *columns) if name in table.column_names])
    for name, column in columns.items():
        table = table.append_column(name, column)
    return table

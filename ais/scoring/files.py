"""Parquet files of any size: streamed to this machine's disk, then put into their place at once."""

from __future__ import annotations

import os
import posixpath
import shutil
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from ais.errors import RunError, StorageError
from ais.storage import Folder, download, explain, tried

_READ_ROWS = 65_536
_ROW_GROUP = 131_072


def write_tables(path: Path, tables: Iterable[pa.Table], schema: pa.Schema) -> None:
    """Write one Parquet file on this machine, holding a row group in memory."""
    with pq.ParquetWriter(path, schema, compression="zstd", write_page_index=True) as writer:
        pending: list[pa.Table] = []
        count = 0
        for table in tables:
            pending.append(table)
            count += table.num_rows
            if count >= _ROW_GROUP:
                writer.write_table(pa.concat_tables(pending), row_group_size=_ROW_GROUP)
                pending, count = [], 0
        writer.write_table(pa.concat_tables([schema.empty_table(), *pending]), row_group_size=_ROW_GROUP)


def read_tables(path: Path, columns: list[str] | None = None) -> Iterator[pa.Table]:
    """Read a Parquet file of this machine piece by piece; the first table is empty and carries the schema."""
    with pq.ParquetFile(path) as parquet:
        schema = parquet.schema_arrow
        yield schema.empty_table().select(columns or schema.names)
        for batch in parquet.iter_batches(_READ_ROWS, columns=columns):
            yield pa.Table.from_batches([batch])


def read_kept(place: Folder, scratch: Path, columns: list[str] | None = None) -> Iterator[pa.Table]:
    """As `read_tables`, of a file that the next scores build on; a remote one is fetched whole, into ``scratch``.

    Raises:
        RunError: it is missing or damaged.
        StorageError: it cannot be read.
    """
    path = local_copy(place, scratch)
    try:
        yield from read_tables(path, columns)
    except (pa.ArrowException, OSError, KeyError) as error:  # Arrow raises OSError too
        raise RunError(
            f"{place.address!r} cannot be read: {explain(error)}; it was damaged, and the next scores build on it: "
            "restore it, or give another output"
        ) from error


def local_copy(place: Folder, scratch: Path) -> Path:
    """Where a file lies on this machine; a remote one is fetched whole, into ``scratch``.

    Raises:
        RunError: it is missing.
        StorageError: it cannot be read.
    """
    if place.local:
        if not Path(place.path).is_file():
            raise _missing(place)
        return Path(place.path)
    path = scratch / uuid.uuid4().hex
    try:
        tried(lambda: download(place, path))
    except FileNotFoundError as error:
        raise _missing(place) from error
    except Exception as error:  # each filesystem raises its own kinds
        raise StorageError(
            f"{place.address!r} cannot be read: {explain(error)}; check the address and the access to it"
        ) from error
    return path


def _missing(place: Folder) -> RunError:
    return RunError(
        f"{place.address!r} is missing, and the next scores build on it: restore it, or give another output"
    )


def copy(source: Folder, target: Folder) -> None:
    """Put a copy of a file under another name, at once: a hard link renamed into place, or a store's own copy.

    Raises:
        StorageError: it cannot be done.
    """
    try:
        if not source.local:
            tried(lambda: source.filesystem.cp_file(source.path, target.path))
            return
        partial = Path(target.path).with_name(f".{posixpath.basename(target.path)}.{uuid.uuid4().hex}.partial")
        try:
            try:
                os.link(source.path, partial)
            except OSError:  # a filesystem without hard links
                shutil.copyfile(source.path, partial)
            partial.replace(target.path)
        finally:
            partial.unlink(missing_ok=True)
    except Exception as error:  # each filesystem raises its own kinds
        raise StorageError(
            f"{target.address!r} cannot be written: {explain(error)}; check the address and the access to it"
        ) from error


def upload(path: Path, place: Folder) -> None:
    """Put a file of this machine into its place, whole or not at all.

    Raises:
        StorageError: it cannot be written.
    """
    try:
        if not place.local:
            tried(lambda: place.filesystem.put_file(str(path), place.path))
            return
        final = Path(place.path)
        final.parent.mkdir(parents=True, exist_ok=True)
        partial = final.with_name(f".{final.name}.{uuid.uuid4().hex}.partial")
        try:
            shutil.copyfile(path, partial)
            with partial.open("rb+") as file:
                os.fsync(file.fileno())
            partial.replace(final)
        finally:
            partial.unlink(missing_ok=True)
    except Exception as error:  # each filesystem raises its own kinds
        raise StorageError(
            f"{place.address!r} cannot be written: {explain(error)}; check the address and the access to it"
        ) from error

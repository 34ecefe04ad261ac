"""Shards: files that are written whole, and that show later whether they still are what was written.

A Parquet shard is *sealed*: between its last column and its footer stand a mark and the SHA-256 of all other bytes.
Readers find the footer from the end of the file and columns by their offsets, so none looks there, and nothing but the
file itself is needed to tell that it is whole: there is no second book that could disagree. A shard of pictures is a
tar; its size and SHA-256 stand in the footer of the shard of results that was written with it (`PNG_KEY`), and so under
that one's seal.
"""

from __future__ import annotations

import hashlib
import io
import struct
import tarfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ais.errors import DamagedError, RunError, StorageError
from ais.storage import Folder, reading, tried

_ROW_GROUP = 4096  # what a reader has to fetch to see a few rows
_MARK = b"AIS-SEAL"
_SEAL_BYTES = len(_MARK) + 32
_TAIL = struct.Struct("<I4s")  # length of the footer, "PAR1"
_MAGIC = b"PAR1"
PNG_KEY, PNG_BYTES_KEY, PNG_SHA256_KEY = "ais.png", "ais.png_bytes", "ais.png_sha256"
"""Metadata of a shard of results: name, size and digest of its pictures, if it has any."""


def parquet_bytes(table: pa.Table) -> bytes:
    """The sealed Parquet file of a table."""
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd", row_group_size=_ROW_GROUP)
    data = sink.getvalue()
    footer = len(data) - _footer_bytes(data)
    digest = hashlib.sha256(data).digest()
    return b"".join((data[:footer], _MARK, digest, data[footer:]))


def write_table(place: Folder, table: pa.Table) -> None:
    """Write one sealed Parquet file, whole or not at all."""
    place.write_bytes(parquet_bytes(table))


def check_seal(data: bytes) -> None:
    """Check that a Parquet file of ours is, byte for byte, what was written.

    Raises:
        DamagedError: it is not, or it has no seal.
    """
    footer = len(data) - _footer_bytes(data)
    seal = data[max(0, footer - _SEAL_BYTES) : footer]
    if not seal.startswith(_MARK):
        raise DamagedError("it has no seal, or what should be the seal is damaged")
    digest = hashlib.sha256(data[: footer - _SEAL_BYTES])
    digest.update(data[footer:])
    if digest.digest() != seal[len(_MARK) :]:
        raise DamagedError("its bytes are not those that were written: the SHA-256 is another")


def _footer_bytes(data: bytes) -> int:
    """Bytes from the start of the footer to the end of the file."""
    if len(data) < 2 * len(_MAGIC) + 4 or data[: len(_MAGIC)] != _MAGIC:
        raise DamagedError("it is not a Parquet file, or its beginning is lost")
    length, magic = _TAIL.unpack(data[-_TAIL.size :])
    if magic != _MAGIC or length + _TAIL.size + len(_MAGIC) > len(data):
        raise DamagedError("it is truncated")
    return int(length) + _TAIL.size


def read_sealed(shard: Folder) -> tuple[pq.ParquetFile, int]:
    """Read a whole shard and check its seal; return it and how many bytes it has.

    Raises:
        DamagedError: it is damaged.
        StorageError: it cannot be read.
    """
    with _reading(shard):
        data = shard.read_bytes()
    check_seal(data)
    try:
        return pq.ParquetFile(pa.BufferReader(data)), len(data)
    except (pa.ArrowException, OSError) as error:
        raise DamagedError(f"it cannot be read as Parquet: {error}") from error


def read_column(shard: Folder, name: str) -> np.ndarray:
    """Read one column of a Parquet file without fetching the others.

    Raises:
        RunError: the file is not whole; nothing here writes such a file, so it was damaged later.
    """
    return read_ids(shard, name)[0]


def read_ids(shard: Folder, name: str = "image_id") -> tuple[np.ndarray, dict[str, str]]:
    """Read one column of a Parquet file and the metadata of its footer, without fetching the other columns.

    Raises:
        RunError: the file is not whole; nothing here writes such a file, so it was damaged later.
        StorageError: it cannot be read, for now.
    """
    with _reading(shard):
        try:
            table = tried(lambda: _columns(shard, [name]))
        except (pa.ArrowInvalid, KeyError) as error:
            raise damaged(shard, error) from error
    metadata = table.schema.metadata or {}
    return table[name].to_numpy(), {key.decode(): value.decode() for key, value in metadata.items()}


def read_table(shard: Folder, columns: list[str]) -> pa.Table:
    """Read some columns of a whole Parquet file.

    Raises:
        RunError: the file is not whole.
        StorageError: it cannot be read, for now.
    """
    with _reading(shard):
        data = shard.read_bytes()
    try:
        return pq.read_table(pa.BufferReader(data), columns=columns)
    except (pa.ArrowException, OSError, KeyError) as error:  # Arrow raises OSError too
        raise damaged(shard, error) from error


@contextmanager
def _reading(shard: Folder) -> Iterator[None]:
    """As `ais.storage.reading`; a shard that is gone was there when its folder was listed.

    Raises:
        StorageError: it cannot be read.
    """
    try:
        with reading(shard):
            yield
    except (FileNotFoundError, NotADirectoryError) as error:
        raise StorageError(
            f"{shard.address!r} was there a moment ago and is gone; find out what deletes or moves it, and start the "
            "same command again"
        ) from error


def damaged(shard: Folder, error: Exception) -> RunError:
    """The error that says which shard is not whole, and the way out."""
    said = " ".join(str(error).split())  # Arrow's messages have several lines
    return RunError(
        f"{shard.address!r} cannot be read: {said}; it was damaged: delete it, and start the same command "
        "again (repair=true of jobs/heatmaps.py does that with all that is damaged)"
    )


def _columns(shard: Folder, names: list[str]) -> pa.Table:
    # Without a cache: it would fetch the columns in between too.
    with shard.filesystem.open(shard.path, "rb", cache_type="none") as file:
        return pq.read_table(file, columns=names)


def tar_bytes(members: Iterable[tuple[str, bytes]]) -> bytes:
    """A tar of files, as tar and WebDataset read it."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return data.getvalue()


class PictureTar:
    """A tar of pictures that is read as a stream, one member in memory at a time.

    Args:
        file: positioned at its beginning.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file: Any = _Digested(file)
        self.names: list[str] = []

    def read(self) -> None:
        """Read it to its end; check every header and every picture.

        Raises:
            DamagedError: it is truncated, or a header or picture is damaged.
        """
        try:
            with tarfile.open(fileobj=self._file, mode="r|", errorlevel=2) as archive:
                for member in archive:
                    content = archive.extractfile(member)
                    _check_png(member.name, b"" if content is None else content.read())
                    self.names.append(member.name)
        except (tarfile.TarError, EOFError) as error:
            raise DamagedError(f"it cannot be read as tar: {error}") from error
        self._file.exhaust()
        if self._file.size % tarfile.RECORDSIZE:
            raise DamagedError("it is truncated")

    @property
    def size(self) -> int:
        """Bytes read."""
        return self._file.size

    @property
    def sha256(self) -> str:
        """Of the bytes read, in hexadecimal."""
        return self._file.digest.hexdigest()


class _Digested:
    """A readable file whose bytes are counted and digested as they pass."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.digest = hashlib.sha256()
        self.size = 0

    def read(self, size: int) -> bytes:
        data = self._file.read(size)
        self.digest.update(data)
        self.size += len(data)
        return data

    def exhaust(self) -> None:
        while self.read(2**20):
            pass


_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_CHUNK = struct.Struct(">I4s")  # length of the data, kind; data and checksum follow


def _check_png(name: str, data: bytes) -> None:
    """Check the checksum of every chunk of a PNG, and that it has an end."""
    start, kind, view = len(_PNG_SIGNATURE), b"", memoryview(data)
    if not data.startswith(_PNG_SIGNATURE):
        raise DamagedError(f"its member {name} is not a PNG")
    while start + _CHUNK.size + 4 <= len(data):
        length, kind = _CHUNK.unpack_from(data, start)
        end = start + _CHUNK.size + length
        if view[end : end + 4] != zlib.crc32(view[start + 4 : end]).to_bytes(4, "big"):
            raise DamagedError(f"its member {name} is damaged: a checksum is another")
        start = end + 4
    if kind != b"IEND" or start != len(data):
        raise DamagedError(f"its member {name} is truncated")

"""The embedding cache: what a frozen backbone sees in an image is computed once.

One folder for every backbone, weights and preprocessing, ``<cache>/<embedding fingerprint>/part-*.parquet``, with the
columns ``uri``, ``version`` and ``embedding``. Parts are only ever added.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from ais.errors import StorageError
from ais.storage import Folder, Storage, reading

_FINGERPRINT = b"ais.embedding_fingerprint"


class Key(NamedTuple):
    """One content of one image.

    Args:
        uri: full address.
        version: etag, or size and time of change.
    """

    uri: str
    version: str


@dataclass(frozen=True)
class EmbeddingCache:
    """Embeddings of one backbone, weights and preprocessing; plain data, so that it travels to Ray workers.

    Args:
        address: folder of all caches (local path or any fsspec address).
        fingerprint: of backbone, weights and preprocessing (`ais.backbones.embedding_fingerprint`).
        storage: how to reach the folder.
    """

    address: str
    fingerprint: str
    storage: Storage = field(default_factory=Storage)

    @property
    def folder(self) -> Folder:
        """Where the parts are."""
        return self.storage.open(self.address) / self.fingerprint

    def missing(self, keys: Sequence[Key]) -> NDArray[np.intp]:
        """Return the indices of the keys that are not in the cache, ascending.

        Raises:
            StorageError: a part is damaged or belongs elsewhere.
        """
        known: set[Key] = set()
        wanted = set(keys)
        for part in self._parts():
            known |= wanted.intersection(_keys(part))
        return np.array([index for index, key in enumerate(keys) if key not in known], np.intp)

    def load(self, keys: Sequence[Key]) -> NDArray[np.float32]:
        """Return the embeddings ``(N, D)`` float32 of N ≥ 1 keys, in their order.

        Reads one part at a time: the memory needed is that of the result and of one part. Where a key is in the cache
        twice, either holds the same embedding.

        Raises:
            StorageError: a key is not in the cache, or a part is damaged or belongs elsewhere.
        """
        positions: dict[Key, list[int]] = {}
        for index, key in enumerate(keys):
            positions.setdefault(key, []).append(index)
        embeddings: NDArray[np.float32] | None = None
        found = np.zeros(len(keys), bool)
        for part in self._parts():
            matches = [(row, index) for row, key in enumerate(_keys(part)) for index in positions.get(key, ())]
            if not matches:
                continue
            values = _embeddings(part)
            if embeddings is None:
                embeddings = np.empty((len(keys), values.shape[1]), np.float32)
            elif values.shape[1] != embeddings.shape[1]:
                raise _unusable(part.place, f"its embeddings have {values.shape[1]} numbers, not {embeddings.shape[1]}")
            rows, indices = np.array(matches).T
            embeddings[indices] = values[rows]
            found[indices] = True
        if embeddings is None or not found.all():
            absent = int((~found).sum())
            raise StorageError(
                f"{self.folder.address!r} lacks {absent} of {len(keys)} embeddings, such as that of "
                f"{keys[int(found.argmin())]}; start the same command again to compute them"
            )
        return embeddings

    def write(self, name: str, uris: Sequence[str], versions: Sequence[str], embeddings: NDArray[np.float32]) -> None:
        """Add one part, whole or not at all.

        Args:
            name: of the part, unique within the cache; the file is ``part-<name>.parquet``.
            uris: N addresses.
            versions: their N versions.
            embeddings: ``(N, D)`` float32.
        """
        count, size = embeddings.shape
        values = pa.array(np.ascontiguousarray(embeddings, np.float32).reshape(-1))
        table = pa.table(
            {
                "uri": pa.array(uris, pa.string()),
                "version": pa.array(versions, pa.string()),
                "embedding": pa.FixedSizeListArray.from_arrays(values, size),
            }
        ).replace_schema_metadata({_FINGERPRINT: self.fingerprint.encode()})
        assert table.num_rows == count
        sink = io.BytesIO()
        # Random-looking mantissas do not compress; trying costs more time than it saves.
        pq.write_table(table, sink, compression="none")
        (self.folder / f"part-{name}.parquet").write_bytes(sink.getvalue())

    def _parts(self) -> Iterator[_Part]:
        for place in self.folder.files("part-*.parquet"):
            with reading(place):
                try:
                    with place.filesystem.open(place.path, "rb") as file:
                        parquet = pq.ParquetFile(file)
                        found = (parquet.schema_arrow.metadata or {}).get(_FINGERPRINT)
                        if found != self.fingerprint.encode():
                            raise _unusable(place, f"it holds embeddings {found!r}")
                        yield _Part(place, parquet)
                except (pa.ArrowException, OSError) as error:
                    raise _unusable(place, f"{type(error).__name__}: {error}") from error


class _Part(NamedTuple):
    place: Folder
    parquet: pq.ParquetFile


def _keys(part: _Part) -> Iterator[Key]:
    with reading(part.place):
        try:
            table = part.parquet.read(columns=["uri", "version"])
            return map(Key, table["uri"].to_pylist(), table["version"].to_pylist())
        except (pa.ArrowException, OSError, KeyError) as error:
            raise _unusable(part.place, f"{type(error).__name__}: {error}") from error


def _embeddings(part: _Part) -> NDArray[np.float32]:
    with reading(part.place):
        try:
            column = part.parquet.read(columns=["embedding"])["embedding"].combine_chunks()
            values: NDArray[np.float32] = column.flatten().to_numpy()
            return values.reshape(len(column), -1)
        except (pa.ArrowException, OSError, KeyError, AttributeError) as error:
            raise _unusable(part.place, f"{type(error).__name__}: {error}") from error


def _unusable(place: Folder, reason: str) -> StorageError:
    return StorageError(
        f"{place.address!r} is not a part of this embedding cache: {reason}; delete the file and start again"
    )

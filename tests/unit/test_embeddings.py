"""The embedding cache on a local folder and in fsspec's memory filesystem. Nothing is faked."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ais.embeddings import EmbeddingCache, Key
from ais.errors import StorageError

SIZE = 6


def embeddings_of(keys: list[Key]) -> np.ndarray:
    """What the cache should hold: numbers that name their key."""
    return np.array([[sum(map(ord, key.uri)) * 10 + j for j in range(SIZE)] for key in keys], np.float32)


def write(cache: EmbeddingCache, name: str, keys: list[Key]) -> None:
    cache.write(name, [key.uri for key in keys], [key.version for key in keys], embeddings_of(keys))


KEYS = [Key(f"/images/{name}.png", "1-1.0") for name in "abcdefgh"]


@pytest.fixture(params=["local", "memory"])
def cache(request: pytest.FixtureRequest, tmp_path: Path) -> EmbeddingCache:
    address = str(tmp_path / "cache") if request.param == "local" else f"memory://{tmp_path.name}"
    cache = EmbeddingCache(address, "f1")
    write(cache, "0", KEYS[:3])
    write(cache, "1", KEYS[3:5])
    write(cache, "2", KEYS[6:])
    return cache


def test_load_in_the_order_asked(cache: EmbeddingCache) -> None:
    asked = [KEYS[index] for index in (7, 0, 4, 3, 0)]
    found = cache.load(asked)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, embeddings_of(asked))


def test_missing(cache: EmbeddingCache) -> None:
    assert cache.missing(KEYS).tolist() == [5]
    assert cache.missing([Key(KEYS[0].uri, "another version"), KEYS[1]]).tolist() == [0]
    assert EmbeddingCache(cache.address, "another fingerprint").missing(KEYS).tolist() == list(range(8))
    with pytest.raises(StorageError, match=r"lacks 1 of 8 embeddings, such as that of .*f\.png"):
        cache.load(KEYS)


def test_a_key_twice_is_harmless(cache: EmbeddingCache) -> None:
    write(cache, "again", KEYS[2:6])
    np.testing.assert_array_equal(cache.load(KEYS), embeddings_of(KEYS))
    assert cache.missing(KEYS).tolist() == []


def test_damaged_part_is_named(cache: EmbeddingCache) -> None:
    whole = (cache.folder / "part-1.parquet").read_bytes()
    (cache.folder / "part-1.parquet").write_bytes(whole[:-20])
    for use in (cache.missing, cache.load):
        with pytest.raises(StorageError, match=r"part-1\.parquet' is not a part of this embedding cache"):
            use(KEYS)


def test_part_of_another_cache_is_named(cache: EmbeddingCache) -> None:
    other = EmbeddingCache(cache.address, "f2")
    write(other, "9", KEYS)
    (cache.folder / "part-9.parquet").write_bytes((other.folder / "part-9.parquet").read_bytes())
    with pytest.raises(StorageError, match=r"part-9\.parquet.*holds embeddings b'f2'"):
        cache.load(KEYS)


def test_embeddings_of_another_size_are_named(cache: EmbeddingCache) -> None:
    cache.write("3", [KEYS[5].uri], [KEYS[5].version], np.ones((1, SIZE + 1), np.float32))
    with pytest.raises(StorageError, match=r"part-3\.parquet.*7 numbers, not 6"):
        cache.load(KEYS)


def test_parts_are_plain_parquet(tmp_path: Path) -> None:
    cache = EmbeddingCache(str(tmp_path), "f1")
    write(cache, "x", KEYS[:2])
    table = pq.read_table(tmp_path / "f1" / "part-x.parquet")
    assert table.schema.field("embedding").type == pa.list_(pa.float32(), SIZE)
    assert table.to_pylist()[1] == {
        "uri": KEYS[1].uri,
        "version": KEYS[1].version,
        "embedding": embeddings_of(KEYS[1:2])[0].tolist(),
    }
    assert [path.name for path in (tmp_path / "f1").iterdir()] == ["part-x.parquet"]

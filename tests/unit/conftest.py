"""What all unit tests share."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.small_disk import small_disk

# Two processes of several threads each on the same cores wait for each other: a forward pass of ResNet-152 that takes
# 0.2 s then takes 7 s. Read when torch is first imported, and by processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keep downloads out of the cache of whoever runs the tests, and find nothing there."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """A small filesystem, in memory, with room for folders and none for files."""
    with small_disk(tmp_path / "disk", "size=4k") as folder:
        (folder / "full").write_bytes(bytes(4096))
        yield folder

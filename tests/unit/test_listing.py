"""Streamed listings: equal to the simple ones on disk, on S3 and in memory, in little memory, and not to be led astray.

S3 is moto in its own process (`tests.s3.server`). One test asks a simulated S3 of many objects, since writing
those would take long: it answers pages as S3 does, and nothing else is faked.
"""

import itertools
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

import ais.listing
from ais.errors import StorageError
from ais.listing import (
    Listing,
    _globbed,
    _globbed_reference,
    _list_batches,
    _walked,
    _walked_reference,
    list_images,
    look_up,
)
from ais.runs import Run
from ais.storage import Folder, Storage
from tests.s3.server import S3Server

STORAGE = Storage()
TREE = [
    "a.png",
    "a/x.png",
    "a/y.JPG",
    "a b/x.png",
    "a-b/x.png",
    "a0.png",
    "b/c/d/e.webp",
    "b/c.png",
    "b/c/notes.txt",
    "b/.hidden/x.png",
    "b/.x.png",
    "ü/画像.png",
    "percent%20#?.png",
    "no_suffix",
    "z/[1].png",
    "z/1.png",
]
EXPECTED = ["a b/x.png", "a-b/x.png", "a.png", "a/x.png", "a/y.JPG", "a0.png", "b/c.png", "b/c/d/e.webp"]
EXPECTED += ["percent%20#?.png", "z/1.png", "z/[1].png", "ü/画像.png"]
IGNORED = Counter({".txt": 1, ".png": 1, "(no suffix)": 1})


@pytest.fixture(params=["disk", "s3", "memory"])
def tree(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[str, Storage]]:
    """The same tree in three places."""
    storage, address = STORAGE, str(tmp_path)
    if request.param == "s3":
        s3: S3Server = request.getfixturevalue("s3")
        address = request.getfixturevalue("bucket") + "/tree"
        storage = Storage(endpoint_url=s3.endpoint_url)
        monkeypatch.setattr(ais.listing, "_PAGE", 3)
        for name in (*TREE, "b/"):  # and the marker of a folder
            s3.put(f"{address}/{name}", name.encode())
        s3.put(f"{address}-other/x.png", b"beside")
    else:
        if request.param == "memory":
            address = "memory:///tree"
        for name in TREE:
            storage.open(f"{address}/{name}").write_bytes(name.encode())
    yield address, storage
    if request.param == "memory":
        storage.open(address).filesystem.rm("/tree", recursive=True)


def test_walks_are_the_same_everywhere_and_equal_the_simple_walk(tree: tuple[str, Storage]) -> None:
    address, storage = tree
    listing = list_images(address, storage)
    found = list(listing)
    base = storage.open(address).address
    assert [image.uri.removeprefix(f"{base}/") for image in found] == EXPECTED
    assert listing.ignored == IGNORED
    assert [image.size for image in found] == [len(name.encode()) for name in EXPECTED]
    simple: Counter[str] = Counter()
    reference = list(_walked_reference(storage.open(address), simple))
    assert simple == IGNORED
    assert {image.uri: (image.size, image.etag, image.mtime) for image in reference} == {
        image.uri: (image.size, image.etag, image.mtime) for image in found
    }
    if not address.startswith("s3"):  # whose keys may hold what no path does; its own order is asked for in pages
        assert reference == found
    for image in found:
        assert storage.open(image.uri).read_bytes().decode() == image.uri.removeprefix(f"{base}/")
        assert look_up(image.uri, storage) == image


@pytest.mark.parametrize(
    "pattern", ["*.png", "*/*.png", "a*/x.png", "**/*.png", "b/**", "?/c/*", "z/[[]1].png", "z/[0-9].png", "no/*", "a*"]
)
def test_globs_equal_the_simple_glob(tree: tuple[str, Storage], pattern: str) -> None:
    address, storage = tree
    place = storage.open(f"{address}/{pattern}")
    found, reference = list(_globbed(place)), list(_globbed_reference(place))
    assert sorted(image.uri for image in found) == [image.uri for image in reference]
    assert {image.uri: image for image in found} == {image.uri: image for image in reference}
    assert bool(found) == (pattern != "no/*")


def test_a_large_folder_takes_little_memory(tmp_path: Path) -> None:
    for number in range(4_000):
        (tmp_path / f"{number:07d}-of-an-ordinary-name.png").touch()
    place = STORAGE.open(str(tmp_path))

    def peak(images: Iterator[Any]) -> int:
        tracemalloc.start()
        assert sum(1 for _ in images) == 4_000
        used = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return used

    streamed, whole = peak(_walked(place, Counter())), peak(_walked_reference(place, Counter()))
    assert streamed < whole / 5  # names alone and everything about them


class Pages:
    """S3 of so many objects, one page at a time, and how many pages were asked for."""

    protocol = ("s3", "s3a")
    req_kw: dict[str, str] = {}  # noqa: RUF012

    def __init__(self, count: int) -> None:
        self.count = count
        self.asked = 0

    def split_path(self, path: str) -> tuple[str, str, None]:
        bucket, _, key = path.partition("/")
        return bucket, key, None

    def unstrip_protocol(self, path: str) -> str:
        return f"s3://{path}"

    def call_s3(self, method: str, **query: Any) -> dict[str, Any]:
        assert method == "list_objects_v2"
        assert query["Bucket"] == "bucket"
        first = int(query.get("ContinuationToken", 0))
        self.asked += 1
        keys = range(first, min(first + query["MaxKeys"], self.count))
        contents = [{"Key": f"photos/{n:09d}.jpg", "Size": n, "ETag": f'"{n:032x}"'} for n in keys]
        more = first + query["MaxKeys"] < self.count
        return {"Contents": contents, "IsTruncated": more, "NextContinuationToken": str(first + query["MaxKeys"])}


def test_s3_is_asked_page_by_page_as_the_manifest_is_written(tmp_path: Path) -> None:
    pages = Pages(30_000)
    place = Folder(pages, "bucket/photos")  # type: ignore[arg-type]
    stream = _walked(place, Counter())
    assert [image.uri for image in itertools.islice(stream, 2)] == [
        "s3://bucket/photos/000000000.jpg",
        "s3://bucket/photos/000000001.jpg",
    ]
    assert pages.asked == 1
    run = Run.at(str(tmp_path), "large", STORAGE)
    tracemalloc.start()
    for _ in itertools.islice(stream, 25_998):
        pass
    used = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert used < 6 * 2**20  # measured: 2 MB, a page or two of a thousand; all of them are over 20 MB
    assert pages.asked == 26
    few = Listing(_walked(Folder(Pages(2_000), "bucket/photos"), Counter()), Counter())  # type: ignore[arg-type]
    assert run.set_out(few, "", {"ignored": {}}) == 2_000
    manifest = pq.read_table(tmp_path / "runs" / "large" / "manifest")
    assert manifest["uri"][1999].as_py() == "s3://bucket/photos/000001999.jpg"
    assert manifest["etag"][3].as_py() == f"{3:032x}"


@pytest.mark.parametrize("name", ["list.csv", "list.parquet"])
def test_etags_of_a_list_may_be_quoted_as_s3_prints_them(tmp_path: Path, name: str) -> None:
    table = pa.table({"uri": ["a.png", "b.png", "c.png"], "etag": ['"d41d8cd9"', "d41d8cd9-2", ""]})
    if name.endswith(".csv"):
        pa.csv.write_csv(table, tmp_path / name)
    else:
        pq.write_table(table, tmp_path / name)
    assert [image.etag for image in list_images(str(tmp_path / name), STORAGE)] == ["d41d8cd9", "d41d8cd9-2", None]


class TestLists:
    def refusal(self, path: Path | str, storage: Storage = STORAGE) -> str:
        with pytest.raises(StorageError) as refused:
            list(list_images(str(path), storage))
        return str(refused.value)

    def test_relative_addresses_do_not_leave_the_folder_of_the_list(self, tmp_path: Path) -> None:
        for outside in ("../secret.png", "a/../../secret.png", "./..//secret.png", ".."):
            pq.write_table(pa.table({"uri": ["a.png", outside]}), tmp_path / "list.parquet")
            message = self.refusal(tmp_path / "list.parquet")
            assert f"row 2: {outside!r} leads out of the folder of the list; write the whole address" in message
        inside = ["a/../b.png", "..a.png", "%2e%2e/a.png", "a..b/c.png"]
        pq.write_table(pa.table({"uri": inside}), tmp_path / "list.parquet")
        found = [image.uri for image in list_images(str(tmp_path / "list.parquet"), STORAGE)]
        assert found[1:] == [f"{tmp_path}/{name}" for name in inside[1:]]

    def test_a_list_elsewhere_names_no_files_of_this_machine(self, s3: S3Server, bucket: str) -> None:
        storage = Storage(endpoint_url=s3.endpoint_url)
        for local in ("/etc/passwd", "file:///etc/passwd", "local:///etc/passwd"):
            s3.put(f"{bucket}/list.csv", f"uri\n{local}\n".encode())
            assert "is a file of this machine, and the list is not" in self.refusal(f"{bucket}/list.csv", storage)
        s3.put(f"{bucket}/list.csv", b"uri\na b.png\ns3://other/c.png\n")
        uris = [image.uri for image in list_images(f"{bucket}/list.csv", storage)]
        assert uris == [f"{bucket}/a b.png", "s3://other/c.png"]

    def test_secrets_in_a_list_are_refused_and_not_shown(self, tmp_path: Path) -> None:
        signed = "https://bucket.s3.amazonaws.com/a.png?X-Amz-Signature=abcdef0123456789"
        (tmp_path / "list.csv").write_text(f"uri\na.png\n{signed}\n")
        message = self.refusal(tmp_path / "list.csv")
        assert "row 2: " in message
        assert "X-Amz-Signature" in message
        assert "abcdef0123456789" not in message

    def test_long_lists_come_in_batches(self, tmp_path: Path) -> None:
        labels = np.arange(100_000).astype(str)
        table = pa.table({"uri": [f"folder-of-an-ordinary-name/{label}.png" for label in labels], "label": labels})
        pq.write_table(table, tmp_path / "list.parquet")
        pa.csv.write_csv(table.append_column("other", table["label"]), tmp_path / "list.csv")
        for name in ("list.csv", "list.parquet"):
            batches = list(_list_batches(STORAGE.open(str(tmp_path / name))))
            assert len(batches) > 1
            assert pa.Table.from_batches(batches)["uri"].equals(table["uri"])

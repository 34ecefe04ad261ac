"""The run folder: listings, manifest, what is done, what is missing. All on real files of a local disk."""

import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ais.errors import RunError, StorageError
from ais.listing import ListedImage, list_images
from ais.runs import ERRORS_SCHEMA, MANIFEST_SCHEMA, Accounting, Run, read_all_ids, results_schema
from ais.shards import PNG_KEY, read_column, write_table
from ais.storage import Storage

STORAGE = Storage()
ODD_NAMES = [
    "with space.png",
    "ünïcode 画像.png",
    "hash#1.png",
    "question?.png",
    "percent%20.png",
    "new\nline.png",
    "a::b.png",
    "s3:file.png",
    "[brackets].png",
    "~tilde.png",
    "UPPER.JPG",
]


def touch(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x" * len(path.name))


def listed(address: Path | str) -> list[str]:
    return [image.uri for image in list_images(str(address), STORAGE)]


class TestListImages:
    def test_a_folder_is_walked_in_the_order_of_names_and_other_files_are_counted(self, tmp_path: Path) -> None:
        images = [tmp_path / "a.png", tmp_path / "b" / "same.jpg", tmp_path / "c" / "d" / "same.jpg"]
        touch(*reversed(images))
        others = ["b/notes.txt", "b/more.TXT", "Makefile", ".hidden.png", ".git/object.png"]
        touch(*(tmp_path / name for name in others))
        listing = list_images(str(tmp_path), STORAGE)
        found = list(listing)
        assert [image.uri for image in found] == [str(path) for path in images]
        assert [image.size for image in found] == [5, 8, 8]
        assert [image.mtime for image in found] == [path.stat().st_mtime for path in images]
        assert listing.ignored == Counter({".txt": 2, "(no suffix)": 1, ".png": 1})

    def test_every_character_of_a_name_is_taken_literally(self, tmp_path: Path) -> None:
        paths = [tmp_path / "[odd] ?#% folder" / name for name in ODD_NAMES]
        touch(*paths)
        assert sorted(listed(paths[0].parent)) == sorted(map(str, paths))
        for uri in listed(paths[0].parent):
            assert STORAGE.open(uri).read_bytes() == b"x" * len(Path(uri).name)

    def test_a_name_that_is_not_utf8_is_listed_escaped(self, tmp_path: Path) -> None:
        (Path(os.fsdecode(os.fsencode(tmp_path) + b"/latin\xe9.png"))).write_bytes(b"x")
        assert listed(tmp_path) == [f"{tmp_path}/latin\\udce9.png"]

    def test_folders_named_like_images_are_walked_and_links_to_folders_are_not(self, tmp_path: Path) -> None:
        touch(tmp_path / "folder.jpg" / "a.png")
        (tmp_path / "link.png").symlink_to(tmp_path / "folder.jpg" / "a.png")
        (tmp_path / "around").symlink_to(tmp_path)
        os.mkfifo(tmp_path / "pipe.jpg")
        names = ["folder.jpg/a.png", "link.png", "pipe.jpg"]
        assert listed(tmp_path) == [str(tmp_path / name) for name in names]

    def test_a_glob_takes_files_whatever_their_suffix(self, tmp_path: Path) -> None:
        touch(tmp_path / "a" / "1.png", tmp_path / "a" / "2.dat", tmp_path / "b" / "3.png", tmp_path / "4.png")
        assert listed(tmp_path / "*" / "*.png") == [str(tmp_path / "a/1.png"), str(tmp_path / "b/3.png")]
        assert listed(tmp_path / "a" / "*") == [str(tmp_path / "a/1.png"), str(tmp_path / "a/2.dat")]
        assert listed(tmp_path / "**" / "*.png") == [str(tmp_path / name) for name in ("4.png", "a/1.png", "b/3.png")]

    def test_two_stars_that_are_no_whole_folder(self, tmp_path: Path) -> None:
        with pytest.raises(StorageError, match=r"is no pattern: .*put \*\* between slashes, as in photos/\*\*/\*\.jpg"):
            listed(tmp_path / "**.png")

    def test_one_image(self, tmp_path: Path) -> None:
        touch(tmp_path / "one.png")
        assert listed(tmp_path / "one.png") == [str(tmp_path / "one.png")]

    @pytest.mark.parametrize("suffix", ["csv", "parquet"])
    def test_relative_addresses_of_a_list_start_at_its_folder(self, tmp_path: Path, suffix: str) -> None:
        table = pa.table(
            {
                "uri": ["/abs/a.png", *ODD_NAMES, "s3://bucket/key.png"],
                "etag": ["007", *["e"] * len(ODD_NAMES), None],
                "size": [1, *[None] * len(ODD_NAMES), 2],
                "label": ["x"] * (len(ODD_NAMES) + 2),
            }
        )
        path = tmp_path / f"list.{suffix}"
        (pa.csv.write_csv if suffix == "csv" else pq.write_table)(table, path)
        images = list(list_images(str(path), STORAGE))
        relative = [str(tmp_path / name) for name in ODD_NAMES]
        assert [image.uri for image in images] == ["/abs/a.png", *relative, "s3://bucket/key.png"]
        assert (images[0].etag, images[0].size, images[-1].size) == ("007", 1, 2)

    def test_a_list_of_many_names_with_newlines(self, tmp_path: Path) -> None:
        names = [f"name {number}\nof two lines.png" for number in range(80_000)]  # over a block of Arrow's reader
        pa.csv.write_csv(pa.table({"uri": names}), tmp_path / "list.csv")
        assert listed(tmp_path / "list.csv") == [str(tmp_path / name) for name in names]

    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("a.csv", "image,score\nx.png,1\n", "no column 'uri'.*it has image, score"),
            ("a.csv", "", "cannot be read as a list of images"),
            ("a.csv", "uri,size\nx.png,large\n", "cannot be read as a list of images.*large"),
            ("a.csv", "uri,size\nx.png,1\n,2\n", "a row with an empty 'uri'"),
            ("a.csv", "uri,Größe\nx.png,1\n", "cannot be read as a list of images: UnicodeDecodeError.*in UTF-8"),
            ("a.parquet", "not Parquet", "cannot be read as a list of images"),
        ],
    )
    def test_unusable_lists(self, tmp_path: Path, name: str, content: str, message: str) -> None:
        (tmp_path / name).write_text(content, "latin-1")
        with pytest.raises(StorageError, match=message):
            listed(tmp_path / name)

    def test_a_list_of_anything_but_text(self, tmp_path: Path) -> None:
        pq.write_table(pa.table({"uri": [None, "a.png"]}), tmp_path / "null.parquet")
        with pytest.raises(StorageError, match="empty 'uri'"):
            listed(tmp_path / "null.parquet")
        pq.write_table(pa.table({"uri": [["a.png"]]}), tmp_path / "nested.parquet")
        with pytest.raises(StorageError, match="cannot be read as a list"):
            listed(tmp_path / "nested.parquet")
        twice = pa.table([pa.array(["a.png"]), pa.array(["b.png"])], names=["uri", "uri"])
        pq.write_table(twice, tmp_path / "twice.parquet")
        with pytest.raises(StorageError, match="cannot be read as a list of images: KeyError"):
            listed(tmp_path / "twice.parquet")
        pq.write_table(pa.table({"uri": pa.array(["a.png"]).dictionary_encode()}), tmp_path / "coded.parquet")
        assert listed(tmp_path / "coded.parquet") == [str(tmp_path / "a.png")]

    def test_nothing_there(self, tmp_path: Path) -> None:
        with pytest.raises(StorageError, match=r"missing.*does not exist: give a folder, a glob"):
            listed(tmp_path / "missing")

    def test_a_folder_that_cannot_be_read_is_an_error_not_a_gap(self, readable_by_all: Path) -> None:
        touch(readable_by_all / "open" / "a.png", readable_by_all / "open" / "closed" / "b.png")
        (readable_by_all / "open" / "closed").chmod(0)
        code = f"list(list_images({str(readable_by_all)!r}, Storage()))"
        answer = as_nobody(code, imports="from ais.listing import list_images\nfrom ais.storage import Storage")
        assert "StorageError" in answer
        assert f"{readable_by_all}/open/closed' cannot be walked" in answer


def test_outputs_that_may_not_be_looked_into_are_named(readable_by_all: Path) -> None:
    closed = readable_by_all / "closed"
    touch(closed / "out" / "a.csv", readable_by_all / "r.csv")
    closed.chmod(0)
    (readable_by_all / "r.csv").chmod(0)
    lock = f"with hold(Storage().open('{closed}/out')): pass"
    answer = as_nobody(lock, imports="from ais.lease import hold\nfrom ais.storage import Storage")
    assert f"StorageError: '{closed}/out/lock" in answer
    imports = "from ais.config import ConvertConfig\nfrom ais.datasets import *\nfrom ais.storage import Storage"
    config = f"ConvertConfig(dataset='ava', source='s', output='{readable_by_all}/r.csv')"
    convert = f"write_converted(Rated('s', ['1.jpg'], np.ones(1), None, ''), {config}, Storage())"
    assert f"StorageError: '{readable_by_all}/r.csv' cannot be read: PermissionError" in as_nobody(convert, imports)


@pytest.fixture
def readable_by_all() -> Iterator[Path]:
    """A folder that other users reach too, unlike pytest's own."""
    with tempfile.TemporaryDirectory(prefix="ais-") as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)
        for path in Path(folder).rglob("closed"):
            path.chmod(0o755)


def as_nobody(code: str, imports: str) -> str:
    """Run code in a process that is not root, for whom permissions mean something; return what it says."""
    drop = "import os\nif os.geteuid() == 0:\n    os.setgroups([])\n    os.setgid(65534)\n    os.setuid(65534)"
    script = "\n".join((imports, drop, code))
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True, check=False)
    return done.stdout + done.stderr


def test_the_version_of_an_image_is_its_etag_or_size_and_time() -> None:
    assert ListedImage("a", size=3, etag="e", mtime=1.5).version == "e"
    assert ListedImage("a", size=3, mtime=1.5).version == "3-1.5"
    assert ListedImage("a", size=3, mtime=1.5).version != ListedImage("a", size=3, mtime=1.25).version


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run.at(str(tmp_path), "first", STORAGE)


def set_out(run: Run, count: int = 6) -> None:
    run.set_out([ListedImage(f"/i/{n}.png", size=n) for n in range(count)], "images: /i\n", {"backbone": "tiny"})


def write_results(run: Run, name: str, ids: Sequence[int]) -> None:
    count = len(ids)
    columns = [
        pa.array(ids),
        [f"/i/{n}.png" for n in ids],
        pa.nulls(count, pa.string()),
        pa.array([4] * count, pa.int32()),
        pa.array([3] * count, pa.int32()),
        pa.FixedSizeListArray.from_arrays(pa.array(np.zeros(4 * count, np.float32)), 4),
        pa.FixedSizeListArray.from_arrays(pa.array(np.zeros(4 * count, np.float32)), 4),
        pa.array(np.zeros(count, np.float32)),
        pa.nulls(count, pa.float32()),
        pa.FixedShapeTensorArray.from_numpy_ndarray(np.zeros((count, 2, 2), np.float32)),
        pa.nulls(count, pa.string()),
    ]
    schema = results_schema((2, 2), {PNG_KEY: f"{name}-1.tar"})
    write_table(run.results / f"{name}.parquet", pa.table(columns, schema=schema))


def write_errors(run: Run, name: str, ids: Sequence[int], reason: str = "truncated") -> None:
    rows = [
        {"image_id": n, "uri": f"/i/{n}.png", "etag": None, "stage": "decode", "reason": reason, "error": reason}
        for n in ids
    ]
    write_table(run.errors / f"{name}.parquet", pa.Table.from_pylist(rows, ERRORS_SCHEMA))


class TestRun:
    def test_setting_out_writes_manifest_configuration_and_record(self, run: Run, tmp_path: Path) -> None:
        assert run.record() is None
        set_out(run, 3)
        manifest = pq.read_table(tmp_path / "runs/first/manifest/part-00000.parquet")
        assert manifest.schema.equals(MANIFEST_SCHEMA)
        assert manifest.to_pydict() == {
            "image_id": [0, 1, 2],
            "uri": ["/i/0.png", "/i/1.png", "/i/2.png"],
            "size": [0, 1, 2],
            "etag": [None] * 3,
            "mtime": [None] * 3,
        }
        assert (tmp_path / "runs/first/config.yaml").read_text() == "images: /i\n"
        record = run.record()
        assert record is not None
        assert (record["images"], record["backbone"]) == (3, "tiny")
        assert run.summary() is None
        assert run.run_id == "first"

    def test_an_interrupted_listing_is_replaced(self, run: Run) -> None:
        (run.manifest / "part-00007.parquet").write_bytes(b"of a longer listing")
        set_out(run)
        assert [part.path.rsplit("/", 1)[-1] for part in run.manifest.files()] == ["part-00000.parquet"]

    def test_ids_go_on_over_the_parts_of_a_long_manifest(self, run: Run) -> None:
        set_out(run, 100_001)
        first, second = run.manifest.files("*.parquet")
        assert len(read_column(first, "image_id")) == 100_000
        assert read_column(second, "image_id").tolist() == [100_000]

    def test_no_images_leaves_no_folder(self, run: Run, tmp_path: Path) -> None:
        with pytest.raises(RunError, match="no images"):
            set_out(run, 0)
        assert list(tmp_path.iterdir()) == []

    def test_recover_and_account(self, run: Run) -> None:
        write_results(run, "part-a-0", [0, 2])
        write_errors(run, "part-a-0", [1])
        write_errors(run, "part-b-0", [5], "corrupt")
        assert run.recover(6).tolist() == [True, True, True, False, False, True]
        assert run.account(6) == Accounting(6, 2, 2, 2, 0, {"decode: truncated": 1, "decode: corrupt": 1})
        assert not run.account(6).whole
        write_results(run, "part-b-1", [3, 4])
        assert run.account(6).whole

    def test_an_image_that_is_there_twice_is_found(self, run: Run) -> None:
        write_results(run, "part-a-0", [0, 1])
        write_errors(run, "part-a-0", [1])
        accounting = run.account(2)
        assert (accounting.missing, accounting.repeated, accounting.whole) == (0, 1, False)

    def test_recovering_deletes_what_is_there_twice(self, run: Run) -> None:
        write_results(run, "part-a-0", [0, 1])
        write_results(run, "part-b-0", [1, 2])
        write_errors(run, "part-c-0", [0])
        write_errors(run, "part-c-1", [3])
        for name in ("part-a-0-1", "part-a-0-2", "part-b-0-1", "part-c-1-1", "top-000000"):
            (run.png / f"{name}.tar").write_bytes(b"")
        assert run.recover(4).tolist() == [True, True, False, True]
        left = [
            shard.path.rsplit("/", 1)[-1] for place in (run.results, run.errors, run.png) for shard in place.files()
        ]
        # Of two attempts of one task the pictures count that the results name; those of top:N stand for themselves.
        assert left == ["part-a-0.parquet", "part-c-1.parquet", "part-a-0-1.tar", "top-000000.tar"]
        assert run.account(4).repeated == 0

    def test_recovering_deletes_what_was_never_finished(self, run: Run) -> None:
        places = (run.folder, run.manifest, run.results, run.errors, run.png)
        for place in places:
            (place / ".name.0123.partial").write_bytes(b"half")
        run.recover(1)
        assert [place.files() for place in places] == 5 * [[]]

    def test_a_damaged_shard_is_named(self, run: Run) -> None:
        (run.results / "part-a-0.parquet").write_bytes(b"PAR1 damaged")
        with pytest.raises(RunError, match=r"part-a-0\.parquet.*it was damaged: delete it, and start the same command"):
            run.recover(1)

    @pytest.mark.parametrize("ids", [[0, 6], [-1], []])
    def test_a_shard_of_another_run_is_named(self, run: Run, ids: list[int]) -> None:
        write_errors(run, "part-a-0", ids)
        with pytest.raises(RunError, match=r"part-a-0\.parquet' holds images that were not listed"):
            run.recover(6)

    def test_many_shards_are_read_in_their_order(self, run: Run) -> None:
        for number in range(300):
            write_errors(run, f"part-{number:03d}", [number])
        read = list(read_all_ids(run.errors.files()))
        assert [ids.tolist() for _, ids, _ in read] == [[number] for number in range(300)]
        assert run.recover(300).all()
        assert run.account(300).whole

    def test_the_summary_completes_a_run(self, run: Run) -> None:
        write_results(run, "part-a-0", [0, 1])
        write_errors(run, "part-b-0", [2])
        run.finish({"images": 3})
        assert run.summary() == {"images": 3, "shards": {"results": 1, "errors": 1, "png": 0}}
        assert run.complete() == run.summary()
        (run.errors / "part-b-0.parquet").remove()
        assert run.complete() is None

    def test_a_run_that_lost_shards_is_complete_only_when_it_says_so_again(self, run: Run) -> None:
        """More shards than before, of fewer images, are no complete run."""
        set_out(run, 3)
        write_results(run, "part-a-0", [0, 1, 2])
        run.finish({"images": 3})
        (run.results / "part-a-0.parquet").remove()
        run.reopen()
        write_results(run, "part-b-0", [0])
        assert run.complete() is None
        run.reopen()  # of a run without a summary there is nothing to take away

    def test_a_damaged_record_is_named(self, run: Run) -> None:
        (run.folder / "run.json").write_bytes(b'{"images": 3')
        with pytest.raises(RunError, match=r"run\.json' is not JSON.*bring it back, or give another run_id"):
            run.record()
        (run.folder / "summary.json").write_bytes(b"")
        with pytest.raises(RunError, match=r"summary\.json' is not JSON.*delete it, and start the same command again"):
            run.summary()

    @pytest.mark.parametrize("content", ["[1]", '{"images": 3}'])
    def test_a_record_of_another_shape_is_named(self, run: Run, content: str) -> None:
        (run.folder / "run.json").write_text(content)
        with pytest.raises(RunError, match=r"run\.json' is not as this version writes it, it lacks .*bring it back"):
            run.record()
        (run.folder / "summary.json").write_text("null")
        with pytest.raises(RunError, match=r"summary\.json' is not as this version writes it.*delete it, and start"):
            run.complete()

    def test_damaged_errors_are_named_with_the_way_out(self, run: Run) -> None:
        """By those who read more of them than their ids, which were read before."""
        write_errors(run, "part-a-0", range(300))
        path = Path(run.errors.path) / "part-a-0.parquet"
        whole = path.read_bytes()
        for damaged in (whole[:-10], whole[:4] + bytes(200) + whole[204:], b""):
            path.write_bytes(damaged)
            for read in (run.retry_errors, lambda: run.account(300)):
                with pytest.raises(RunError, match=r"part-a-0\.parquet' cannot be read: .*repair=true"):
                    read()

    def test_what_may_fare_better_is_tried_again(self, run: Run) -> None:
        set_out(run, 6)
        write_results(run, "part-a-0", [0])
        write_errors(run, "part-a-0", [1, 2], "corrupt")
        run.finish({"images": 6})
        assert run.retry_errors() == 0
        assert run.complete() is not None
        for name, image, stage, reason in (("a-1", 3, "fetch", "not found"), ("a-2", 5, "decode", "out of memory")):
            rows = [
                {"image_id": number, "uri": "", "etag": None, "stage": stage, "reason": reason, "error": ""}
                for number in (image, image + 1)
                if number < 6
            ]
            rows[-1] |= {"stage": "decode", "reason": "corrupt"} if image == 3 else {}
            write_table(run.errors / f"part-{name}.parquet", pa.Table.from_pylist(rows, ERRORS_SCHEMA))
        run.finish({"images": 6})
        assert run.retry_errors() == 2
        assert run.complete() is None
        assert run.recover(6).tolist() == [True, True, True, False, True, False]
        assert run.account(6).reasons == {"decode: corrupt": 3}

    def test_results_without_a_record_are_given_to_no_other_images(self, run: Run) -> None:
        set_out(run, 3)
        write_results(run, "part-a-0", [0, 1])
        (run.folder / "run.json").remove()
        with pytest.raises(RunError, match=r"has results but no run\.json.*give another run_id"):
            set_out(run, 4)
        assert run.account(3).scored == 2


class TestWriting:
    def test_replaces_and_leaves_no_partial_names(self, run: Run, tmp_path: Path) -> None:
        place = run.folder / "file"
        place.write_bytes(b"first")
        place.write_bytes(b"second")
        assert [path.name for path in (tmp_path / "runs/first").iterdir()] == ["file"]
        assert place.read_bytes() == b"second"

    def test_a_failing_write_keeps_what_was_there(
        self, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (run.folder / "file").write_bytes(b"old")

        def fail(_: int) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "fsync", fail)  # the only way to a full disk here
        with pytest.raises(StorageError, match=r"file' cannot be written.*No space left"):
            (run.folder / "file").write_bytes(b"new")
        assert [path.name for path in (tmp_path / "runs/first").iterdir()] == ["file"]
        assert (run.folder / "file").read_bytes() == b"old"

    def test_a_place_that_cannot_be(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_bytes(b"")
        run = Run.at(str(tmp_path / "file"), "first", STORAGE)
        assert run.record() is None
        assert run.results.files() == []
        with pytest.raises(StorageError, match="cannot be written: NotADirectoryError"):
            set_out(run)

    def test_reading_stops_just_beyond_the_limit(self, run: Run) -> None:
        (run.folder / "file").write_bytes(b"0123456789")
        assert (run.folder / "file").read_bytes(limit=4) == b"01234"
        assert (run.folder / "file").read_bytes(limit=10) == b"0123456789"


def test_folders_and_files_that_cannot_be_read_or_deleted_are_named(tmp_path: Path) -> None:
    long = STORAGE.open(str(tmp_path / ("x" * 300)))
    with pytest.raises(StorageError, match=r"x' cannot be read: OSError: .*File name too long"):
        long.files()
    (tmp_path / "folder").mkdir()
    with pytest.raises(StorageError, match=r"folder' cannot be deleted: IsADirectoryError"):
        STORAGE.open(str(tmp_path / "folder")).remove()
    with pytest.raises(FileNotFoundError):
        STORAGE.open(str(tmp_path / "missing")).remove()
    with pytest.raises(StorageError, match=r"'zip://a/b' cannot be opened: .*check its scheme"):
        STORAGE.open("zip://a/b")

"""Reading a run back: every way in which its files can be damaged or not fit together, and the repair.

Real files, locally; the run is written with the functions that the pipeline writes with. Nothing is faked.
"""

import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import duckdb
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from ais.errors import DamagedError, RunError, StorageError
from ais.pipeline.sink import write_pngs
from ais.runs import ERRORS_SCHEMA, SELECTED_PICTURES, ListedImage, Run, results_schema
from ais.shards import check_seal, parquet_bytes, read_ids, read_sealed, read_table, write_table
from ais.storage import Folder, Storage
from ais.verification import _read_pictures, repair, verify

LISTED = 12


def png(number: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(number).integers(0, 256, (8, 8, 3), np.uint8)).save(file, "PNG")
    return file.getvalue()


def write_shard(
    run: Run, name: str, ids: Sequence[int], pictured: Sequence[int], of: Sequence[int] | None = None
) -> None:
    """Results, and a picture of some of them, as `RunSink` writes them; ``of`` other images than the ids say."""
    count = len(ids)
    pngs = pa.array([png(image) if image in pictured else None for image in ids], pa.large_binary())
    shard = write_pngs(run, f"{name}-0", pa.table({"image_id": pa.array(ids, pa.int64()), "png": pngs}))
    metadata = {"ais.run_id": run.run_id} | (shard.metadata() if shard else {})
    boxes = pa.FixedSizeListArray.from_arrays(pa.array(np.zeros(4 * count, np.float32)), 4)
    columns = {
        "image_id": ids,
        "uri": [f"/i/{image}.png" for image in of or ids],
        "etag": [None] * count,
        "width": [4] * count,
        "height": [3] * count,
        "box": boxes,
        "heatmap_box": boxes,
        "score": [float(image) for image in ids],
        "score_std": [None] * count,
        "heatmap": pa.FixedShapeTensorArray.from_numpy_ndarray(np.zeros((count, 2, 2), np.float32)),
        "png": [shard.name if shard and image in pictured else None for image in ids],
    }
    write_table(run.results / f"{name}.parquet", pa.table(columns, schema=results_schema((2, 2), metadata)))


def write_errors(run: Run, name: str, ids: Sequence[int], of: Sequence[int] | None = None) -> None:
    rows = [
        {"image_id": n, "uri": f"/i/{m}.png", "etag": None, "stage": "decode", "reason": "truncated", "error": ""}
        for n, m in zip(ids, of or ids, strict=True)
    ]
    write_table(run.errors / f"{name}.parquet", pa.Table.from_pylist(rows, ERRORS_SCHEMA))


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A complete run: two shards of results, one of them with pictures, one of errors, and pictures of the best."""
    run = Run.at(str(tmp_path), "first", Storage())
    run.set_out([ListedImage(f"/i/{n}.png", size=n) for n in range(LISTED)], "images: /i\n", {})
    write_shard(run, "part-a-000000", [0, 1, 2, 3, 4], pictured=[0, 1, 3])
    write_shard(run, "part-a-000001", [5, 6, 7], pictured=[])
    write_errors(run, "part-a-000001", [8, 9, 10, 11])
    best = pa.table({"image_id": [7, 6], "png": pa.array([png(7), png(6)], pa.large_binary())})
    top = write_pngs(run, "top-000000", best)
    assert top is not None
    counts = {"images": LISTED, "scored": 8, "failed": 4, "errors": {"decode: truncated": 4}}
    run.finish(counts | {SELECTED_PICTURES: {top.name: [top.size, top.sha256]}})
    return run


def test_a_whole_run(run: Run) -> None:
    seen: list[int] = []
    found = verify(run, seen.append)
    assert found.whole, found
    files = list(Path(run.folder.path).rglob("part-*")) + list(Path(run.png.path).glob("top-*"))
    assert (found.shards, found.size) == (5, sum(path.stat().st_size for path in files))
    assert seen == [1, 2, 3, 4, 5]
    assert repair(run, found) == 0
    assert verify(run).whole


def damaged_files(run: Run) -> list[Path]:
    return sorted(path for path in Path(run.folder.path).rglob("*") if path.suffix in (".parquet", ".tar"))


def test_every_flipped_bit_is_found(run: Run) -> None:
    """One bit in each of many places of each file, headers and footers and the seal itself included."""
    rng = np.random.default_rng(0)
    for path in damaged_files(run):
        whole = path.read_bytes()
        for place in {0, 3, len(whole) - 1, len(whole) - 9, *rng.integers(0, len(whole), 60).tolist()}:
            data = bytearray(whole)
            data[place] ^= 1 << int(rng.integers(8))
            path.write_bytes(data)
            if path.parent.name == "manifest":
                with pytest.raises(RunError, match=r"is damaged.*start another"):
                    verify(run)
                continue
            assert not verify(run).whole, (path.name, place)
        path.write_bytes(whole)
    assert verify(run).whole


@pytest.mark.parametrize("keep", [0, 1, 0.5, 0.99])
def test_truncated_files_are_found(run: Run, keep: float) -> None:
    for path in damaged_files(run):
        whole = path.read_bytes()
        path.write_bytes(whole[: int(keep) if keep in (0, 1) else int(len(whole) * keep)])
        if path.parent.name == "manifest":
            with pytest.raises(RunError, match="is damaged"):
                verify(run)
        else:
            assert not verify(run).whole, path
        path.write_bytes(whole)


def write_top(run: Run, name: str, image: int) -> None:
    write_pngs(run, name, pa.table({"image_id": [image], "png": [png(image)]}))


def remove(run: Run, *names: str) -> None:
    for name in names:
        (run.folder / name).remove()


def replace_pictures(run: Run) -> None:
    [pictures] = run.png.files("part-*")
    table = pa.table({"image_id": [0, 1, 3], "png": pa.array([png(9), png(9), png(9)], pa.large_binary())})
    write_pngs(run, pictures.path.rpartition("/")[2].removesuffix(".tar"), table)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda run: remove(run, "png/part-a-000000-0.tar"), "png/part-a-000000-0.tar, are missing"),
        (replace_pictures, "are not those that were written: size or SHA-256 is another"),
        (lambda run: write_top(run, "top-000000", 9), "is not what was written: size or SHA-256 is another"),
        (lambda run: write_top(run, "bottom-000000", 7), "is not what was written"),
        (lambda run: (run.png / "top-1.tar").write_bytes(b"no tar"), "cannot be read as tar"),
        (lambda run: remove(run, "png/top-000000.tar"), "png/top-000000.tar: it is missing"),
        (lambda run: write_errors(run, "part-a-000001", [8, 9, 11, 10], [8, 9, 10, 11]), "image 11 has another uri"),
        (lambda run: write_shard(run, "part-a-000001", [5, 7, 6], [], [5, 6, 7]), "image 7 has another uri"),
    ],
)
def test_what_does_not_fit_together(run: Run, change: Callable[[Run], object], message: str) -> None:
    change(run)
    found = verify(run)
    assert not found.whole
    assert message in str(found.damages[0])
    assert len(found.damages) == 1
    repair(run, found)
    assert run.complete() is None


def test_pictures_of_the_best_of_an_unfinished_run(run: Run) -> None:
    """No summary says yet which there are."""
    remove(run, "summary.json")
    write_top(run, "top-000001", 9)
    [damage] = verify(run).damages
    assert "9.png is of no image in results" in str(damage)


def test_rows_that_are_missing_repeated_or_foreign(run: Run) -> None:
    remove(run, "results/part-a-000001.parquet")
    write_shard(run, "part-b-000000", [4, 5, 99], pictured=[])
    found = verify(run)
    accounting = found.accounting
    assert (accounting.missing, accounting.repeated, accounting.foreign) == (2, 1, 1)
    assert not found.whole


def test_what_is_left_of_killed_tasks_is_orphaned(run: Run) -> None:
    (run.png / "part-c-000000-0.tar").write_bytes(b"")
    (run.results / ".part-c-000000.parquet.0.partial").write_bytes(b"")
    found = verify(run)
    assert [file.path.rpartition("/")[2] for file in found.orphans] == [
        "part-c-000000-0.tar",
        ".part-c-000000.parquet.0.partial",
    ]
    assert not found.whole
    run.recover(LISTED)
    assert verify(run).whole


def test_a_run_that_is_not_complete(run: Run) -> None:
    summary = run.summary()
    assert summary is not None
    (run.folder / "summary.json").write_text(json.dumps(summary | {"scored": 9}))
    assert not verify(run).complete
    remove(run, "summary.json")
    found = verify(run)
    assert (found.accounting.whole, found.complete, found.whole) == (True, False, False)


def test_the_manifest_has_to_be_there(run: Run) -> None:
    remove(run, "manifest/part-00000.parquet")
    with pytest.raises(RunError, match=r"has 0 images, run\.json says 12"):
        verify(run)
    remove(run, "run.json")
    with pytest.raises(RunError, match="there is no run at"):
        verify(run)


def test_repair_makes_the_images_of_what_is_damaged_undone(run: Run) -> None:
    (run.png / "part-a-000000-0.tar").write_bytes(b"damaged")
    damaged = run.errors / "part-a-000001.parquet"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    found = verify(run)
    assert len(found.damages) == 2
    assert repair(run, found) == 3  # the results that name the damaged pictures go with them
    assert run.complete() is None
    assert np.flatnonzero(run.recover(LISTED)).tolist() == [5, 6, 7]


def test_a_seal_is_in_nobodys_way(tmp_path: Path) -> None:
    table = pa.table({"a": range(10_000), "b": [str(number) for number in range(10_000)]})
    data = parquet_bytes(table)
    check_seal(data)
    path = tmp_path / "sealed.parquet"
    path.write_bytes(data)
    assert pq.read_table(path).equals(table)
    assert pq.ParquetFile(path).metadata.num_row_groups == 3
    assert pd.read_parquet(path)["a"].sum() == pl.read_parquet(path)["a"].sum() == 49_995_000
    assert duckdb.sql(f"select count(*), max(b) from '{path}' where a >= 9000").fetchall() == [(1000, "9999")]
    assert pl.scan_parquet(path).filter(pl.col("a") > 9_990).collect().height == 9
    plain = io.BytesIO()
    pq.write_table(table, plain)
    with pytest.raises(DamagedError, match="no seal"):
        check_seal(plain.getvalue())


def test_a_file_that_cannot_be_read_is_no_damage(monkeypatch: pytest.MonkeyPatch) -> None:
    """Repair would delete it: without credentials the same files are in a bucket that does not answer."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    place = Storage(endpoint_url="http://127.0.0.1:9").open("s3://somebody/shard")
    for read in (read_sealed, _read_pictures):
        with pytest.raises(StorageError, match="'s3://somebody/shard' cannot be read: NoCredentialsError"):
            read(place)


@pytest.mark.parametrize("read", [read_sealed, read_ids, lambda shard: read_table(shard, ["image_id"])])
def test_a_shard_that_goes_between_listing_and_reading_is_named(
    read: Callable[[Folder], object], tmp_path: Path
) -> None:
    shard = Storage().open(str(tmp_path / "part-000000.parquet"))
    with pytest.raises(StorageError, match=r"part-000000\.parquet' was there a moment ago and is gone; find out what"):
        read(shard)

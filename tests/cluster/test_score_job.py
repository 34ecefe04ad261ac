"""Scheduled scoring on a real Ray: night after night over a collection that changes, killed, locked, and on S3.

Real files, a real S3 server, a real kill. Faked: in one test, that starting Ray fails, to show that it is not tried.
"""

import json
import re
import shutil
import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import ais.pipeline.score_job
from ais import Explainer, load_backbone, load_head
from ais.errors import BackboneError, ConfigError, RunError
from ais.heads import HeadEnsemble, RegressionHead, save_head
from ais.images import decode_image
from ais.lease import hold
from ais.runs import results_schema
from ais.storage import Storage
from jobs.score import main
from tests.cluster.test_heatmaps_job import snapshot, write_picture
from tests.kills import Job, joined
from tests.s3.proxy import FaultyProxy
from tests.s3.server import S3Server

pytestmark = [
    pytest.mark.usefixtures("local_ray"),
    pytest.mark.filterwarnings("ignore:.*deprecated:DeprecationWarning:ray"),
]
ROOT = Path(__file__).parents[2]


def night(
    arguments: list[str], tick: str | None, capsys: pytest.CaptureFixture[str], **changed: str
) -> tuple[int, str]:
    """Exit code and output of one run."""
    given = {**dict(argument.split("=", 1) for argument in arguments), **changed}
    given |= {} if tick is None else {"tick": tick}
    capsys.readouterr()
    code = main([f"{key}={value}" for key, value in given.items()])
    return code, capsys.readouterr().out


def latest(output: Path) -> dict[str, dict[str, Any]]:
    """Rows of the view by file name."""
    rows = pq.read_table(output / "latest.parquet").to_pylist()
    assert [row["uri"] for row in rows] == sorted({row["uri"] for row in rows})
    return {Path(row["uri"]).name: row for row in rows}


def scored_in(output: Path, series: str, tick: str) -> list[str]:
    table = pq.read_table(output / "series" / series / "runs" / tick / "results")
    assert table.schema.equals(results_schema(None))
    return sorted(Path(uri).name for uri in table["uri"].to_pylist())


def pointer(output: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((output / "latest.json").read_text())
    return found


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 pictures in three folders, one that is cut off, and a file that is no image."""
    root = tmp_path_factory.mktemp("nights") / "photos"
    for number in range(24):
        write_picture(root / f"{number % 3}" / f"{number:02d}.png", 40 + number, 60, number)
    (root / "0" / "broken.png").write_bytes((root / "0" / "00.png").read_bytes()[:200])
    (root / "notes.txt").write_bytes(b"no image")
    return root


@pytest.fixture
def output(photos: Path) -> Path:
    return photos.parent / "scores"


@pytest.fixture
def arguments(photos: Path, output: Path, head: Path) -> list[str]:
    return [f"images={photos}", f"output={output}", f"head={head}", "shard_rows=8", "compute.batch_size=8"]


class TestNights:
    """In this order: every test is a later night over the same collection."""

    def test_the_first_scores_everything_and_too_many_errors_are_not_published(
        self,
        arguments: list[str],
        output: Path,
        head: Path,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        code, said = night(arguments, "n1", capsys, max_error_share="0.03")
        assert code == 1, said
        assert "listing     25 images: 25 new, 1 other files left out" in said
        assert "4.0% of the images could not be used, more than max_error_share=0.03" in said
        code, said = night(arguments, "n1", capsys)  # the same tick is over
        assert (code, "nothing to do" in said) == (1, True)
        assert not list(output.glob("latest*"))
        code, said = night(arguments, "n1b", capsys)  # that share is accepted now, and nothing scored again
        assert (code, "unchanged   25 images, as of n1" in said) == (0, True)
        rows = latest(output)
        assert len(rows) == 25
        assert (rows["broken.png"]["status"], rows["broken.png"]["reason"]) == ("failed", "decode: truncated")
        good = sorted(name for name in rows if name != "broken.png")
        images = [decode_image(Path(rows[name]["uri"]).read_bytes()) for name in good]
        library = Explainer(load_backbone("tiny", weights="random", seed=3), load_head(str(head)))
        # Measured: equal to the last bit; other batches may be rounded otherwise, and the heads multiply that by 200.
        np.testing.assert_allclose([rows[name]["score"] for name in good], library.score(images), rtol=0, atol=1e-3)
        for name in good:
            row, file = rows[name], Path(rows[name]["uri"]).stat()
            assert (row["status"], row["reason"], row["run_id"], row["etag"]) == ("present", None, "n1", None)
            assert (row["size"], row["mtime"]) == (file.st_size, file.st_mtime)
            assert row["score_std"] > 0
            assert datetime.now(UTC) - row["scored_at"] < timedelta(hours=1)
        series = pointer(output)["series"]
        assert scored_in(output, series, "n1") == good
        metadata = pq.read_schema(output / "latest.parquet").metadata
        assert metadata is not None
        assert metadata[b"ais.run_id"] == b"n1"
        assert metadata[b"ais.series"].decode() == series
        assert metadata[b"ais.untrained"] == b"the backbone has random weights, seed 3"

    def test_plain_readers_see_the_same(self, output: Path) -> None:
        path = str(output / "latest.parquet")
        expected = pq.read_table(path)["score"].to_pylist()
        frame = pd.read_parquet(path)
        assert [None if np.isnan(score) else score for score in frame["score"]] == expected
        assert pl.read_parquet(path)["score"].to_list() == expected
        found = duckdb.sql(f"SELECT score FROM '{path}'").fetchall()
        assert [score for (score,) in found] == expected

    def test_the_second_scores_what_is_new_or_changed(
        self, arguments: list[str], photos: Path, output: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        before, series = latest(output), pointer(output)["series"]
        first = output / "series" / series / "runs" / "n1" / "snapshot.parquet"
        kept = first.read_bytes()
        for number in (30, 31):
            write_picture(photos / "3" / f"{number}.png", 50, 60, number)
        write_picture(photos / "0" / "broken.png", 50, 60, 33)
        write_picture(photos / "0" / "03.png", 51, 60, 34)
        for name in ("1/01.png", "2/02.png"):
            (photos / name).unlink()
        code, said = night(arguments, "n2", capsys)
        assert code == 0, said
        assert "listing     25 images: 2 new, 2 changed, 2 gone, 1 other files left out" in said
        assert scored_in(output, series, "n2") == ["03.png", "30.png", "31.png", "broken.png"]
        rows = latest(output)
        assert len(rows) == 27
        for name, row in rows.items():
            if name in ("03.png", "30.png", "31.png", "broken.png"):
                assert (row["status"], row["run_id"]) == ("present", "n2")
            elif name in ("01.png", "02.png"):
                assert (row["status"], row["score"], row["run_id"]) == ("gone", before[name]["score"], "n1")
            else:
                assert row == before[name]
        assert rows["03.png"]["score"] != before["03.png"]["score"]
        assert first.read_bytes() == kept
        drift = json.loads((output / "series" / series / "runs" / "n2" / "drift.json").read_text())
        assert drift["changes"]["new"] == 2
        assert drift["gone"] == {"count": 2, "of": 25, "share": 0.08}
        assert drift["errors"]["before"] == {"count": 1, "of": 25, "share": 0.04}
        assert drift["errors"]["collection"] == {"count": 0, "of": 25, "share": 0.0}
        assert drift["new_against_before"]["images"] == 4
        assert drift["collection_against_before"]["images"] == 25
        assert re.search(r"drift       new images  median -?[\d.]+ → -?[\d.]+, PSI [\d.]+", said)

    def test_the_third_finds_nothing_and_starts_nothing(
        self, arguments: list[str], output: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse() -> None:
            raise AssertionError("Ray is started")

        monkeypatch.setattr(ais.pipeline.score_job, "start_ray", refuse)
        before, series = snapshot(output), pointer(output)["series"]
        code, said = night(arguments, "n3", capsys)
        assert code == 0, said
        assert "unchanged   25 images, as of n2; nothing to do" in said
        after = snapshot(output)
        changed = {name for name in after if after[name] != before.get(name)}
        assert changed == {"latest.json", f"series/{series}/series.json", f"series/{series}/runs/n3/summary.json"}
        assert before.keys() <= after.keys()
        assert pointer(output)["run_id"] == "n2"

    @pytest.mark.parametrize("tick", ["n2", "n3"])
    def test_a_complete_tick_does_nothing(
        self, arguments: list[str], output: Path, capsys: pytest.CaptureFixture[str], tick: str
    ) -> None:
        before = snapshot(output)
        code, said = night(arguments, tick, capsys)
        assert (code, "nothing to do (another tick lists the collection again)" in said) == (0, True)
        assert snapshot(output) == before

    def test_an_overlapping_run_leaves_it_to_the_other(
        self, arguments: list[str], output: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with hold(Storage().open(str(output))):
            before = snapshot(output)
            code, said = night(arguments, "n4", capsys)
            assert snapshot(output) == before
        assert code == 0
        assert re.search(r"^locked      .*is held by process \d+", said, re.MULTILINE)

    def test_another_head_is_another_series_and_drift_asks_to_be_looked_at(
        self,
        arguments: list[str],
        output: Path,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        torch.manual_seed(1)
        backbone = load_backbone("tiny", weights="random", seed=3)
        other = RegressionHead(backbone.embedding_size, hidden=32, target_mean=9000)
        save_head(str(tmp_path / "head"), HeadEnsemble([other]), backbone, "center_crop", {})
        before, old = snapshot(output / "series"), pointer(output)["series"]
        code, said = night(arguments, "n5", capsys, head=str(tmp_path / "head"), **{"drift.min_images": "20"})
        assert code == 4, said
        assert f"against another model, {old}" in said
        assert re.search(r"^LOOK        PSI of the collection is \d.*, above drift.max_psi=0.25$", said, re.MULTILINE)
        series = pointer(output)["series"]
        assert series != old
        assert len(scored_in(output, series, "n5")) == 25
        after = snapshot(output / "series")
        assert {name: after[name] for name in before} == before
        rows = latest(output)
        assert {row["run_id"] for row in rows.values()} == {"n5"}
        assert {row["score_std"] for row in rows.values()} == {None}
        again, said = night(arguments, "n5", capsys, head=str(tmp_path / "head"), **{"drift.min_images": "20"})
        assert (again, "LOOK " in said) == (4, True)
        # Back to the first head: its series is as it was, and the view is its own again, without scoring.
        code, said = night(arguments, "n6", capsys)
        assert (code, "unchanged   25 images, as of n2" in said) == (0, True)
        assert pointer(output)["series"] == old
        assert (output / "latest.parquet").read_bytes() == (output / pointer(output)["snapshot"]).read_bytes()

    def test_an_empty_collection_is_refused(
        self, arguments: list[str], output: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        before = snapshot(output)
        (tmp_path / "empty").mkdir()
        with pytest.raises(RunError, match="there are no images; nothing is marked as gone"):
            night(arguments, "n10", capsys, images=str(tmp_path / "empty"))
        assert snapshot(output) == before


SHARDS = "series/*/runs/*/results/part-*.parquet"


@pytest.mark.skipif(sys.platform != "linux", reason="finds processes under /proc")
def test_a_killed_run_is_continued_by_the_same_command(
    head: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    photos, output = tmp_path / "photos", tmp_path / "scores"
    for number in range(12):
        write_picture(photos / f"{number:02d}.jpg", 1600, 1200, number)
    for number in range(12, 360):
        shutil.copy(photos / f"{number % 12:02d}.jpg", photos / f"{number:03d}.jpg")
    arguments = [f"images={photos}", f"output={output}", f"head={head}", "shard_rows=16", "compute.batch_size=8"]
    arguments += ["compute.fetch_threads=1"]
    job = Job(["jobs/score.py", *arguments], joined())
    try:
        job.wait_for(lambda: len(list(output.glob(SHARDS))) >= 2)
        job.kill()
    finally:
        job.end()
    shards = list(output.glob(SHARDS))
    [run] = output.glob("series/*/runs/*")
    assert not (output / "latest.parquet").exists()
    assert not (run / "summary.json").exists()
    kept = {path: path.stat().st_mtime_ns for path in shards}
    code, said = night(arguments, None, capsys)  # the same command, another day
    assert code == 0, said
    assert f"tick        {run.name}\ncontinues   360 images: 360 new" in said
    assert {path: path.stat().st_mtime_ns for path in shards} == kept
    ids = pq.read_table(run / "results", columns=["image_id"])["image_id"].to_pylist()
    assert sorted(ids) == list(range(360))
    assert len(latest(output)) == 360
    assert not (run / "draft.parquet").exists()
    summary = json.loads((run / "summary.json").read_text())
    assert 0 < summary["last_start"]["images"] <= 360 - 16


def test_with_heatmaps(head: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(4):
        write_picture(tmp_path / "photos" / f"{number}.png", 60, 60, number)
    arguments = [
        f"images={tmp_path}/photos",
        f"output={tmp_path}/scores",
        f"head={head}",
        "heatmaps=true",
        "png.select=sample:0.9",
    ]
    code, said = night(arguments, "n1", capsys)
    assert code == 0, said
    [run] = tmp_path.glob("scores/series/*/runs/n1")
    results = pq.read_table(run / "results")
    assert results.schema.equals(results_schema((8, 8)))
    assert results["png"].null_count < 4
    (tmp_path / "photos" / "0.png").unlink()
    code, said = night(arguments, "n2", capsys, keep="1h")
    assert (code, "listing     3 images: 1 gone" in said) == (0, True)
    # However old the first run is: rows of the view are its rows.
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps(summary | {"finished_at": "2020-01-01T00:00:00+00:00"}))
    code, said = night(arguments, "n3", capsys, keep="1h")
    assert (code, re.findall("^pruned .*", said, re.MULTILINE)) == (
        0,
        [f"pruned      {run.parent.parent.name}/n1, older than 1h"],
    )
    assert sorted(path.name for path in run.iterdir()) == [
        "config.yaml",
        "drift.json",
        "manifest",
        "png",
        "results",
        "run.json",
        "summary.json",
    ]


def test_a_backbone_that_gives_scores_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    backbone = load_backbone("inception_v3", weights="random", seed=0)
    head = HeadEnsemble([RegressionHead(backbone.embedding_size, hidden=8)])
    save_head(str(tmp_path / "head"), head, backbone, "center_crop", {})
    paths = [write_picture(tmp_path / "photos" / f"{number}.png", 320, 310, number) for number in range(3)]
    arguments = [f"images={tmp_path}/photos", f"output={tmp_path}/scores", f"head={tmp_path}/head"]
    with pytest.raises(BackboneError, match="inception_v3 gives no heatmaps: the last layers of Inception-v3"):
        night(arguments, "n1", capsys, heatmaps="true")
    with pytest.raises(ConfigError, match=r"compute\.precision: bfloat16 is that of the trunk"):
        night(arguments, "n1", capsys, **{"compute.precision": "bfloat16"})
    code, said = night(arguments, "n1", capsys)
    assert code == 0, said
    expected = Explainer(backbone, head).score([decode_image(path.read_bytes()) for path in paths])
    found = [row["score"] for _, row in sorted(latest(tmp_path / "scores").items())]
    # Measured: equal to the last bit; the worker's torch may use other kernels, with other numbers of threads.
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_on_s3(
    head: Path,
    tmp_path: Path,
    s3: S3Server,
    bucket: str,
    faulty_proxy: Callable[..., FaultyProxy],
    capsys: pytest.CaptureFixture[str],
) -> None:
    proxy = faulty_proxy()

    def put(name: str, seed: int) -> None:
        path = write_picture(tmp_path / Path(name).name, 60, 50, seed)
        s3.put(f"{bucket}/photos/{name}", path.read_bytes())

    def view() -> dict[str, dict[str, Any]]:
        rows = pq.read_table(pa.BufferReader(s3.get(f"{bucket}/scores/latest.parquet"))).to_pylist()
        return {Path(row["uri"]).name: row for row in rows}

    for number in range(10):
        put(f"{number % 2}/{number}.png", number)
    arguments = [f"images={bucket}/photos", f"output={bucket}/scores", f"head={head}"]
    arguments += [f"storage.endpoint_url={proxy.endpoint_url}", "compute.batch_size=8"]
    code, said = night(arguments, "n1", capsys)
    assert code == 0, said
    first = view()
    assert len(first) == 10
    assert all(row["etag"] and row["status"] == "present" for row in first.values())
    put("0/2.png", 50)
    put("new.png", 51)
    put("0/4.png", 4)  # the same bytes again: a new time, and the etag of before
    s3.client.delete_object(Bucket=bucket.removeprefix("s3://"), Key="photos/1/1.png")
    code, said = night(arguments, "n2", capsys, keep="30d")
    assert code == 0, said
    assert "listing     10 images: 1 new, 1 changed, 1 gone" in said
    second = view()
    assert {name for name in second if second[name]["run_id"] == "n2"} == {"2.png", "new.png"}
    assert (second["1.png"]["status"], second["1.png"]["score"]) == ("gone", first["1.png"]["score"])
    document = json.loads(s3.get(f"{bucket}/scores/latest.json"))
    assert s3.get(f"{bucket}/scores/{document['snapshot']}") == s3.get(f"{bucket}/scores/latest.parquet")
    assert not [key for key in s3.keys(bucket) if "draft" in key]
    [lock] = [key for key in s3.keys(bucket) if "lock/" in key]
    assert json.loads(s3.get(f"{bucket}/{lock}"))["released"]

    # An unchanged collection: its listing, and a few small requests for lock and state, however many images there are.
    seen = proxy.requests()
    code, said = night(arguments, "n3", capsys)
    assert (code, "unchanged   10 images" in said) == (0, True)
    requests = {
        name: count - seen.get(name, 0) for name, count in proxy.requests().items() if count > seen.get(name, 0)
    }
    large = r"^(GET|PUT|POST) .*(photos/|snapshot|latest\.parquet|results|manifest)"
    assert not [name for name in requests if re.search(large, name)]
    assert sum(requests.values()) <= 60, requests

"""The main job on a real Ray and real files: every image accounted for, and the numbers are those of the library.

Nothing is faked. The backbone is a tiny one with random weights, registered under its own name.
"""

import dataclasses
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
import ray
from PIL import Image
from ray.data.block import Block

from ais import Explainer, Explanation, load_backbone, load_head
from ais.command_line import load_config, run_job
from ais.config import HeatmapsConfig, PngSelection
from ais.errors import RunError
from ais.heads import HeadEnsemble, save_head
from ais.images import decode_image
from ais.importance import ImportanceRecord, save_importance
from ais.pipeline.fetch import Pictures
from ais.pipeline.heatmaps import _extreme, render_selected
from ais.pipeline.prepare import Prepared, prepare_heatmaps, set_out
from ais.pipeline.progress import Progress
from ais.pipeline.render import Render
from ais.pipeline.sink import PngShard, PngSink
from ais.render import fit_within
from ais.runs import ERRORS_SCHEMA, MANIFEST_SCHEMA, Run, results_schema
from ais.settings import parse_config
from ais.storage import Storage
from jobs.heatmaps import main
from tests.kills import descendants
from tests.zoo import ZOO_LIMITS, ZooCase, write_zoo

# Ray's own context copies its deprecated settings.
pytestmark = pytest.mark.filterwarnings("ignore:Corrupt EXIF data", "ignore:.*deprecated:DeprecationWarning:ray")
STORAGE = Storage()
MAPS = (8, 8)
MAX_SIDE = 64
UNTRAINED = "the backbone has random weights, seed 3"


def write_picture(path: Path, width: int, height: int, seed: int, mode: str = "RGB") -> Path:
    """A picture of random blotches, large enough to survive the resize, in the format of the suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    levels = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), np.uint8)
    Image.fromarray(levels).resize((width, height), Image.Resampling.NEAREST).convert(mode).save(path)
    return path


def prepared(arguments: list[str]) -> Prepared:
    return prepare_heatmaps(load_config(HeatmapsConfig, arguments, doc="").config)


def rows(folder: Path) -> dict[int, dict[str, Any]]:
    """Rows of a folder of shards by image_id; heatmaps stay arrays."""
    found: dict[int, dict[str, Any]] = {}
    for shard in sorted(folder.glob("*.parquet")):
        table = pq.read_table(shard)
        heatmaps = None
        if "heatmap" in table.column_names:
            heatmaps = table["heatmap"].combine_chunks().to_numpy_ndarray()
            table = table.drop_columns("heatmap")
        for index, row in enumerate(table.to_pylist()):
            assert row["image_id"] not in found, f"{row['uri']} is there twice"
            found[row["image_id"]] = row | ({} if heatmaps is None else {"heatmap": heatmaps[index]})
    return found


def pngs(folder: Path, pattern: str = "part-*.tar") -> dict[int, tuple[str, bytes]]:
    """Members of the PNG shards by image_id, each with the name of its shard."""
    found: dict[int, tuple[str, bytes]] = {}
    for shard in sorted(folder.glob(pattern)):
        with tarfile.open(shard) as archive:
            for member in archive.getmembers():
                image_id = int(member.name.removesuffix(".png"))
                file = archive.extractfile(member)
                assert file is not None
                assert image_id not in found
                found[image_id] = (shard.name, file.read())
    return found


def picture_of(data: bytes) -> Image.Image:
    picture = Image.open(io.BytesIO(data))
    picture.load()
    return picture


def snapshot(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Time of change and content of every file."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


def explained(uris: list[str], head: Path, **options: Any) -> Explanation:
    """What the library says of the same files, in the order given."""
    backbone = load_backbone("tiny", weights="random", seed=3)
    images = [decode_image(Path(uri).read_bytes(), ZOO_LIMITS) for uri in uris]
    return Explainer(backbone, load_head(str(head)), **options)(images)


def command(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> tuple[int, str]:
    """Exit code and output of the job as the command line gives them, in this process."""
    monkeypatch.setattr(sys, "argv", ["heatmaps.py", *arguments])
    with pytest.raises(SystemExit) as stop:
        run_job(main)
    assert isinstance(stop.value.code, int)
    captured = capsys.readouterr()
    return stop.value.code, captured.out + captured.err


@dataclass(frozen=True)
class Done:
    """A finished run and what went into it."""

    arguments: list[str]
    code: int
    folder: Path
    uris: list[str]
    cases: list[ZooCase]

    @property
    def summary(self) -> dict[str, Any]:
        summary: dict[str, Any] = json.loads((self.folder / "summary.json").read_text())
        return summary


MODES = ("RGB", "L", "RGBA", "P", "LA", "1", "CMYK", "I;16")
FORMATS = {"CMYK": "jpg", "1": "tif"}


@pytest.fixture(scope="module")
def done(local_ray: None, head: Path, tmp_path_factory: pytest.TempPathFactory) -> Done:  # noqa: ARG001
    """60 good images of all sizes and modes and the whole zoo, from a list of relative addresses."""
    root = tmp_path_factory.mktemp("collection")
    rng = np.random.default_rng(0)
    good = []
    for number in range(60):
        mode = MODES[number % len(MODES)]
        width, height = (int(side) for side in rng.integers(20, 200, 2))
        suffix = FORMATS.get(mode, ("png", "webp", "jpg")[number % 3] if mode == "RGB" else "png")
        good.append(write_picture(root / "good" / f"{number:02d}.{suffix}", width, height, number, mode))
    cases = write_zoo(root / "zoo")
    paths = [*good[:30], *(case.path for case in cases), *good[30:]]
    pq.write_table(pa.table({"uri": [str(path.relative_to(root)) for path in paths]}), root / "list.parquet")
    arguments = [
        f"images={root}/list.parquet",
        f"output={root}/output",
        "run_id=first",
        f"head={head}",
        f"limits.max_bytes={ZOO_LIMITS.max_bytes}",
        "max_error_share=0.5",
        "shard_rows=32",
        "compute.batch_size=16",
        f"png.max_side={MAX_SIDE}",
    ]
    code = main(arguments)
    return Done(arguments, code, root / "output" / "runs" / "first", [str(path) for path in paths], cases)


class TestOneRun:
    def test_every_image_is_in_results_or_errors_exactly_once(self, done: Done) -> None:
        assert done.code == 0
        results, errors = rows(done.folder / "results"), rows(done.folder / "errors")
        assert sorted([*results, *errors]) == list(range(len(done.uris)))
        for image_id, row in (results | errors).items():
            assert row["uri"] == done.uris[image_id]

    def test_every_file_of_the_zoo_is_scored_or_refused_with_its_reason(self, done: Done) -> None:
        results, errors = rows(done.folder / "results"), rows(done.folder / "errors")
        found: dict[str, object] = {row["uri"]: (row["width"], row["height"]) for row in results.values()}
        found |= {row["uri"]: (row["stage"], row["reason"]) for row in errors.values()}
        expected = {
            str(case.path): case.size if case.expect == "ok" else ("decode", case.expect.value) for case in done.cases
        }
        assert {uri: found[uri] for uri in expected} == expected
        assert len(errors) == sum(case.expect != "ok" for case in done.cases)  # nothing else failed
        assert all(row["reason"] in row["error"] for row in errors.values())

    def test_schemas(self, done: Done) -> None:
        for shard in (done.folder / "results").glob("*.parquet"):
            schema = pq.read_schema(shard)
            assert schema.equals(results_schema(MAPS))
            assert schema.metadata is not None
            assert schema.metadata[b"ais.untrained"].decode() == UNTRAINED
            assert schema.metadata[b"ais.layer"] == b"features.6"
            assert schema.metadata[b"ais.backbone"] == b"tiny"
        assert {pq.read_schema(shard) for shard in (done.folder / "errors").glob("*.parquet")} == {ERRORS_SCHEMA}
        assert pq.read_schema(done.folder / "manifest" / "part-00000.parquet") == MANIFEST_SCHEMA
        shards = [pq.read_metadata(shard).num_rows for shard in (done.folder / "results").glob("*.parquet")]
        assert len(shards) >= 3
        assert max(shards) <= 48  # shard_rows and at most one block more

    def test_the_summary(self, done: Done, head: Path) -> None:
        summary, refused = done.summary, [case.expect for case in done.cases if case.expect != "ok"]
        assert summary["images"] == len(done.uris)
        assert summary["failed"] == len(refused)
        assert summary["scored"] == len(done.uris) - len(refused)
        assert summary["errors"] == {f"decode: {reason}": refused.count(reason) for reason in set(refused)}
        assert summary["untrained"] is True
        assert summary["weights"]["seed"] == 3
        assert summary["layer"] == {"name": "features.6", "map_shape": [8, 8, 8]}
        assert summary["identity"]["head"] == json.loads((head / "head.json").read_text())["sha256"]
        assert summary["versions"]["ray"] == ray.__version__
        assert summary["results"] == str(done.folder / "results")
        start = summary["last_start"]
        assert start["images"] == len(done.uris)
        assert set(start["stage_s"]) == {"fetch_s", "decode_s", "explain_s", "render_s"}
        assert 0 < start["pipeline_s"] <= start["wall_s"]
        assert start["images_per_s"] == pytest.approx(len(done.uris) / start["pipeline_s"], rel=0.01)

    def test_the_saved_configuration_is_the_resolved_one(self, done: Done) -> None:
        saved = parse_config(HeatmapsConfig, (done.folder / "config.yaml").read_text())
        again = prepared(done.arguments)
        assert saved == again.config
        assert saved.backbone.layer == "features.6"
        assert saved.backbone.seed == 3
        assert prepare_heatmaps(saved).identity == again.identity

    def test_every_scored_image_has_its_picture(self, done: Done) -> None:
        results, pictures = rows(done.folder / "results"), pngs(done.folder / "png")
        assert pictures.keys() == results.keys()
        for image_id, (shard, data) in pictures.items():
            row, picture = results[image_id], picture_of(data)
            assert row["png"] == shard
            shown = fit_within(np.zeros((row["height"], row["width"], 3), np.uint8), MAX_SIDE)
            assert picture.size == (shown.shape[1], shown.shape[0]), row["uri"]
            texts: dict[str, str] = picture.text  # type: ignore[attr-defined]
            assert texts["ais.untrained"] == UNTRAINED
            assert texts["image"] == row["uri"]
            assert float(texts["score"]) == pytest.approx(row["score"], rel=1e-5)

    def test_equals_the_library(self, done: Done, head: Path) -> None:
        results = list(rows(done.folder / "results").values())
        expected = explained([row["uri"] for row in results], head)
        # Measured: equal to the last bit, though the batches differ. The bounds leave room for other kernels (the heads
        # multiply rounding errors by 200) and are a thousandth of the spread of the values.
        np.testing.assert_allclose([row["score"] for row in results], expected.scores, rtol=0, atol=1e-3)
        np.testing.assert_allclose([row["score_std"] for row in results], expected.score_stds, rtol=0, atol=1e-3)
        heatmaps = np.stack([row["heatmap"] for row in results])
        np.testing.assert_allclose(heatmaps, expected.heatmaps, rtol=0, atol=1e-4)
        np.testing.assert_array_equal([row["box"] for row in results], expected.boxes)
        np.testing.assert_allclose([row["heatmap_box"] for row in results], expected.heatmap_boxes, rtol=1e-6)
        np.testing.assert_array_equal([row["heatmap_box"] for row in results], expected.heatmap_boxes)
        assert np.std([row["score"] for row in results]) > 0.5
        assert heatmaps.max() > 0.1

    def test_opens_without_anything_of_ours(self, done: Done, tmp_path: Path) -> None:
        script = f"""
import json, sys
import duckdb, numpy as np, pandas, polars, pyarrow.parquet as pq
folder = {str(done.folder / "results")!r}
answers = {{}}
table = pq.read_table(folder)
heatmaps = np.concatenate([chunk.to_numpy_ndarray() for chunk in table["heatmap"].chunks])
answers["pyarrow"] = (table["image_id"].to_pylist(), table["score"].to_pylist(), heatmaps)
frame = pandas.read_parquet(folder)
answers["pandas"] = (frame.image_id.tolist(), frame.score.tolist(), np.stack(frame.heatmap))
found = duckdb.sql(f"SELECT image_id, score, heatmap FROM '{{folder}}/*.parquet'").fetchall()
answers["duckdb"] = ([row[0] for row in found], [row[1] for row in found], np.array([row[2] for row in found]))
frame = polars.read_parquet(folder + "/*.parquet")
answers["polars"] = (frame["image_id"].to_list(), frame["score"].to_list(), np.array(frame["heatmap"].to_list()))
assert heatmaps.shape == ({done.summary["scored"]}, 8, 8), heatmaps.shape
first = dict(zip(*answers["pyarrow"][:2]))
for reader, (ids, scores, maps) in answers.items():
    assert dict(zip(ids, scores)) == first, reader
    order = np.argsort(ids)
    np.testing.assert_array_equal(
        maps.reshape(-1, 64)[order], heatmaps.reshape(-1, 64)[np.argsort(answers["pyarrow"][0])], reader)
assert not [name for name in sys.modules if name.partition(".")[0] in ("ais", "ray", "torch")]
print("equal")
"""
        # In a folder of its own, and isolated, so that nothing of this checkout can be imported.
        found = subprocess.run(
            [sys.executable, "-I", "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert found.stdout == "equal\n", found.stderr

    @pytest.mark.skipif(sys.platform != "linux", reason="looks under /proc")
    @pytest.mark.usefixtures("done")
    def test_torch_is_loaded_only_where_it_scores(self) -> None:
        """Ray Data's own actors take no object of ours that would bring it in, a second of every start."""
        theirs = [process for process in descendants(os.getpid()) if process.title.startswith("ray::_StatsActor")]
        assert len(theirs) == 1
        assert "libtorch" not in Path(f"/proc/{theirs[0].pid}/maps").read_text()

    def test_again_it_does_nothing(
        self, done: Done, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        before = snapshot(done.folder.parent)
        code, said = command(done.arguments, monkeypatch, capsys)
        assert code == 0
        assert "nothing to do" in said
        assert "the backbone is UNTRAINED" in said
        assert snapshot(done.folder.parent) == before

    def test_damage_is_found_and_only_that_is_done_again(
        self, done: Done, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        shutil.copytree(done.folder, tmp_path / "runs" / "first")
        folder = tmp_path / "runs" / "first"
        arguments = [*done.arguments, f"output={tmp_path}"]
        code, said = command([*arguments, "verify=true"], monkeypatch, capsys)
        assert code == 0, said
        assert re.search(r"whole\s+every listed image is there exactly once", said)
        before = rows(folder / "results")

        # A shard that is gone: the run is not complete, and the same command does its images again.
        gone, damaged, *kept = sorted((folder / "results").glob("*.parquet"))
        lost = pq.read_table(gone)["image_id"].to_pylist()
        gone.unlink()
        code, said = command([*arguments, "verify=true"], monkeypatch, capsys)
        assert code == 1
        assert re.search(rf"missing\s+{len(lost)} in neither", said), said
        times = {path: path.stat().st_mtime_ns for path in (damaged, *kept)}
        assert main(arguments) == 0
        assert json.loads((folder / "summary.json").read_text())["last_start"]["images"] == len(lost)
        assert {path: path.stat().st_mtime_ns for path in times} == times

        # A flipped bit in a picture: repair=true deletes it with the rows that name it, and goes on.
        lost = pq.read_table(damaged)["image_id"].to_pylist()
        pictures = folder / "png" / pq.read_schema(damaged).metadata[b"ais.png"].decode()
        data = bytearray(pictures.read_bytes())
        data[700] ^= 1
        pictures.write_bytes(data)
        code, said = command([*arguments, "verify=true"], monkeypatch, capsys)
        assert code == 1
        assert re.search(rf"damaged\s+1\n\s+{damaged}: its pictures, png/{pictures.name}, are damaged", said), said
        assert damaged.exists()
        code, said = command([*arguments, "repair=true"], monkeypatch, capsys)
        assert code == 0, said
        assert "2 damaged files deleted" in said
        assert json.loads((folder / "summary.json").read_text())["last_start"]["images"] == len(lost)
        code, said = command([*arguments, "verify=true"], monkeypatch, capsys)
        assert code == 0, said
        after = rows(folder / "results")
        assert {image: row["score"] for image, row in after.items()} == pytest.approx(
            {image: row["score"] for image, row in before.items()}, abs=1e-3
        )

    @pytest.mark.parametrize(
        ("change", "named"),
        [("weighting=signed", "weighting: 'positive' there, 'signed' now"), ("png.kind=both", "'overlay'.*'both'")],
    )
    def test_the_same_name_for_something_else_is_refused(
        self,
        done: Done,
        change: str,
        named: str,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        before = snapshot(done.folder.parent)
        code, said = command([*done.arguments, change], monkeypatch, capsys)
        assert code == 2
        assert re.search(named, said), said
        assert "run_id: 'first' exists and was made of something else" in said
        assert snapshot(done.folder.parent) == before


NAMES = (
    "with space.png",
    "ünïcode 画像.png",
    "hash#1.png",
    "question?.png",
    "percent%20.png",
    "new\nline.png",
    "a::b.png",
    "[brackets].png",
    "left/same.png",
    "right/same.png",
    "folder.jpg/deep/er/inside.png",
)


@pytest.fixture(scope="module")
def nested(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of folders with names that trip, other files, and an image-like name that is no file."""
    root = tmp_path_factory.mktemp("nested")
    for number, name in enumerate(NAMES):
        seed = 0 if name.endswith("same.png") else 1 + number  # the scores of equal images tie
        write_picture(root / "images" / name, 60, 40, seed)
    for number in range(9):
        write_picture(root / "images" / "more" / f"{number}.png", 50, 70, seed=100 + number)
    os.mkfifo(root / "images" / "pipe.jpg")
    for name in ("notes.txt", "left/notes.txt", "README"):
        (root / "images" / name).write_text("not an image")
    return root


@pytest.fixture(scope="module")
def troubled(local_ray: None, head: Path, nested: Path) -> Done:  # noqa: ARG001
    """The nested folder, with an image that vanishes after the listing and no patience for errors."""
    vanishing = write_picture(nested / "images" / "vanishing.png", 60, 40, seed=50)
    arguments = [
        f"images={nested}/images",
        f"output={nested}/troubled",
        f"head={head}",
        "png.select=sample:0.5",
        "png.kind=both",
        "max_error_share=0.05",
        "shard_rows=8",
        "compute.batch_size=4",
    ]
    job = prepared(arguments)
    set_out(job)
    vanishing.unlink()
    code = main(arguments)
    uris = [str(nested / "images" / name) for name in (*NAMES, *(f"more/{number}.png" for number in range(9)))]
    return Done(arguments, code, Path(job.run.folder.path), uris, [])


class TestTroubledRun:
    def test_every_name_is_read_and_what_cannot_be_is_a_row(self, troubled: Done, nested: Path) -> None:
        results, errors = rows(troubled.folder / "results"), rows(troubled.folder / "errors")
        assert sorted(row["uri"] for row in results.values()) == sorted(troubled.uris)
        assert {row["uri"]: (row["stage"], row["reason"]) for row in errors.values()} == {
            str(nested / "images" / "pipe.jpg"): ("fetch", "not a file"),
            str(nested / "images" / "vanishing.png"): ("fetch", "not found"),
        }
        assert troubled.summary["ignored_files"] == {".txt": 2, "(no suffix)": 1}
        for name in ("left/same.png", "right/same.png"):
            [row] = [row for row in results.values() if row["uri"].endswith(name)]
            assert (row["width"], row["height"]) == (60, 40)

    def test_too_many_errors_fail_the_run_and_keep_what_is_good(
        self, troubled: Done, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert troubled.code == 1
        before = snapshot(troubled.folder)
        code, said = command(troubled.arguments, monkeypatch, capsys)
        assert code == 1
        assert "failed      9.1% of the images could not be used, more than max_error_share=0.05" in said
        assert "1  fetch: not found" in said
        assert snapshot(troubled.folder) == before

    def test_a_sample_of_pictures_with_all_three_views(self, troubled: Done) -> None:
        results, pictures = rows(troubled.folder / "results"), pngs(troubled.folder / "png")
        sample = Pictures(PngSelection("sample", share=0.5), MAX_SIDE)
        assert pictures.keys() == {image_id for image_id in results if sample.wanted(image_id)}
        assert 0 < len(pictures) < len(results)
        for image_id, row in results.items():
            assert row["png"] == (pictures[image_id][0] if image_id in pictures else None)
            if image_id in pictures:
                assert picture_of(pictures[image_id][1]).size == (3 * row["width"] + 8, row["height"])


@pytest.fixture(scope="module")
def top(local_ray: None, head: Path, nested: Path) -> Prepared:  # noqa: ARG001
    """A finished run with the pictures of the three best."""
    arguments = [
        f"images={nested}/images/**/*.png",
        f"output={nested}/extremes",
        f"head={head}",
        "png.select=top:3",
        "png.kind=heatmap",
        "shard_rows=8",
        "compute.batch_size=4",
    ]
    assert main(arguments) == 0
    return prepared(arguments)


class TestExtremes:
    def by_score(self, folder: Path, sign: int) -> list[int]:
        results = rows(folder / "results")
        return sorted(results, key=lambda image_id: (sign * results[image_id]["score"], image_id))

    def test_top(self, top: Prepared) -> None:
        folder = Path(top.run.folder.path)
        results, pictures = rows(folder / "results"), pngs(folder / "png", "*.tar")
        assert len(results) == len(NAMES) + 9
        assert {shard for shard, _ in pictures.values()} == {"top-000000.tar"}
        assert set(pictures) == set(self.by_score(folder, -1)[:3])
        for image_id, (_, data) in pictures.items():
            picture = picture_of(data)
            assert picture.size == (results[image_id]["width"], results[image_id]["height"])
            assert picture.text["ais.untrained"] == UNTRAINED  # type: ignore[attr-defined]

    def test_bottom_of_the_same_results_and_once_more(self, top: Prepared) -> None:
        folder = Path(top.run.folder.path)
        for count in (7, 5):  # those of an interrupted attempt are replaced
            png = top.plan.png.model_copy(update={"select": f"bottom:{count}"})
            assert render_selected(top.run, dataclasses.replace(top.plan, png=png))[1] == 0
        assert set(pngs(folder / "png", "bottom-*.tar")) == set(self.by_score(folder, 1)[:5])
        assert len(pngs(folder / "png", "top-*.tar")) == 3

    def test_of_an_image_that_changed_since_it_was_listed_there_is_no_picture(self, top: Prepared) -> None:
        """Its heatmap is not of what it shows by now."""
        folder = Path(top.run.folder.path)
        best = self.by_score(folder, -1)[0]
        image = Path(rows(folder / "results")[best]["uri"])
        whole, times = image.read_bytes(), image.stat()
        write_picture(image, 33, 44, seed=99)
        png = top.plan.png.model_copy(update={"select": "top:2"})
        try:
            [shard], failed = render_selected(top.run, dataclasses.replace(top.plan, png=png))
        finally:
            image.write_bytes(whole)
            os.utime(image, ns=(times.st_atime_ns, times.st_mtime_ns))
        assert failed == 1
        data = (folder / "png" / shard.name).read_bytes()
        assert (shard.size, shard.sha256) == (len(data), hashlib.sha256(data).hexdigest())
        assert set(pngs(folder / "png", "top-*.tar")) == {self.by_score(folder, -1)[1]}
        assert render_selected(top.run, top.plan)[1] == 0
        assert len(pngs(folder / "png", "top-*.tar")) == 3

    def test_ties_go_to_the_lower_id(self, top: Prepared) -> None:
        results = rows(Path(top.run.folder.path) / "results")
        left, right = (
            next(image_id for image_id, row in results.items() if row["uri"].endswith(name))
            for name in ("left/same.png", "right/same.png")
        )
        assert results[left]["score"] == results[right]["score"]
        for count in range(1, len(results) + 2):
            largest, smallest = (_extreme(top.run, count, largest=largest) for largest in (True, False))
            assert largest is not None
            assert largest["image_id"].to_pylist() == self.by_score(Path(top.run.folder.path), -1)[:count]
            assert smallest is not None
            assert smallest["image_id"].to_pylist() == self.by_score(Path(top.run.folder.path), 1)[:count]

    def test_pictures_are_drawn_as_they_come_and_not_by_the_task_that_writes(
        self, top: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def note(stage: str) -> None:
            (tmp_path / f"{stage}-{ray.get_runtime_context().get_task_id()}").touch()

        class NotedRender(Render):
            def __call__(self, batch: pa.Table) -> pa.Table:
                note("draw")
                return super().__call__(batch)

        class NotedSink(PngSink):
            def write(self, blocks: Iterable[Block], ctx: Any) -> tuple[int, PngShard | None]:
                note("write")
                return super().write(blocks, ctx)

        monkeypatch.setattr("ais.pipeline.heatmaps.Render", NotedRender)
        monkeypatch.setattr("ais.pipeline.heatmaps.PngSink", NotedSink)
        png = top.plan.png.model_copy(update={"select": "bottom:12"})
        assert render_selected(top.run, dataclasses.replace(top.plan, png=png))[1] == 0
        tasks = [path.name.split("-")[0] for path in tmp_path.iterdir()]
        assert sorted(tasks) == ["draw", "draw", "draw", "write"]  # batches of four
        folder = Path(top.run.folder.path)
        assert len(pngs(folder / "png", "bottom-*.tar")) == 12

    def test_of_no_results_there_are_none(self, top: Prepared, tmp_path: Path) -> None:
        assert render_selected(Run.at(str(tmp_path), "empty", STORAGE), top.plan) == ((), 0)


@pytest.fixture(scope="module")
def importance(head: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bundle of an AIS with both signs, for the head at ``features.6``."""
    folder = tmp_path_factory.mktemp("importance")
    made = json.loads((head / "head.json").read_text())
    record = ImportanceRecord("error", "tiny", made["weights_fingerprint"], "features.6", "center_crop", made["sha256"])
    ais = np.random.default_rng(0).normal(size=8)
    save_importance(str(folder), pa.table({"map": range(8), "ais": ais}), record, {}, STORAGE)
    return folder


class TestImportance:
    def test_one_ais_vector_for_the_whole_run(
        self,
        local_ray: None,  # noqa: ARG002
        head: Path,
        nested: Path,
        importance: Path,
    ) -> None:
        arguments = [
            f"images={nested}/list.csv",
            f"output={nested}/importance",
            f"head={head}",
            f"importance={importance}",
            "weighting=signed",
            "png.select=none",
            "preprocessing.mode=center_crop",
        ]
        pa.csv.write_csv(pa.table({"uri": [f"images/{name}" for name in NAMES]}), nested / "list.csv")
        assert main(arguments) == 0
        folder = Path(prepared(arguments).run.folder.path)
        results = list(rows(folder / "results").values())
        assert len(results) == len(NAMES)
        assert {row["png"] for row in results} == {None}
        assert not (folder / "png").exists()
        vector = pq.read_table(importance / "importance.parquet")["ais"].to_pylist()
        expected = explained([row["uri"] for row in results], head, importance=vector, weighting="signed")
        heatmaps = np.stack([row["heatmap"] for row in results])
        # Measured: equal to the last bit.
        np.testing.assert_allclose(heatmaps, expected.heatmaps, rtol=0, atol=1e-5)
        np.testing.assert_allclose([row["score"] for row in results], expected.scores, rtol=0, atol=1e-3)
        assert heatmaps.min() < -0.01
        assert heatmaps.max() > 0.01

    def test_of_another_layer_is_refused(
        self,
        head: Path,
        nested: Path,
        importance: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        arguments = [f"images={nested}", f"output={nested}/no", f"head={head}", f"importance={importance}"]
        code, said = command([*arguments, "backbone.layer=features.3"], monkeypatch, capsys)
        assert code == 2
        assert "the importance was made with layer 'features.6', not 'features.3'" in said
        assert not (nested / "no").exists()


class TestRefusedBeforeAnyWork:
    """None of these starts Ray or creates a run folder."""

    @pytest.mark.parametrize(
        ("overrides", "message", "expected"),
        [
            (["head={root}/missing"], "missing' is n.* head bundle.*jobs/train.py writes one", 2),
            (["backbone.weights=random", "backbone.seed=4"], "the head was trained with backbone weights .*, not ", 2),
            (["backbone.layer=features.99"], "tiny has no layer 'features.99'; nearest: features", 2),
            (["backbone.name=vgg16"], "trained with backbone 'tiny', not 'vgg16'", 2),
            (["preprocessing.mode=letterbox"], "trained with preprocessing 'center_crop', not 'letterbox'", 2),
            (["head={root}/inception"], "inception_v3 gives no heatmaps", 2),
            (["images={root}/empty"], "there are no images to work on", 1),
            (["images={root}/missing"], "missing' does not exist: give a folder, a glob", 1),
            (["images={root}/empty/*.png"], "there are no images to work on", 1),
            (["output={root}/file"], "cannot be written: NotADirectoryError", 1),
        ],
    )
    def test_refused(
        self,
        overrides: list[str],
        message: str,
        expected: int,
        head: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        write_picture(tmp_path / "images" / "a.png", 40, 40, seed=0)
        (tmp_path / "empty").mkdir()
        (tmp_path / "file").write_text("")
        (tmp_path / "inception").mkdir()
        record = json.loads((head / "head.json").read_text()) | {"backbone": "inception_v3"}
        (tmp_path / "inception" / "head.json").write_text(json.dumps(record))
        usual = [f"images={tmp_path}/images", f"output={tmp_path}/output", f"head={head}"]
        given = [override.format(root=tmp_path) for override in overrides]
        code, said = command([*usual, *given], monkeypatch, capsys)
        assert code == expected  # 2: the same command would fail again; images and storage may be there by then
        assert re.search(f"^error: .*{message}", said, re.MULTILINE), said
        assert not (tmp_path / "output").exists()

    def test_a_run_is_named_after_everything_that_makes_it(self, head: Path, tmp_path: Path) -> None:
        usual = [f"images={tmp_path}", f"output={tmp_path}/output", f"head={head}"]
        name = prepared(usual).run.run_id
        assert prepared([*usual, "compute.batch_size=3", "shard_rows=7", "max_error_share=1"]).run.run_id == name
        copy = tmp_path / "copy"
        shutil.copytree(head, copy)
        assert prepared([*usual, f"head={copy}"]).run.run_id == name  # the head counts, not its address
        one = HeadEnsemble(load_head(str(head)).variants[:1])
        save_head(str(copy), one, load_backbone("tiny", weights="random", seed=3), "center_crop", {})
        names = {name, prepared([*usual, f"head={copy}"]).run.run_id}
        names |= {prepared([*usual, change]).run.run_id for change in ("weighting=signed", "png.select=none")}
        names |= {prepared([*usual, "backbone.layer=features.3"]).run.run_id}
        assert len(names) == 5
        assert all(run_id.startswith("tiny-") for run_id in names)

    def test_a_dry_run_writes_nothing(
        self, head: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        usual = [f"images={tmp_path}", f"output={tmp_path}/output", f"head={head}", "--dry-run"]
        code, said = command(usual, monkeypatch, capsys)
        assert code == 0
        assert "tiny (UNTRAINED, random with seed 3)" in said
        assert "layer: features.6" in said
        assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("local_ray")
def test_a_count_that_is_lost_is_no_work_that_stands_still() -> None:
    lost = Progress("images", 9, stall_minutes=0.005)
    ray.kill(lost.counter)
    with lost as progress:
        time.sleep(3)
        assert progress.pace() is None
    # The limit is over before the second look.
    stands_still = pytest.raises(RunError, match=r"nothing was finished for 0\.005 minutes, after 0 of 9 images")
    with stands_still, Progress("images", 9, stall_minutes=0.005):
        time.sleep(60)

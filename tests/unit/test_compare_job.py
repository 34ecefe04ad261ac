"""`jobs/compare.py` on run folders written here by hand, with the schema of `ais.runs`. Nothing else is faked."""

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from scipy.ndimage import map_coordinates

from ais.agreement import METRICS, agreement
from ais.command_line import load_config
from ais.comparison import mean_agreement
from ais.config import CompareConfig
from ais.errors import ConfigError, RunError, StorageError
from ais.images import Geometry
from ais.listing import ListedImage
from ais.runs import Run, results_schema, write_table
from ais.settings import parse_config, to_yaml
from ais.storage import Storage
from jobs.compare import main

ROOT = Path(__file__).parents[2]
CENTER_CROP = Geometry(224, 256, "bilinear")
LETTERBOX = Geometry(224, 256, "bilinear", mode="letterbox")
SIZES = [(96, 96), (150, 100), (80, 200), (120, 90), (64, 128), (100, 100)]  # width, height


@dataclass(frozen=True)
class Row:
    """An image of a run; its heatmap's cells cover what the model saw, unless said."""

    uri: str
    width: int
    height: int
    box: np.ndarray
    heatmap: np.ndarray
    etag: str | None = None
    heatmap_box: np.ndarray | None = None


def seen(geometry: Geometry, width: int, height: int) -> np.ndarray:
    return geometry.apply(np.zeros((height, width, 3), np.uint8))[1]


def rows_of(heatmaps: np.ndarray, geometry: Geometry = CENTER_CROP) -> list[Row]:
    return [
        Row(f"/i/{number}.png", width, height, seen(geometry, width, height), heatmap)
        for number, ((width, height), heatmap) in enumerate(zip(SIZES, heatmaps, strict=True))
    ]


def write_run(
    place: Path,
    run_id: str,
    rows: Sequence[Row],
    *,
    weighting: str = "signed",
    complete: bool = True,
    shard_rows: int = 4,
) -> str:
    """Write a run folder with these images; return its address."""
    run = Run.at(str(place), run_id, Storage())
    shape = rows[0].heatmap.shape if rows else (7, 7)
    facts = {
        "run_id": run_id,
        "identity": {"weighting": weighting},
        "backbone": "tiny",
        "layer": {"name": "features.8", "map_shape": [16, *shape]},
        "weights": {"fingerprint": "0123"},
        "untrained": True,
    }
    run.set_out([ListedImage(row.uri, etag=row.etag) for row in rows] or [ListedImage("/i/bad.png")], "", facts)
    for start in range(0, len(rows), shard_rows):
        write_shard(run, f"part-{start:05d}", start, rows[start : start + shard_rows])
    if complete:
        run.finish({**facts, "images": len(rows), "scored": len(rows), "failed": 0})
    return run.folder.address


def write_shard(run: Run, name: str, first_id: int, rows: Sequence[Row]) -> None:
    boxes, cells = (
        [row.box for row in rows],
        [row.box if row.heatmap_box is None else row.heatmap_box for row in rows],
    )
    columns = {
        "image_id": pa.array(np.arange(first_id, first_id + len(rows))),
        "uri": [row.uri for row in rows],
        "etag": pa.array([row.etag for row in rows], pa.string()),
        "width": pa.array([row.width for row in rows], pa.int32()),
        "height": pa.array([row.height for row in rows], pa.int32()),
        "box": pa.FixedSizeListArray.from_arrays(np.concatenate(boxes).astype(np.float32), 4),
        "heatmap_box": pa.FixedSizeListArray.from_arrays(np.concatenate(cells).astype(np.float32), 4),
        "score": pa.array(np.zeros(len(rows), np.float32)),
        "score_std": pa.nulls(len(rows), pa.float32()),
        "heatmap": pa.FixedShapeTensorArray.from_numpy_ndarray(np.stack([row.heatmap for row in rows])),
        "png": pa.nulls(len(rows), pa.string()),
    }
    write_table(run.results / f"{name}.parquet", pa.table(columns, schema=results_schema(rows[0].heatmap.shape)))


def random_heatmaps(seed: int, side: int = 7) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(len(SIZES), side, side)).astype(np.float32)


def compare(runs: Sequence[str], output: Path, *overrides: str) -> tuple[dict, list[dict]]:
    """Run the job; return the summary and the rows of ``agreement.parquet``."""
    assert main([f"runs=[{','.join(runs)}]", f"output={output}", *overrides]) == 0
    summary = json.loads((output / "summary.json").read_text())
    return summary, pq.read_table(output / "agreement.parquet").to_pylist()


def test_a_run_against_itself_its_negative_and_a_scaled_one(tmp_path: Path) -> None:
    heatmaps = random_heatmaps(0)
    runs = [
        write_run(tmp_path, "first", rows_of(heatmaps)),
        write_run(tmp_path, "again", rows_of(heatmaps), shard_rows=2),
        write_run(tmp_path, "negative", rows_of(-heatmaps)),
        write_run(tmp_path, "scaled", rows_of(10 * heatmaps)),
    ]
    summary, rows = compare(runs, tmp_path / "out")
    means = {
        (pair["run_a"], pair["run_b"]): {metric: value["mean"] for metric, value in pair["agreement"].items()}
        for pair in summary["pairs"]
    }
    assert list(means[("first", "again")].values()) == pytest.approx([1, 1, 0, 1, 0, 1], abs=1e-12)
    assert means[("first", "negative")]["pearson"] == pytest.approx(-1)
    assert means[("first", "negative")]["cosine"] == pytest.approx(-1)
    assert means[("first", "negative")]["top_overlap"] == 0
    scaled = means[("first", "scaled")]
    assert (scaled["pearson"], scaled["cosine"], scaled["top_overlap"]) == pytest.approx((1, 1, 1))
    assert scaled["emd"] == pytest.approx(0, abs=1e-7)
    assert scaled["ssim"] < 0.5  # not blind to scale, as its docstring says
    assert scaled["mse"] > 10
    assert len(means) == 6
    assert len(rows) == 6 * len(SIZES)


def test_values_are_those_of_both_heatmaps_placed_on_the_image(tmp_path: Path) -> None:
    """7×7 under a centre crop against 14×14 under a letterbox whose cells lie off centre, on images of all shapes."""
    first, second = random_heatmaps(1), random_heatmaps(2, side=14)
    second += np.kron(first, np.ones((1, 2, 2), np.float32))
    crop = rows_of(first)
    letterbox = [replace(row, heatmap_box=row.box + np.float32([-3, 2, 1, 7])) for row in rows_of(second, LETTERBOX)]
    runs = [write_run(tmp_path, "crop", crop), write_run(tmp_path, "letterbox", letterbox)]
    _, table = compare(runs, tmp_path / "out", "resolution=20")
    assert [row["uri"] for row in table] == [row.uri for row in crop]
    for row, one, other in zip(table, crop, letterbox, strict=True):
        left, top, right, bottom = one.box.tolist()  # the letterbox saw all of the image, hence the crop
        y, x = np.mgrid[top:bottom:21j, left:right:21j][:, :-1, :-1]
        y, x = y + (bottom - top) / 40, x + (right - left) / 40
        grids = [_sample(one.heatmap, one.box, y, x), _sample(other.heatmap, other.heatmap_box, y, x)]
        extent = np.array([[bottom - top, right - left]]) / np.hypot(one.width, one.height)
        expected = agreement(grids[0][None], grids[1][None], extent)
        for metric in METRICS:
            print(row[metric] - expected[metric][0])
            assert row[metric] == pytest.approx(expected[metric][0], abs=2e-7), (one.uri, metric)  # measured: 2e-8


def _sample(heatmap: np.ndarray, box: np.ndarray | None, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Bilinear interpolation by SciPy at places of the original image; the outermost cells go on outside."""
    left, top, right, bottom = np.asarray(box, np.float64)
    rows = (y - top) / (bottom - top) * heatmap.shape[0] - 0.5
    columns = (x - left) / (right - left) * heatmap.shape[1] - 0.5
    return map_coordinates(heatmap.astype(np.float64), [rows, columns], order=1, mode="nearest")


def test_only_what_both_looked_at_counts(tmp_path: Path) -> None:
    """A crop and a letterbox of a wide image agree inside the crop, whatever the letterbox shows outside."""
    width, height = 300, 100
    both = []
    for geometry in (CENTER_CROP, LETTERBOX):
        left, _, right, _ = box = seen(geometry, width, height)
        x = left + (np.arange(14) + 0.5) / 14 * (right - left)  # the heatmap says where its cells are
        both.append(Row("/i/wide.png", width, height, box, np.tile(x, (14, 1)).astype(np.float32)))
    both[1].heatmap[:, [0, -1]] = 999, -999  # far outside the crop
    runs = [write_run(tmp_path, str(number), [row]) for number, row in enumerate(both)]
    _, (row,) = compare(runs, tmp_path / "out")
    assert row["pearson"] > 0.999
    assert row["mse"] < 0.5  # square pixels, at the edges, where the outermost cells of the crop go on


def test_images_missing_in_a_run_are_counted(tmp_path: Path) -> None:
    heatmaps = random_heatmaps(3)
    rows = rows_of(heatmaps)
    changed = replace(rows[2], etag="new")
    resized = replace(rows[3], width=200, height=200, box=seen(CENTER_CROP, 200, 200))
    runs = [
        write_run(tmp_path, "all", rows),
        write_run(tmp_path, "four", rows[1:5]),
        write_run(tmp_path, "changed", [rows[5], changed, resized, rows[4]]),
        write_run(tmp_path, "repeated", [*rows, rows[0], rows[0]]),
    ]
    summary, table = compare(runs, tmp_path / "out")
    counts = [
        (pair["run_a"], pair["run_b"], pair["images"], pair["only_in_a"], pair["only_in_b"])
        for pair in summary["pairs"]
    ]
    assert counts == [
        ("all", "four", 4, 2, 0),
        ("all", "changed", 2, 4, 2),
        ("all", "repeated", 6, 0, 0),
        ("four", "changed", 1, 3, 3),
        ("four", "repeated", 4, 0, 2),
        ("changed", "repeated", 2, 2, 4),
    ]
    assert [row["uri"] for row in table if (row["run_a"], row["run_b"]) == ("all", "changed")] == [
        "/i/4.png",
        "/i/5.png",
    ]
    assert all(row["pearson"] == pytest.approx(1) for row in table)  # each with its own, in whatever order


def test_an_etag_is_part_of_what_an_image_is(tmp_path: Path) -> None:
    rows = rows_of(random_heatmaps(4))
    tagged = [replace(row, etag=f"e{row.width}") for row in rows]
    runs = [write_run(tmp_path, "first", tagged), write_run(tmp_path, "second", tagged[::-1])]
    _, table = compare(runs, tmp_path / "out")
    assert [(row["uri"], row["etag"]) for row in table] == [(row.uri, row.etag) for row in tagged]
    assert all(row["pearson"] == pytest.approx(1) for row in table)


def test_undefined_values_are_null_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = random_heatmaps(5), random_heatmaps(6)
    first[0], first[1], second[1] = 0, -0.25, 0.1
    runs = [write_run(tmp_path, "first", rows_of(first)), write_run(tmp_path, "second", rows_of(second))]
    summary, table = compare(runs, tmp_path / "out", "names=[one, other]")
    undefined = {metric: value["undefined"] for metric, value in summary["pairs"][0]["agreement"].items()}
    assert undefined == {"pearson": 2, "cosine": 1, "mse": 0, "ssim": 0, "emd": 2, "top_overlap": 2}
    assert [row["pearson"] is None for row in table] == [True, True, False, False, False, False]
    assert summary["pairs"][0]["agreement"]["pearson"]["n"] == 4
    printed = capsys.readouterr().out
    assert "undefined   one – other: images with a constant or nowhere positive heatmap: pearson 2, cosine 1" in printed


def test_what_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [write_run(tmp_path, f"run-{seed}", rows_of(random_heatmaps(seed))) for seed in range(3)]
    out = tmp_path / "out"
    summary, table = compare(runs, out, "names=[a, b, c]", "top_share=0.2")
    assert sorted(path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()) == sorted(
        ["agreement.parquet", "config.yaml", "matrices.parquet", "summary.json"]
        + [f"matrices/{metric}.png" for metric in METRICS]
    )
    assert pq.read_schema(out / "agreement.parquet").names == ["uri", "etag", "run_a", "run_b", *METRICS]
    of_a_and_c = [row["ssim"] for row in table if (row["run_a"], row["run_b"]) == ("a", "c")]
    expected = mean_agreement(np.array(of_a_and_c)).as_dict()
    assert summary["pairs"][1]["agreement"]["ssim"] == expected
    matrices = pq.read_table(out / "matrices.parquet").to_pylist()
    assert len(matrices) == len(METRICS) * 6
    for one, other in (("a", "c"), ("c", "a")):
        assert {"metric": "ssim", "run_a": one, "run_b": other, **expected} in matrices
    assert [(run["name"], run["run_id"], run["backbone"], run["untrained"]) for run in summary["runs"]] == [
        ("a", "run-0", "tiny", True),
        ("b", "run-1", "tiny", True),
        ("c", "run-2", "tiny", True),
    ]
    assert summary["metrics"] == METRICS
    config = load_config(CompareConfig, ["--config", str(out / "config.yaml")], doc="").config
    assert (config.names, config.top_share) == (("a", "b", "c"), 0.2)
    printed = capsys.readouterr().out
    assert "a: 6 heatmaps, signed, 7×7, tiny features.8, UNTRAINED" in printed
    assert "note" not in printed
    with Image.open(out / "matrices" / "pearson.png") as picture:
        colours = np.asarray(picture.convert("RGB")).reshape(-1, 3)
    assert len(np.unique(colours, axis=0)) > 50  # cells, numbers and names, not an empty page


def test_a_comparison_made_again_replaces_the_old_one(tmp_path: Path) -> None:
    runs = [write_run(tmp_path, f"run-{seed}", rows_of(random_heatmaps(seed))) for seed in range(3)]
    _, three = compare(runs, tmp_path / "out")
    summary, two = compare(runs[:2], tmp_path / "out")
    assert (len(three), len(two), len(summary["pairs"])) == (18, 6, 1)
    assert two == three[:6]


def test_mixed_weightings_are_noted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [
        write_run(tmp_path, "signed", rows_of(random_heatmaps(0))),
        write_run(tmp_path, "positive", rows_of(np.abs(random_heatmaps(0))), weighting="positive"),
    ]
    compare(runs, tmp_path / "out")
    assert "some heatmaps are positive and some signed" in capsys.readouterr().out


def test_a_dry_run_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [write_run(tmp_path, f"run-{seed}", rows_of(random_heatmaps(seed))) for seed in range(2)]
    assert main(["--dry-run", f"runs=[{','.join(runs)}]", f"output={tmp_path}/out"]) == 0
    assert not (tmp_path / "out").exists()
    printed = capsys.readouterr().out
    assert "runs        run-0: 6 heatmaps" in printed
    assert parse_config(CompareConfig, printed[printed.index("runs:\n") :]).runs == tuple(runs)


class TestRefused:
    @pytest.fixture
    def first(self, tmp_path: Path) -> str:
        return write_run(tmp_path, "first", rows_of(random_heatmaps(0)))

    def refused(self, tmp_path: Path, runs: Sequence[str], error: type[Exception], message: str, *more: str) -> None:
        with pytest.raises(error, match=message):
            main([f"runs=[{','.join(runs)}]", f"output={tmp_path}/out", *more])
        assert not (tmp_path / "out").exists()

    def test_one_run(self, tmp_path: Path, first: str) -> None:
        self.refused(tmp_path, [first], ConfigError, r"runs: expected list \[text, ...\] of at least 2, got")

    def test_a_run_that_is_not_complete(self, tmp_path: Path, first: str) -> None:
        other = write_run(tmp_path, "half", rows_of(random_heatmaps(1)), complete=False)
        self.refused(tmp_path, [first, other], ConfigError, "runs/half' is not complete.*command that started it cont")

    def test_a_folder_that_holds_no_run(self, tmp_path: Path, first: str) -> None:
        self.refused(tmp_path, [first, str(tmp_path)], ConfigError, "holds no run; give a folder OUTPUT/runs/RUN_ID")

    def test_a_run_given_twice(self, tmp_path: Path, first: str) -> None:
        self.refused(tmp_path, [first, first], ConfigError, 'runs/first" is given twice; name each run once')
        self.refused(tmp_path, [first, f"{first}/../first/"], ConfigError, "runs/first' is given twice")

    def test_two_runs_of_one_name(self, tmp_path: Path, first: str) -> None:
        other = write_run(tmp_path / "elsewhere", "first", rows_of(random_heatmaps(1)))
        self.refused(tmp_path, [first, other], ConfigError, "run ids first, first are not all different; give names=")
        compare([first, other], tmp_path / "out", "names=[here, elsewhere]")

    def test_names_that_do_not_name_each_run(self, tmp_path: Path, first: str) -> None:
        runs = [first, "other"]
        self.refused(tmp_path, runs, ConfigError, "names: 1 given for 2 runs; give one for each", "names=[a]")
        self.refused(tmp_path, runs, ConfigError, 'names: "a" is given twice; give each run', "names=[a, a]")

    def test_no_image_in_common(self, tmp_path: Path, first: str) -> None:
        others = [replace(row, uri=f"/elsewhere{row.uri}") for row in rows_of(random_heatmaps(1))]
        runs = [first, write_run(tmp_path, "second", others)]
        message = "first and second have no image in common.*'/i/0.png', the other '/elsewhere/i/0.png'"
        self.refused(tmp_path, runs, RunError, message)

    def test_a_run_whose_images_all_failed(self, tmp_path: Path, first: str) -> None:
        runs = [first, write_run(tmp_path, "failed", [])]
        self.refused(tmp_path, runs, RunError, "runs/failed' has no results: every image is in errors; leave the run")

    def test_nothing_seen_by_both(self, tmp_path: Path) -> None:
        heatmap = random_heatmaps(0)[0]
        halves = [
            write_run(tmp_path, name, [Row("/i/0.png", 100, 100, np.array(box, np.float32), heatmap)])
            for name, box in (("left", [0, 0, 50, 100]), ("right", [50, 0, 100, 100]))
        ]
        self.refused(tmp_path, halves, RunError, "left and right saw no common part of '/i/0.png'")

    def test_a_damaged_shard(self, tmp_path: Path, first: str) -> None:
        second = write_run(tmp_path, "second", rows_of(random_heatmaps(1)))
        (Path(second) / "results" / "part-00004.parquet").write_bytes(b"PAR1 damaged")
        self.refused(tmp_path, [first, second], RunError, r"part-00004\.parquet' cannot be read.*make the run anew")

    def test_a_shard_damaged_where_arrow_says_oserror(self, tmp_path: Path, first: str) -> None:
        second = write_run(tmp_path, "second", rows_of(random_heatmaps(1)))
        shard = Path(second) / "results" / "part-00004.parquet"
        whole = shard.read_bytes()
        shard.write_bytes(whole[:4] + bytes(len(whole) // 2) + whole[4 + len(whole) // 2 :])
        self.refused(tmp_path, [first, second], StorageError, r"part-00004\.parquet' cannot be read: OSError")

    def test_a_run_of_scores_only(self, tmp_path: Path, first: str) -> None:
        second = write_run(tmp_path, "second", rows_of(random_heatmaps(1)))
        summary = json.loads((Path(second) / "summary.json").read_text())
        del summary["identity"]["weighting"]
        (Path(second) / "summary.json").write_text(json.dumps({**summary, "layer": None}))
        self.refused(tmp_path, [first, second], ConfigError, r"runs/second' holds no heatmaps: .*heatmaps=true")

    def test_no_room_for_scratch_files(
        self, tmp_path: Path, first: str, full_disk: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        second = write_run(tmp_path, "second", rows_of(random_heatmaps(1)))
        monkeypatch.setattr(tempfile, "tempdir", str(full_disk))
        self.refused(tmp_path, [first, second], StorageError, "no room for scratch files in .*disk': .*set TMPDIR")

    def test_the_folder_of_a_run_as_output(self, tmp_path: Path, first: str) -> None:
        second = write_run(tmp_path, "second", rows_of(random_heatmaps(1)))
        with pytest.raises(
            ConfigError, match=r"output: .*runs/second' holds a run of jobs/heatmaps.py; give another output"
        ):
            main([f"runs=[{first},{second}]", f"output={second}"])
        assert json.loads((Path(second) / "summary.json").read_text())["run_id"] == "second"

    def test_an_address_of_no_known_kind(self, tmp_path: Path, first: str) -> None:
        self.refused(tmp_path, [first, "nowhere://a/runs/b"], StorageError, "cannot be opened")


def test_the_script_exits_with_its_code(tmp_path: Path) -> None:
    runs = [write_run(tmp_path, f"run-{seed}", rows_of(random_heatmaps(seed))) for seed in range(2)]

    def script(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(ROOT / "jobs" / "compare.py"), *arguments, f"output={tmp_path}/out"]
        return subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)

    refused = script(f"runs=[{runs[0]},{tmp_path}/none]")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr.startswith("error: runs: ")
    done = script(f"runs=[{','.join(runs)}]", "resolution=16")
    assert done.returncode == 0, done.stderr
    assert "run-0 – run-1" in done.stdout


class TestMeanAgreement:
    def test_mean_interval_and_counts(self) -> None:
        values = np.random.default_rng(0).normal(0.5, 0.2, 400)
        mean = mean_agreement(np.concatenate([values, [np.nan] * 7]))
        assert (mean.mean, mean.n, mean.undefined) == (pytest.approx(values.mean()), 400, 7)
        reach = 1.96 * values.std() / np.sqrt(400)
        # The normal interval, which Student's comes near for a mean of 400.
        assert mean.low == pytest.approx(values.mean() - reach, abs=0.01 * reach)
        assert mean.high == pytest.approx(values.mean() + reach, abs=0.01 * reach)

    def test_by_hand(self) -> None:
        """Variance 1/3 of four values: standard error √(1/12), three degrees of freedom."""
        mean = mean_agreement(np.array([0.0, 1.0, 1.0, 0.0]))
        assert mean.mean == 0.5
        assert mean.high - 0.5 == pytest.approx(3.18245 * np.sqrt(1 / 12), rel=1e-5)
        assert 0.5 - mean.low == pytest.approx(mean.high - 0.5)

    def test_too_few_for_an_interval(self) -> None:
        assert mean_agreement(np.array([0.25, np.nan])).as_dict() == {
            "mean": 0.25, "low": None, "high": None, "n": 1, "undefined": 1,
        }  # fmt: skip
        assert mean_agreement(np.array([np.nan])).as_dict() == {
            "mean": None, "low": None, "high": None, "n": 0, "undefined": 1,
        }  # fmt: skip


def test_the_production_example_loads() -> None:
    config = load_config(CompareConfig, ["--config", str(ROOT / "configs" / "compare.yaml")], doc="").config
    assert config.output.startswith("s3://")
    assert len(config.runs) == len(config.names or ()) == 3
    assert parse_config(CompareConfig, to_yaml(config)) == config


def test_lists_in_files_and_on_the_command_line() -> None:
    text = "runs:\n  - s3://a/runs/x\n  - 'b'\noutput: o\n"
    assert parse_config(CompareConfig, text).runs == ("s3://a/runs/x", "b")
    assert parse_config(CompareConfig, text, ["runs=[s3://c/d,e f]"]).runs == ("s3://c/d", "e f")
    for wrong in ("a", "[a, 3]", "[a, '']", "null", "[]"):
        with pytest.raises(
            ConfigError, match=r"^1 problem.*\nruns: expected list \[text, ...\] of at least 2, got .*$"
        ):
            parse_config(CompareConfig, text, [f"runs={wrong}"])

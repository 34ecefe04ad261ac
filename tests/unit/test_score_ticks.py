"""A tick of scheduled scoring, killed before and after every single file that it writes or removes, and started again.

Faked: the run of the network (a function of the file stands for it, written with the shards and the recovery of a real
run), Ray, which is not started, and the kill, an exception that nothing catches. Everything else is the job itself.
The real network, Ray and kills are in ``tests/cluster/test_score_job.py``.
"""

import itertools
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import ais.pipeline.score_job as job
import ais.scoring.series
from ais.backbones import load_backbone
from ais.command_line import load_config
from ais.config import ScoreConfig
from ais.errors import RunError
from ais.heads import HeadEnsemble, RegressionHead, save_head
from ais.pipeline.heatmaps import HeatmapPlan, Work
from ais.runs import ERRORS_SCHEMA, Run, results_schema, write_table
from ais.storage import Folder
from tests.tiny import TINY

SHARD_ROWS = 2


class Killed(BaseException):
    """Nothing catches it."""


class Machine:
    """Dies at the ``at``-th file that is written or removed: before it is, or just after."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.at = -1
        self.after = False
        self.count = 0
        for owner, name in (
            (Folder, "write_bytes"),
            (Folder, "remove"),
            (job, "upload"),
            (ais.scoring.series, "copy"),
        ):
            monkeypatch.setattr(owner, name, self._mortal(getattr(owner, name)))

    def _mortal(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            now = self.count == self.at
            self.count += 1
            if now and not self.after:
                raise Killed
            result = function(*args)
            if now:
                raise Killed
            return result

        return call


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    monkeypatch.setattr(job, "start_ray", lambda: None)
    monkeypatch.setattr(job, "run_heatmaps", score_files)
    return Machine(monkeypatch)


def score_files(run: Run, plan: HeatmapPlan, listed: int) -> Work:
    """Score each file by its size; those that say ``bad`` are no images, and those that say ``far`` cannot be fetched
    while there is a file ``down`` beside them."""
    assert plan.cells is None
    done = run.recover(listed)
    rows = [row for part in run.manifest.files("*.parquet") for row in pq.read_table(part.path).to_pylist()]
    todo = [row for row in rows if not done[row["image_id"]]]
    for start in range(0, len(todo), SHARD_ROWS):
        shard = todo[start : start + SHARD_ROWS]
        name = f"part-{run.run_id}-{shard[0]['image_id']:06d}.parquet"
        bad = [row | failure for row in shard if (failure := failure_of(Path(row["uri"])))]
        good = [row for row in shard if not failure_of(Path(row["uri"]))]
        if bad:
            write_table(run.errors / name, pa.Table.from_pylist(bad, ERRORS_SCHEMA))
        if good:
            facts = {"width": 1, "height": 1, "box": [0.0] * 4, "score_std": None}
            found = [row | facts | {"score": float(Path(row["uri"]).stat().st_size)} for row in good]
            write_table(run.results / name, pa.Table.from_pylist(found, results_schema(None)))
    return Work(len(todo), 1.0, {})


def failure_of(file: Path) -> dict[str, str]:
    content = file.read_bytes()
    if content.startswith(b"bad"):
        return {"stage": "decode", "reason": "not an image", "error": "not an image"}
    if content.startswith(b"far") and (file.parent / "down").exists():
        return {"stage": "fetch", "reason": "unreadable", "error": "unreadable"}
    return {}


@pytest.fixture(scope="module")
def scoring(tmp_path_factory: pytest.TempPathFactory) -> job.Scoring:
    root = tmp_path_factory.mktemp("ticks")
    torch.manual_seed(0)
    backbone = load_backbone(TINY, weights="random", seed=3)
    save_head(str(root / "head"), HeadEnsemble([RegressionHead(8, hidden=4)]), backbone, "center_crop", {})
    arguments = [f"images={root}/photos", f"output={root}/scores", f"head={root}/head", "max_error_share=0.5"]
    return job.prepare_scoring(load_config(ScoreConfig, arguments, doc="").config)


def at(scoring: job.Scoring, root: Path, tick: str | None) -> job.Scoring:
    """The same job over another collection."""
    config = scoring.config.model_copy(
        update={"images": str(root / "photos"), "output": str(root / "scores"), "tick": tick, "keep": "1h"}
    )
    series = type(scoring.series)(scoring.model.plan.storage.open(config.output), scoring.series.name)
    return replace(scoring, config=config, series=series)


def first_night(root: Path, scoring: job.Scoring) -> None:
    (root / "photos").mkdir()
    for number in range(6):
        (root / "photos" / f"{number}.png").write_bytes(b"x" * (number + 1))
    assert job.run_ticks(at(scoring, root, "n1")) == 0


def change(root: Path) -> None:
    for name, content in {"1.png": b"y" * 20, "6.png": b"z" * 30, "7.png": b"bad", "8.png": b"z" * 40}.items():
        (root / "photos" / name).write_bytes(content)
    (root / "photos" / "0.png").unlink()


BEFORE = {f"{number}.png": ("present", number + 1.0) for number in range(6)}
AFTER = BEFORE | {
    "0.png": ("gone", 1.0),
    "1.png": ("present", 20.0),
    "6.png": ("present", 30.0),
    "7.png": ("failed", None),
    "8.png": ("present", 40.0),
}


def seen(path: Path) -> dict[str, tuple[str, float | None]]:
    rows = pq.read_table(path, columns=["uri", "status", "score"]).to_pylist()
    return {Path(row["uri"]).name: (row["status"], row["score"]) for row in rows}


@pytest.mark.parametrize(
    ("after", "again"),
    [(False, None), (True, "n2"), (False, "n3")],
    ids=["before, no tick given", "after, the same tick", "before, the next tick"],
)
def test_killed_anywhere_it_ends_the_same(
    tmp_path: Path, machine: Machine, scoring: job.Scoring, after: bool, again: str | None
) -> None:
    first_night(tmp_path, scoring)
    change(tmp_path)
    output = tmp_path / "scores"
    shutil.copytree(output, tmp_path / "first")
    machine.after = after
    for death in itertools.count():
        shutil.rmtree(output)
        shutil.copytree(tmp_path / "first", output)
        machine.at, machine.count = death, 0
        try:
            job.run_ticks(at(scoring, tmp_path, "n2"))
        except Killed:
            machine.at = -1
        else:
            break
        # Whatever the moment: readers see one night or the other, and what the pointer names is there.
        latest, written = seen(output / "latest.parquet"), snapshots(output)
        assert latest in (BEFORE, AFTER)
        pointer = json.loads((output / "latest.json").read_text())
        assert seen(output / pointer["snapshot"]) in (BEFORE, latest)
        assert job.run_ticks(at(scoring, tmp_path, again)) == 0
        check_end(tmp_path, scoring)
        assert written.items() <= snapshots(output).items()  # those never change
    assert death > 12
    check_end(tmp_path, scoring)


def snapshots(output: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in output.glob("series/*/runs/*/snapshot.parquet")}


def check_end(root: Path, scoring: job.Scoring) -> None:
    output = root / "scores"
    assert seen(output / "latest.parquet") == AFTER
    series = at(scoring, root, None).series
    state = series.state()
    assert state.open is None
    assert state.snapshot is not None
    assert (state.snapshot.present, state.snapshot.failed, state.snapshot.gone) == (7, 1, 1)
    pointer = json.loads((output / "latest.json").read_text())
    assert (output / "latest.parquet").read_bytes() == (output / pointer["snapshot"]).read_bytes()
    assert pointer["snapshot"] == state.snapshot.path
    left = [str(path) for path in output.rglob("*") if "draft" in path.name or path.name.startswith(".")]
    assert left == []
    run = series.run(state.snapshot.run_id)
    ids = np.concatenate([pq.read_table(shard.path)["image_id"].to_numpy() for shard in run.results.files("*.parquet")])
    assert sorted(ids) == sorted(set(ids))


def test_an_unchanged_night_killed_anywhere(tmp_path: Path, machine: Machine, scoring: job.Scoring) -> None:
    first_night(tmp_path, scoring)
    deaths = 0
    for machine.after in (False, True):
        for machine.at in range(10):
            machine.count = 0
            try:
                job.run_ticks(at(scoring, tmp_path, f"n2-{machine.after}-{machine.at}"))
            except Killed:
                deaths += 1
            assert seen(tmp_path / "scores" / "latest.parquet") == BEFORE
    machine.at = -1
    assert job.run_ticks(at(scoring, tmp_path, None)) == 0
    assert deaths == 6  # before and after the pointer, the summary and the state


@pytest.mark.usefixtures("machine")
def test_failed_images_are_tried_again_where_that_may_help(
    tmp_path: Path, scoring: job.Scoring, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "photos").mkdir()
    for name, content in {"a.png": b"good", "bad.png": b"bad", "far.png": b"far", "down": b""}.items():
        (tmp_path / "photos" / name).write_bytes(content)

    def night(tick: str, **changed: Any) -> str:
        tonight = at(scoring, tmp_path, tick)
        config = tonight.config.model_copy(update={"max_error_share": 0.9, **changed})
        assert job.run_ticks(replace(tonight, config=config)) == 0
        return capsys.readouterr().out

    def statuses() -> dict[str, str]:
        return {name: status for name, (status, _) in seen(tmp_path / "scores" / "latest.parquet").items()}

    assert "3 images: 3 new" in night("n1")
    assert statuses() == {"a.png": "present", "bad.png": "failed", "far.png": "failed"}
    assert "3 images: 1 to try again" in night("n2")
    assert "unchanged" in night("n3", retry_errors=False)
    (tmp_path / "photos" / "down").unlink()
    assert "3 images: 1 to try again" in night("n4")
    assert statuses() == {"a.png": "present", "bad.png": "failed", "far.png": "present"}
    assert "unchanged" in night("n5")
    limits = scoring.config.limits.model_copy(update={"max_bytes": 10})
    assert "3 images: 1 to try again" in night("n6", limits=limits)
    assert "unchanged" in night("n7", limits=limits)


def test_other_limits_take_effect_the_night_after_an_interrupted_one(
    tmp_path: Path, machine: Machine, scoring: job.Scoring, capsys: pytest.CaptureFixture[str]
) -> None:
    """What failed before the interruption failed under the old limits, and gets its second try under the new."""
    (tmp_path / "photos").mkdir()
    for name, content in {"a.png": b"good", "bad.png": b"bad"}.items():
        (tmp_path / "photos" / name).write_bytes(content)
    machine.at = 6
    with pytest.raises(Killed):
        job.run_ticks(at(scoring, tmp_path, "n1"))
    machine.at = -1
    raised = scoring.config.limits.model_copy(update={"max_bytes": 10})

    def night(tick: str) -> job.Scoring:
        tonight = at(scoring, tmp_path, tick)
        return replace(tonight, config=tonight.config.model_copy(update={"limits": raised, "max_error_share": 0.9}))

    assert job.run_ticks(night("n1")) == 0
    assert "continues   2 images: 2 new" in capsys.readouterr().out
    state = at(scoring, tmp_path, None).series.state()
    assert state.snapshot is not None
    assert state.snapshot.limits == scoring.config.limits.model_dump()
    assert job.run_ticks(night("n2")) == 0
    assert "2 images: 1 to try again" in capsys.readouterr().out


def test_other_pixels_are_another_series(scoring: job.Scoring) -> None:
    def name(**limits: Any) -> str:
        config = scoring.config.model_copy(update={"limits": scoring.config.limits.model_copy(update=limits)})
        return job.prepare_scoring(config).series.name

    assert name(max_bytes=10) == scoring.series.name
    assert name(scaled_jpeg=True) != scoring.series.name


@pytest.mark.usefixtures("machine")
def test_what_the_next_scores_build_on_is_damaged(tmp_path: Path, scoring: job.Scoring) -> None:
    first_night(tmp_path, scoring)
    change(tmp_path)
    snapshot = tmp_path / "scores" / at(scoring, tmp_path, None).series.state().snapshot.path
    whole = snapshot.read_bytes()
    for damaged in (b"", whole[:-9], whole[:100] + bytes(300) + whole[400:]):
        snapshot.write_bytes(damaged)
        with pytest.raises(RunError, match=r"snapshot\.parquet' cannot be read: .*restore it, or give another output"):
            job.run_ticks(at(scoring, tmp_path, "n2"))
    snapshot.write_bytes(whole)
    (tmp_path / "scores" / "latest.json").write_text("[1]")
    with pytest.raises(RunError, match=r"latest\.json' is not as this version writes it.*delete it, and"):
        job.run_ticks(at(scoring, tmp_path, "n2"))
    (tmp_path / "scores" / "latest.json").unlink()
    assert job.run_ticks(at(scoring, tmp_path, "n2")) == 0
    assert seen(tmp_path / "scores" / "latest.parquet") == AFTER


@pytest.mark.usefixtures("machine")
@pytest.mark.parametrize("name", ["run.json", "summary.json"])
def test_a_tick_of_another_version_is_not_gone_on_with(tmp_path: Path, scoring: job.Scoring, name: str) -> None:
    first_night(tmp_path, scoring)
    folder = at(scoring, tmp_path, "n2").series.run("n2").folder
    (folder / name).write_text(json.dumps({"images": 1, "listed_at": "2026-11-25T01:00:00+00:00"}))
    with pytest.raises(RunError, match=rf"n2/{name}' is not as this version writes it, it lacks .*give another tick"):
        job.run_ticks(at(scoring, tmp_path, "n2"))
    assert job.run_ticks(at(scoring, tmp_path, "n3")) == 0

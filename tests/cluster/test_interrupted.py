"""The main job killed with signal 9: driver, scoring actor, fetching actor; on one core and two; or refused.

The real command line in processes of their own, with a private Ray or on the tests' own. Nothing is faked; workers
are found under ``/proc`` (Linux), and what a driver left of its private Ray is ended when its test is over.
Kills of all of them and of nodes, in one run over S3, are in ``make chaos`` (`tests.chaos`).
"""

import json
import os
import re
import shutil
import signal
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tests.kills import FETCHING, SCORING, Job, actors, descendants, joined

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="finds processes under /proc")

IMAGES, FILES, SHARD_ROWS = 360, 24, 24
COMMAND = """
import sys
import tests.tiny
from ais.command_line import run_job
from jobs.heatmaps import main
if cpus := int(sys.argv.pop(1)):
    import ray
    ray.init(address="local", num_cpus=cpus, include_dashboard=False, log_to_driver=False)
run_job(main)
"""


@pytest.fixture
def start(local_ray: None) -> Iterator[Callable[..., Job]]:  # noqa: ARG001
    """Start the job on the tests' Ray, or with a private one of so many CPUs (0: it starts Ray itself, as for a user).

    All is ended with the test.
    """
    started: list[Job] = []
    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # sockets below it: the path has to be short

    def begin(arguments: list[str], cpus: int | None = None, **variables: str) -> Job:
        environment = joined() if cpus is None else {"RAY_TMPDIR": folder, "RAY_ADDRESS": "local"}
        started.append(Job(arguments, environment | variables, ["-c", COMMAND, str(cpus or 0)]))
        return started[-1]

    yield begin
    for one in started:
        one.end()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def collection(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A list of 360 addresses of 24 files whose decoding takes a while, one of them missing."""
    root = tmp_path_factory.mktemp("collection")
    rng = np.random.default_rng(0)
    for number in range(FILES - 1):
        levels = rng.integers(0, 256, (6, 6, 3), np.uint8)
        Image.fromarray(levels).resize((1600, 1200), Image.Resampling.NEAREST).save(root / f"{number}.jpg")
    uris = [f"{number * 7 % FILES}.jpg" for number in range(IMAGES)]
    pq.write_table(pa.table({"uri": uris}), root / "list.parquet")
    return root


def arguments(collection: Path, head: Path, output: Path) -> list[str]:
    return [
        f"images={collection}/list.parquet",
        f"output={output}",
        "run_id=run",
        f"head={head}",
        f"shard_rows={SHARD_ROWS}",
        "compute.batch_size=8",
        "compute.fetch_threads=1",
        "png.max_side=32",
    ]


def shards(output: Path) -> set[str]:
    return {path.name for path in (output / "runs" / "run" / "results").glob("part-*.parquet")}


@dataclass(frozen=True)
class Outcome:
    """All rows of a run in the order of ``image_id``."""

    ids: list[int]
    uris: list[str]
    scores: np.ndarray
    heatmaps: np.ndarray
    errors: list[tuple[int, str, str]]


def outcome_of(output: Path) -> Outcome:
    """Read a run, and check what holds of every complete one: nothing twice, and pictures exactly of the results."""
    folder = output / "runs" / "run"
    assert (folder / "summary.json").is_file()
    table = pq.read_table(folder / "results")
    order = np.argsort(table["image_id"].to_numpy(), kind="stable")
    table = table.take(order)
    errors = pq.read_table(folder / "errors").sort_by("image_id")
    ids = table["image_id"].to_pylist()
    assert sorted([*ids, *errors["image_id"].to_pylist()]) == list(range(IMAGES))
    pictures: list[tuple[int, str]] = []
    for shard in (folder / "png").iterdir():
        with tarfile.open(shard) as archive:
            pictures += [(int(name.removesuffix(".png")), shard.name) for name in archive.getnames()]
    assert sorted(pictures) == list(zip(ids, table["png"].to_pylist(), strict=True))
    hidden = [path for path in folder.rglob("*") if path.name.startswith(".") or path.suffix == ".partial"]
    assert hidden == []
    return Outcome(
        ids,
        table["uri"].to_pylist(),
        table["score"].to_numpy(),
        np.concatenate([chunk.to_numpy_ndarray() for chunk in table["heatmap"].chunks]),
        [(row["image_id"], row["uri"], row["reason"]) for row in errors.to_pylist()],
    )


def assert_same(found: Outcome, undisturbed: Outcome) -> None:
    assert found.ids == undisturbed.ids
    assert found.uris == undisturbed.uris
    assert found.errors == undisturbed.errors
    # Measured: equal to the last bit. The batches of a continued run hold other images, so other kernels may round
    # otherwise; the heads multiply that by 200.
    np.testing.assert_allclose(found.scores, undisturbed.scores, rtol=0, atol=1e-3)
    np.testing.assert_allclose(found.heatmaps, undisturbed.heatmaps, rtol=0, atol=1e-4)


def kill_worker(job: Job, stage: str) -> None:
    """Kill the process of one of a stage's actors, on the tests' Ray."""
    worker = actors(stage, [process.pid for process in descendants(os.getpid())])[0]
    worker.kill()
    job.wait_for(lambda: not worker.alive)


@pytest.fixture(scope="module")
def undisturbed_output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("undisturbed")


class TestInterrupted:
    """In this order: the first test makes what the others compare with."""

    def test_one_core_is_enough(
        self, start: Callable[..., Job], collection: Path, head: Path, undisturbed_output: Path
    ) -> None:
        job = start(arguments(collection, head, undisturbed_output), cpus=1)
        job.wait_for((undisturbed_output / "runs" / "run" / "manifest" / "part-00000.parquet").exists)
        second = start(arguments(collection, head, undisturbed_output))
        assert second.finish() == 3, second.said()
        assert f"is held by process {job.pid} on" in second.said()
        assert job.finish() == 0, job.said()
        undisturbed = outcome_of(undisturbed_output)
        assert len(undisturbed.errors) == IMAGES // FILES
        assert len(shards(undisturbed_output)) > 10
        assert np.std(undisturbed.scores) > 0.1
        assert undisturbed.heatmaps.max() > 0.1

    def test_a_killed_driver_continues_where_it_was(
        self, start: Callable[..., Job], collection: Path, head: Path, undisturbed_output: Path, tmp_path: Path
    ) -> None:
        job = start(arguments(collection, head, tmp_path))
        job.wait_for(lambda: len(shards(tmp_path)) >= 2)
        job.kill()
        folder = tmp_path / "runs" / "run"
        assert not (folder / "summary.json").exists()
        kept = {path: path.stat().st_mtime_ns for path in folder.glob("*/part-*.parquet")}
        again = start(arguments(collection, head, tmp_path), cpus=0)
        assert again.finish() == 0, again.said()
        assert not re.search(r"logging\.cc|raylet|WARNING", again.said()), "Ray's remarks are for its log files"
        assert {path: path.stat().st_mtime_ns for path in kept} == kept
        summary = json.loads((folder / "summary.json").read_text())
        assert summary["images"] == IMAGES
        assert 0 < summary["last_start"]["images"] <= IMAGES - 2 * SHARD_ROWS
        assert_same(outcome_of(tmp_path), outcome_of(undisturbed_output))

    def test_killed_workers_are_replaced_on_two_cores(
        self, start: Callable[..., Job], collection: Path, head: Path, undisturbed_output: Path, tmp_path: Path
    ) -> None:
        job = start(arguments(collection, head, tmp_path))
        job.wait_for(lambda: len(shards(tmp_path)) >= 1)
        kill_worker(job, FETCHING)  # first: it may be done long before scoring is
        so_far = len(shards(tmp_path))
        job.wait_for(lambda: len(shards(tmp_path)) > so_far + 1)
        kill_worker(job, SCORING)
        assert not (tmp_path / "runs" / "run" / "summary.json").exists()
        assert job.finish() == 0, job.said()
        assert_same(outcome_of(tmp_path), outcome_of(undisturbed_output))

    def test_one_that_waits_in_vain_ends_and_one_told_to_end_does(
        self,
        start: Callable[..., Job],
        collection: Path,
        head: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setenv("RAY_DATA_EXECUTION_NO_PROGRESS_TIMEOUT_S", "3")  # Ray Data's own limit is not in the way
        no_such_node = ["compute.device=cuda", "compute.max_gpus=1", "compute.stall_minutes=0.1"]
        waiting = start([*arguments(collection, head, tmp_path), *no_such_node])
        assert waiting.finish() == 1, waiting.said()
        assert re.search(r"^error: nothing was finished for 0\.1 minutes, after 0 of 360 im", waiting.said(), re.M)
        again = start(arguments(collection, head, tmp_path), cpus=0)  # the lock is free
        again.wait_for(lambda: len(shards(tmp_path)) >= 1)
        os.kill(again.pid, signal.SIGTERM)
        assert again.finish() == 143, again.said()
        assert again.said().endswith("told to end\n")
        assert "***" not in again.said(), "Ray's core prints its stack"
        assert not list((tmp_path / "runs" / "run").glob("*lock*"))


@pytest.mark.parametrize(
    "token", [{"RAY_AUTH_MODE": "disabled"}, {"RAY_AUTH_TOKEN": "0" * 64}], ids=["none", "another"]
)
def test_a_cluster_that_wants_a_token_says_so(
    token: dict[str, str], start: Callable[..., Job], collection: Path, head: Path, tmp_path: Path
) -> None:
    job = start(arguments(collection, head, tmp_path), RAY_NUM_REDIS_GET_RETRIES="1", **token)  # not for 20 seconds
    assert job.finish() == 1, job.said()
    assert re.search(r"^error: the cluster of RAY_ADDRESS=\S+ cannot be joined: it wants a token", job.said(), re.M)

"""The main job, killed: driver, scoring actor and fetching actor with signal 9, and clusters of one and two cores.

The real command line in processes of their own, each with a private Ray. Nothing is faked; the processes of a killed
driver's cluster are ended at the latest when its test is over, found as its descendants under ``/proc`` (Linux).
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="finds processes under /proc")

ROOT = Path(__file__).parents[2]
IMAGES, FILES, SHARD_ROWS = 480, 24, 24
PATIENCE_S = 150
COMMAND = """
import sys
import tests.tiny
from ais.config import run_job
from jobs.heatmaps import main
if cpus := int(sys.argv.pop(1)):
    import ray
    ray.init(address="local", num_cpus=cpus, include_dashboard=False, log_to_driver=False)
run_job(main)
"""


@dataclass(frozen=True)
class Process:
    """A process by id and start time, so that a later one of the same id is not taken for it."""

    pid: int
    started: int
    parent: int
    title: str

    @classmethod
    def of(cls, pid: int) -> "Process | None":
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            title = Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ").strip()
        except (FileNotFoundError, ProcessLookupError):
            return None
        return None if fields[0] == "Z" else cls(pid, int(fields[19]), int(fields[1]), title)

    @property
    def alive(self) -> bool:
        found = Process.of(self.pid)
        return found is not None and found.started == self.started

    def kill(self) -> None:
        if self.alive:
            os.kill(self.pid, signal.SIGKILL)


def descendants(pid: int) -> list[Process]:
    everything = [Process.of(int(path.name)) for path in Path("/proc").iterdir() if path.name.isdigit()]
    found, parents = [], {pid}
    while new := [process for process in everything if process and process.parent in parents]:
        found += new
        parents = {process.pid for process in new}
    return found


class Start:
    """One start of the job, with a private Ray of so many CPUs (0: as the machine has)."""

    def __init__(self, arguments: list[str], ray_folder: str, cpus: int = 0) -> None:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        environment |= {"RAY_TMPDIR": ray_folder, "RAY_ADDRESS": "local", "PYTHONPATH": str(ROOT)}
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed by end
        self._process = subprocess.Popen(
            [sys.executable, "-c", COMMAND, str(cpus), *arguments],
            cwd=ROOT,
            env=environment,
            stdout=self._log,
            stderr=subprocess.STDOUT,
        )
        self._family: list[Process] = []

    def wait_for(self, condition: Callable[[], bool]) -> None:
        end = time.monotonic() + PATIENCE_S
        while not condition():
            assert self._process.poll() is None, f"ended too early: {self.said()}"
            assert time.monotonic() < end, f"waited {PATIENCE_S} s: {self.said()}"
            time.sleep(0.02)

    def kill_driver(self) -> None:
        self._family = descendants(self._process.pid)
        self._process.kill()
        self._process.wait()

    def kill_worker(self, stage: str) -> None:
        """Kill the process of a stage's actor."""
        [worker] = [process for process in descendants(self._process.pid) if f"({stage})" in process.title]
        worker.kill()
        self.wait_for(lambda: not worker.alive)

    def said(self) -> str:
        self._log.seek(0)
        return self._log.read()

    def finish(self) -> int:
        """Wait for the end and return the exit code."""
        return self._process.wait(timeout=PATIENCE_S)

    def end(self) -> None:
        """Leave nothing of it behind."""
        if self._process.poll() is None:
            self.kill_driver()
        for process in self._family:
            process.kill()
        self._log.close()


@pytest.fixture
def start() -> Iterator[Callable[..., Start]]:
    """Start the job; everything started is ended with the test."""
    started: list[Start] = []
    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # sockets below it: the path has to be short

    def begin(arguments: list[str], cpus: int = 0) -> Start:
        started.append(Start(arguments, folder, cpus))
        return started[-1]

    yield begin
    for one in started:
        one.end()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def collection(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A list of 480 addresses of 24 files whose decoding takes a while, one of them missing."""
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


@pytest.fixture(scope="module")
def undisturbed_output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("undisturbed")


class TestInterrupted:
    """In this order: the first test makes what the others compare with."""

    def test_one_core_is_enough(
        self, start: Callable[..., Start], collection: Path, head: Path, undisturbed_output: Path
    ) -> None:
        job = start(arguments(collection, head, undisturbed_output), cpus=1)
        assert job.finish() == 0, job.said()
        undisturbed = outcome_of(undisturbed_output)
        assert len(undisturbed.errors) == IMAGES // FILES
        assert len(shards(undisturbed_output)) > 10
        assert np.std(undisturbed.scores) > 0.1
        assert undisturbed.heatmaps.max() > 0.1

    def test_a_killed_driver_continues_where_it_was(
        self, start: Callable[..., Start], collection: Path, head: Path, undisturbed_output: Path, tmp_path: Path
    ) -> None:
        job = start(arguments(collection, head, tmp_path))
        job.wait_for(lambda: len(shards(tmp_path)) >= 2)
        job.kill_driver()
        folder = tmp_path / "runs" / "run"
        assert not (folder / "summary.json").exists()
        kept = {path: path.stat().st_mtime_ns for path in folder.glob("*/part-*.parquet")}
        again = start(arguments(collection, head, tmp_path))
        assert again.finish() == 0, again.said()
        assert {path: path.stat().st_mtime_ns for path in kept} == kept
        summary = json.loads((folder / "summary.json").read_text())
        assert summary["images"] == IMAGES
        assert 0 < summary["last_start"]["images"] <= IMAGES - 2 * SHARD_ROWS
        assert_same(outcome_of(tmp_path), outcome_of(undisturbed_output))

    def test_killed_workers_are_replaced_on_two_cores(
        self, start: Callable[..., Start], collection: Path, head: Path, undisturbed_output: Path, tmp_path: Path
    ) -> None:
        job = start(arguments(collection, head, tmp_path), cpus=2)
        job.wait_for(lambda: len(shards(tmp_path)) >= 1)
        job.kill_worker("MapBatches(FetchDecode)")  # first: it may be done long before scoring is
        so_far = len(shards(tmp_path))
        job.wait_for(lambda: len(shards(tmp_path)) > so_far + 1)
        job.kill_worker("MapBatches(Explain)")
        assert not (tmp_path / "runs" / "run" / "summary.json").exists()
        assert job.finish() == 0, job.said()
        assert_same(outcome_of(tmp_path), outcome_of(undisturbed_output))

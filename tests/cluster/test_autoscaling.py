"""The main job on a cluster that grows from no worker and shrinks to none, submitted through Ray's own command line.

The autoscaler, the job server, the kills and the submitter are real. Of the nodes only the GPUs are imaginary:
`cluster/local.py` runs them all on this machine, and the backbone is ``tiny``, on the CPU.
"""

import contextlib
import http.client
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from cluster.local import LocalCluster, processes_of, without_ray
from tests.kills import PATIENCE_S

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="finds processes under /proc")

ROOT = Path(__file__).parents[2]
RAY = Path(sys.executable).parent / "ray"
LOCAL = (sys.executable, "cluster/local.py")
IMAGES, FILES, SHARD_ROWS = 240, 24, 16


@dataclass(frozen=True)
class Node:
    id: str
    gpus: float

    @classmethod
    def of(cls, found: dict[str, Any]) -> "Node":
        return cls(found["node_id"], found["resources_total"].get("GPU", 0))


class Running:
    """A command beside the test, and everything it said."""

    def __init__(self, command: list[str], variables: dict[str, str]) -> None:
        environment = without_ray(os.environ) | variables
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed by end
        self._process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=self._log, stderr=subprocess.STDOUT, text=True
        )

    @property
    def runs(self) -> bool:
        return self._process.poll() is None

    def said(self) -> str:
        self._log.seek(0)
        return self._log.read()

    def finish(self) -> int:
        return self._process.wait(PATIENCE_S)


class TestBed:
    """The cluster of these tests, and what its dashboard tells of it."""

    __test__ = False

    def __init__(self, cluster: LocalCluster) -> None:
        self.cluster = cluster
        self.variables = cluster.variables

    def workers(self) -> list[Node]:
        """Nodes that are alive, without the head."""
        found = self._dashboard("/api/v0/nodes?detail=true")["result"]["result"]
        return [Node.of(node) for node in found if node["state"] == "ALIVE" and not node["is_head_node"]]

    def metrics(self) -> set[str]:
        """Names of our metrics that Prometheus would get from the nodes just now."""
        names: set[str] = set()
        for node in self._dashboard("/nodes?view=summary")["summary"]:
            # A node that comes or goes has no address yet, or does not answer.
            address = f"http://{node.get('ip')}:{node['raylet'].get('metricsExportPort')}/metrics"
            with (
                contextlib.suppress(OSError, http.client.HTTPException),
                urllib.request.urlopen(address, timeout=60) as answer,
            ):
                names |= set(re.findall(r"^(ray_ais_\w+)\{", answer.read().decode(), re.MULTILINE))
        return names

    def _dashboard(self, path: str) -> Any:
        request = urllib.request.Request(
            self.variables["RAY_API_SERVER_ADDRESS"] + path,
            headers={"Authorization": f"Bearer {self.variables['RAY_AUTH_TOKEN']}"},
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)["data"]

    def submit(self, *arguments: str) -> Running:
        """`ray job submit` of the heatmaps job."""
        return Running([str(RAY), "job", "submit", "--working-dir", str(ROOT), "--", *job(*arguments)], self.variables)

    def schedule(self, tick: str, *arguments: str) -> Running:
        """`cluster/submit.py` of the heatmaps job."""
        return Running(
            [sys.executable, "cluster/submit.py", "--tick", tick, "--attempts", "2", "--", *job(*arguments)],
            self.variables,
        )

    def wait_for(self, condition: Callable[[], bool], running: Running | None = None) -> None:
        end = time.monotonic() + PATIENCE_S
        while not condition():
            assert running is None or running.runs, running.said()
            assert time.monotonic() < end, f"waited {PATIENCE_S} s: {running.said() if running else self.workers()}"
            time.sleep(0.3)


def job(*arguments: str) -> list[str]:
    return [sys.executable, "tests/run_tiny.py", "jobs/heatmaps.py", *arguments]


@pytest.fixture(scope="module")
def bed() -> Iterator[TestBed]:
    folder = Path(tempfile.mkdtemp(prefix="asc-", dir="/tmp"))  # sockets below it: the path has to be short
    quick = {
        "OMP_NUM_THREADS": "1",
        "RAY_health_check_period_ms": "1000",
        "RAY_health_check_failure_threshold": "15",  # nodes that only wait for a core are not dead
        "RAY_metrics_report_interval_ms": "1000",
    }
    options = [
        "--folder",
        str(folder),
        "--cpu-nodes=1",
        "--idle=5",
        *(f"--env={key}={value}" for key, value in quick.items()),
    ]
    up = subprocess.run([*LOCAL, "up", *options], cwd=ROOT, capture_output=True, text=True)
    assert up.returncode == 0, up.stderr
    cluster = LocalCluster(folder)
    try:
        assert up.stdout.splitlines() == [f"export {key}={value}" for key, value in cluster.variables.items()]
        yield TestBed(cluster)
    finally:
        subprocess.run([*LOCAL, "down", "--folder", str(folder)], cwd=ROOT, check=True)
    assert processes_of(folder) == []
    assert not folder.exists()


@pytest.fixture(scope="module")
def collection(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A list of 240 addresses of 24 files whose decoding takes a while, one of them missing."""
    root = tmp_path_factory.mktemp("collection")
    rng = np.random.default_rng(0)
    for number in range(FILES - 1):
        levels = rng.integers(0, 256, (6, 6, 3), np.uint8)
        Image.fromarray(levels).resize((1200, 900), Image.Resampling.NEAREST).save(root / f"{number}.jpg")
    uris = [f"{number * 7 % FILES}.jpg" for number in range(IMAGES)]
    pq.write_table(pa.table({"uri": uris}), root / "list.parquet")
    yield root
    shutil.rmtree(root)


def arguments(collection: Path, head: Path, output: Path) -> list[str]:
    return [
        f"images={collection}/list.parquet",
        f"output={output}",
        "run_id=run",
        f"head={head}",
        f"shard_rows={SHARD_ROWS}",
        "compute.batch_size=8",
        "compute.fetch_threads=1",
        "compute.scoring_gpus=1",
        "compute.device=cpu",
        "png.select=sample:0.1",
        "png.max_side=32",
    ]


def scores_of(output: Path) -> np.ndarray:
    """Scores in the order of ``image_id``, checked to be those of every image that there is, once."""
    folder = output / "runs" / "run"
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["images"], summary["failed"]) == (IMAGES, IMAGES // FILES)
    table = pq.read_table(folder / "results", columns=["image_id", "score"]).sort_by("image_id")
    errors = pq.read_table(folder / "errors", columns=["image_id"])
    assert sorted(table["image_id"].to_pylist() + errors["image_id"].to_pylist()) == list(range(IMAGES))
    return table["score"].to_numpy()


class TestFromNothingAndBack:
    """In this order: the cluster that the first test makes grow is the one in which the second kills."""

    undisturbed: np.ndarray

    def test_a_submitted_job_grows_the_cluster_from_nothing(
        self, bed: TestBed, collection: Path, head: Path, tmp_path_factory: pytest.TempPathFactory
    ) -> None:
        assert bed.workers() == []
        output = tmp_path_factory.mktemp("grown")
        running = bed.submit(*arguments(collection, head, output))
        bed.wait_for(lambda: sum(node.gpus for node in bed.workers()) == 2, running)
        seen: set[str] = set()
        while running.runs:
            seen |= bed.metrics()
            time.sleep(1)
        assert running.finish() == 0, running.said()
        assert seen >= {
            "ray_ais_images_scored_total",
            "ray_ais_images_failed_total",
            "ray_ais_images_left",
            "ray_ais_stage_seconds_total",
            *(f"ray_ais_batch_seconds_{part}" for part in ("bucket", "sum", "count")),
        }
        # Lines of a log carry the run.
        assert re.search(rf"^images: {IMAGES} of {IMAGES} · .* · run run$", running.said(), re.MULTILINE)
        assert f"scored      {IMAGES - IMAGES // FILES} of {IMAGES} images" in running.said()
        TestFromNothingAndBack.undisturbed = scores_of(output)

    def test_a_killed_node_costs_nothing_but_time(
        self, bed: TestBed, collection: Path, head: Path, tmp_path: Path
    ) -> None:
        running = bed.schedule("kill", *arguments(collection, head, tmp_path))
        shards = tmp_path / "runs" / "run" / "results"
        bed.wait_for(lambda: len([*shards.glob("part-*.parquet")]) >= 2, running)
        killed = self.busy_node(bed)
        bed.cluster.kill_node(killed)
        assert not (tmp_path / "runs" / "run" / "summary.json").exists()
        assert running.finish() == 0, running.said()
        assert "attempt" not in running.said()
        assert killed not in [node.id for node in bed.workers()]
        # Measured: equal to the last bit. A batch done again is the same batch.
        np.testing.assert_allclose(scores_of(tmp_path), self.undisturbed, rtol=0, atol=1e-3)
        # The same tick again follows what was submitted, and says what it said.
        again = bed.schedule("kill", *arguments(collection, head, tmp_path))
        assert again.finish() == 0, again.said()
        assert "was submitted before" in again.said()
        assert f"scored      {IMAGES - IMAGES // FILES} of {IMAGES} images" in again.said()

    @staticmethod
    def busy_node(bed: TestBed) -> str:
        """A node with a GPU on which images are being scored."""
        for node in bed.workers():
            titles = [Path(f"/proc/{pid}/cmdline").read_bytes() for pid in bed.cluster.processes_of_node(node.id)]
            if node.gpus and any(b"Explain" in title for title in titles):
                return node.id
        raise AssertionError(f"nobody scores: {bed.workers()}")

    def test_a_job_that_fails_says_so_with_its_exit_code(self, bed: TestBed, collection: Path, head: Path) -> None:
        wrong = [word for word in arguments(collection, head, Path("x")) if not word.startswith("output=")]
        submitted = bed.submit(*wrong, "output=results")
        scheduled = bed.schedule("wrong", *wrong, "output=results")
        assert submitted.finish() == 1
        assert scheduled.finish() == 2
        for one in (submitted, scheduled):
            assert 'output: "results" is relative, and this job runs in a copy of the submitted folder' in one.said()
        assert "attempt" not in scheduled.said()

    def test_nothing_is_left_up_when_the_work_is_done(self, bed: TestBed) -> None:
        bed.wait_for(lambda: bed.workers() == [])


def test_a_command_on_a_cluster_of_its_own_ends_with_the_code_of_the_command(tmp_path: Path) -> None:
    folder = Path(tempfile.mkdtemp(prefix="asc-", dir="/tmp"))
    command = [sys.executable, "-c", "import os; print(os.environ['RAY_ADDRESS']); raise SystemExit(3)"]
    run = [*LOCAL, "run", "--folder", str(folder), "--", *command]
    assert subprocess.run(run, cwd=ROOT).returncode == 3
    assert processes_of(folder) == []
    assert not folder.exists()
    # A folder with something in it is nobody's to remove.
    (tmp_path / "precious").touch()
    assert subprocess.run([*LOCAL, "up", "--folder", str(tmp_path)], cwd=ROOT).returncode == 1
    subprocess.run([*LOCAL, "down", "--folder", str(tmp_path)], cwd=ROOT, check=True)
    assert (tmp_path / "precious").exists()

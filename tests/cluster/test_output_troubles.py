"""Outputs that cannot be written: a clear error, nothing lost, and the same command continues once the cause is gone.

A full disk and a read-only one (a small filesystem in memory, which needs root to mount), both real, and an S3
server that refuses. Nothing is faked but AWS.
"""

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from ais.command_line import load_config
from ais.config import HeatmapsConfig
from ais.pipeline.prepare import prepare_heatmaps
from ais.verification import verify
from jobs.heatmaps import main
from tests.cluster.test_heatmaps_job import command
from tests.s3.server import S3Server
from tests.small_disk import small_disk

# Ray's own context copies its deprecated settings.
pytestmark = pytest.mark.filterwarnings("ignore:.*deprecated:DeprecationWarning:ray")
IMAGES = 96


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    for number in range(IMAGES):
        levels = np.random.default_rng(number).integers(0, 256, (48, 64, 3), np.uint8)
        Image.fromarray(levels).save(folder / f"{number:03d}.png")
    return folder


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A filesystem of its own, read-only at first."""
    with small_disk(tmp_path / "disk", "ro,size=64k") as folder:
        yield folder


def remount(disk: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", str(disk)], check=True)


@pytest.mark.usefixtures("local_ray")
def test_a_full_disk_stops_the_run_and_loses_nothing(
    disk: Path, images: Path, head: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [f"images={images}", f"output={disk}/out", f"head={head}", "shard_rows=8", "compute.batch_size=8"]
    code, said = command(arguments, monkeypatch, capsys)
    assert code == 1
    assert re.search(r"^error: .*lock/000001\.json' cannot be written: OSError: .*Read-only file system", said, re.M), (
        said
    )
    assert list(disk.iterdir()) == []

    remount(disk, "rw,size=600k")
    code, said = command(arguments, monkeypatch, capsys)
    assert code == 1
    assert re.search(
        r"^error: the run stopped: .*cannot be written: .*No space left on device.*continues", said, re.M
    ), said
    [folder] = (disk / "out" / "runs").iterdir()
    assert not (folder / "summary.json").exists()
    assert not (folder / "lock").exists()
    kept = {path: path.stat().st_mtime_ns for path in folder.glob("results/part-*.parquet")}
    assert kept  # some of it found room

    remount(disk, "rw,size=20m")
    assert main(arguments) == 0
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert sum(pq.read_metadata(path).num_rows for path in folder.glob("results/*.parquet")) == IMAGES
    assert verify(prepare_heatmaps(load_config(HeatmapsConfig, arguments, doc="").config).run).whole


@pytest.mark.parametrize(
    ("output", "environment", "message"),
    [
        ("s3://nowhere/out", {}, "'s3://nowhere/.*lock/000001.json' cannot be written: .*bucket does not exist"),
        (
            "s3://refused/out",
            {},
            "'s3://refused/.*run.json' cannot be read: PermissionError",
        ),
        ("s3://refused/out", {"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""}, "NoCredentialsError"),
    ],
)
def test_a_bucket_that_cannot_be_written_is_named_before_any_work(
    output: str,
    environment: dict[str, str],
    message: str,
    images: Path,
    head: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    # After the first request (the bucket's creation) moto asks for keys that it has given out itself.
    monkeypatch.setenv("INITIAL_NO_AUTH_ACTION_COUNT", "1" if "refused" in output else "inf")
    with S3Server() as server:
        server.create_bucket("refused")
        for name, value in environment.items():
            monkeypatch.setenv(name, value) if value else monkeypatch.delenv(name)
        arguments = [f"images={images}", f"output={output}", f"head={head}"]
        code, said = command([*arguments, f"storage.endpoint_url={server.endpoint_url}"], monkeypatch, capsys)
    assert code == 1
    assert re.search(f"^error: .*{message}", said, re.M), said
    assert "Traceback" not in said

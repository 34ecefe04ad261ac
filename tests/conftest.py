"""What all tests share: an S3 server of their own and no way to anybody's real one, one small Ray, a head."""

import itertools
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.s3.proxy import Faults, FaultyProxy
from tests.s3.server import S3Server, credentials
from tests.zoo import HOSTILE_PATH

_numbers = itertools.count()
# Sixteen workers on two cores, which `local_ray` may come to keep, are told to every driver on standard output; a job
# that is alone on a machine does not start so many. Ray reads this when it is imported.
os.environ["RAY_DEDUP_LOGS_SKIP_REGEX"] = "worker processes have been started on node"


@pytest.fixture(scope="session", autouse=True)
def aws_credentials() -> Iterator[None]:
    """The tests' own keys instead of whatever this machine has; set before any Ray starts, whose workers inherit."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"):
            patch.delenv(name, raising=False)
        for name, value in credentials().items():
            patch.setenv(name, value)
        yield


@pytest.fixture(scope="session")
def s3() -> Iterator[S3Server]:
    """Moto in its own process."""
    with S3Server() as server:
        yield server


@pytest.fixture
def bucket(s3: S3Server) -> str:
    """Address of a new, empty bucket."""
    return s3.create_bucket(f"bucket-{next(_numbers)}")


@pytest.fixture
def faulty_proxy(s3: S3Server) -> Iterator[Callable[..., FaultyProxy]]:
    """Start a proxy before the S3 server: ``faulty_proxy(Faults(reset=0.1), seed=3)``."""
    started: list[FaultyProxy] = []

    def start(faults: Faults = Faults(), seed: int = 0) -> FaultyProxy:  # noqa: B008 - frozen
        started.append(FaultyProxy(s3.endpoint_url, faults, seed))
        return started[-1]

    yield start
    for proxy in started:
        proxy.stop()


@pytest.fixture(scope="session")
def local_ray(aws_credentials: None) -> Iterator[None]:  # noqa: ARG001 - in place before workers inherit it
    """A private cluster of two CPUs, which the jobs that tests start in this process join."""
    import ray

    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # sockets below it: the path has to be short
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_TMPDIR", folder)
        # By its default of one a CPU, Ray ends most workers between two jobs, and the next job starts them anew.
        patch.setenv("RAY_num_workers_soft_limit", "12")
        patch.setenv("PYTHONPATH", HOSTILE_PATH, prepend=os.pathsep)  # deadly images do as they say
        ray.init(
            address="local",
            num_cpus=2,
            object_store_memory=300 * 2**20,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
        yield
        ray.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def head(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bundle of two untrained heads on ``tiny`` with random weights of seed 3; scores spread by about 1."""
    import torch

    from ais.backbones import load_backbone
    from ais.heads import HeadEnsemble, RegressionHead, save_head
    from tests.tiny import TINY

    folder = tmp_path_factory.mktemp("head")
    torch.manual_seed(0)
    heads = [RegressionHead(TINY.embedding_size, hidden=32, target_mean=5, target_std=200) for _ in range(2)]
    backbone = load_backbone(TINY, weights="random", seed=3)
    save_head(str(folder), HeadEnsemble(heads), backbone, "center_crop", {})
    return folder

"""What the tests on a real Ray share: one small cluster of this process, and a head on the tiny backbone."""

import logging
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
import torch

from ais.backbones import load_backbone
from ais.heads import HeadEnsemble, RegressionHead, save_head
from tests.tiny import TINY


@pytest.fixture(scope="session")
def local_ray() -> Iterator[None]:
    """A private cluster of two CPUs, which the jobs that tests start in this process join."""
    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # sockets below it: the path has to be short
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_TMPDIR", folder)
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
    folder = tmp_path_factory.mktemp("head")
    torch.manual_seed(0)
    heads = [RegressionHead(TINY.embedding_size, hidden=32, target_mean=5, target_std=200) for _ in range(2)]
    backbone = load_backbone(TINY, weights="random", seed=3)
    save_head(str(folder), HeadEnsemble(heads), backbone, "center_crop", {})
    return folder

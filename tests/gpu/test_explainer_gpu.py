"""The explainer on a CUDA device against the CPU (`make gpu-test`). Fails where there is no GPU."""

import numpy as np
import pytest
import torch

from ais import Explainer, RegressionHead, load_backbone

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def gpu() -> None:
    """A GPU test without a GPU has failed, not passed."""
    if not torch.cuda.is_available():
        pytest.fail("no CUDA device is seen by torch; these tests are for machines that have one")


@pytest.mark.parametrize("name", ["resnet152", "densenet161", "efficientnet_b3", "barlow_twins", "vgg16", "vgg19"])
def test_effects_equal_the_cpus(name: str) -> None:
    """Float32 on both (the library turns TF32 off); the bound is relative to the largest effect."""
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 255, (260, 300, 3), dtype=np.uint8) for _ in range(2)]
    results = []
    for device in ("cpu", "cuda"):
        backbone = load_backbone(name, weights="random", seed=0, device=device)
        torch.manual_seed(0)
        head = RegressionHead(backbone.embedding_size)
        with torch.no_grad():
            head.hidden.weight.div_(float(backbone(torch.zeros(1, 3, 256, 256, device=device)).std()) + 1e-6)
        results.append(Explainer(backbone, head)(images))
    cpu, cuda = results
    largest = cpu.importance.abs().max()
    torch.testing.assert_close(cuda.importance, cpu.importance, rtol=0, atol=float(1e-3 * largest))

"""Batches that do not fit into memory. Faked: the device that is full (`torch.OutOfMemoryError` is raised by hand, as
CUDA's allocator raises it); network, head and explainer are real.
"""

import pytest
import torch
from torch import Tensor, nn

from ais import Explainer, RegressionHead, load_backbone
from ais.passes import Passes
from tests.tiny import TINY


class FullAbove(nn.Module):
    """A trunk for which only so many images fit."""

    def __init__(self, trunk: nn.Module, most: int) -> None:
        super().__init__()
        self._trunk = trunk
        self._most = most
        self.sizes: list[int] = []

    def forward(self, images: Tensor) -> object:
        self.sizes.append(len(images))
        if len(images) > self._most:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return self._trunk(images)


def explainer(most: int) -> tuple[Explainer, FullAbove]:
    backbone = load_backbone(TINY, weights="random", seed=0)
    torch.manual_seed(0)
    found = Explainer(backbone, RegressionHead(TINY.embedding_size, 16))
    trunk = FullAbove(backbone.split.trunk, most)
    object.__setattr__(backbone.split, "trunk", trunk)  # a frozen record
    return found, trunk


def test_halves_until_it_fits_and_remembers() -> None:
    pixels = torch.randint(0, 255, (10, 32, 32, 3), dtype=torch.uint8)
    boxes = torch.tensor([[0.0, 0.0, 32.0, 32.0]]).repeat(10, 1)
    whole, _ = explainer(most=10)
    parts, trunk = explainer(most=3)
    expected, found = whole.explain_pixels(pixels, boxes), parts.explain_pixels(pixels, boxes)
    assert trunk.sizes == [10, 5, 2, 2, 2, 2, 2]
    assert parts.passes.limit == 2
    assert whole.passes.limit is None
    # Measured: 0; a batch of another size may take other kernels, so 10 units in the last place are allowed.
    for name in ("scores", "importance", "heatmaps", "feature_maps", "ablated_scores"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=1e-6, atol=1e-6)
    trunk.sizes.clear()
    scores, spreads, heatmaps = parts.heatmap_pixels(pixels)
    assert trunk.sizes == [2] * 5, "the size is learned once"
    torch.testing.assert_close(scores, expected.scores, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(heatmaps, expected.heatmaps, rtol=1e-6, atol=1e-6)
    assert spreads.isnan().all(), "one head has no spread"
    torch.testing.assert_close(parts.score_pixels(pixels)[0], expected.scores, rtol=1e-6, atol=1e-6)


def test_one_image_that_does_not_fit_is_an_error() -> None:
    found, _ = explainer(most=0)
    with pytest.raises(torch.OutOfMemoryError):
        found.score_pixels(torch.zeros(4, 32, 32, 3, dtype=torch.uint8))


def test_other_errors_pass() -> None:
    def broken(part: slice) -> None:
        raise RuntimeError(f"{part}")

    with pytest.raises(RuntimeError, match="slice"):
        Passes().run(broken, 4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_compiled_trunk_of_lower_precision_gives_the_same(dtype: torch.dtype) -> None:
    """Compiled without code generation (backend ``eager``), which would take a minute: that it can be captured."""
    pixels = torch.randint(0, 255, (4, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    exact, _ = explainer(most=4)
    backbone = load_backbone(TINY, weights="random", seed=0)
    backbone.compile_trunk(backend="eager")
    reduced = Explainer(backbone, exact.head, trunk_dtype=dtype)
    for found, expected in zip(reduced.heatmap_pixels(pixels), exact.heatmap_pixels(pixels), strict=True):
        assert found.dtype is torch.float32
        scale = float(expected.nan_to_num().abs().max()) or 1.0
        # Measured: 4e-3 (bfloat16) and 6e-4 (float16) of the largest.
        torch.testing.assert_close(found, expected, rtol=0, atol=3e-2 * scale, equal_nan=True)

"""What exact ablation of all maps costs, over the plain forward pass and over one map at a time.

For every backbone at its default layer (and the VGGs at both): the same images, the same weights (random, seeded: speed
does not depend on them), the same threads. "One map at a time" is timed on a few maps and multiplied, since all of them
would take hours; it is what `ais.ablation.ablate_reference` does.
"""

from __future__ import annotations

import numpy as np
import torch

from ais import Explainer, RegressionHead, load_backbone
from ais.ablation import ablate_reference
from tests.benchmarks.timing import Ratio, paired

CASES = (
    ("resnet152", None),
    ("barlow_twins", None),
    ("densenet161", None),
    ("efficientnet_b3", None),
    ("vgg16", None),
    ("vgg19", "features.34"),
    ("vgg19", None),
)
BATCH = 4
REFERENCE_MAPS = 3


def measure(name: str, layer: str | None, runs: int = 5) -> dict[str, str | int | float]:
    """Measure one backbone; returns a row of the table."""
    backbone = load_backbone(name, weights="random", seed=0, layer=layer)
    assert backbone.layer is not None
    torch.manual_seed(0)
    explainer = Explainer(backbone, RegressionHead(backbone.embedding_size, 512))
    rng = np.random.default_rng(0)
    side = backbone.spec.input_size
    # Already of the input's size, so that what is compared is the networks.
    # Where the tail is a third of the network, one image says as much as four.
    count = 1 if (name, layer) == ("vgg19", None) else BATCH
    images = [rng.integers(0, 255, (side, side, 3), dtype=np.uint8) for _ in range(count)]
    batch = explainer.preprocess(images)
    maps = backbone.layer.map_shape[0]

    def forward() -> object:
        with torch.inference_mode():
            return explainer.module(batch)

    over_forward = paired(lambda: explainer(images), forward, runs)
    one_at_a_time = paired(
        lambda: ablate_reference(backbone, explainer.head, batch, range(REFERENCE_MAPS)), forward, runs
    )
    speed_up = one_at_a_time.median / REFERENCE_MAPS * maps / over_forward.median
    return _row(name, backbone.layer.name, maps, backbone.layer.tail, count, over_forward, speed_up)


def _row(
    name: str, layer: str, maps: int, tail: str, count: int, over_forward: Ratio, speed_up: float
) -> dict[str, str | int | float]:
    return {
        "backbone": name,
        "layer": layer,
        "maps": maps,
        "tail": str(tail),
        "forward_ms_per_image": round(1000 * over_forward.denominator_s / count, 1),
        "explainer_over_forward": round(over_forward.median, 3),
        "low": round(over_forward.low, 3),
        "high": round(over_forward.high, 3),
        "one_map_at_a_time_over_explainer": round(speed_up),
    }

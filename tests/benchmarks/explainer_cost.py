"""What exact ablation of all maps costs, over the plain forward pass and over one map at a time.

For every backbone at its default layer (and VGG19 at both of its layers): the same images, the same weights (random,
seeded: speed does not depend on them), the same threads. "One map at a time" is timed on a few maps and multiplied,
since all of them would take hours; it is what `ais.ablation.ablate_reference` does. The floor is counted, see
`tests.benchmarks.floors`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ais import Explainer, HeadEnsemble, RegressionHead, load_backbone
from ais.ablation import ablate_reference
from tests.benchmarks.floors import floor_of
from tests.benchmarks.tables import grid, paragraph, show
from tests.benchmarks.timing import compared

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
HEADS = 5  # as configs/train.yaml fits them
REFERENCE_MAPS = 3


def measure(name: str, layer: str | None, runs: int = 5) -> dict[str, Any]:
    """Measure one backbone; returns a row of the table."""
    backbone = load_backbone(name, weights="random", seed=0, layer=layer)
    assert backbone.layer is not None
    torch.manual_seed(0)
    heads = [RegressionHead(backbone.embedding_size, 512) for _ in range(HEADS)]
    explainer, of_heads = Explainer(backbone, heads[0]), Explainer(backbone, HeadEnsemble(heads))
    rng = np.random.default_rng(0)
    side = backbone.spec.input_size
    # Already of the input's size, so that what is compared is the networks.
    # Where the tail is a third of the network, one image says as much as four.
    count = 1 if (name, layer) == ("vgg19", None) else BATCH
    images = [rng.integers(0, 255, (side, side, 3), dtype=np.uint8) for _ in range(count)]
    batch = explainer.preprocess(images)
    maps = backbone.layer.map_shape[0]
    floor = floor_of(backbone, explainer.head.variants[0])

    def forward() -> object:
        with torch.inference_mode():
            return explainer.module(batch)

    def one_by_one() -> object:
        return ablate_reference(backbone, explainer.head, batch, range(REFERENCE_MAPS))

    over_forward, heads_over_forward, one_at_a_time = compared(
        [lambda: explainer(images), lambda: of_heads(images), one_by_one], forward, runs
    )
    return {
        "backbone": name,
        "layer": backbone.layer.name,
        "maps": maps,
        "tail": str(backbone.layer.tail),
        "forward_ms_per_image": round(1000 * over_forward.denominator_s / count, 1),
        "explainer_over_forward": over_forward.as_dict(),
        "of_heads_over_forward": heads_over_forward.as_dict(),
        "floor": round(floor.ratio, 4),
        "above_floor": round(over_forward.median / floor.ratio, 3),
        "forward_multiply_adds": floor.forward.multiply_adds,
        "explanation_multiply_adds": floor.explanation.multiply_adds,
        "forward_bytes": floor.forward.bytes,
        "explanation_bytes": floor.explanation.bytes,
        "one_map_at_a_time_over_explainer": round(
            one_at_a_time.median / REFERENCE_MAPS * maps / over_forward.median, 1
        ),
    }


def rows(only: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Measure every case."""
    return [measure(name, layer) for name, layer in CASES if not only or name in only]


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    text = """
        **Exact ablation of all maps** over the plain forward pass of the same images, float32, one thread. *Floor*: the
        same ratio in multiply-adds, the least that can be done, counted on the network
        (`tests/benchmarks/floors.py`); *bytes*: the same of the bytes that layers read and write.
        """
    header = ["backbone", "layer", "maps", "forward, ms an image", "explainer ÷ forward", "floor", "bytes"]
    of_heads = all("of_heads_over_forward" in row for row in rows)  # not of older versions
    cells = [
        (
            row["backbone"],
            f"`{row['layer']}`",
            row["maps"],
            row["forward_ms_per_image"],
            show(row["explainer_over_forward"]),
            f"{row['floor']:.4g}",
            f"{row['explanation_bytes'] / row['forward_bytes']:.3g}",
            *([show(row["of_heads_over_forward"])] if of_heads else ()),
            f"{row['one_map_at_a_time_over_explainer']:,.0f}",
        )
        for row in rows
    ]
    if of_heads:
        text += "*Five heads*: the explainer with an ensemble of them over the forward pass with one."
        header.append("five heads")
    return paragraph(text) + "\n" + grid([*header, "one map at a time ÷ explainer"], cells)

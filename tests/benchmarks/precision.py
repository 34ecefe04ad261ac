"""What a trunk of lower precision does to scores and effects, against float32; measured on the CPU, random weights.

Tail, head and differences are float32 in all cases. Random weights are a hard case for float16: nothing has kept the
activations of an untrained network in its range.
"""

from __future__ import annotations

from typing import Any

import torch

from ais import Explainer, RegressionHead, load_backbone
from tests.benchmarks.tables import grid, paragraph

BACKBONES = ("resnet152", "barlow_twins", "densenet161", "efficientnet_b3", "vgg16", "vgg19")
DTYPES = (torch.bfloat16, torch.float16)
IMAGES = 4


def rows() -> list[dict[str, Any]]:
    """Measure every backbone at its default layer (VGG19 at its last convolution, which is quicker)."""
    return [measure(name) for name in BACKBONES]


def measure(name: str) -> dict[str, Any]:
    """Measure one backbone."""
    backbone = load_backbone(name, weights="random", seed=0, layer="features.34" if name == "vgg19" else None)
    assert backbone.layer is not None
    side = backbone.spec.input_size
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 255, (IMAGES, side, side, 3), dtype=torch.uint8, generator=generator)
    torch.manual_seed(0)
    head = RegressionHead(backbone.embedding_size)
    with torch.inference_mode():
        embeddings = backbone(backbone.normalise(pixels))
    # An untrained network's embedding may be of any size; a fitted head would have divided by it.
    with torch.no_grad():
        head.hidden.weight.div_(embeddings.std())
    boxes = torch.zeros(IMAGES, 4)
    exact = Explainer(backbone, head).explain_pixels(pixels, boxes)
    row: dict[str, Any] = {"backbone": name, "layer": backbone.layer.name}
    for dtype in DTYPES:
        found = Explainer(backbone, head, trunk_dtype=dtype).explain_pixels(pixels, boxes)
        score = (found.scores - exact.scores).abs().max() / exact.scores.abs().max()
        effect = (found.importance - exact.importance).abs().max() / exact.importance.abs().max()
        kept = str(dtype).split(".")[1]
        row[kept] = {"scores": _digits(score), "effects": _digits(effect)}
    return row


def _digits(value: torch.Tensor) -> float | None:
    """Two digits; ``None`` for what left the range of the numbers."""
    return float(f"{value:.1e}") if torch.isfinite(value) else None


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    text = """
        **A trunk in lower precision** (`compute.precision`), tail and head in float32: largest error against float32,
        of scores relative to the largest score, of effects to the largest effect. Random weights, noise as images.
        """
    header = ["backbone", "layer"]
    header += [f"{kind}, {what}" for kind in ("bfloat16", "float16") for what in ("scores", "effects")]
    cells = [
        (
            row["backbone"],
            f"`{row['layer']}`",
            *(
                "out of range" if row[kind][what] is None else f"{row[kind][what]:.1e}"
                for kind in ("bfloat16", "float16")
                for what in ("scores", "effects")
            ),
        )
        for row in rows
    ]
    return paragraph(text) + "\n" + grid(header, cells)

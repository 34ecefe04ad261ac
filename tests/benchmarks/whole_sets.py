"""What importance over a set of images costs, over one plain forward pass; and training from cached embeddings.

*error*: 1,000 images × 2048 maps. Forward passes and ablations are timed on a part of the images, side by side, and
multiplied; what is done once for the set (`EffectSums`) is done in full. *similarity*: all 2048 maps from embeddings in
memory. *training*: one epoch of a head on cached embeddings, over an epoch that runs the backbone again, whose images
are timed in part likewise.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from ais import Explainer, RegressionHead, load_backbone
from ais.ablation import ablate
from ais.config import FitConfig, HeadConfig
from ais.importance.effects import EffectSums
from ais.importance.similarity import collective_ais, individual_ais
from ais.training.fit import VariantFit
from ais.training.splits import Split
from tests.benchmarks.tables import grid, paragraph, show
from tests.benchmarks.timing import paired, seconds

BACKBONE = "barlow_twins"
IMAGES = 1000
TIMED = 32
BATCH = 16
SIMILAR = (120, 1000)
SIMILAR_MAPS = 128  # of many images, the others multiplied


def rows() -> list[dict[str, Any]]:
    """Measure all of it."""
    backbone = load_backbone(BACKBONE, weights="random", seed=0)
    assert backbone.layer is not None
    torch.manual_seed(0)
    explainer = Explainer(backbone, RegressionHead(backbone.embedding_size))
    maps, side = backbone.layer.map_shape[0], backbone.spec.input_size
    pixels = torch.randint(0, 255, (TIMED, side, side, 3), dtype=torch.uint8)
    images = backbone.normalise(pixels)
    rng = np.random.default_rng(0)
    ratings = rng.normal(size=IMAGES)
    scores, effects = rng.normal(size=IMAGES).astype(np.float32), rng.normal(size=(IMAGES, maps)).astype(np.float32)

    @torch.inference_mode()
    def forward() -> None:
        for start in range(0, TIMED, BATCH):
            explainer.module(images[start : start + BATCH])

    def ablations() -> None:
        for start in range(0, TIMED, BATCH):
            ablate(backbone, explainer.head, images[start : start + BATCH])

    def summing() -> None:
        parts = [
            EffectSums.of(scores[start : start + BATCH], effects[start : start + BATCH], ratings[start : start + BATCH])
            for start in range(0, IMAGES, BATCH)
        ]
        EffectSums.merge(parts).interval("error_effect")

    over_forward = paired(ablations, forward)
    forward_s = over_forward.denominator_s / TIMED * IMAGES
    summing_s = seconds(summing)
    found: list[dict[str, Any]] = [
        {
            "what": f"`error` AIS of {maps} maps over {IMAGES:,} images ÷ one forward pass over them",
            "ratio": {
                name: float(f"{value + summing_s / forward_s:.3g}")
                for name, value in over_forward.as_dict().items()
                if name in ("median", "low", "high")
            },
            "seconds": round(over_forward.median * forward_s + summing_s, 1),
            "timed_images": TIMED,
        }
    ]
    for count in SIMILAR:
        found += _similarity(count, maps, forward_s / IMAGES)
    found.append(_training(backbone.embedding_size, forward_s))
    return found


def _similarity(count: int, maps: int, forward_s: float) -> list[dict[str, Any]]:
    rng = np.random.default_rng(1)
    embeddings = rng.normal(size=(count, maps)).astype(np.float32) ** 2
    replacements = embeddings * rng.uniform(0, 1, (count, maps)).astype(np.float32)
    human = np.corrcoef(rng.normal(size=(count, 20)))
    found = []
    timed = maps if count <= 200 else SIMILAR_MAPS
    for level, compute in (("collective", collective_ais), ("individual", individual_ais)):
        taken = maps / timed * seconds(lambda compute=compute: compute(embeddings, replacements[:, :timed], 0, human))
        found.append(
            {
                "what": f"`similarity` AIS, {level}, of {maps} maps from {count:,} embeddings ÷ embedding the images",
                "ratio": {"median": float(f"{taken / (forward_s * count):.3g}")},
                "seconds": float(f"{taken:.3g}"),
            }
        )
    return found


def _training(size: int, forward_s: float) -> dict[str, Any]:
    rng = np.random.default_rng(2)
    embeddings = rng.normal(size=(IMAGES, size)).astype(np.float32)
    rows = np.arange(IMAGES)
    fit = VariantFit(
        0, Split(rows[: IMAGES * 4 // 5], rows[IMAGES * 4 // 5 :]), embeddings, rng.normal(size=IMAGES), HeadConfig(),
        FitConfig(),
    )  # fmt: skip
    fit.run_epoch()
    epoch_s = sorted(seconds(fit.run_epoch) for _ in range(5))
    ratios = [(forward_s + taken) / taken for taken in epoch_s]
    return {
        "what": f"an epoch of {IMAGES:,} images that runs the backbone again ÷ one from the embedding cache",
        "ratio": {"median": round(ratios[2]), "low": round(ratios[-1]), "high": round(ratios[0])},
        "seconds": float(f"{epoch_s[2]:.3g}"),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    text = f"""
        **Over sets of images** ({BACKBONE}, one thread; forward passes timed on {TIMED} images and multiplied).
        *Seconds*: of what stands before the ÷, or for training of the epoch from the cache.
        """
    cells = []
    for row in rows:
        ratio = row["ratio"]
        cells.append((row["what"], show(ratio) if "low" in ratio else f"{ratio['median']:.3g}", row["seconds"]))
    return paragraph(text) + "\n" + grid(("what", "ratio", "seconds"), cells)

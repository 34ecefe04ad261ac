"""One pass over the validated images: coordinates for the protocol, heatmaps of every method, and their curves.

B images of a batch, N images in all, C maps of h × w cells, D embedding coordinates, S × S pixels of the model's input.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ais.ablation import ablate, channelwise_effects, replaced_coordinates, run_trunk
from ais.backbones import Backbone
from ais.heads import HeadEnsemble, RegressionHead
from ais.heatmaps import Weighting
from ais.validation.faithfulness import (
    FILLS,
    Curves,
    InputMaps,
    cell_order,
    centre_bias,
    filled,
    grad_cam,
    perturbation_curves,
    random_maps,
    score_of,
    scored,
)
from ais.validation.heads import correlation_between, correlation_with_each, heatmaps_of_each, random_heads
from ais.validation.protocol import Coordinates, HeadWeights

# What heatmaps are compared with, and what each stands for.
BASELINES = {
    "random": "noise as smooth as the heatmaps",
    "centre": "a Gaussian in the middle of the image",
    "random head": "heatmaps of heads that were never fitted",
    "Grad-CAM": "gradient-weighted maps of the same layer (Selvaraju et al. 2017)",
}


@dataclass(frozen=True)
class Subject:
    """The model whose heatmaps are validated.

    Args:
        backbone: cut at its layer; decides the device.
        head: on its embedding, on the same device.
        weighting: of the heatmaps.
        batch_size: images in one pass.
        trunk_dtype: precision of the trunk.
        chunk: maps ablated at once where the tail has to be run.
    """

    backbone: Backbone
    head: HeadEnsemble
    weighting: Weighting = "positive"
    batch_size: int = 16
    trunk_dtype: torch.dtype = torch.float32
    chunk: int | None = None

    def batches(self, pixels: np.ndarray) -> Iterator[Tensor]:
        """Yield normalised images ``(B, 3, S, S)`` of pixels ``(N, S, S, 3)`` uint8."""
        for start in range(0, len(pixels), self.batch_size):
            part = torch.from_numpy(pixels[start : start + self.batch_size])
            yield self.backbone.normalise(part.to(self.backbone.mean.device))


@dataclass(frozen=True)
class Ablated:
    """What the protocol needs of N images, for a channelwise tail.

    Args:
        coordinates: of the embeddings.
        scores: ``(N,)`` intact.
        effects: ``(N, C)`` ``s - s_k``.
    """

    coordinates: Coordinates
    scores: np.ndarray
    effects: np.ndarray


def scores_of(subject: Subject, pixels: np.ndarray) -> np.ndarray:
    """Scores ``(N,)`` float64; for tails of which the protocol knows no fast path."""
    score = score_of(subject.backbone, subject.head, subject.trunk_dtype)
    return np.concatenate([scored(score, images) for images in subject.batches(pixels)])


@torch.inference_mode()
def ablate_coordinates(subject: Subject, pixels: np.ndarray) -> Ablated:
    """Run N images through a channelwise tail, intact and with every map ablated alone.

    Args:
        subject: whose tail is channelwise.
        pixels: ``(N, S, S, 3)`` uint8.
    """
    split, head = subject.backbone.split, subject.head
    first = 0
    parts: list[tuple[Tensor, ...]] = []
    for images in subject.batches(pixels):
        maps, context = run_trunk(split, images, subject.trunk_dtype)
        embeddings = split.tail(maps, *context)
        first, changes = replaced_coordinates(split, maps, context, embeddings)
        effects = torch.stack([channelwise_effects(each, embeddings, first, changes) for each in head.variants])
        replacements = embeddings[:, first : first + changes.shape[1]] + changes
        parts.append((embeddings, replacements, head(embeddings), effects.mean(0)))
    joined = [torch.cat(values).cpu().numpy() for values in zip(*parts, strict=True)]
    return Ablated(Coordinates(joined[0], joined[1], first), joined[2].astype(np.float64), joined[3])


def head_weights(head: HeadEnsemble) -> list[HeadWeights]:
    """Return the heads as float64 arrays."""
    return [
        HeadWeights(
            (_array(each.hidden.weight), _array(each.hidden.bias)),
            (_array(each.output.weight)[0], float(each.output.bias)),
            (float(each.target_mean), float(each.target_std)),
        )
        for each in head.variants
    ]


def _array(value: Tensor) -> np.ndarray:
    return np.asarray(value.detach().double().cpu().numpy())


@dataclass(frozen=True)
class Faithfulness:
    """Heatmaps of N images and of their baselines, and what deleting by them does.

    Args:
        maps: by method, ``"ais"`` first, then `BASELINES`.
        curves: by fill, of `ais.validation.faithfulness.FILLS`, and method.
        random_head_correlation: ``(N,)`` mean rank correlation of the heatmap with those of random heads.
        variant_correlation: ``(N,)`` mean rank correlation between the heatmaps of the head's variants; NaN for one.
    """

    maps: dict[str, InputMaps]
    curves: dict[str, dict[str, Curves]]
    random_head_correlation: np.ndarray
    variant_correlation: np.ndarray


def measure_faithfulness(subject: Subject, pixels: np.ndarray, steps: int, seed: int = 0) -> Faithfulness:
    """Make all heatmaps and follow all curves.

    Args:
        subject: the model.
        pixels: ``(N, S, S, 3)`` uint8.
        steps: of a curve, see `ais.validation.faithfulness.perturbation_curves`. Each image costs about 20 · steps
            forward passes of the whole network, which is nearly all the time this takes.
        seed: of random maps, random heads and ties.
    """
    layer = subject.backbone.layer
    assert layer is not None, "a backbone that can be split has a layer"
    side = subject.backbone.spec.input_size
    with torch.inference_mode():
        centre = torch.cat([subject.backbone(images) for images in subject.batches(pixels)]).mean(0)
    strangers = random_heads(subject.head, centre, seed)
    found = [_heatmaps(subject, strangers, images) for images in subject.batches(pixels)]
    ours, variants, random, cam = (
        np.concatenate(values, axis=axis) for values, axis in zip(zip(*found, strict=True), (0, 1, 1, 0), strict=True)
    )
    on_layer = InputMaps(ours, layer.extent)
    each = np.arange(len(ours))
    maps = {
        "ais": on_layer,
        "random": random_maps(on_layer, seed),
        "centre": centre_bias(len(ours), side),
        # One random head for each image in turn: what one of them happens to point at should not decide.
        "random head": InputMaps(random[each % len(random), each], layer.extent),
        "Grad-CAM": InputMaps(cam, layer.extent),
    }
    orders = {method: cell_order(values, side, seed) for method, values in maps.items()}
    score = score_of(subject.backbone, subject.head, subject.trunk_dtype)
    curves: dict[str, dict[str, list[Curves]]] = {fill: {method: [] for method in maps} for fill in FILLS}
    for index, images in enumerate(subject.batches(pixels)):
        rows = slice(index * subject.batch_size, (index + 1) * subject.batch_size)
        intact = scored(score, images)
        for fill in FILLS:
            blank = filled(images, fill)
            ends = intact, scored(score, blank)
            for method, order in orders.items():
                part = perturbation_curves(score, images, blank, ends, order[rows], steps)
                curves[fill][method].append(part)
    return Faithfulness(
        maps,
        {fill: {method: _joined(parts) for method, parts in methods.items()} for fill, methods in curves.items()},
        correlation_with_each(ours, random),
        correlation_between(variants),
    )


def _joined(parts: list[Curves]) -> Curves:
    return Curves(np.concatenate([part.deletion for part in parts]), np.concatenate([part.insertion for part in parts]))


def _heatmaps(
    subject: Subject, strangers: list[RegressionHead], images: Tensor
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Heatmaps of the ensemble ``(B, h, w)``, its K variants, the random heads, and by Grad-CAM ``(B, h, w)``."""
    backbone, variants = subject.backbone, subject.head.variants
    together = HeadEnsemble([*variants, *strangers])
    result = ablate(backbone, together, images, chunk=subject.chunk, trunk_dtype=subject.trunk_dtype)
    fitted = result.effects_each[: len(variants)]
    ours = heatmaps_of_each(fitted.mean(0)[None], result.feature_maps, subject.weighting)[0]
    each = heatmaps_of_each(result.effects_each, result.feature_maps, subject.weighting).cpu().numpy()
    cam = grad_cam(backbone, subject.head, images)
    return ours.cpu().numpy(), each[: len(variants)], each[len(variants) :], cam.cpu().numpy()

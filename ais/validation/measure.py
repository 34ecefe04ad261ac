"""What is measured on the validated images: the protocol's fits, heatmaps of every method, and their curves.

B images of a batch, N images in all, M of them with curves, C maps of h × w cells, D embedding coordinates, K variants
of the head, R heads that were never fitted, S × S pixels of the model's input.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor

from ais.ablation import ablate, channelwise_effects, replaced_coordinates, run_trunk
from ais.backbones import Backbone, TailKind
from ais.heads import HeadEnsemble, RegressionHead
from ais.heatmaps import Weighting
from ais.importance.adding import embeddings_along
from ais.importance.general import general_similarities
from ais.importance.similarity import similarity_of, unit_rows
from ais.progress import ProgressLine
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
from ais.validation.heads import (
    correlation_between,
    correlation_with_each,
    heatmaps_of_each,
    random_heads,
    rank_correlation,
)
from ais.validation.protocol import (
    Coordinates,
    CumulativeCurve,
    HeadWeights,
    number_grid,
    ratings_protocol,
    score_protocol,
    similarity_protocol,
    similarity_protocol_of,
)
from ais.validation.separation import Separation, mask_response

_WEIGHTINGS: tuple[Weighting, ...] = get_args(Weighting)
_NUMBERS, TAIL_NUMBERS = 256, 16

# What heatmaps are compared with, and what each stands for.
BASELINES = {
    "random": "noise as smooth as the heatmaps",
    "centre": "a Gaussian in the middle of the image",
    "random head": "heatmaps of heads that were never fitted",
    "Grad-CAM": "gradient-weighted maps of the same layer (Selvaraju et al. 2017)",
}


@dataclass(frozen=True, kw_only=True)
class Network:
    """The frozen backbone that is validated.

    Args:
        backbone: cut at its layer; decides the device.
        batch_size: images in one pass.
        trunk_dtype: precision of the trunk.
        chunk: maps ablated at once where the tail has to be run.
    """

    backbone: Backbone
    batch_size: int = 16
    trunk_dtype: torch.dtype = torch.float32
    chunk: int | None = None

    def batches(self, pixels: np.ndarray) -> Iterator[Tensor]:
        """Yield normalised images ``(B, 3, S, S)`` of pixels ``(N, S, S, 3)`` uint8."""
        for start in range(0, len(pixels), self.batch_size):
            part = torch.from_numpy(pixels[start : start + self.batch_size])
            yield self.backbone.normalise(part.to(self.backbone.mean.device))


@dataclass(frozen=True, kw_only=True)
class Subject(Network):
    """The model whose heatmaps are validated.

    Args:
        head: on the backbone's embedding, on the same device.
        weighting: of the heatmaps.
    """

    head: HeadEnsemble
    weighting: Weighting = "positive"


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


@torch.inference_mode()
def ablate_coordinates(subject: Subject, pixels: np.ndarray) -> Ablated:
    """Run N images through a channelwise tail, intact and with every map ablated alone.

    Args:
        subject: whose tail is channelwise.
        pixels: ``(N, S, S, 3)`` uint8.
    """
    first, head = 0, subject.head
    parts: list[tuple[Tensor, ...]] = []
    for images in subject.batches(pixels):
        embeddings, first, changes = _ablated_batch(subject, images)
        effects = torch.stack([channelwise_effects(each, embeddings, first, changes) for each in head.variants])
        parts.append((embeddings, _replacements(embeddings, first, changes), head(embeddings), effects.mean(0)))
    joined = [torch.cat(values).cpu().numpy() for values in zip(*parts, strict=True)]
    return Ablated(Coordinates(joined[0], joined[1], first), joined[2].astype(np.float64), joined[3])


@torch.inference_mode()
def coordinates_of(network: Network, pixels: np.ndarray) -> Coordinates:
    """The same without a head: only the embeddings, and what ablating each map alone puts into them."""
    first = 0
    parts: list[tuple[Tensor, ...]] = []
    for images in network.batches(pixels):
        embeddings, first, changes = _ablated_batch(network, images)
        parts.append((embeddings, _replacements(embeddings, first, changes)))
    embeddings_all, replacements = (torch.cat(values).cpu().numpy() for values in zip(*parts, strict=True))
    return Coordinates(embeddings_all, replacements, first)


def _ablated_batch(network: Network, images: Tensor) -> tuple[Tensor, int, Tensor]:
    split = network.backbone.split
    maps, context = run_trunk(split, images, network.trunk_dtype)
    embeddings = split.tail(maps, *context)
    return embeddings, *replaced_coordinates(split, maps, context, embeddings)


def _replacements(embeddings: Tensor, first: int, changes: Tensor) -> Tensor:
    return embeddings[:, first : first + changes.shape[1]] + changes


def head_weights(head: HeadEnsemble) -> list[HeadWeights]:
    """Return the heads as float64 arrays."""
    return [
        HeadWeights(
            (_array(each.hidden.weight), _array(each.hidden.bias)),
            (_array(each.output.weight)[0], float(each.output.bias.detach())),
            (float(each.target_mean), float(each.target_std)),
        )
        for each in head.variants
    ]


def _array(value: Tensor) -> np.ndarray:
    return np.asarray(value.detach().double().cpu().numpy())


@dataclass(frozen=True)
class HeadAgreement:
    """Rank correlations between heatmaps, with one weighting of the maps.

    Args:
        random_each: ``(R, N)`` of the head's own heatmap with that of each unfitted head.
        variants: ``(N,)`` mean over every two variants of the head; NaN for a single one.
    """

    random_each: np.ndarray
    variants: np.ndarray

    @property
    def random(self) -> np.ndarray:
        """Mean over the unfitted heads, ``(N,)``."""
        return np.asarray(self.random_each.mean(0))


@dataclass(frozen=True)
class Heatmaps:
    """Heatmaps of N images and what they are compared with.

    Args:
        scores: ``(N,)`` float64, intact.
        maps: by method, ``"ais"`` first, then `BASELINES`.
        random_head: ``(N,)`` which of the R unfitted heads each image's map of that baseline is of.
        agreement: by weighting, whichever the heatmaps themselves have.
        plain_correlation: ``(N,)`` rank correlation with the sum of all rectified maps, every one with the same weight.
        separation: of the maps by their AIS; ``None`` without masks.
    """

    scores: np.ndarray
    maps: dict[str, InputMaps]
    random_head: np.ndarray
    agreement: dict[Weighting, HeadAgreement]
    plain_correlation: np.ndarray
    separation: Separation | None


def make_heatmaps(subject: Subject, pixels: np.ndarray, inside: np.ndarray | None = None, seed: int = 0) -> Heatmaps:
    """Make the heatmaps of every method.

    Args:
        subject: the model.
        pixels: ``(N, S, S, 3)`` uint8.
        inside: ``(N, h, w)`` cells of the masks, where there are any; see `ais.validation.separation.mask_on_cells`.
        seed: of random maps and random heads.
    """
    layer = subject.backbone.layer
    assert layer is not None, "a backbone that can be split has a layer"
    with torch.inference_mode():
        embeddings = torch.cat([subject.backbone(images) for images in subject.batches(pixels)])
        scores = subject.head(embeddings).double().cpu().numpy()
    strangers = random_heads(subject.head, embeddings.mean(0), seed)
    parts = []
    with ProgressLine("heatmaps", len(pixels), silent_s=1) as progress:
        for index, images in enumerate(subject.batches(pixels)):
            rows = slice(index * subject.batch_size, (index + 1) * subject.batch_size)
            parts.append(_heatmaps(subject, strangers, images, None if inside is None else inside[rows]))
            progress.advance(len(images))
    each = {weighting: np.concatenate([part.each[weighting] for part in parts], axis=1) for weighting in _WEIGHTINGS}
    ours, plain, cam = (np.concatenate([getattr(part, name) for part in parts]) for name in ("ours", "plain", "cam"))
    count, own = len(pixels), len(subject.head.variants)
    on_layer = InputMaps(ours[:, _WEIGHTINGS.index(subject.weighting)], layer.extent)
    random = each[subject.weighting][own:]
    # One random head for each image in turn: what one of them happens to point at should not decide.
    random_head = np.arange(count) % len(random)
    maps = {
        "ais": on_layer,
        "random": random_maps(on_layer, seed),
        "centre": centre_bias(count, subject.backbone.spec.input_size),
        "random head": InputMaps(random[random_head, np.arange(count)], layer.extent),
        "Grad-CAM": InputMaps(cam, layer.extent),
    }
    agreement = {
        weighting: HeadAgreement(
            correlation_with_each(ours[:, index], each[weighting][own:]), correlation_between(each[weighting][:own])
        )
        for index, weighting in enumerate(_WEIGHTINGS)
    }
    separation = None
    if inside is not None:
        separation = Separation(
            np.concatenate([part.effects for part in parts]),
            np.concatenate([part.response for part in parts]),
            np.sum([part.random_effects for part in parts], axis=0) / count,
        )
    return Heatmaps(scores, maps, random_head, agreement, rank_correlation(on_layer.values, plain), separation)


def follow_curves(
    subject: Subject,
    pixels: np.ndarray,
    maps: dict[str, InputMaps],
    steps: int,
    fills: Sequence[str] = FILLS,
    seed: int = 0,
) -> dict[str, dict[str, Curves]]:
    """Delete and insert by the heatmaps of every method; curves by fill and method.

    Args:
        subject: the model.
        pixels: ``(M, S, S, 3)`` uint8.
        maps: of the same M images, by method.
        steps: of a curve, see `ais.validation.faithfulness.perturbation_curves`. Each image costs 2 · steps forward
            passes of the whole network for each method and fill, which is nearly all the time this takes.
        fills: of `ais.validation.faithfulness.FILLS`.
        seed: of ties.
    """
    side = subject.backbone.spec.input_size
    orders = {method: cell_order(values, side, seed) for method, values in maps.items()}
    score = score_of(subject.backbone, subject.head, subject.trunk_dtype)
    curves: dict[str, dict[str, list[Curves]]] = {fill: {method: [] for method in maps} for fill in fills}
    with ProgressLine("curves", len(pixels) * len(fills) * len(maps), silent_s=1) as progress:
        for index, images in enumerate(subject.batches(pixels)):
            rows = slice(index * subject.batch_size, (index + 1) * subject.batch_size)
            intact = scored(score, images)
            for fill in fills:
                blank = filled(images, fill)
                ends = intact, scored(score, blank)
                for method, order in orders.items():
                    part = perturbation_curves(score, images, blank, ends, order[rows], steps)
                    curves[fill][method].append(part)
                    progress.advance(len(images))
    return {fill: {method: _joined(parts) for method, parts in methods.items()} for fill, methods in curves.items()}


def _joined(parts: list[Curves]) -> Curves:
    return Curves(np.concatenate([part.deletion for part in parts]), np.concatenate([part.insertion for part in parts]))


class _Part(NamedTuple):
    """Of a batch: heatmaps ``(B, weighting, h, w)`` and of each head ``(K + R, B, h, w)``; effects for `Separation`."""

    ours: np.ndarray
    each: dict[Weighting, np.ndarray]
    plain: np.ndarray
    cam: np.ndarray
    effects: np.ndarray
    random_effects: np.ndarray
    response: np.ndarray


def _heatmaps(subject: Subject, strangers: list[RegressionHead], images: Tensor, inside: np.ndarray | None) -> _Part:
    backbone, variants = subject.backbone, subject.head.variants
    together = HeadEnsemble([*variants, *strangers])
    result = ablate(backbone, together, images, chunk=subject.chunk, trunk_dtype=subject.trunk_dtype)
    effects, maps = result.effects_each[: len(variants)].mean(0), result.feature_maps
    ours = torch.stack([heatmaps_of_each(effects[None], maps, weighting)[0] for weighting in _WEIGHTINGS], dim=1)
    return _Part(
        ours.cpu().numpy(),
        {weighting: heatmaps_of_each(result.effects_each, maps, weighting).cpu().numpy() for weighting in _WEIGHTINGS},
        maps.relu().mean(1).cpu().numpy(),
        grad_cam(backbone, subject.head, images).cpu().numpy(),
        effects.cpu().numpy(),
        result.effects_each[len(variants) :].double().sum(1).cpu().numpy(),
        np.zeros(0) if inside is None else mask_response(maps.cpu().numpy(), inside),
    )


# --- the protocol, for any kind of tail


def run_ratings_protocol(
    subject: Subject, pixels: np.ndarray, ratings: np.ndarray, folds: int, seeds: int, numbers: int | None
) -> dict[str, CumulativeCurve]:
    """Run `ais.validation.protocol.score_protocol` on rated images.

    Args:
        subject: the model.
        pixels: ``(N, S, S, 3)`` uint8.
        ratings: ``(N,)``.
        folds: of the protocol.
        seeds: likewise.
        numbers: of maps on a curve; by default 256, or 16 where the tail has to be run for each.
    """
    if subject.backbone.split.kind is TailKind.CHANNELWISE:
        ablated = ablate_coordinates(subject, pixels)
        return ratings_protocol(
            ablated.coordinates, head_weights(subject.head), ablated.scores, ablated.effects, ratings, folds, seeds,
            numbers or _NUMBERS,
        )  # fmt: skip
    split, head = subject.backbone.split, subject.head
    trunks, scores, effects = [], [], []
    for images in subject.batches(pixels):
        found = ablate(subject.backbone, head, images, chunk=subject.chunk, trunk_dtype=subject.trunk_dtype)
        trunks.append(run_trunk(split, images, subject.trunk_dtype))
        scores.append(found.scores.double().cpu().numpy())
        effects.append(found.effects.cpu().numpy())
    counts = number_grid(effects[0].shape[1], numbers or TAIL_NUMBERS)

    @torch.inference_mode()
    def predict(order: np.ndarray) -> np.ndarray:
        along = [
            torch.stack([head(embeddings) for embeddings in embeddings_along(split, maps, context, order, counts)], 1)
            for maps, context in trunks
        ]
        return np.asarray(torch.cat(along).double().cpu().numpy())

    # One fit at a time: torch itself uses all cores.
    return score_protocol(
        predict, counts, np.concatenate(scores), np.concatenate(effects), ratings, folds, seeds, threads=1
    )


def run_similarity_protocol(
    network: Network, pixels: np.ndarray, human: np.ndarray, folds: int, seeds: int, numbers: int | None
) -> tuple[np.ndarray, dict[str, CumulativeCurve]]:
    """Run `ais.validation.protocol.similarity_protocol` on compared images.

    Args:
        network: the backbone.
        pixels: ``(N, S, S, 3)`` uint8, in the order of the matrix.
        human: ``(N, N)``.
        folds: of the protocol.
        seeds: likewise.
        numbers: of maps on a curve; by default all, or 16 where the tail has to be run for each.

    Returns:
        the intact similarity ``(N, N)`` and the curves.
    """
    split = network.backbone.split
    if split.kind is TailKind.CHANNELWISE:
        coordinates = coordinates_of(network, pixels)
        curves = similarity_protocol(coordinates, human, folds, seeds, numbers)
        return similarity_of(coordinates.embeddings), curves
    batches = list(network.batches(pixels))
    intact, parts = general_similarities(network.backbone, batches, "collective", network.chunk)
    trunks = [run_trunk(split, images, network.trunk_dtype) for images in batches]
    counts = number_grid(trunks[0][0].shape[1], numbers or TAIL_NUMBERS)

    def along(order: np.ndarray) -> np.ndarray:
        streams = [embeddings_along(split, maps, context, order, counts) for maps, context in trunks]
        # Not `similarity_of`: the few maps kept at first may leave an embedding constant.
        rows = (unit_rows(torch.cat(each).cpu().numpy().astype(np.float64)) for each in zip(*streams, strict=True))
        return np.stack([each @ each.T for each in rows])

    chunks = []
    with ProgressLine("maps ablated", trunks[0][0].shape[1], silent_s=1) as progress:
        for part in parts:
            chunks.append(part)
            progress.advance(len(part))
    ablated = np.concatenate(chunks)
    return intact, similarity_protocol_of(ablated, intact, along, counts, human, folds, seeds, threads=1)

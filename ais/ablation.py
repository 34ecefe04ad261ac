"""Exact ablation of every feature map for about the price of one forward pass, and the slow way that proves it.

Ablating map k sets it to zero at the layer's output and leaves everything downstream as it was. One at a time that
costs C forward passes. Here the trunk runs once, and the tail does no more than its graph demands (DESIGN section 3):

* channelwise tail: one more pass of the tail, with all maps zeroed, holds in coordinate k of the embedding exactly what
  zeroing map k alone puts there. The head's hidden layer then moves by one column times one number.
* linear tail: the share of map k in the first convolution or linear layer is subtracted; what follows runs batched
  over k.
* general tail: the tail runs batched over k.

Shapes: B images, C maps of h × w at the layer, D embedding coordinates, c maps in one chunk, K heads of H hidden units.
All differences are float32 or better, also where the trunk runs in bfloat16: effects are small differences of large
numbers, so ``s - s_k`` is summed from the changes of the hidden units and never subtracted from two scores.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ais.backbones import Backbone, TailKind
from ais.backbones.graph import LinearSplit, Split
from ais.heads import HeadEnsemble, RegressionHead
from ais.products import SkippingZeros, once_where_unmoved, skipping_zeros

# Numbers in one chunk's largest tensor. On a CPU the head's chunk should stay in the cache; a tail's chunk should be
# large enough to keep the kernels busy. Measured in tests/benchmarks/LOG.md.
_HEAD_NUMBERS = {"cpu": 2**18, "cuda": 2**26}
_TAIL_NUMBERS = {"cpu": 2**23, "cuda": 2**27}
# Where the maps first mix in a linear layer, nothing larger than its output is made for each of them.
_VECTOR_NUMBERS = {"cpu": 2**25, "cuda": 2**27}


@dataclass(frozen=True)
class Ablation:
    """What ablating every map does to the scores of a batch.

    Args:
        scores: ``(B,)`` intact scores, the mean over the heads.
        scores_each: ``(K, B)`` of every head.
        effects: ``(B, C)`` ``s - s_k``, the mean over the heads; positive where the map raises the score.
        effects_each: ``(K, B, C)`` of every head.
        feature_maps: ``(B, C, h, w)`` at the layer.
        embeddings: ``(B, D)`` intact.
    """

    scores: Tensor
    scores_each: Tensor
    effects: Tensor
    effects_each: Tensor
    feature_maps: Tensor
    embeddings: Tensor


@contextmanager
def full_float32() -> Iterator[None]:
    """Let no convolution on a GPU round float32 to the 10 bits of TF32, torch's default; all settings return after it.

    Effects are small differences, and float32 is meant where it is asked for.
    """
    cudnn: Any = torch.backends.cudnn
    if cudnn.conv.fp32_precision != "tf32":
        yield
        return
    of_rnns = cudnn.rnn.fp32_precision
    cudnn.allow_tf32 = False
    try:
        yield
    finally:
        cudnn.allow_tf32 = True
        if cudnn.rnn.fp32_precision != of_rnns:  # setting it anew would part it from allow_tf32
            cudnn.rnn.fp32_precision = of_rnns


@full_float32()
@torch.inference_mode()
def ablate(
    backbone: Backbone,
    head: HeadEnsemble,
    images: Tensor,
    *,
    chunk: int | None = None,
    trunk_dtype: torch.dtype = torch.float32,
) -> Ablation:
    """Ablate each of the C maps of the backbone's layer, exactly.

    Args:
        backbone: cut at its layer.
        head: on the backbone's embedding, on the same device.
        images: ``(B, 3, S, S)`` normalised.
        chunk: maps ablated in one pass; chosen by size and device if not given. Does not change the result.
        trunk_dtype: ``torch.bfloat16`` runs the trunk under autocast; everything after it stays float32.

    Raises:
        BackboneError: the backbone refuses heatmaps.
        ValueError: no such chunk.
    """
    check_chunk(chunk)
    split = backbone.split
    maps, context = run_trunk(split, images, trunk_dtype)
    embeddings = split.tail(maps, *context)
    scores_each = head.each(embeddings)
    if split.kind is TailKind.CHANNELWISE:
        first, changes = replaced_coordinates(split, maps, context, embeddings)
        per_head = [channelwise_effects(variant, embeddings, first, changes, chunk) for variant in head.variants]
    else:
        parts: list[list[Tensor]] = [[] for _ in head.variants]
        hidden = [torch.relu(variant.hidden(embeddings)) for variant in head.variants]
        for ablated in ablated_embeddings(split, maps, context, chunk):
            for variant, intact, found in zip(head.variants, hidden, parts, strict=True):
                change = torch.stack([skipping_zeros(variant.hidden, rows) for rows in ablated])
                found.append(_lost_score(variant, change.relu_().sub_(intact[:, None])))
        per_head = [torch.cat(found, dim=1) for found in parts]
    effects_each = torch.stack(per_head)
    return Ablation(scores_each.mean(0), scores_each, effects_each.mean(0), effects_each, maps, embeddings)


def check_chunk(chunk: int | None) -> None:
    """Refuse a number of maps that is none (ValueError): effects would be left unwritten."""
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk is {chunk}: must be at least 1, or None to have it chosen")


def run_trunk(split: Split, images: Tensor, dtype: torch.dtype = torch.float32) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Run the trunk once.

    Returns:
        the feature maps ``(B, C, h, w)`` and the context that the tail needs besides, float32 or the input's own
        precision if that is higher.
    """
    reduced = dtype is not torch.float32
    with torch.autocast(images.device.type, dtype if reduced else torch.bfloat16, enabled=reduced):
        maps, *context = split.trunk(images)
    if reduced:
        return maps.to(torch.float32), tuple(value.to(torch.float32) for value in context)
    return maps, tuple(context)


def replaced_coordinates(
    split: Split, maps: Tensor, context: Sequence[Tensor], embeddings: Tensor
) -> tuple[int, Tensor]:
    """For a channelwise tail, what ablating map k alone changes in the embedding.

    Returns:
        the embedding coordinate of map 0 (map k has the k-th after it), and the change ``(B, C)`` of that coordinate:
        ablated minus intact.
    """
    assert split.coordinates is not None
    first = split.coordinates.offset
    owned = slice(first, first + maps.shape[1])
    without = split.tail(torch.zeros_like(maps), *context)[:, owned]
    return first, without - embeddings[:, owned]


def channelwise_effects(
    head: RegressionHead, embeddings: Tensor, first: int, changes: Tensor, chunk: int | None = None
) -> Tensor:
    """Effects ``(B, C)`` on one head's score of changing one embedding coordinate at a time.

    Most hidden units are so far from zero that no single coordinate carries them through it. They are linear, or
    silent, whichever coordinate changes, and one product of matrices has all of them; on a CPU only the few others are
    gone through for every coordinate. On a GPU all are: to ask which they are would be to wait for the device.

    Args:
        head: the head.
        embeddings: ``(B, D)`` intact.
        first: coordinate that the first column of ``changes`` belongs to.
        changes: ``(B, C)`` new minus intact value of coordinate ``first + k``.
        chunk: coordinates handled at once.
    """
    weight = head.hidden.weight[:, first : first + changes.shape[1]]  # (H, C)
    output = head.output.weight[0]
    intact = head.hidden(embeddings)  # (B, H), before the ReLU
    if intact.device.type != "cpu":
        return _moved_output(output, weight, intact, changes, chunk).mul_(-head.target_std)
    reach = changes.abs().amax(1, keepdim=True) * weight.abs().amax(1)
    bends = ~(reach < intact.abs())  # also where one of them is not a number
    moved = torch.where(bends | (intact < 0), 0, output) @ weight * changes
    for image, units in enumerate(bends):
        rows = units.nonzero()[:, 0]
        one = slice(image, image + 1)
        moved[one] += _moved_output(output[rows], weight[rows], intact[one, rows], changes[one], chunk)
    return moved.mul_(-head.target_std)


def _moved_output(output: Tensor, weight: Tensor, intact: Tensor, changes: Tensor, chunk: int | None) -> Tensor:
    """What changing one coordinate at a time does to the output ``(B, C)``, unit by unit and coordinate by coordinate.

    A unit's activation moves by ``relu(a + d) - relu(a)``. It is computed as ``max(min(a, 0) + d, -max(a, 0))``, the
    same number: where the unit stays active this is d itself, with all its digits, however small beside a.

    Args:
        output: ``(H,)`` weights of the hidden units.
        weight: ``(H, C)`` of the coordinates in them.
        intact: ``(B, H)`` hidden units before the ReLU.
        changes: ``(B, C)`` of the coordinates.
        chunk: coordinates handled at once.
    """
    count = changes.shape[1]
    below, above = intact.clamp(max=0)[..., None], intact.clamp(min=0).neg_()[..., None]
    chunk = chunk or _fitting(_HEAD_NUMBERS, intact.device, intact.numel())
    moved = torch.empty_like(changes)
    for start in range(0, count, chunk):
        part = slice(start, min(start + chunk, count))
        change = torch.addcmul(below, changes[:, None, part], weight[None, :, part])  # (B, H, c)
        moved[:, part] = output @ torch.maximum(change, above, out=change)
    return moved


def ablated_embeddings(
    split: Split, maps: Tensor, context: Sequence[Tensor], chunk: int | None = None
) -> Iterator[Tensor]:
    """Yield the embeddings ``(B, c, D)`` with each map ablated alone, chunk after chunk of maps.

    Works for every kind of tail; a channelwise tail has a far cheaper form in `replaced_coordinates`. While it waits to
    be asked for the next chunk it holds on to nothing that is as large as one: several may advance in step.
    """
    batch, count = maps.shape[:2]
    if split.kind is TailKind.LINEAR:
        assert split.linear is not None
        yield from _ablated_linear(split.linear, maps, context, chunk)
        return
    chunk = chunk or _fitting(_TAIL_NUMBERS, maps.device, batch * _numbers(maps, *context))
    for start in range(0, count, chunk):
        size = min(chunk, count - start)
        ablated = maps[:, None].repeat(1, size, 1, 1, 1)  # (B, c, C, h, w)
        index = torch.arange(size, device=maps.device)
        ablated[:, index, start + index] = 0
        embeddings = split.tail(ablated.flatten(0, 1), *_repeated(context, size))
        del ablated
        yield embeddings.unflatten(0, (batch, size))


def _ablated_linear(
    linear: LinearSplit, maps: Tensor, context: Sequence[Tensor], chunk: int | None
) -> Iterator[Tensor]:
    """Subtract each map's share where the maps first mix, then run what follows, image by image."""
    batch, count = maps.shape[:2]
    intact = linear.prefix(maps, *context)
    mixed = linear.mix(intact)
    share = intact - linear.prefix(torch.zeros_like(maps), *context)
    first, unit = linear.channels.offset, linear.channels.unit
    share = share[:, first : first + count * unit]
    budget = _VECTOR_NUMBERS if isinstance(linear.mix, nn.Linear) else _TAIL_NUMBERS
    chunk = chunk or _fitting(budget, maps.device, batch * _numbers(mixed))
    moved = share.unflatten(1, (count, unit)).flatten(2).any(2)
    suffix = SkippingZeros(linear.suffix) if maps.device.type == "cpu" else None
    for start in range(0, count, chunk):
        size = min(chunk, count - start)
        columns = slice(start * unit, (start + size) * unit)
        lost = _share(linear.mix, share[:, columns], slice(first + columns.start, first + columns.stop), size)
        ablated = torch.sub(mixed[:, None], lost, out=lost)
        if suffix is None:
            embeddings = linear.suffix(ablated.flatten(0, 1), *_repeated(context, size)).unflatten(0, (batch, size))
        else:
            embeddings = torch.stack(
                [
                    _after_mixing(suffix, rows, [value[index : index + 1] for value in context], changed)
                    for index, (rows, changed) in enumerate(zip(ablated, moved[:, start : start + size], strict=True))
                ]
            )
        del lost, ablated
        yield embeddings


def _after_mixing(suffix: SkippingZeros, rows: Tensor, context: list[Tensor], moved: Tensor) -> Tensor:
    """Embeddings ``(c, D)`` of one image's ablated outputs ``(c, …)`` of the mixing layer, context ``(1, …)``."""

    def run(rows: Tensor) -> Tensor:
        embeddings: Tensor = suffix.run(rows, *(value.expand(len(rows), *value.shape[1:]) for value in context))
        return embeddings

    return once_where_unmoved(run, rows, moved)


def _share(mix: nn.Linear | nn.Conv2d, values: Tensor, columns: slice, count: int) -> Tensor:
    """What each of ``count`` maps alone adds to the output of ``mix``: ``(B, c, *output)``.

    Args:
        mix: the layer.
        values: ``(B, c * unit, …)`` inputs that belong to the maps.
        columns: their indices among the layer's inputs.
        count: c.
    """
    weight = mix.weight[:, columns]
    if isinstance(mix, nn.Linear):
        return torch.einsum("bku,oku->bko", values.unflatten(1, (count, -1)), weight.unflatten(1, (count, -1)))
    patches = F.unfold(values, mix.kernel_size, mix.dilation, mix.padding, mix.stride)  # type: ignore[arg-type]
    shares = torch.einsum(
        "bkpl,okp->bkol", patches.unflatten(1, (count, -1)), weight.flatten(2)
    )  # p: kernel taps, l: output pixels
    height = (values.shape[2] + 2 * int(mix.padding[0]) - mix.dilation[0] * (mix.kernel_size[0] - 1) - 1) // mix.stride[
        0
    ] + 1
    return shares.unflatten(3, (height, -1))


def _lost_score(head: RegressionHead, change: Tensor) -> Tensor:
    """Score lost ``(B, c)`` through a change ``(B, c, H)`` of the active hidden units, in rating units."""
    return -head.target_std * (change @ head.output.weight[0])


def _repeated(context: Sequence[Tensor], count: int) -> list[Tensor]:
    """Each image's context once for every ablated map: ``(B, …) -> (B * c, …)``."""
    return [value.repeat_interleave(count, dim=0) for value in context]


def _numbers(*values: Tensor) -> int:
    """Numbers that one image has in all of these tensors."""
    return sum(value[0].numel() for value in values)


def _fitting(budget: dict[str, int], device: torch.device, numbers: int) -> int:
    return max(1, budget.get(device.type, budget["cuda"]) // max(1, numbers))


@full_float32()
@torch.inference_mode()
def ablate_reference(
    backbone: Backbone, head: HeadEnsemble, images: Tensor, maps: Sequence[int] | None = None
) -> Tensor:
    """The slow, obvious twin of `ablate`: for every map, zero it with a hook and run the whole network.

    Args:
        backbone: cut at its layer.
        head: on its embedding.
        images: ``(B, 3, S, S)`` normalised.
        maps: which maps, all if not given.

    Returns:
        the scores ``(B, len(maps))`` with each map ablated.
    """
    assert backbone.layer is not None
    layer = backbone.network.get_submodule(backbone.layer.name)
    ablated = []
    for k in range(backbone.layer.map_shape[0]) if maps is None else maps:

        def zero(_module: nn.Module, _inputs: object, output: Tensor, k: int = k) -> Tensor:
            output = output.clone()
            output[:, k] = 0
            return output

        handle = layer.register_forward_hook(zero)
        try:
            ablated.append(head(backbone(images)))
        finally:
            handle.remove()
    return torch.stack(ablated, dim=1)

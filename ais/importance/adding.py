"""Embeddings with only some of the maps, added one after another from the top of a ranking, for any tail.

`ais.importance.cumulative` is the algebra of channelwise tails, where adding a map costs next to nothing. Here what
follows the maps is run for each number of maps that is asked for: all of a general tail; of a linear one (the VGGs)
what comes after the layer in which maps first mix, whose sums over maps grow by those that are added.

B images, C maps, D embedding coordinates, G numbers of maps.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ais.backbones import Backbone
from ais.backbones.graph import LinearSplit, Split


@torch.inference_mode()
def embeddings_along(
    split: Split, maps: Tensor, context: Sequence[Tensor], order: np.ndarray, counts: np.ndarray
) -> Iterator[Tensor]:
    """Yield the embeddings ``(B, D)`` with only the first maps of an order, all others ablated, for each of G counts.

    Args:
        split: with any kind of tail.
        maps: ``(B, C, h, w)``.
        context: what the tail needs besides.
        order: ``(C,)`` maps, first added first.
        counts: ``(G,)`` ascending numbers of maps, from 0 to C.
    """
    if split.linear is not None:
        yield from _along_linear(split.linear, maps, context, order, counts)
        return
    for count in counts:
        kept = torch.zeros(maps.shape[1], dtype=maps.dtype, device=maps.device)
        kept[torch.from_numpy(order[:count].copy()).to(maps.device)] = 1
        yield split.tail(maps * kept[:, None, None], *context)


def _along_linear(
    linear: LinearSplit, maps: Tensor, context: Sequence[Tensor], order: np.ndarray, counts: np.ndarray
) -> Iterator[Tensor]:
    """Begin with all maps ablated, and add to where the maps first mix the shares of those that are added."""
    empty = linear.prefix(torch.zeros_like(maps), *context)
    share = linear.prefix(maps, *context) - empty
    mixed = linear.mix(empty)
    first, unit = linear.channels.offset, linear.channels.unit
    added = 0
    for count in counts:
        if count > added:
            columns = (first + order[added:count, None] * unit + np.arange(unit)).ravel()
            index = torch.from_numpy(columns).to(maps.device)
            mixed = mixed + _without_bias(linear.mix, share[:, index], index)
            added = count
        yield linear.suffix(mixed, *context)


def _without_bias(mix: nn.Linear | nn.Conv2d, values: Tensor, columns: Tensor) -> Tensor:
    """What some of the inputs of a layer add to its output."""
    weight = mix.weight[:, columns]
    if isinstance(mix, nn.Linear):
        return F.linear(values, weight)
    return F.conv2d(values, weight, None, mix.stride, mix.padding, mix.dilation)


@torch.inference_mode()
def embeddings_along_reference(backbone: Backbone, images: Tensor, order: np.ndarray, counts: np.ndarray) -> Tensor:
    """The slow, obvious twin of `embeddings_along`: zero the other maps with a hook and run the whole network.

    Args:
        backbone: cut at its layer.
        images: ``(B, 3, S, S)`` normalised.
        order: ``(C,)``.
        counts: ``(G,)``.

    Returns:
        ``(G, B, D)``.
    """
    assert backbone.layer is not None
    layer = backbone.network.get_submodule(backbone.layer.name)
    found = []
    for count in counts:

        def zero(_module: nn.Module, _inputs: object, output: Tensor, count: int = int(count)) -> Tensor:
            output = output.clone()
            output[:, order[count:].copy()] = 0
            return output

        handle = layer.register_forward_hook(zero)
        try:
            found.append(backbone(images))
        finally:
            handle.remove()
    return torch.stack(found)

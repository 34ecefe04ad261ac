"""The least that exact ablation of all maps can cost, counted on the network itself, not timed.

Multiply-adds are those of convolutions, linear layers and matrix products (`torch.utils.flop_counter`); bytes are what
every layer reads and writes with nothing fused and nothing cached, weights included. Batch of one.

C maps, H hidden units of the head.

* channelwise tail: trunk, tail twice (intact, all maps zeroed), and for every map one column of the head's hidden
  layer and one product with its output weights.
* linear tail: trunk, tail, every map's share of the layer where maps first mix, and for every map the rest of the tail
  and the head. Zeros that all of them share can be left out of the products (`ais.products.skipping_zeros`), so a
  measurement may come out below this.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ais.ablation import run_trunk
from ais.backbones import Backbone, TailKind
from ais.heads import RegressionHead


@dataclass(frozen=True)
class Work:
    """Multiply-adds and bytes moved."""

    multiply_adds: float
    bytes: float

    def __add__(self, other: Work) -> Work:
        return Work(self.multiply_adds + other.multiply_adds, self.bytes + other.bytes)

    def __mul__(self, times: int) -> Work:
        return Work(self.multiply_adds * times, self.bytes * times)


@dataclass(frozen=True)
class Floor:
    """What one image costs at least: a forward pass, and the explanation of all maps (which contains one)."""

    forward: Work
    explanation: Work

    @property
    def ratio(self) -> float:
        """Multiply-adds of the explanation over those of the forward pass."""
        return self.explanation.multiply_adds / self.forward.multiply_adds


@torch.inference_mode()
def floor_of(backbone: Backbone, head: RegressionHead) -> Floor:
    """Count the floor of a backbone at its layer."""
    side = backbone.spec.input_size
    split = backbone.split
    image = torch.rand(1, 3, side, side)
    maps, context = run_trunk(split, image)
    embedding = split.tail(maps, *context)
    trunk, tail = work_of(split.trunk, image), work_of(split.tail, maps, *context)
    scoring = work_of(head, embedding)
    count, hidden = maps.shape[1], head.hidden.out_features
    if split.kind is TailKind.CHANNELWISE:
        # For every map: its column of the hidden layer is read, the hidden units are made, and multiplied once.
        ablation = tail + Work(2 * count * hidden, count * 4 * (hidden + 2 * hidden))
    else:
        assert split.linear is not None, "the registry's layers are channelwise or linear"
        intact = split.linear.prefix(maps, *context)
        mixed = split.linear.mix(intact)
        shares = work_of(split.linear.mix, intact) + Work(0, count * 4 * mixed.numel())
        ablation = shares + (activations_of(split.linear.suffix, mixed, *context) + activations_of(head, embedding)) * (
            count
        )
        weights = sum(p.numel() for m in (split.linear.suffix, head) for p in m.parameters())
        ablation = ablation + Work(0, 4 * weights)  # read once for all maps
    return Floor(trunk + tail + scoring, trunk + tail + scoring + ablation)


def work_of(module: nn.Module, *inputs: Tensor) -> Work:
    """Count one call of a module."""
    found = activations_of(module, *inputs)
    return found + Work(0, 4 * sum(parameter.numel() for parameter in module.parameters()))


def activations_of(module: nn.Module, *inputs: Tensor) -> Work:
    """Count one call of a module without reading its weights."""
    moved = 0

    def count(_module: nn.Module, given: tuple[Any, ...], output: Any) -> None:
        nonlocal moved
        moved += sum(value.nbytes for value in (*given, output) if isinstance(value, Tensor))

    leaves: list[Callable[[], None]] = [
        leaf.register_forward_hook(count).remove for leaf in module.modules() if not list(leaf.children())
    ]
    try:
        with FlopCounterMode(display=False) as counter:
            module(*inputs)
    finally:
        for remove in leaves:
            remove()
    return Work(counter.get_total_flops() / 2, moved)

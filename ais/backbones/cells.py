"""Where in the input the cells of a feature map look: strides and offsets of convolutions and pools, added up.

A map of h × w cells is usually stretched over the whole input. That is right for the VGGs, whose pools have even
kernels. A ResNet's strided convolutions have odd kernels and symmetric padding: their output 0 is centred on input
pixel 0, not between pixels 0 and 1, so that after five of them the cells of a 7×7 map are centred on pixels 0, 32, 64
and so on of 224, and stretching the map over the whole input shows everything 15.5 pixels, half a cell, off.
On planted discs that costs 17 hits of 100 in the pointing game.

The arithmetic is that of Araujo, Norris and Sim, *Computing Receptive Fields of Convolutional Neural Networks*
(Distill, 2019).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn

from ais.backbones.graph import node_shapes

_WINDOWED = (nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d)


@dataclass(frozen=True)
class Cells:
    """The grid of a map along both sides, vertical first, in input pixels.

    Args:
        stride: distance between two neighbouring cells.
        first: index of the pixel that cell 0 is centred on; fractions lie between pixels.
    """

    stride: tuple[float, float]
    first: tuple[float, float]

    def after(self, module: nn.Conv2d | nn.MaxPool2d | nn.AvgPool2d) -> Cells | None:
        """Return the grid after a convolution or pool, ``None`` where its padding is not a number."""
        if isinstance(module.padding, str):
            return None
        stride, first = [], []
        for side in (0, 1):
            kernel, step, padding = (
                _side(value, side) for value in (module.kernel_size, module.stride, module.padding)
            )
            reach = (kernel - 1) * _side(getattr(module, "dilation", 1), side)
            first.append(self.first[side] + self.stride[side] * (reach / 2 - padding))
            stride.append(self.stride[side] * step)
        return Cells((stride[0], stride[1]), (first[0], first[1]))

    def extent(self, height: int, width: int) -> tuple[float, float, float, float]:
        """Left, top, right and bottom edge of a map of so many cells, in pixels of the input square.

        The edge of pixel 0 is at 0 and its centre at 0.5; a cell reaches half a stride to each side of its centre.
        """
        top = self.first[0] + 0.5 - self.stride[0] / 2
        left = self.first[1] + 0.5 - self.stride[1] / 2
        return left, top, left + width * self.stride[1], top + height * self.stride[0]


def follow_cells(network: nn.Module, layer: str, images: Tensor) -> Cells | None:
    """Follow the pixels of the input to the cells at the output of a layer.

    Args:
        network: traceable by ``torch.fx``.
        layer: qualified name of a module.
        images: an example batch that fixes the shapes (any values, any device, the meta device included).

    Returns:
        the grid; ``None`` where an operation on the way is not understood, or branches of different strides meet.
    """
    graph = fx.Tracer().trace(network)
    inside = [node for node in graph.nodes if layer in node.meta.get("nn_module_stack", {}) or node.target == layer]
    if not inside:
        return None
    shapes = node_shapes(network, graph, images)
    # Of all but what is pooled to one cell or flattened: the gate of a squeeze-and-excitation block fits any grid.
    grids: dict[fx.Node, Cells | None] = {}
    sizes: dict[fx.Node, tuple[int, ...]] = {}  # (h, w), of a reshaped map the last
    for node in graph.nodes:
        shape = shapes.get(node) or ()
        sources = [source for source in node.all_input_nodes if source in grids]
        module = network.get_submodule(str(node.target)) if node.op == "call_module" else None
        if node.op == "placeholder":
            grids[node], sizes[node] = Cells((1.0, 1.0), (0.0, 0.0)), shape[2:]
        elif sources and not (shape[2:] == (1, 1) or (module is not None and len(shape) == 2)):
            sizes[node] = shape[2:] if len(shape) == 4 else sizes[sources[0]]
            if isinstance(module, _WINDOWED):
                before = grids[sources[0]]
                grids[node] = before.after(module) if before else None
            elif any(sizes[source] != sizes[node] for source in sources):
                grids[node] = None  # it resizes, pads or cuts, in a way that is not known here
            else:
                grids[node] = _common([grids[source] for source in sources])
        if node is inside[-1]:
            return grids.get(node)
    return None


def _common(grids: list[Cells | None]) -> Cells | None:
    """The grid of a value that several branches meet in: their own, or halfway between them if only offsets differ."""
    known = [grid for grid in grids if grid is not None]
    if len(known) < len(grids) or any(grid.stride != known[0].stride for grid in known):
        return None
    count = len(known)
    first = (sum(grid.first[0] for grid in known) / count, sum(grid.first[1] for grid in known) / count)
    return Cells(known[0].stride, first)


def _side(value: Any, side: int) -> int:
    return int(value[side]) if isinstance(value, tuple) else int(value)

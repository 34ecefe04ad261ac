"""Cut a network at a layer into trunk and tail, and find out what the tail does to single feature maps.

The network is traced with ``torch.fx`` (as torchvision's own ``feature_extraction`` does). Everything that depends on
the layer's output is the *tail*; everything else is the *trunk*, run once. What the tail needs of the trunk besides
the feature maps (the shortcut of a residual block, the earlier maps of a dense block) is the *context*.

Because the kind of the tail is read off the graph, any layer of any traceable network gets the fastest exact ablation
it admits; no family needs code of its own.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from ais.backbones.spec import TailKind
from ais.errors import BackboneError

# Operations whose output channel k depends on nothing but input channel k (in eval mode).
_CHANNELWISE_MODULES = (
    nn.BatchNorm2d,
    nn.ReLU,
    nn.ReLU6,
    nn.LeakyReLU,
    nn.SiLU,
    nn.GELU,
    nn.Hardswish,
    nn.Sigmoid,
    nn.Identity,
    nn.Dropout,
    nn.Dropout2d,
    nn.MaxPool2d,
    nn.AvgPool2d,
    nn.AdaptiveAvgPool2d,
    nn.AdaptiveMaxPool2d,
)
_CHANNELWISE_FUNCTIONS = {
    F.relu,
    torch.relu,
    F.silu,
    F.gelu,
    F.max_pool2d,
    F.avg_pool2d,
    F.adaptive_avg_pool2d,
    F.adaptive_max_pool2d,
}
_SUMS: set[Any] = {operator.add, torch.add}


@dataclass(frozen=True)
class Channels:
    """Where the feature maps are in a value of the tail.

    Map k owns the indices ``offset + k * unit`` to ``offset + (k + 1) * unit - 1`` of dimension 1. ``unit`` is 1 until
    maps are flattened, then the number of pixels of a map.
    """

    offset: int
    unit: int = 1


@dataclass(frozen=True)
class LinearSplit:
    """A tail cut at the one convolution or linear layer that everything passes through.

    Args:
        prefix: ``(maps, *context) -> input of mix``, channelwise.
        mix: the ``nn.Linear`` or ``nn.Conv2d``.
        suffix: ``(output of mix, *context) -> embedding``.
        channels: where the feature maps are in the input of ``mix``.
    """

    prefix: nn.Module
    mix: nn.Linear | nn.Conv2d
    suffix: nn.Module
    channels: Channels


@dataclass(frozen=True)
class Split:
    """A network cut at a layer; ``tail(*trunk(x))`` equals ``network(x)``.

    Args:
        trunk: ``(B, 3, H, W) -> (maps (B, C, h, w), *context)``.
        tail: ``(maps, *context) -> embedding (B, D)``; writes into none of its inputs.
        kind: what the graph of the tail admits.
        coordinates: first coordinate of the embedding that belongs to map 0, for a channelwise tail.
        linear: the further cut, for a linear tail.
    """

    trunk: nn.Module
    tail: nn.Module
    kind: TailKind
    coordinates: Channels | None
    linear: LinearSplit | None


class _LeafTracer(fx.Tracer):
    """Keeps the chosen layer whole, so that its output is one value of the graph."""

    def __init__(self, layer: str) -> None:
        super().__init__()
        self._layer = layer

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return module_qualified_name == self._layer or super().is_leaf_module(m, module_qualified_name)


def map_shapes(network: nn.Module, images: Tensor) -> dict[str, tuple[int, ...]]:
    """Return the output shape ``(B, …)`` of every module that returns one tensor, in order of execution.

    Works on any device, the meta device included, where it costs no arithmetic.
    """
    shapes: dict[str, tuple[int, ...]] = {}

    def record(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                shapes[name] = tuple(output.shape)

        return hook

    handles = [module.register_forward_hook(record(name)) for name, module in network.named_modules() if name]
    try:
        with torch.no_grad():
            network(images)
    finally:
        for handle in handles:
            handle.remove()
    return shapes


def split_at(network: nn.Module, layer: str, images: Tensor) -> Split:
    """Cut ``network`` at the output of ``layer``.

    Args:
        network: in eval mode, ``(B, 3, H, W) -> (B, D)``, traceable by ``torch.fx``.
        layer: qualified name of a module of it that returns ``(B, C, h, w)`` and is called once.
        images: an example batch (any values, any device, the meta device included) that fixes the shapes.

    Raises:
        BackboneError: the network cannot be traced, the layer is not called exactly once, or what follows it
            overwrites values in a way that cannot be undone here.
    """
    try:
        graph = _LeafTracer(layer).trace(network)
    except Exception as error:  # whatever the traced forward raises
        raise BackboneError(
            f"the network cannot be traced for ablation at {layer!r}: {error}; choose another layer"
        ) from error
    calls = [node for node in graph.nodes if node.op == "call_module" and node.target == layer]
    if len(calls) != 1:
        raise BackboneError(
            f"layer {layer!r} is called {len(calls)} times in a forward pass, and ablation needs one call; "
            "choose another layer"
        )
    cut = calls[0]
    downstream = _downstream(graph, cut)
    output = next(node for node in graph.nodes if node.op == "output")
    if output not in downstream:
        raise BackboneError(f"the embedding does not depend on layer {layer!r}; choose one on the way to it")
    shapes = node_shapes(network, graph, images)
    tail_nodes = [node for node in graph.nodes if node in downstream and node is not output]
    embedding = _as_node(output.args[0])
    context = _inputs(tail_nodes, exclude=downstream | {cut})
    for node in context:
        if (shapes[node] or ())[:1] != images.shape[:1]:
            raise BackboneError(
                f"at layer {layer!r} the rest of the network needs {node.name!r}, which is not a batch of tensors; "
                "choose another layer"
            )
    _refuse_in_place(tail_nodes, layer)
    trunk_nodes = [node for node in graph.nodes if node not in downstream]
    trunk = _module(network, trunk_nodes, [], (cut, *context))
    tail = _module(network, tail_nodes, [cut, *context], embedding, in_place=False)
    states, mixing = _follow(network, tail_nodes, cut, shapes)
    kind, coordinates, linear = TailKind.GENERAL, None, None
    if embedding in states and states[embedding].unit == 1:
        kind, coordinates = TailKind.CHANNELWISE, states[embedding]
    elif mixing is not None:
        after = _downstream(graph, mixing)
        prefix_nodes = [node for node in tail_nodes if node not in after and node is not mixing]
        suffix_nodes = [node for node in tail_nodes if node in after]
        before = {cut, *prefix_nodes}
        if not any(source in before for node in suffix_nodes for source in node.all_input_nodes):
            source = mixing.all_input_nodes[0]
            module = network.get_submodule(str(mixing.target))
            assert isinstance(module, nn.Linear | nn.Conv2d)
            kind = TailKind.LINEAR
            linear = LinearSplit(
                prefix=_module(network, prefix_nodes, [cut, *context], source, in_place=False),
                mix=module,
                suffix=_module(network, suffix_nodes, [mixing, *context], embedding, in_place=False),
                channels=states[source],
            )
    return Split(trunk, tail, kind, coordinates, linear)


def _as_node(value: Any) -> fx.Node:
    if not isinstance(value, fx.Node):
        raise BackboneError("the network must return one tensor, the embedding; wrap it in a module that does")
    return value


def _refuse_in_place(nodes: Iterable[fx.Node], layer: str) -> None:
    """Refuse what `_module` does not rewrite: methods and functions such as ``x.relu_()``."""
    for node in nodes:
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
        if node.op in ("call_method", "call_function") and name.endswith("_") and not name.endswith("__"):
            raise BackboneError(
                f"after layer {layer!r} the network overwrites values by {name!r}, and ablation reads them again; "
                f"write {name.rstrip('_')!r} there"
            )


def _downstream(graph: fx.Graph, start: fx.Node) -> set[fx.Node]:
    """All nodes that depend on ``start``, without ``start``."""
    found: set[fx.Node] = set()
    for node in graph.nodes:  # topological order
        if any(source is start or source in found for source in node.all_input_nodes):
            found.add(node)
    return found


def _inputs(nodes: Iterable[fx.Node], exclude: set[fx.Node]) -> list[fx.Node]:
    """Nodes whose values ``nodes`` read from outside, in order of first use; parameters are not inputs."""
    found = dict.fromkeys(source for node in nodes for source in node.all_input_nodes if source not in exclude)
    return [node for node in found if node.op != "get_attr"]


def node_shapes(network: nn.Module, graph: fx.Graph, images: Tensor) -> dict[fx.Node, tuple[int, ...] | None]:
    """Shape of every value of the graph (``None`` where it is not a tensor)."""
    shapes: dict[fx.Node, tuple[int, ...] | None] = {}

    class Recorder(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            value = super().run_node(n)
            shapes[n] = tuple(value.shape) if isinstance(value, Tensor) else None
            return value

    with torch.no_grad():
        Recorder(network, graph=graph).run(images)
    return shapes


def _module(
    network: nn.Module,
    nodes: list[fx.Node],
    inputs: list[fx.Node],
    result: fx.Node | tuple[fx.Node, ...],
    *,
    in_place: bool = True,
) -> fx.GraphModule:
    """Build a module of ``nodes`` that shares the parameters of ``network``.

    ``in_place=False`` rewrites operations that overwrite their input, since ablation reads those inputs again.
    """
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {node: graph.placeholder(node.name) for node in inputs}

    def copy_of(node: fx.Node) -> fx.Node:
        if node not in copies:  # a parameter read from several parts
            copies[node] = graph.node_copy(node)
        return copies[node]

    root = nn.Module()
    for node in nodes:
        copies[node] = graph.node_copy(node, copy_of)
        if not in_place and "inplace" in node.kwargs:
            copies[node].kwargs = {**node.kwargs, "inplace": False}
    graph.output(tuple(map(copy_of, result)) if isinstance(result, tuple) else copy_of(result))
    for node in graph.nodes:
        if node.op == "call_module":
            module = network.get_submodule(str(node.target))
            if not in_place and getattr(module, "inplace", False):
                module = copy.copy(module)  # an activation without parameters; the network keeps its own
                module.inplace = False  # type: ignore[assignment]
            _attach(root, str(node.target), module)
        elif node.op == "get_attr":
            path, _, name = str(node.target).rpartition(".")
            setattr(_attach(root, path, None), name, getattr(network.get_submodule(path), name))
    return fx.GraphModule(root, graph)


def _attach(root: nn.Module, target: str, module: nn.Module | None) -> nn.Module:
    """Put ``module`` (or an empty one, unless there is one) at the dotted ``target`` under ``root`` and return it."""
    *path, name = target.split(".")
    for part in path:
        if not hasattr(root, part):
            setattr(root, part, nn.Module())
        root = getattr(root, part)
    if not name:
        return root
    if module is not None or not hasattr(root, name):
        setattr(root, name, module if module is not None else nn.Module())
    return getattr(root, name)


def _follow(
    network: nn.Module, nodes: list[fx.Node], cut: fx.Node, shapes: dict[fx.Node, tuple[int, ...] | None]
) -> tuple[dict[fx.Node, Channels], fx.Node | None]:
    """Follow the feature maps through the tail.

    Returns:
        where the maps are in each value that keeps them apart, and the one convolution or linear layer that mixes
        them; nothing and ``None`` where the tail admits no shortcut.
    """
    states: dict[fx.Node, Channels] = {cut: Channels(offset=0)}
    mixed: set[fx.Node] = set()
    mixing: fx.Node | None = None
    for node in nodes:
        apart = any(source in states for source in node.all_input_nodes)
        if any(source in mixed for source in node.all_input_nodes):
            if apart:
                return {}, None  # maps reach the embedding on two ways (a shortcut): the general tail
            mixed.add(node)
        elif (state := _after(network, node, states, shapes)) is not None:
            states[node] = state
        elif mixing is None and _is_plain_linear(network, node, states, shapes):
            mixing = node
            mixed.add(node)
        else:
            return {}, None  # a second mixing operation, or one that is not understood
    return states, mixing


def _is_plain_linear(
    network: nn.Module,
    node: fx.Node,
    states: dict[fx.Node, Channels],
    shapes: dict[fx.Node, tuple[int, ...] | None],
) -> bool:
    """Whether ``node`` is a convolution or linear layer in which the shares of single maps add up."""
    if node.op != "call_module" or len(node.all_input_nodes) != 1:
        return False
    source = node.all_input_nodes[0]
    module, rank = network.get_submodule(str(node.target)), len(shapes[source] or ())
    if isinstance(module, nn.Conv2d):
        zero_padded = module.padding_mode == "zeros" and not isinstance(module.padding, str)
        return rank == 4 and states[source].unit == 1 and module.groups == 1 and zero_padded
    return isinstance(module, nn.Linear) and rank == 2


def _after(
    network: nn.Module,
    node: fx.Node,
    states: dict[fx.Node, Channels],
    shapes: dict[fx.Node, tuple[int, ...] | None],
) -> Channels | None:
    """Where the maps are after ``node``, or ``None`` if it does not keep them apart (or is not known to)."""
    sources = [source for source in node.all_input_nodes if source in states]
    state, shape = states[sources[0]], shapes[sources[0]]
    assert shape is not None
    spatial = len(shape) == 4
    if node.op == "call_module":
        module = network.get_submodule(str(node.target))
        if isinstance(module, nn.Flatten):
            return _flattened(state, shape) if (module.start_dim, module.end_dim) == (1, -1) else None
        keeps = isinstance(module, _CHANNELWISE_MODULES) and (spatial or not isinstance(module, nn.BatchNorm2d))
        return state if keeps and not module.training else None
    if (node.op == "call_method" and node.target == "flatten") or node.target is torch.flatten:
        rest = node.args[1:]
        return _flattened(state, shape) if rest == (1,) and not node.kwargs else None
    if node.op != "call_function":
        return None
    if node.target in _SUMS:
        same = all(states[source] == state for source in sources)
        return state if same and all(shapes[source] == shape for source in node.all_input_nodes) else None
    if node.target is torch.cat:
        return _concatenated(node, states, shapes)
    if node.target in _CHANNELWISE_FUNCTIONS:
        return state if node.args[:1] == (sources[0],) and len(node.all_input_nodes) == 1 else None
    return None


def _flattened(state: Channels, shape: tuple[int, ...]) -> Channels:
    pixels = 1
    for side in shape[2:]:
        pixels *= side
    return Channels(offset=state.offset * pixels, unit=state.unit * pixels)


def _concatenated(
    node: fx.Node, states: dict[fx.Node, Channels], shapes: dict[fx.Node, tuple[int, ...] | None]
) -> Channels | None:
    """A concatenation along channels moves the maps by the channels that stand before them."""
    parts = node.args[0]
    dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    if dim != 1 or not isinstance(parts, list | tuple):
        return None
    found: Channels | None = None
    before = 0
    for part in parts:
        assert isinstance(part, fx.Node)
        shape = shapes[part]
        assert shape is not None
        if part in states:
            if found is not None:
                return None
            found = Channels(states[part].offset + before, states[part].unit)
        before += shape[1]
    return found

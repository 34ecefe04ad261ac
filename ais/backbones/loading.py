"""From a name to a frozen network, cut at a layer that was checked by a forward pass."""

from __future__ import annotations

import difflib
import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from ais.backbones.cells import follow_cells
from ais.backbones.graph import Split, map_shapes, split_at
from ais.backbones.registry import get_spec
from ais.backbones.spec import BackboneSpec, TailKind
from ais.backbones.weights import Weights, build_from_file, build_random, resolve_weights
from ais.errors import BackboneError
from ais.storage import Storage


@dataclass(frozen=True)
class LayerInfo:
    """The layer that is ablated.

    Args:
        name: qualified module name.
        map_shape: ``(C, h, w)`` at the backbone's input size.
        tail: what the rest of the network admits.
        extent: left, top, right, bottom edge of the maps in pixels of the input square, see `ais.backbones.cells`; the
            whole square where it cannot be followed.
    """

    name: str
    map_shape: tuple[int, int, int]
    tail: TailKind
    extent: tuple[float, float, float, float]


class Backbone(nn.Module):
    """A frozen network: normalised images ``(B, 3, S, S)`` to embeddings ``(B, D)``, always in eval mode.

    Args:
        spec: its record.
        weights: which weights it has.
        network: images to embeddings.
        split: the network cut at the layer; ``None`` where heatmaps are refused.
        layer: the layer; ``None`` likewise.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, spec: BackboneSpec, weights: Weights, network: nn.Module, split: Split | None, layer: LayerInfo | None
    ) -> None:
        super().__init__()
        self.spec = spec
        self.weights = weights
        self.layer = layer
        self.network = network
        # Not submodules: trunk and tail share the network's parameters, which must not be listed twice.
        object.__setattr__(self, "_split", split)
        self.register_buffer("mean", torch.tensor(spec.mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(spec.std).view(1, 3, 1, 1), persistent=False)
        self.requires_grad_(False)
        self.eval()

    @property
    def embedding_size(self) -> int:
        """D."""
        return self.spec.embedding_size

    @property
    def untrained(self) -> bool:
        """Whether the weights are random."""
        return self.weights.untrained

    @property
    def split(self) -> Split:
        """The network cut at its layer.

        Raises:
            BackboneError: this backbone refuses heatmaps.
        """
        split: Split | None = self._split  # type: ignore[assignment]
        if split is None:
            raise BackboneError(
                f"{self.spec.name} gives no heatmaps: {self.spec.refuses_heatmaps}; choose another for them"
            )
        return split

    def compile_trunk(self, backend: str = "inductor") -> None:
        """Let `torch.compile` make the trunk faster; the first passes, and those of another size, wait for it."""
        compiled = cast(nn.Module, torch.compile(self.split.trunk, backend=backend))
        object.__setattr__(self, "_split", replace(self.split, trunk=compiled))

    def train(self, mode: bool = True) -> Backbone:  # noqa: ARG002 - the signature of nn.Module
        """Stay in eval mode: a frozen backbone's batch-norm statistics never move, also while a head trains."""
        return super().train(False)

    def normalise(self, pixels: Tensor) -> Tensor:
        """Scale RGB pixels ``(B, S, S, 3)`` uint8 to the network's input ``(B, 3, S, S)`` float32, on their device."""
        images = pixels.permute(0, 3, 1, 2).to(torch.float32).div_(255.0)
        return images.sub_(self.mean).div_(self.std)

    def forward(self, images: Tensor) -> Tensor:
        """Return embeddings ``(B, D)`` of normalised images ``(B, 3, S, S)``."""
        return self.network(images)


def load_backbone(
    name: str | BackboneSpec,
    *,
    weights: str = "published",
    seed: int | None = None,
    layer: str | None = None,
    sha256: str | None = None,
    storage: Storage = Storage(),  # noqa: B008 - frozen
    cache: Path | None = None,
    device: str | torch.device = "cpu",
    inspected: bool = False,
) -> Backbone:
    """Load a backbone and check its layer by a forward pass.

    Args:
        name: of the registry, such as ``"resnet152"``, or a record of one's own.
        weights: ``"published"`` (or ``"imagenet"``), ``"random"``, or the address of a state dict.
        seed: of random weights; required there.
        layer: whose feature maps are ablated; the backbone's default if not given.
        sha256: expected digest of the weights file.
        storage: how to reach remote addresses.
        cache: folder for downloads.
        device: where the network is put.
        inspected: the caller has seen the result of `inspect_layer`, which is otherwise asked first: a layer that
            does not exist is refused before weights are fetched for it. The forward pass checks it in any case.

    Raises:
        BackboneError: unknown name or layer, or a layer that cannot be ablated.
        WeightsError: the weights cannot be had or do not fit.
    """
    spec = name if isinstance(name, BackboneSpec) else get_spec(name)
    if not inspected:
        inspect_layer(spec, layer)
    found, path = resolve_weights(spec, weights, seed, sha256, storage, cache)
    if path is None:
        assert found.seed is not None
        network = build_random(spec, found.seed)
    else:
        network = build_from_file(spec, path)
    network = spec.adapt(network).eval().to(device)
    if torch.device(device).type == "cuda":
        # What `Backbone.normalise` makes of pixels is in this order already, and tensor cores want it.
        network = network.to(memory_format=torch.channels_last)
    probe = torch.zeros(1, 3, spec.input_size, spec.input_size, device=device)
    split, info = _cut(spec, network, layer, probe)
    if split is not None:
        with torch.inference_mode():
            # In-place operations of the network could make trunk and tail disagree with the whole.
            probe = torch.rand(probe.shape, generator=torch.Generator().manual_seed(0)).to(device)
            whole, parts = network(probe), split.tail(*split.trunk(probe))
            if not torch.allclose(whole, parts, rtol=1e-4, atol=1e-4 * float(whole.abs().max())):
                raise BackboneError(
                    f"{spec.name} cut at {layer or spec.layer} does not compute what it computes whole; "
                    "choose another layer"
                )
    return Backbone(spec, found, network, split, info)


def inspect_layer(spec: BackboneSpec, layer: str | None = None) -> LayerInfo | None:
    """Check a layer without weights or arithmetic (on torch's meta device).

    Returns:
        the layer, or ``None`` for a backbone that predicts scores only.

    Raises:
        BackboneError: the layer does not exist or does not return ``(B, C, h, w)``; names the nearest that do.
    """
    with torch.device("meta"):
        network = spec.adapt(spec.build()).eval()
        # Two images, so that a constant of the network is not taken for a batch of one.
        probe = torch.zeros(2, 3, spec.input_size, spec.input_size)
    return _cut(spec, network, layer, probe)[1]


def _cut(
    spec: BackboneSpec, network: nn.Module, layer: str | None, probe: Tensor
) -> tuple[Split | None, LayerInfo | None]:
    if spec.refuses_heatmaps is not None:
        if layer is not None:
            raise BackboneError(f"{spec.name} has no layer to choose: {spec.refuses_heatmaps}; leave the layer out")
        return None, None
    name = layer or spec.layer
    assert name is not None
    shapes = map_shapes(network, probe)
    shape = shapes.get(name, ())
    if len(shape) != 4:
        raise BackboneError(_no_such_layer(spec, name, shapes, {module for module, _ in network.named_modules()}))
    split = split_at(network, name, probe)
    cells = follow_cells(network, name, probe)
    side = float(spec.input_size)
    extent = cells.extent(shape[2], shape[3]) if cells is not None else (0.0, 0.0, side, side)
    return split, LayerInfo(name, (shape[1], shape[2], shape[3]), split.kind, extent)


def _no_such_layer(spec: BackboneSpec, name: str, shapes: dict[str, tuple[int, ...]], modules: set[str]) -> str:
    usable = {key: shape for key, shape in shapes.items() if len(shape) == 4}
    near = difflib.get_close_matches(name, usable, n=5, cutoff=0.0)
    shown = ", ".join(f"{key} ({'×'.join(map(str, usable[key][1:]))})" for key in near)
    if name in shapes:
        reason = f"layer {name!r} of {spec.name} returns {shapes[name]}, not feature maps (B, C, h, w)"
    elif name in modules:
        reason = f"layer {name!r} of {spec.name} does not return one tensor in a forward pass"
    else:
        reason = f"{spec.name} has no layer {name!r}"
    why = dict(spec.corrections).get(name)
    return f"{reason}{f': {why}' if why else ''}; nearest: {shown}; default: {spec.layer}"


def preprocessing_fingerprint(spec: BackboneSpec, mode: str) -> str:
    """Describe everything that happens to an image before the network, for the identity of embeddings and runs."""
    numbers = ",".join(f"{value:g}" for value in (*spec.mean, *spec.std))
    return f"{mode}/{spec.input_size}of{spec.resize_size}/{spec.interpolation}/{numbers}"


def embedding_fingerprint(spec: BackboneSpec, weights: Weights, mode: str) -> str:
    """Identify embeddings: backbone, weights and preprocessing (the ablated layer does not change an embedding)."""
    parts = "\n".join((spec.name, weights.fingerprint, preprocessing_fingerprint(spec, mode)))
    return hashlib.sha256(parts.encode()).hexdigest()

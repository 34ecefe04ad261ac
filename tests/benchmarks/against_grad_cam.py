"""Exact ablation of all maps against `grad-cam` (PyPI), what people would use instead.

The same network, head, layer and image; weights random and seeded, since speed does not depend on them. grad-cam's
AblationCAM is called the usual way, where every batch of ablated maps runs the whole network again, and with its trunk
wrapped so that it runs once and only the tail is repeated (the best that can be had without changing grad-cam). Some
hundreds of maps are timed, or tens, and the rest extrapolated: every batch of maps does the same work, and all of them
would take hours. What is not extrapolated is the wrapped way.

grad-cam sets a map to zero only where the layer's smallest activation is zero, else to that minimum less ten million,
"deviating from the paper"; the layers here end in a ReLU, so that both mean the same. Its weight of map k is
``(s - s_k) / s``, checked against our ``s - s_k`` on every map that was ablated.
"""

from __future__ import annotations

import contextlib
import io
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from pytorch_grad_cam import AblationCAM, GradCAM
from pytorch_grad_cam.ablation_layer import AblationLayer
from torch import Tensor, nn

from ais import Explainer, RegressionHead, load_backbone
from ais.ablation import ablated_embeddings, channelwise_effects, replaced_coordinates, run_trunk
from ais.backbones import Backbone, TailKind
from ais.heads import HeadEnsemble
from tests.benchmarks.tables import grid, paragraph, show
from tests.benchmarks.timing import paired

CASES = (("resnet152", "features.7.2"), ("barlow_twins", "features.7.2"), ("vgg16", "features.29"))
BATCH = 32  # grad-cam's own default
USUAL_MAPS = 32


class SomeMaps(AblationLayer):
    """grad-cam's layer, for the first maps only."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self._count = count

    def activations_to_be_ablated(self, activations: np.ndarray, ratio_channels_to_ablate: float = 1.0) -> np.ndarray:
        super().activations_to_be_ablated(activations, ratio_channels_to_ablate)
        self.indices = self.indices[: self._count]
        return self.indices


class TrunkOnce(nn.Module):
    """A network whose trunk runs once, for one image, however often it is called; ``layer`` is what is ablated."""

    def __init__(self, backbone: Backbone, head: HeadEnsemble) -> None:
        super().__init__()
        self._backbone = backbone
        self.head = head
        self.layer = nn.Identity()
        self._kept: tuple[Tensor, tuple[Tensor, ...]] | None = None

    def forward(self, images: Tensor) -> Tensor:
        if self._kept is None:
            self._kept = run_trunk(self._backbone.split, images[:1])
        maps, context = self._kept
        maps = self.layer(maps)
        return self.head(self._backbone.split.tail(maps, *(value.expand(len(maps), -1, -1, -1) for value in context)))

    def forget(self) -> None:
        """Run the trunk at the next call."""
        self._kept = None


def measure(name: str, layer: str, runs: int = 5) -> dict[str, Any]:
    """Measure one backbone; returns a row of the table."""
    backbone = load_backbone(name, weights="random", seed=0, layer=layer)
    torch.manual_seed(0)
    explainer = Explainer(backbone, RegressionHead(backbone.embedding_size, 512))
    side = backbone.spec.input_size
    images = [np.random.default_rng(0).integers(0, 255, (side, side, 3), dtype=np.uint8)]
    batch = explainer.preprocess(images)
    maps = backbone.layer.map_shape[0]
    ours = explainer(images)
    score = float(ours.scores[0])

    usual, usual_s, intact_s = _usual(explainer, batch, layer)
    agreement = _difference(usual[:USUAL_MAPS] * score, ours.importance[0, :USUAL_MAPS])
    usual_all_s = intact_s + (usual_s - intact_s) / USUAL_MAPS * maps

    wrapped = TrunkOnce(backbone, explainer.head)
    wrapped_cam = AblationCAM(model=wrapped, target_layers=[wrapped.layer], batch_size=BATCH)

    def call_wrapped() -> np.ndarray:
        wrapped.forget()
        return _weights_of(wrapped_cam, batch)

    agreement = max(agreement, _difference(call_wrapped() * score, ours.importance[0]))
    # Measured: 1.4e-5 at most; a map that is ablated otherwise differs by all of its effect.
    assert agreement < 1e-4, f"AblationCAM's weights differ by {agreement:.1e} of the largest effect"
    against_wrapped = paired(call_wrapped, lambda: explainer(images), runs)
    alone = _ablations(explainer, batch)
    alone_ratio = paired(lambda: _weights_of(wrapped_cam, batch), alone, runs)
    return {
        "backbone": name,
        "layer": layer,
        "maps": maps,
        "explainer_s": round(against_wrapped.denominator_s, 3),
        "usual_over_explainer": round(usual_all_s / against_wrapped.denominator_s),
        "usual_maps_timed": USUAL_MAPS,
        "wrapped_over_explainer": against_wrapped.as_dict(),
        "wrapped_over_explainer_without_trunks": alone_ratio.as_dict(),
        "largest_difference_of_weights": float(f"{agreement:.1e}"),
        **_backward(explainer, batch, layer, alone, runs),
    }


def _ablations(explainer: Explainer, batch: Tensor) -> Callable[[], None]:
    """All ablations of one image, given what the forward pass leaves."""
    split, head = explainer.backbone.split, explainer.head
    with torch.inference_mode():
        maps, context = run_trunk(split, batch)
        embeddings = split.tail(maps, *context)

    @torch.inference_mode()
    def ablations() -> None:
        if split.kind is TailKind.CHANNELWISE:
            first, changes = replaced_coordinates(split, maps, context, embeddings)
            channelwise_effects(head.variants[0], embeddings, first, changes)
        else:
            for ablated in ablated_embeddings(split, maps, context):
                head(ablated[0])

    return ablations


def _usual(explainer: Explainer, batch: Tensor, layer: str) -> tuple[np.ndarray, float, float]:
    """Weights of the first maps by AblationCAM as people call it; seconds; seconds with no map ablated."""
    module = explainer.module
    target = explainer.backbone.network.get_submodule(layer)
    seconds = []
    for count in (0, USUAL_MAPS):
        cam = AblationCAM(module, [target], ablation_layer=SomeMaps(count), batch_size=BATCH)
        _weights_of(cam, batch) if count == 0 else None  # warm
        started = time.process_time()
        weights = _weights_of(cam, batch)
        seconds.append(time.process_time() - started)
    return weights, seconds[1], seconds[0]


def _weights_of(cam: AblationCAM, batch: Tensor) -> np.ndarray:
    """Channel weights ``(C,)`` of one image, by everything that grad-cam does up to them."""
    with torch.no_grad(), contextlib.redirect_stderr(io.StringIO()):  # its progress bar
        cam.activations_and_grads(batch)
        activations = cam.activations_and_grads.activations[0].numpy()
        weights = cam.get_cam_weights(batch, cam.target_layers[0], [_score], activations, None)
    return weights[0]


def _score(output: Tensor) -> Tensor:
    """grad-cam's target: the score itself."""
    return output


def _difference(theirs: np.ndarray, ours: Tensor) -> float:
    """Largest difference, relative to the largest effect."""
    return float(np.abs(theirs - ours.numpy()).max() / ours.abs().max())


def _backward(
    explainer: Explainer, batch: Tensor, layer: str, ablations: Callable[[], None], runs: int
) -> dict[str, Any]:
    """What all ablations cost beyond the forward pass, over the backward pass of plain Grad-CAM.

    As grad-cam calls it (gradients down to the first layer, since they are asked of all parameters), and as short as it
    can be made (from the score to the layer's maps and no further).
    """
    backbone, head = explainer.backbone, explainer.head
    split = backbone.split
    module = explainer.module
    cam = GradCAM(module, [backbone.network.get_submodule(layer)])
    module.requires_grad_(True)
    try:
        outputs = cam.activations_and_grads(batch)

        def whole_backward() -> None:
            module.zero_grad()
            outputs.sum().backward(retain_graph=True)

        whole = paired(ablations, whole_backward, runs)
    finally:
        module.requires_grad_(False)
        cam.activations_and_grads.release()
    with torch.no_grad():
        maps, context = run_trunk(split, batch)
    leaf = maps.clone().requires_grad_(True)
    tail_score = head(split.tail(leaf, *context)).sum()
    short = paired(ablations, lambda: torch.autograd.grad(tail_score, leaf, retain_graph=True), runs)
    return {"ablations_over_grad_cam_backward": whole.as_dict(), "ablations_over_shortest_backward": short.as_dict()}


def rows(only: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Measure every case."""
    return [measure(name, layer) for name, layer in CASES if not only or name in only]


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    difference = max(row["largest_difference_of_weights"] for row in rows)
    text = f"""
        **Against [`grad-cam`](https://github.com/jacobgil/pytorch-grad-cam)**, whose AblationCAM gives the same channel
        weights (largest difference {difference:.0e} of the largest effect); one image, one thread. *As called*:
        extrapolated from {rows[0]["usual_maps_timed"]} maps. *Trunk once*: its trunk wrapped so that only the tail is
        repeated; both sides then contain one pass of the trunk, and the next column leaves it out of both. The last
        two: all ablations over the backward pass of plain Grad-CAM as called, and over one cut off at the layer.
        """
    names = (
        "wrapped_over_explainer",
        "wrapped_over_explainer_without_trunks",
        "ablations_over_grad_cam_backward",
        "ablations_over_shortest_backward",
    )
    header = ("backbone", "layer", "AblationCAM as called ÷ ours", "trunk once ÷ ours", "without trunks")
    cells = [
        (row["backbone"], f"`{row['layer']}`", f"{row['usual_over_explainer']:,}", *(show(row[name]) for name in names))
        for row in rows
    ]
    return paragraph(text) + "\n" + grid((*header, "ablations ÷ Grad-CAM's backward", "÷ shortest backward"), cells)

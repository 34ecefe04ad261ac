"""What is known about a backbone, in one frozen record; `tests/unit/test_backbones.py` recomputes every claim."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Literal

from torch import nn


class TailKind(Enum):
    """What follows the layer, as far as ablation is concerned (DESIGN section 3).

    ``CHANNELWISE``: every operation acts on each map alone up to the embedding, so one pass with all maps zeroed gives
    every single ablation. ``LINEAR``: channelwise up to one convolution or linear layer that everything passes
    through, so a map's share is subtracted there. ``GENERAL``: anything else; the tail is run for every map.
    """

    CHANNELWISE = "channelwise"
    LINEAR = "linear"
    GENERAL = "general"

    # Not a `StrEnum`, which Ray Data takes for text and hands to its statistics as it is: their actor would import this
    # package, and torch with it, at the start of every job.
    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True)
class PublishedWeights:
    """Where the authors publish the weights.

    Args:
        url: address of the state dict, loaded without unpickling code (``weights_only=True``).
        sha256: the published SHA-256 in hexadecimal, or a published prefix of it (torchvision publishes the first
            eight digits in the file name); ``None`` where the authors publish none, in which case the digest seen at
            the first download is kept and later downloads must match it.
        licence: under which the authors publish the weights.
        source: what to cite.
    """

    url: str
    sha256: str | None
    licence: str
    source: str


@dataclass(frozen=True)
class BackboneSpec:
    """The facts of one backbone.

    Args:
        name: as configurations name it.
        build: makes the network with its classifier, as the published state dict expects it (float32, untrained).
        adapt: makes of it the network ``(B, 3, H, W) -> (B, embedding_size)`` whose module names this package uses.
        published: the published weights; ``None`` for a network that has none.
        input_size: side of the square input in pixels.
        resize_size: the shorter side is resized to this many pixels before the centre crop.
        interpolation: ``"bilinear"`` or ``"bicubic"``, antialiased.
        mean: per channel, of RGB in [0, 1].
        std: per channel, of RGB in [0, 1].
        layer: default layer whose feature maps are ablated; ``None`` where heatmaps are refused.
        map_shape: ``(C, H, W)`` of the default layer at ``input_size``.
        embedding_size: D.
        tail: kind of the tail at the default layer.
        classifier: prefixes of state dict keys that the embedding does not use; they may be absent.
        refuses_heatmaps: the reason, where heatmaps are refused.
        other_layers: further layers that the project's notes name or mean, with their ``(C, H, W)``.
        corrections: layer names in the notes that do not exist, each with the reason and what to use.
        rename_key: old name of a state dict key to its present name, for files written by old releases.
    """

    name: str
    build: Callable[[], nn.Module]
    adapt: Callable[[nn.Module], nn.Module]
    published: PublishedWeights | None
    input_size: int
    resize_size: int
    interpolation: Literal["bilinear", "bicubic"]
    layer: str | None
    map_shape: tuple[int, int, int] | None
    embedding_size: int
    tail: TailKind | None
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    classifier: tuple[str, ...] = ()
    refuses_heatmaps: str | None = None
    other_layers: tuple[tuple[str, tuple[int, int, int]], ...] = ()
    corrections: tuple[tuple[str, str], ...] = ()
    rename_key: Callable[[str], str] | None = None

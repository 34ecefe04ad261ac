"""Similarity where the tail mixes maps (the VGGs): every ablated embedding is needed, none is kept.

N images, C maps, D embedding coordinates. All N × C ablated embeddings would take N · C · D numbers (1 GB for VGG16 and
120 images); here the images go through the maps in step, a chunk of maps at a time, and only similarities remain.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ais.ablation import ablated_embeddings, run_trunk
from ais.backbones import Backbone
from ais.importance.similarity import similarity_of, unit_rows

_CHUNK = 16


@torch.inference_mode()
def general_similarities(
    backbone: Backbone,
    batches: list[Tensor],
    level: Literal["collective", "individual"],
    chunk: int | None = None,
) -> tuple[np.ndarray, Iterator[np.ndarray]]:
    """Similarities for any kind of tail, intact and with each map ablated.

    Args:
        backbone: cut at its layer.
        batches: normalised images ``(b, 3, S, S)``, N in all.
        level: ``"collective"`` ablates a map in all images, ``"individual"`` in image i (row) alone.
        chunk: maps ablated at once.

    Returns:
        the intact similarity ``(N, N)`` float64, and parts ``(c, N, N)`` of the C others, map 0 first.
    """
    split = backbone.split
    trunks = [run_trunk(split, images) for images in batches]
    embeddings = np.concatenate([split.tail(maps, *context).cpu().numpy() for maps, context in trunks])
    return similarity_of(embeddings), _ablated(backbone, trunks, embeddings, level, chunk)


@torch.inference_mode()
def _ablated(
    backbone: Backbone,
    trunks: list[tuple[Tensor, tuple[Tensor, ...]]],
    embeddings: np.ndarray,
    level: Literal["collective", "individual"],
    chunk: int | None,
) -> Iterator[np.ndarray]:
    # Batches of images advance in step: each yields its part of the same chunk of maps.
    streams = [ablated_embeddings(backbone.split, maps, context, chunk or _CHUNK) for maps, context in trunks]
    intact = unit_rows(embeddings.astype(np.float64))
    for parts in zip(*streams, strict=True):
        ablated = unit_rows(torch.cat(parts).cpu().numpy().astype(np.float64).swapaxes(0, 1))  # (c, N, D)
        yield ablated @ (ablated.swapaxes(1, 2) if level == "collective" else intact.T)

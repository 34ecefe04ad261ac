"""Similarity AIS where the tail mixes maps (the VGGs): every ablated embedding is needed, none is kept.

N images, C maps, D embedding coordinates. All N × C ablated embeddings would take N · C · D numbers (1 GB for VGG16 and
120 images); here the images go through the maps in step, a chunk of maps at a time, and only agreements remain.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ais.ablation import ablated_embeddings, run_trunk
from ais.backbones import Backbone
from ais.importance.similarity import collective_ais_of, individual_ais_of

_CHUNK = 16


@torch.inference_mode()
def general_similarity_ais(
    backbone: Backbone,
    batches: list[Tensor],
    human: np.ndarray,
    level: Literal["collective", "individual"],
    chunk: int | None = None,
) -> np.ndarray:
    """AIS of the similarity objective for any kind of tail.

    Args:
        backbone: cut at its layer.
        batches: normalised images ``(b, 3, S, S)``, N in all, in the order of the matrix.
        human: ``(N, N)``, checked by `ais.importance.similarity.check_human_matrix`.
        level: ``"collective"`` gives ``(C,)``, ``"individual"`` ``(N, C)``.
        chunk: maps ablated at once.
    """
    split = backbone.split
    trunks = [run_trunk(split, images) for images in batches]
    embeddings = np.concatenate([split.tail(maps, *context).cpu().numpy() for maps, context in trunks])
    # Batches of images advance in step: each yields its part of the same chunk of maps.
    streams = [ablated_embeddings(split, maps, context, chunk or _CHUNK) for maps, context in trunks]
    found = []
    for parts in zip(*streams, strict=True):
        ablated = torch.cat(parts).cpu().numpy()  # (N, c, D)
        if level == "collective":
            found.append(collective_ais_of((ablated[:, k] for k in range(ablated.shape[1])), embeddings, human))
        else:
            rows = [individual_ais_of(ablated[i], embeddings, i, human) for i in range(len(embeddings))]
            found.append(np.stack(rows))
    return np.concatenate(found, axis=-1)

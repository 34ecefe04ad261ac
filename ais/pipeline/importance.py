"""AIS over a set of images, streamed through the same stages as the heatmaps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import ray.data
import torch

from ais.ablation import ablate, replaced_coordinates, run_trunk
from ais.backbones import TailKind
from ais.config import AblatingComputeConfig, ComputeConfig
from ais.errors import AisError, RunError
from ais.explainer import geometry_of
from ais.heads import HeadSource
from ais.images import Limits
from ais.importance.effects import EffectSums
from ais.listing import ListedImage
from ais.pipeline.cluster import Pools, cluster_pools, set_up_ray_data
from ais.pipeline.explain import BackboneSource
from ais.pipeline.fetch import listing_table
from ais.pipeline.gather import Gathered, GatherSink
from ais.pipeline.heatmaps import fetched, worker_failure
from ais.pipeline.network import NetworkStage
from ais.pipeline.progress import Progress
from ais.pipeline.sink import Unreadable

_KEPT = ["image_id", "uri", "rating"]


class Effects(NetworkStage):
    """Callable stage: ``pixels`` → ``score`` and ``effects (C)``, by exact ablation. Arguments as `NetworkStage`, and:

    Args:
        head: whose scores they are effects on.
        chunk: maps ablated at once.
    """

    def __init__(self, head: HeadSource, chunk: int | None, source: BackboneSource, **shared: Any) -> None:
        super().__init__(source, **shared)
        self._head = head.load().to(self.device)
        self._chunk = chunk

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Ablate every map in every image of a batch."""
        good, images = self.good_images(batch)
        if not len(good):
            assert self.backbone.layer is not None
            nothing = np.zeros((0, self.backbone.layer.map_shape[0]))
            return self.returned(batch, _KEPT, good, score=np.zeros((0, 1)), effects=nothing)
        result = ablate(self.backbone, self._head, images, chunk=self._chunk)
        scores, effects = result.scores.cpu().numpy()[:, None], result.effects.cpu().numpy()
        return self.returned(batch, _KEPT, good, score=scores, effects=effects)


class Coordinates(NetworkStage):
    """Callable stage: ``pixels`` → ``embedding (D)`` and, for channelwise tails, ``replacements (C)``."""

    @torch.inference_mode()
    def __call__(self, batch: pa.Table) -> pa.Table:
        """Embed a batch, intact and with each map ablated."""
        good, images = self.good_images(batch)
        split, layer = self.backbone.split, self.backbone.layer
        assert layer is not None
        maps = layer.map_shape[0] if split.kind is TailKind.CHANNELWISE else 0
        if not len(good):
            empty = np.zeros((0, self.backbone.embedding_size))
            return self.returned(batch, _KEPT, good, embedding=empty, replacements=np.zeros((0, maps)))
        feature_maps, context = run_trunk(split, images)
        embeddings = split.tail(feature_maps, *context)
        replacements = np.zeros((len(good), maps), np.float32)
        if split.kind is TailKind.CHANNELWISE:
            first, changes = replaced_coordinates(split, feature_maps, context, embeddings)
            replacements = (embeddings[:, first : first + maps] + changes).cpu().numpy()
        return self.returned(batch, _KEPT, good, embedding=embeddings.cpu().numpy(), replacements=replacements)


def effects_over(
    images: Sequence[ListedImage],
    ratings: Sequence[float] | None,
    source: BackboneSource,
    head: HeadSource,
    preprocessing: str,
    limits: Limits,
    compute: AblatingComputeConfig,
    maps: int,
) -> tuple[EffectSums, list[Unreadable]]:
    """Ablate every map in every image and add up the effects.

    Args:
        images: the set.
        ratings: one for each, or ``None``.
        source: of the backbone.
        head: whose scores they are effects on.
        preprocessing: ``"center_crop"`` or ``"letterbox"``.
        limits: on one image.
        compute: where and how.
        maps: C.

    Raises:
        RunError: the pipeline stopped, or no image could be used.
    """
    arguments = {"source": source, "head": head, "chunk": compute.chunk}
    widths = {"score": 1, "effects": maps}
    gathered = _stream(Effects, arguments, widths, images, ratings, source, preprocessing, limits, compute)
    if not gathered.sums:
        raise RunError(
            f"none of the {len(images)} images could be used; the first: {gathered.unreadable[0]}; "
            "check that they can be read from here"
        )
    return EffectSums.merge(gathered.sums), gathered.unreadable


def coordinates_over(
    images: Sequence[ListedImage],
    source: BackboneSource,
    preprocessing: str,
    limits: Limits,
    compute: ComputeConfig,
    maps: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Embed every image, intact and with each map ablated.

    Returns:
        embeddings ``(N, D)`` and replacements ``(N, maps)``, in the order of the images.

    Raises:
        RunError: the pipeline stopped, or an image could not be used: a similarity matrix has no room for a gap.
    """
    widths = {"embedding": source.spec.embedding_size, "replacements": maps}
    gathered = _stream(Coordinates, {"source": source}, widths, images, None, source, preprocessing, limits, compute)
    if gathered.unreadable:
        first = gathered.unreadable[0]
        raise RunError(
            f"{len(gathered.unreadable)} of {len(images)} images could not be used, the first {first.uri!r} "
            f"({first.error}); take them out of the list and the matrix"
        )
    order = np.argsort(np.concatenate([ids for ids, _, _ in gathered.arrays]))
    embeddings = np.concatenate([embedding for _, embedding, _ in gathered.arrays])[order]
    return embeddings, np.concatenate([replacements for _, _, replacements in gathered.arrays])[order]


def _stream(
    stage: type[NetworkStage],
    arguments: dict[str, Any],
    widths: dict[str, int],
    images: Sequence[ListedImage],
    ratings: Sequence[float] | None,
    source: BackboneSource,
    preprocessing: str,
    limits: Limits,
    compute: ComputeConfig,
) -> Gathered:
    if not images:
        raise AisError("there are no images to work on; give a folder, glob or list that has some")
    set_up_ray_data()
    pools = cluster_pools(compute, len(images))
    geometry = geometry_of(source.spec, preprocessing)
    with Progress("images", len(images), stall_minutes=compute.stall_minutes) as progress:
        units = ray.data.from_arrow(_units(images, ratings, pools))
        rows = fetched(units, geometry, limits, source.storage, compute, pools).map_batches(
            stage,
            batch_format="pyarrow",
            **pools.scoring_options(),
            fn_constructor_kwargs={
                **arguments,
                "preprocessing": preprocessing,
                "device": compute.device,
                "threads": pools.scoring_threads,
                "progress": progress.meter,
            },
        )
        sink = GatherSink(widths)
        try:
            rows.write_datasink(sink, ray_remote_args={"num_cpus": pools.writing_cpus})
        except ray.exceptions.RayError as error:
            raise RunError(f"the pipeline stopped: {worker_failure(error)}; start the same command again") from error
    return sink.gathered


def _units(images: Sequence[ListedImage], ratings: Sequence[float] | None, pools: Pools) -> list[pa.Table]:
    rating = np.full(len(images), np.nan) if ratings is None else np.asarray(ratings, np.float64)
    table = listing_table(images).append_column("rating", pa.array(rating))
    return [table.slice(start, pools.batch) for start in range(0, table.num_rows, pools.batch)]

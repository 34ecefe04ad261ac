"""Embeddings of rated images, computed once on Ray Data and kept in the embedding cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import ray.data
import torch
from ray.data import ActorPoolStrategy

from ais.config import ComputeConfig
from ais.embeddings import EmbeddingCache
from ais.errors import RunError
from ais.explainer import geometry_of
from ais.images import Limits
from ais.pipeline.cluster import cluster_pools, quiet_ray_data
from ais.pipeline.columns import pack, replace, unpack
from ais.pipeline.explain import BackboneSource, choose_device
from ais.pipeline.heatmaps import fetched, worker_failure
from ais.pipeline.progress import Progress
from ais.pipeline.sink import CacheSink, Unreadable
from ais.runs import ListedImage


class Embed:
    """Callable stage: table with ``pixels`` → ``embedding`` instead.

    Args:
        source: of the backbone.
        preprocessing: mode under which the pixels were made.
        device: ``"auto"``, ``"cpu"`` or ``"cuda"``.
        threads: of torch on the CPU.
        progress: actor that counts.
    """

    def __init__(
        self, source: BackboneSource, preprocessing: str, device: str, threads: int | None, progress: Any
    ) -> None:
        if threads is not None:
            torch.set_num_threads(threads)
        self._device = choose_device(device)
        self._backbone = source.load(self._device)
        self._side = geometry_of(self._backbone.spec, preprocessing).input_size
        self._progress = progress

    @torch.inference_mode()
    def __call__(self, batch: pa.Table) -> pa.Table:
        """Embed the rows that have pixels; rows with an error pass through."""
        embeddings = np.zeros((batch.num_rows, self._backbone.embedding_size), np.float32)
        stages, reasons, errors = (np.array(batch[name].to_pylist(), object) for name in ("stage", "reason", "error"))
        good = np.flatnonzero(stages == "")
        if len(good):
            pixels = torch.from_numpy(unpack(batch["pixels"], (self._side, self._side, 3), np.uint8)[good])
            images = self._backbone.normalise(pixels.to(self._device))
            embeddings[good] = self._backbone(images).cpu().numpy()
            unusable = good[~np.isfinite(embeddings[good]).all(1)]
            stages[unusable], reasons[unusable] = "score", "not finite"
            errors[unusable] = "the network gave an embedding that is not finite"
        self._progress.add.remote(batch.num_rows, int((stages != "").sum()))
        columns = {
            name: pa.array(values, pa.string())
            for name, values in (("stage", stages), ("reason", reasons), ("error", errors))
        }
        return replace(batch.select(["uri", "version"]), [], embedding=pack(embeddings), **columns)


def embed_images(
    images: Sequence[ListedImage],
    cache: EmbeddingCache,
    source: BackboneSource,
    preprocessing: str,
    limits: Limits,
    compute: ComputeConfig,
) -> list[Unreadable]:
    """Compute the embeddings of images that the cache does not have, and put them there.

    Args:
        images: to embed.
        cache: of this backbone, weights and preprocessing.
        source: of the backbone.
        preprocessing: ``"center_crop"`` or ``"letterbox"``.
        limits: on one image.
        compute: where and how.

    Returns:
        the images that could not be used, with the reason of each.

    Raises:
        RunError: the pipeline stopped; embeddings computed so far stay in the cache.
    """
    if not images:
        return []
    quiet_ray_data()
    pools = cluster_pools(compute)
    table = pa.table(
        {
            "image_id": pa.array(np.arange(len(images))),
            "uri": pa.array([image.uri for image in images], pa.string()),
            "size": pa.array([image.size for image in images], pa.int64()),
            "version": pa.array([image.version for image in images], pa.string()),
        }
    )
    units = [table.slice(start, pools.batch) for start in range(0, table.num_rows, pools.batch)]
    with Progress("embeddings", len(images)) as progress:
        geometry = geometry_of(source.spec, preprocessing)
        rows = fetched(ray.data.from_arrow(units), geometry, limits, source.storage, compute, pools)
        rows = rows.map_batches(
            Embed,
            batch_format="pyarrow",
            batch_size=pools.batch,
            compute=ActorPoolStrategy(size=pools.scoring_actors),
            num_cpus=pools.scoring_cpus,
            num_gpus=pools.scoring_gpus,
            fn_constructor_kwargs={
                "source": source,
                "preprocessing": preprocessing,
                "device": compute.device,
                "threads": pools.scoring_threads,
                "progress": progress.counter,
            },
        )
        sink = CacheSink(cache, source.spec.embedding_size)
        try:
            rows.write_datasink(sink, ray_remote_args={"num_cpus": pools.task_cpus})
        except ray.exceptions.RayError as error:
            raise RunError(
                f"embedding stopped: {worker_failure(error)}; what is computed is kept, the same command continues"
            ) from error
    return sink.unreadable

"""Embeddings of rated images, computed once on Ray Data and kept in the embedding cache."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import ray
import ray.data
import torch

from ais.config import ComputeConfig
from ais.embeddings import EmbeddingCache
from ais.errors import RunError
from ais.explainer import geometry_of
from ais.images import Limits
from ais.listing import ListedImage
from ais.pipeline.cluster import cluster_pools, set_up_ray_data
from ais.pipeline.explain import BackboneSource
from ais.pipeline.fetch import listing_table
from ais.pipeline.heatmaps import fetched, worker_failure
from ais.pipeline.network import NetworkStage
from ais.pipeline.progress import Progress
from ais.pipeline.sink import CacheSink, Unreadable


class Embed(NetworkStage):
    """Callable stage: table with ``pixels`` → ``embedding (D)`` instead. Arguments as `NetworkStage`."""

    @torch.inference_mode()
    def __call__(self, batch: pa.Table) -> pa.Table:
        """Embed the rows that have pixels; rows with an error pass through."""
        good, images = self.good_images(batch)
        size = self.backbone.embedding_size
        embeddings = self.backbone(images).cpu().numpy() if len(good) else np.zeros((0, size), np.float32)
        return self.returned(batch, ["uri", "version"], good, embedding=embeddings)


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
    set_up_ray_data()
    pools = cluster_pools(compute, len(images))
    versions = pa.array([image.version for image in images], pa.string())
    table = listing_table(images).append_column("version", versions)
    units = [table.slice(start, pools.batch) for start in range(0, table.num_rows, pools.batch)]
    with Progress("embeddings", len(images), stall_minutes=compute.stall_minutes) as progress:
        geometry = geometry_of(source.spec, preprocessing)
        rows = fetched(ray.data.from_arrow(units), geometry, limits, source.storage, compute, pools)
        rows = rows.map_batches(
            Embed,
            batch_format="pyarrow",
            **pools.scoring_options(),
            fn_constructor_kwargs={
                "source": source,
                "preprocessing": preprocessing,
                "device": compute.device,
                "threads": pools.scoring_threads,
                "progress": progress.meter,
            },
        )
        sink = CacheSink(cache, source.spec.embedding_size)
        try:
            rows.write_datasink(sink, ray_remote_args={"num_cpus": pools.writing_cpus})
        except ray.exceptions.RayError as error:
            raise RunError(
                f"embedding stopped: {worker_failure(error)}; what is computed is kept, the same command continues"
            ) from error
    return sink.unreadable

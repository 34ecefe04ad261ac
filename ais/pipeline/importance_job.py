"""The importance job: what it needs, what it computes for each objective, what it writes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import torch

from ais.backbones import TailKind
from ais.config import ImportanceConfig
from ais.errors import RatingsError, RunError
from ais.explainer import geometry_of
from ais.heads import HeadSource, read_record
from ais.images import Limits
from ais.importance import ImportanceRecord, save_importance
from ais.importance.general import general_similarities
from ais.importance.jackknife import JackknifedAIS, agreement_interval, jackknifed_ais
from ais.importance.matrix import read_matrix
from ais.importance.ranking import by_image_table, effects_table, ranking_png, similarity_table
from ais.importance.similarity import (
    check_human_matrix,
    collective_similarities,
    individual_similarities,
    similarity_of,
)
from ais.listing import ListedImage, list_images
from ais.pipeline.cluster import Pools, cluster_pools
from ais.pipeline.columns import unpack
from ais.pipeline.explain import choose_device, set_up_process
from ais.pipeline.fetch import FetchDecode, listing_table
from ais.pipeline.heatmaps import worker_failure
from ais.pipeline.importance import coordinates_over, effects_over
from ais.pipeline.prepare import Model, resolve_model, storage_of, versions
from ais.pipeline.progress import TaskProgress
from ais.pipeline.sink import Unreadable
from ais.ratings import MIN_RATED, Ratings, held_out_images, ratings_fingerprint, read_ratings, with_absolute_addresses
from ais.settings import to_yaml
from ais.storage import Storage, absolute

_FEWEST = 3
_MAY_BE_FITTED = "that the head may have been fitted to"

_SIGN = {
    "prediction": "mean of s - s_k: positive where the map raises the score",
    "error": "mean of |s_k - y| - |s - y|: positive where the map brings predictions nearer to the ratings",
    "collective": "R²(all maps) - R²(without the map): positive where the map adds to the agreement with people",
    "individual": "mean over images of r - r(without the map in that image): positive where the map adds to agreement",
}
_SIGN_AGAINST_PEOPLE = "R²(all maps) - R²(without the map): positive where the map adds to R², here of a disagreement"
_AGAINST_PEOPLE = (
    "R is not positive: the model finds those images alike that the matrix gives small numbers. Larger numbers of the "
    "matrix must mean more alike; of a matrix of distances, give the negative. If they do, model and people disagree"
)


@dataclass(frozen=True)
class PreparedImportance:
    """An importance job that can start.

    Args:
        config: with local paths absolute.
        storage: how to reach addresses.
        model: backbone, layer and weights.
        images: the set, in the order of the matrix for ``similarity``.
        ratings: one for each image, for ``error``.
        human: the checked matrix, for ``similarity``.
        head: SHA-256 of the head's weights, where one is used.
        seen: what the head knows of the images, in words, for ``error``.
    """

    config: ImportanceConfig
    storage: Storage
    model: Model
    images: list[ListedImage]
    ratings: np.ndarray | None
    human: np.ndarray | None
    head: str | None
    seen: str | None = None

    @property
    def limits(self) -> Limits:
        """Bounds on one image."""
        return Limits(**self.config.limits.model_dump())

    def describe(self) -> str:
        """Say in a few lines what would be done."""
        weights, layer = self.model.weights, self.model.layer
        trained = f"UNTRAINED, random with seed {weights.seed}" if weights.untrained else weights.source
        level = f", {self.config.level}" if self.config.objective == "similarity" else ""
        return "\n".join(
            (
                f"objective   {self.config.objective}{level}",
                f"images      {len(self.images):,}{f' {self.seen}' if self.seen else ''}",
                f"backbone    {self.model.source.spec.name} ({trained})",
                f"layer       {layer.name}: {'×'.join(map(str, layer.map_shape))}, {layer.tail} tail",
                f"output      {self.config.output}",
            )
        )


@dataclass(frozen=True)
class ImportanceResult:
    """What was found.

    Args:
        table: with ``map``, ``ais`` and ``rank`` at least.
        details: for ``importance.json``.
        unreadable: images that could not be used.
        by_image: individual AIS of every image, for ``level=individual``.
    """

    table: pa.Table
    details: dict[str, Any]
    unreadable: list[Unreadable]
    by_image: pa.Table | None = None


def prepare_importance(config: ImportanceConfig) -> PreparedImportance:
    """Check everything that can be checked without reading an image.

    Raises:
        AisError: of the kind that fits.
    """
    storage = storage_of(config.storage)
    addresses = ("output", "images", "matrix", "head")
    found = {name: absolute(getattr(config, name)) for name in addresses if getattr(config, name) is not None}
    config = config.model_copy(update=found | {"ratings": with_absolute_addresses(config.ratings)})
    record, document = read_record(config.head, storage) if config.head else (None, {})
    model = resolve_model(config.backbone, config.preprocessing.mode, record, storage)
    ratings = human = seen = None
    if config.objective == "error":
        rated = read_ratings(config.ratings.table(), storage)
        chosen, seen = _unseen(config, rated, document, storage)
        images, ratings = [ListedImage(address) for address in rated.addresses[chosen].tolist()], rated.scores[chosen]
    elif config.objective == "prediction":
        assert config.images is not None
        images = list(list_images(config.images, storage))
        if len(images) < _FEWEST:
            raise RunError(
                f"images {config.images!r}: {len(images)} are too few for intervals over them; give at least {_FEWEST}"
            )
    else:
        assert config.matrix is not None
        images, human = compared_images(config.matrix, config.images, storage)
    head = record.sha256 if record is not None and config.objective != "similarity" else None
    return PreparedImportance(config, storage, model, images, ratings, human, head, seen)


def _unseen(config: ImportanceConfig, rated: Ratings, head: dict[str, Any], storage: Storage) -> tuple[np.ndarray, str]:
    """Choose the rated images that errors are measured on; say in words what the head knows of them.

    Of an image that the head has learned by heart every ablation takes the prediction away from the rating, so that
    all maps seem to help.

    Raises:
        RatingsError: too few are in the head's test split, or it does not say which.
    """
    assert config.head is not None
    if not config.held_out:
        identity = head.get("identity")
        own = isinstance(identity, dict) and identity.get("ratings") == ratings_fingerprint(rated)
        return np.arange(len(rated)), "that the head was fitted to" if own else _MAY_BE_FITTED
    chosen = np.flatnonzero(np.isin(rated.images, held_out_images(config.head, storage)))
    if len(chosen) < MIN_RATED:
        raise RatingsError(
            f"held_out: {len(chosen)} images of {config.ratings.path!r} are in the test split of head {config.head!r}, "
            f"as its predictions.parquet writes them; at least {MIN_RATED} are needed: rate more and train again, or, "
            "if the head was trained on none of the rated images, held_out=false"
        )
    return chosen, "of the head's test split"


def compared_images(matrix_address: str, images: str | None, storage: Storage) -> tuple[list[ListedImage], np.ndarray]:
    """Return the images of a human matrix in its order, and the matrix, checked.

    Args:
        matrix_address: see `ais.importance.matrix.read_matrix`.
        images: address of a list in the order of the matrix, which may be left out if the matrix names its images.
        storage: how to reach both.

    Raises:
        SimilarityError: the matrix cannot be used.
        RunError: neither the matrix nor ``images`` says which image a row is, or they say it differently.
    """
    matrix, names = read_matrix(matrix_address, storage)
    listed = list(list_images(images, storage)) if images else None
    if names is not None:
        place = storage.open(matrix_address)
        folder = type(place)(place.filesystem, place.path.rsplit("/", 1)[0])
        own = [
            ListedImage(name if "://" in name or name.startswith("/") else (folder / name).address) for name in names
        ]
        if listed is not None and [image.uri for image in own] != [image.uri for image in listed]:
            at = next((i for i, (a, b) in enumerate(zip(own, listed, strict=False)) if a.uri != b.uri), len(own))
            raise RunError(
                f"images {images!r} and matrix {matrix_address!r} are in another order from number {at + 1} on: "
                "leave images out, or bring them into the order of the matrix"
            )
        listed = own
    if listed is None:
        raise RunError(
            f"matrix {matrix_address!r} does not say which image a row is: give images, a CSV or Parquet list with a "
            "uri column in the order of the matrix"
        )
    return listed, check_human_matrix(matrix, len(listed))


def compared_pixels(images: Sequence[ListedImage], fetch: FetchDecode) -> np.ndarray:
    """Fetch and decode images of a human matrix, in this process: pixels ``(n, S, S, 3)`` uint8.

    Raises:
        RunError: one cannot be used: a matrix has no room for a gap.
    """
    table = fetch(listing_table(images))
    for row in table.select(["uri", "stage", "error"]).to_pylist():
        if row["stage"]:
            raise RunError(f"{row['uri']!r} could not be used ({row['error']}); take it out of list and matrix")
    return unpack(table["pixels"], (fetch.side, fetch.side, 3), np.uint8)


def importance_of(prepared: PreparedImportance) -> ImportanceResult:
    """Compute the AIS on the cluster that this process has joined.

    Raises:
        RunError: the pipeline stopped, or more images than ``max_error_share`` could not be used.
    """
    if prepared.config.objective == "similarity":
        return _similarity(prepared)
    config, model = prepared.config, prepared.model
    assert config.head is not None
    assert prepared.head is not None
    sums, unreadable = effects_over(
        prepared.images,
        None if prepared.ratings is None else prepared.ratings.tolist(),
        model.source,
        HeadSource(config.head, prepared.head, prepared.storage),
        model.preprocessing,
        prepared.limits,
        config.compute,
        model.layer.map_shape[0],
    )
    share = len(unreadable) / len(prepared.images)
    if share > config.max_error_share:
        raise RunError(
            f"{share:.1%} of the images could not be used, more than max_error_share={config.max_error_share:g}; "
            f"the first: {unreadable[0].uri!r} ({unreadable[0].error}); mend or remove them, or raise max_error_share"
        )
    details: dict[str, Any] = {"images": sums.images, "rated": sums.rated, "sign": _SIGN[config.objective]}
    if prepared.seen is not None:
        details |= {"held_out": config.held_out, "measured_on": f"images {prepared.seen}"}
        if not config.held_out:
            details["sign"] += f"; measured on {details['measured_on']}"
    return ImportanceResult(effects_table(sums, config.objective), details, unreadable)


def _similarity(prepared: PreparedImportance) -> ImportanceResult:
    config, model, human = prepared.config, prepared.model, prepared.human
    assert human is not None
    maps = model.layer.map_shape[0]
    details: dict[str, Any] = {"images": len(prepared.images), "sign": _SIGN[config.level], "level": config.level}
    if model.layer.tail is TailKind.CHANNELWISE:
        embeddings, replacements = coordinates_over(
            prepared.images, model.source, model.preprocessing, prepared.limits, config.compute, maps
        )
        first = model.source.load("cpu").split.coordinates
        assert first is not None
        ablated = collective_similarities if config.level == "collective" else individual_similarities
        intact = similarity_of(embeddings)
        found = jackknifed_ais(ablated(embeddings, replacements, first.offset), intact, human, config.level)
    else:
        pools = cluster_pools(config.compute)
        task = ray.remote(num_cpus=pools.scoring_cpus, num_gpus=pools.scoring_gpus)(_general_similarity)
        try:
            with TaskProgress("maps", maps, config.compute.stall_minutes) as progress:
                intact, found = ray.get(task.remote(prepared, pools, progress.counter))
        except ray.exceptions.RayError as error:
            raise RunError(f"the task stopped: {worker_failure(error)}; start the same command again") from error
    value, low, high = agreement_interval(intact, human)
    known = np.isfinite(low)  # not of a handful of images
    details["correlation"] = {"value": value, "low": low if known else None, "high": high if known else None}
    details["agreement"] = value**2
    details["interval"] = "95%, delete-one jackknife over images"
    if value <= 0:
        details["warning"] = _AGAINST_PEOPLE
        if config.level == "collective":
            details["sign"] = _SIGN_AGAINST_PEOPLE
    by_image = None
    if config.level == "individual":
        by_image = by_image_table([image.uri for image in prepared.images], found.ais)
    return ImportanceResult(similarity_table(found), details, [], by_image)


def _general_similarity(prepared: PreparedImportance, pools: Pools, counter: Any) -> tuple[np.ndarray, JackknifedAIS]:
    """Similarity AIS of a tail that mixes maps, in one task; runs on a worker."""
    set_up_process(pools.scoring_threads)
    config, source = prepared.config, prepared.model.source
    device = choose_device(config.compute.device)
    backbone = source.load(device)
    geometry = geometry_of(source.spec, prepared.model.preprocessing)
    fetch = FetchDecode(
        geometry, prepared.limits, prepared.storage, config.compute.fetch_threads, None, config.compute.decoders
    )
    batches = []
    for start in range(0, len(prepared.images), pools.batch):
        images = prepared.images[start : start + pools.batch]
        pixels = torch.from_numpy(compared_pixels(images, fetch).copy())
        batches.append(backbone.normalise(pixels.to(device)))
    assert prepared.human is not None
    intact, ablated = general_similarities(backbone, batches, config.level, config.compute.chunk)
    return intact, jackknifed_ais(_counted(ablated, counter), intact, prepared.human, config.level)


def _counted(parts: Iterable[np.ndarray], counter: Any) -> Iterator[np.ndarray]:
    for part in parts:
        yield part
        ray.get(counter.add.remote(len(part), 0))  # so that the last line counts them all


def write_importance(prepared: PreparedImportance, result: ImportanceResult) -> str:
    """Write the bundle; return what to say about it."""
    config, model = prepared.config, prepared.model
    folder = prepared.storage.open(config.output)
    name = config.level if config.objective == "similarity" else config.objective
    (folder / "importance.png").write_bytes(ranking_png(result.table, f"AIS, {name}"))
    (folder / "config.yaml").write_text(to_yaml(config))
    record: ImportanceRecord = model.importance_record(config.objective, prepared.head)
    details = {
        **result.details,
        "unreadable": [asdict(image) for image in result.unreadable],
        "weights": model.weights.as_dict(),
        "untrained": model.weights.untrained,
        "versions": versions(),
    }
    save_importance(config.output, result.table, record, details, prepared.storage, result.by_image)
    ais = result.table["ais"].to_numpy()
    top = np.argsort(-ais, kind="stable")[:5]
    lines = [
        f"importance  {len(ais):,} maps; {int((ais > 0).sum()):,} positive; {result.details['sign']}",
        "largest     " + ", ".join(f"map {k} {ais[k]:.3g}" for k in top),
    ]
    if "agreement" in result.details:
        r, squared = result.details["correlation"], result.details["agreement"]
        ends = "" if r["low"] is None else f" [{r['low']:.3f}, {r['high']:.3f}]"
        lines.append(f"agreement   R of all maps with people {r['value']:.3f}{ends}, R² {squared:.3f}")
    if "warning" in result.details:
        lines.append(f"WARNING     {result.details['warning']}")
    if result.unreadable:
        lines.append(f"errors      {len(result.unreadable)} images could not be used, see importance.json")
    return "\n".join([*lines, f"bundle      {folder.address}"])

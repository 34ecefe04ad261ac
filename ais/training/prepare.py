"""From a configuration to a checked training: everything that can be refused is refused here, before any work."""

from __future__ import annotations

import posixpath
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from ais.backbones import (
    BackboneSpec,
    Weights,
    embedding_fingerprint,
    get_spec,
    inspect_layer,
    preprocessing_fingerprint,
    resolve_weights,
)
from ais.config import TrainConfig, config_fingerprint
from ais.embeddings import EmbeddingCache, Key
from ais.errors import ConfigError, RunError
from ais.heads import RECORD_FILE, read_record
from ais.listing import ListedImage, look_up
from ais.ratings import Ratings, ratings_fingerprint, read_ratings, with_absolute_addresses
from ais.runs import write_table
from ais.storage import Folder, Storage, absolute
from ais.training.fit import FitPlan
from ais.training.splits import draw_test_split, variant_splits

ERRORS_SCHEMA = pa.schema([pa.field(name, pa.string(), nullable=False) for name in ("uri", "stage", "reason", "error")])
# What a head is does not depend on these, so that they may change between two starts of one training.
_OPERATIONAL = {"workers", "max_failures", "checkpoint_every"}
_LISTING_THREADS = 32
_REASONS_SHOWN = 5


@dataclass(frozen=True)
class PreparedTraining:
    """A training that can start.

    Args:
        config: with local paths absolute and the cache's address.
        storage: how to reach addresses.
        ratings: checked.
        spec: record of the backbone.
        weights: of the backbone.
        cache: of its embeddings.
        identity: what makes this bundle this bundle; a change of any of it is another bundle.
    """

    config: TrainConfig
    storage: Storage
    ratings: Ratings
    spec: BackboneSpec
    weights: Weights
    cache: EmbeddingCache
    identity: dict[str, Any]

    @property
    def bundle(self) -> Folder:
        """The folder that the head is written to."""
        return self.storage.open(self.config.output)

    @property
    def checkpoints(self) -> Folder:
        """Where the fit keeps its state until the bundle is complete."""
        return self.bundle / ".train"

    def describe(self) -> str:
        """Say in a few lines what would be done."""
        ratings, fit = self.ratings, self.config.fit
        trained = f"UNTRAINED, random with seed {self.weights.seed}" if self.weights.untrained else self.weights.source
        left_out = f", {ratings.skipped} of {ratings.rows} rows have no score" if ratings.skipped else ""
        averaged = f", {ratings.averaged} repeated rows averaged" if ratings.averaged else ""
        low, high = ratings.scores.min(), ratings.scores.max()
        heads = f"{fit.variants} heads" if fit.variants > 1 else "1 head"
        sizes = f"{self.spec.embedding_size} → {self.config.head.hidden} → 1"
        return "\n".join(
            (
                f"ratings     {len(ratings):,} images, {low:g} to {high:g}{left_out}{averaged}",
                f"            {self.config.ratings.path}",
                f"backbone    {self.spec.name} ({trained})",
                f"cache       {self.cache.folder.address}",
                f"fit         {heads}: {sizes}, at most {fit.epochs} epochs",
                f"output      {self.bundle.address}",
            )
        )

    def finished(self) -> bool:
        """Whether this bundle is complete.

        Raises:
            ConfigError: a bundle of something else is there.
            HeadError: ``head.json`` is there and cannot be read.
        """
        if not (self.bundle / RECORD_FILE).exists():
            return False
        _, document = read_record(self.config.output, self.storage)
        there = document.get("identity")
        if not isinstance(there, dict):
            raise ConfigError(
                f"output: {self.config.output!r} holds a head that was not trained here; give another output"
            )
        changed = [key for key in self.identity if there.get(key) != self.identity[key]]
        if changed:
            differences = "\n".join(f"  {key}: {there.get(key)!r} there, {self.identity[key]!r} now" for key in changed)
            raise ConfigError(
                f"output: {self.config.output!r} holds a head trained on something else:\n{differences}\n"
                "  give another output"
            )
        return True


def prepare_training(config: TrainConfig, spec: BackboneSpec | None = None) -> PreparedTraining:
    """Read the ratings and check everything that a training needs, without reading an image.

    Args:
        config: as configured.
        spec: a backbone's record to use instead of the registry's.

    Raises:
        AisError: the ratings cannot be used, or the backbone, its layer or its weights cannot be had.
    """
    storage = Storage(**config.storage.model_dump())
    output = absolute(config.output)
    cache_address = absolute(config.cache) if config.cache else posixpath.join(posixpath.dirname(output), "embeddings")
    rated = with_absolute_addresses(config.ratings)
    config = config.model_copy(update={"output": output, "cache": cache_address, "ratings": rated})
    ratings = read_ratings(config.ratings, storage)
    spec = spec or get_spec(config.backbone.name)
    inspect_layer(spec, config.backbone.layer)
    backbone = config.backbone
    weights, _ = resolve_weights(spec, backbone.weights, backbone.seed, backbone.sha256, storage)
    mode = config.preprocessing.mode
    identity = {
        "ratings": ratings_fingerprint(ratings),
        "backbone": spec.name,
        "weights": weights.fingerprint,
        "preprocessing": preprocessing_fingerprint(spec, mode),
        "head": config.head.model_dump(),
        "fit": config.fit.model_dump(exclude=_OPERATIONAL),
        "limits": config.limits.model_dump(),
    }
    if config.limits.scaled_jpeg:
        cache_address = posixpath.join(cache_address, "scaled-jpeg")  # other pixels, other embeddings
    cache = EmbeddingCache(cache_address, embedding_fingerprint(spec, weights, mode), storage)
    return PreparedTraining(config, storage, ratings, spec, weights, cache, identity)


def list_rated(ratings: Ratings, storage: Storage) -> list[ListedImage]:
    """Ask for size and version of every rated image; one that is not there has none, and fails when it is read."""

    with ThreadPoolExecutor(_LISTING_THREADS) as pool:
        return list(pool.map(lambda address: look_up(address, storage), ratings.addresses.tolist()))


def keys_of(images: Sequence[ListedImage]) -> list[Key]:
    """Return the keys of the images in the embedding cache."""
    return [Key(image.uri, image.version) for image in images]


@dataclass(frozen=True)
class Rows:
    """Rows of the ratings that can be used, ascending: ``pool`` trains and validates, ``test`` does neither."""

    pool: np.ndarray
    test: np.ndarray


def usable_rows(prepared: PreparedTraining, errors: Sequence[dict[str, str]]) -> Rows:
    """Leave out the images that could not be used, and list them in ``errors.parquet``.

    The test split is drawn before, so that it does not depend on them.

    Args:
        prepared: the training.
        errors: ``uri``, ``stage``, ``reason`` and ``error`` of each image without embedding.

    Raises:
        RunError: they are more than ``max_error_share``, or the whole test split.
    """
    ratings, limit = prepared.ratings, prepared.config.max_error_share
    listed = prepared.bundle / "errors.parquet"
    write_table(listed, pa.Table.from_pylist(list(errors), schema=ERRORS_SCHEMA))
    share = len(errors) / len(ratings)
    if share > limit:
        counts = Counter(f"{row['stage']}: {row['reason']}" for row in errors).most_common(_REASONS_SHOWN)
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in counts)
        raise RunError(
            f"{len(errors):,} of {len(ratings):,} rated images could not be used ({share:.1%}; {reasons}), more than "
            f"max_error_share={limit:g}; {listed.address} lists them, and what was computed is kept; "
            "mend them or raise max_error_share"
        )
    is_test = draw_test_split(ratings, prepared.config.fit)
    usable = ~np.isin(ratings.addresses, [row["uri"] for row in errors])
    rows = Rows(np.flatnonzero(usable & ~is_test), np.flatnonzero(usable & is_test))
    if len(rows.test) == 0:
        raise RunError(
            f"none of the {int(is_test.sum())} images of the test split could be used; see errors.parquet; "
            "mend them, or rate more"
        )
    return rows


def fit_plan(prepared: PreparedTraining, rows: Rows, keys: Sequence[Key]) -> FitPlan:
    """Put together what the workers need; ``keys`` are those of all ratings.

    Raises:
        RatingsError: too few images are left, or the training ratings of a head are all the same.
    """
    config, ratings = prepared.config, prepared.ratings
    pool_keys = [keys[row] for row in rows.pool]
    identity = {**prepared.identity, "keys": pool_keys}
    return FitPlan(
        name=f"fit-{config_fingerprint(identity)[:16]}",
        cache=prepared.cache,
        keys=pool_keys,
        scores=ratings.scores[rows.pool],
        splits=variant_splits(rows.pool, len(rows.pool) + len(rows.test), ratings, config.fit),
        head=config.head,
        fit=config.fit,
    )

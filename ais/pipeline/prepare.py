"""From a configuration to a checked plan: everything that can be refused is refused here, before any work."""

from __future__ import annotations

import hashlib
import json
import platform
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any

import numpy as np
from pydantic import ValidationError

from ais.backbones import (
    BackboneSpec,
    LayerInfo,
    Weights,
    get_spec,
    inspect_layer,
    preprocessing_fingerprint,
    resolve_weights,
)
from ais.config import BackboneConfig, BackboneOverrides, HeatmapsConfig, StorageConfig
from ais.errors import BackboneError, ConfigError
from ais.explainer import geometry_of
from ais.heads import HeadRecord, HeadSource, check_record, read_record
from ais.heatmaps import HeatmapCells
from ais.images import Limits
from ais.importance import ImportanceRecord, load_importance
from ais.lease import Lease
from ais.listing import list_images
from ais.pipeline.explain import BackboneSource
from ais.pipeline.heatmaps import HeatmapPlan
from ais.runs import Run
from ais.settings import to_yaml
from ais.storage import Storage, absolute

_PACKAGES = ("ais", "torch", "torchvision", "ray", "pyarrow", "pillow", "numpy", "fsspec", "s3fs")


@dataclass(frozen=True)
class Prepared:
    """A heatmaps job that can start.

    Args:
        config: with every default resolved and local paths absolute.
        plan: for the stages.
        run: the run folder, which may exist already.
        identity: what makes this run this run; a change of any of it is another run.
        layer: that is ablated; ``None`` of a backbone that gives scores only.
        weights: of the backbone.
    """

    config: HeatmapsConfig
    plan: HeatmapPlan
    run: Run
    identity: dict[str, Any]
    layer: LayerInfo | None
    weights: Weights

    def describe(self) -> str:
        """Say in a few lines what would be done."""
        trained = f"UNTRAINED, random with seed {self.weights.seed}" if self.weights.untrained else self.weights.source
        lines = [
            f"images      {self.config.images}",
            f"backbone    {self.plan.source.spec.name} ({trained})",
            f"head        {self.config.head}",
        ]
        if self.plan.cells is not None:
            assert self.layer is not None
            channels, height, width = self.layer.map_shape
            importance = self.config.importance or "each image's own, by exact ablation"
            lines[2:2] = [f"layer       {self.layer.name}: {channels} maps of {height}×{width}, {self.layer.tail} tail"]
            lines += [
                f"importance  {importance}; {self.config.weighting} weights",
                f"pictures    {self.config.png.select}, {self.config.png.kind}",
            ]
        return "\n".join([*lines, f"run         {self.run.folder.address}"])

    def under(self, lease: Lease) -> Prepared:
        """The same with a run that is written only while the lease lasts."""
        return replace(self, run=Run(self.run.folder, lease.fence))

    def check_existing(self) -> dict[str, Any] | None:
        """Return ``run.json`` if this run was set out before.

        Raises:
            ConfigError: a run of this name was made of something else, or by another version.
            RunError: ``run.json`` is damaged.
        """
        record = self.run.record()
        if record is None:
            return None
        there = record.get("identity")
        if not isinstance(there, dict) or not isinstance(record.get("ignored"), dict):
            raise ConfigError(
                f"run_id: {self.run.run_id!r} exists, and its run.json is not as this version writes it; give another "
                "run_id, or none to have one derived"
            )
        changed = [key for key in self.identity if there.get(key) != self.identity[key]]
        if changed:
            differences = "\n".join(f"  {key}: {there.get(key)!r} there, {self.identity[key]!r} now" for key in changed)
            raise ConfigError(
                f"run_id: {self.run.run_id!r} exists and was made of something else:\n{differences}\n"
                "  give another run_id, or none to have one derived"
            )
        return record

    def facts(self) -> dict[str, Any]:
        """Identity, fingerprints and versions, for ``run.json`` and ``summary.json``."""
        return {
            "run_id": self.run.run_id,
            "identity": self.identity,
            "backbone": self.plan.source.spec.name,
            "layer": {"name": self.layer.name, "map_shape": list(self.layer.map_shape)} if self.layer else None,
            "weights": self.weights.as_dict(),
            "untrained": self.weights.untrained,
            "versions": versions(),
        }


def versions() -> dict[str, str]:
    """Versions of everything that may change a number."""
    return {"python": platform.python_version(), **{name: version(name) for name in _PACKAGES}}


def storage_of(config: StorageConfig) -> Storage:
    """The storage options as plain data for workers."""
    return Storage(**config.model_dump())


def prepare_heatmaps(config: HeatmapsConfig, spec: BackboneSpec | None = None, *, heatmaps: bool = True) -> Prepared:
    """Check everything that a heatmaps run needs, without listing or reading an image.

    Args:
        config: as configured.
        spec: a backbone's record to use instead of the registry's.
        heatmaps: false for scores only, which every backbone gives.

    Raises:
        AisError: of the kind that fits: the head cannot be read, the backbone, weights or preprocessing are not those
            that it was trained with, the layer does not exist, the importance belongs elsewhere, or a run of this
            name was made of something else.
    """
    storage = storage_of(config.storage)
    config = config.model_copy(
        update={key: absolute(getattr(config, key)) for key in ("images", "output", "head")}
        | ({"importance": absolute(config.importance)} if config.importance else {})
    )
    record, _ = read_record(config.head, storage)
    model = find_model(config.backbone, config.preprocessing.mode, record, storage, spec, heatmaps=heatmaps)
    spec, layer, weights, mode = model.source.spec, model.layer, model.weights, model.preprocessing
    importance, importance_digest = None, None
    if config.importance:
        importance, made, importance_digest = load_importance(config.importance, storage)
        assert isinstance(model, Model), "scores alone need no importance"
        made.check_belongs(model.importance_record(made.objective, record.sha256))
    if layer is None and config.compute.precision != "float32":
        raise ConfigError(
            f"compute.precision: {config.compute.precision} is that of the trunk, and {spec.name} is not cut into "
            "trunk and tail; set float32"
        )
    if layer is None and config.compute.compile:
        raise ConfigError(
            f"compute.compile: the trunk is compiled, and {spec.name} is not cut into trunk and tail; set false"
        )
    config = config.model_copy(
        update={
            "backbone": BackboneOverrides(**{**model.backbone.model_dump(), "layer": layer.name if layer else None}),
            "preprocessing": config.preprocessing.model_copy(update={"mode": mode}),
        }
    )
    identity = {
        "images": config.images,
        "backbone": spec.name,
        "weights": weights.fingerprint,
        "layer": layer.name if layer else None,
        "preprocessing": preprocessing_fingerprint(spec, mode),
        "head": record.sha256,
        "precision": config.compute.precision + (", compiled" if config.compute.compile else ""),
        "limits": config.limits.model_dump(),
    }
    cells = None
    if heatmaps:
        assert layer is not None
        cells = HeatmapCells((layer.map_shape[1], layer.map_shape[2]), layer.extent, spec.input_size)
        identity |= {
            "importance": importance_digest,
            "weighting": config.weighting,
            "png": config.png.model_dump(),
        }
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    run = Run.at(config.output, config.run_id or f"{spec.name}-{digest[:12]}", storage)
    plan = HeatmapPlan(
        source=model.source,
        head=HeadSource(config.head, record.sha256, storage),
        importance=None if importance is None else importance.astype(np.float32),
        weighting=config.weighting,
        geometry=geometry_of(spec, mode),
        cells=cells,
        limits=Limits(**config.limits.model_dump()),
        png=config.png,
        compute=config.compute,
        storage=storage,
        shard_rows=config.shard_rows,
        metadata=_metadata(run, spec, layer, weights, record.sha256, config.weighting if heatmaps else None),
    )
    return Prepared(config, plan, run, identity, layer, weights)


@dataclass(frozen=True)
class ScoringModel:
    """A backbone and its weights, found and checked.

    Args:
        source: for actors to load it from.
        backbone: the configuration with everything filled in.
        layer: that is ablated; ``None`` of a backbone that gives scores only.
        weights: of the backbone.
        preprocessing: ``"center_crop"`` or ``"letterbox"``.
    """

    source: BackboneSource
    backbone: BackboneConfig
    layer: LayerInfo | None
    weights: Weights
    preprocessing: str


@dataclass(frozen=True)
class Model(ScoringModel):
    """A backbone that can be explained: it has a layer."""

    layer: LayerInfo

    def importance_record(self, objective: str, head: str | None) -> ImportanceRecord:
        """What an AIS of this model belongs to."""
        spec = self.source.spec
        return ImportanceRecord(
            objective, spec.name, self.weights.fingerprint, self.layer.name, self.preprocessing, head
        )


def resolve_model(
    given: BackboneOverrides,
    preprocessing: str | None,
    record: HeadRecord | None,
    storage: Storage,
    spec: BackboneSpec | None = None,
) -> Model:
    """As `find_model`, of a backbone that gives heatmaps."""
    model = find_model(given, preprocessing, record, storage, spec)
    assert isinstance(model, Model)
    return model


def find_model(
    given: BackboneOverrides,
    preprocessing: str | None,
    record: HeadRecord | None,
    storage: Storage,
    spec: BackboneSpec | None = None,
    *,
    heatmaps: bool = True,
) -> ScoringModel:
    """Find backbone, weights, layer and preprocessing: as configured, and for the rest as the head was trained.

    Args:
        given: as configured.
        preprocessing: as configured.
        record: of the head; ``None`` where no head is used.
        storage: how to reach the weights.
        spec: a backbone's record to use instead of the registry's.
        heatmaps: whether it has to give them; the result is then a `Model`.

    Raises:
        ConfigError: what is given of the backbone does not go with what the head was trained with.
        BackboneError: there is no such backbone or layer, or it gives no heatmaps.
        WeightsError: the weights cannot be had.
        HeadError: the head was trained with something else.
    """
    weights = given.weights or (record.weights if record else "published")
    try:
        backbone = BackboneConfig(
            name=given.name or (record.backbone if record else ""),
            layer=given.layer,
            weights=weights,
            seed=record.seed if record and not given.weights and given.seed is None else given.seed,
            sha256=given.sha256,
        )
    except ValidationError as error:  # each is possible, and does not go with what the head was trained with
        said = "; ".join(problem["msg"].removeprefix("Value error, ") for problem in error.errors())
        raise ConfigError(
            f"backbone.{said} (what is not given of the backbone is as the head was trained, weights={weights!r}; give "
            "backbone.weights too for another)"
        ) from error
    mode = preprocessing or (record.preprocessing if record else "center_crop")
    spec = spec or get_spec(backbone.name)
    layer = inspect_layer(spec, backbone.layer)
    if layer is None and heatmaps:
        raise BackboneError(
            f"backbone.name: {spec.name} gives no heatmaps: {spec.refuses_heatmaps}; choose another for them"
        )
    found, _ = resolve_weights(spec, backbone.weights, backbone.seed, backbone.sha256, storage)
    if record is not None:
        check_record(record, spec.name, found.fingerprint, mode)
    source = BackboneSource(
        spec,
        layer.name if layer else None,
        backbone.weights,
        backbone.seed,
        backbone.sha256,
        found.fingerprint,
        storage,
    )
    if layer is None:
        return ScoringModel(source, backbone, layer, found, mode)
    return Model(source, backbone, layer, found, mode)


def _metadata(
    run: Run, spec: BackboneSpec, layer: LayerInfo | None, weights: Weights, head: str, weighting: str | None
) -> dict[str, str]:
    metadata = {
        "ais.run_id": run.run_id,
        "ais.backbone": spec.name,
        "ais.weights": weights.source,
        "ais.weights_fingerprint": weights.fingerprint,
        "ais.head": head,
        "ais.version": version("ais"),
    }
    if layer is not None:
        metadata["ais.layer"] = layer.name
    if weighting is not None:
        metadata["ais.weighting"] = weighting
    if weights.untrained:
        metadata["ais.untrained"] = f"the backbone has random weights, seed {weights.seed}"
    return metadata


def set_out(prepared: Prepared) -> dict[str, Any]:
    """List the images and write the manifest, unless that was done before; return ``run.json``.

    Raises:
        ConfigError: a run of this name was made of something else.
        AisError: there are no images, or they cannot be listed.
    """
    run, storage = prepared.run, prepared.plan.storage
    record = prepared.check_existing()
    if record is None:
        listing = list_images(prepared.config.images, storage)
        facts = {**prepared.facts(), "ignored": listing.ignored}
        run.set_out(listing, to_yaml(prepared.config), facts)
        record = prepared.check_existing()
        assert record is not None
    print_listed(record)
    return record


def print_listed(record: dict[str, Any]) -> None:
    """Say what the manifest holds, by ``run.json``."""
    listed = f"{record['images']:,} images, listed {record['listed_at']}"
    ignored = sum(record["ignored"].values())
    if ignored:
        kinds = ", ".join(f"{count} {suffix}" for suffix, count in sorted(record["ignored"].items()))
        listed += f"; {ignored:,} other files left out ({kinds})"
    print(f"manifest    {listed}", flush=True)

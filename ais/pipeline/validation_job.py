"""The validation of a head on rated images: what it needs, what it measures, what it writes.

verdict.txt            the verdict in words
checks.parquet         a row per check: name, claim, outcome, value, low, high, n
protocol.parquet       a row per measure, order, seed and fold: where it stopped, and the values there and of all maps
curves.parquet         mean test value by measure, order and number of maps
faithfulness.parquet   a row per image, fill, mode and method: area under the curve, plain and normalised
deletion.parquet       mean score along deletion and insertion, by fill, mode and method
images.parquet         a row per image: rating, score, rank correlations of its heatmap with those of other heads
maps.parquet           a row per map: AIS and response to the masks; where masks are given
localisation.parquet   a row per image and method: pointing hit, overlap with the mask, chance; where masks are given
deletion.png, cumulative.png
errors.parquet         images that could not be used
config.yaml            the resolved configuration
validation.json        all figures; written last, its presence means complete
"""

from __future__ import annotations

import json
import posixpath
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from ais.backbones import TailKind
from ais.config import LEAST_PER_FOLD, ValidateConfig
from ais.errors import ConfigError, ImageError, RatingsError, RunError
from ais.explainer import geometry_of
from ais.heads import HeadSource, check_belongs, read_record
from ais.heatmaps import heatmap_boxes
from ais.images import Limits, decode_image
from ais.listing import ListedImage
from ais.metrics import regression_metrics
from ais.pipeline.columns import unpack
from ais.pipeline.explain import choose_device
from ais.pipeline.fetch import FetchDecode, listing_table, read_image
from ais.pipeline.prepare import Model, resolve_model, storage_of, versions
from ais.ratings import Ratings, held_out_images, ratings_fingerprint, read_ratings, with_absolute_addresses
from ais.runs import write_table
from ais.settings import to_yaml
from ais.storage import Folder, Storage, absolute
from ais.validation.faithfulness import FILLS, InputMaps
from ais.validation.intervals import ENOUGH_IMAGES, mean_over_images, mean_over_images_and_heads
from ais.validation.localisation import localisation
from ais.validation.measure import (
    TAIL_NUMBERS,
    Subject,
    follow_curves,
    make_heatmaps,
    run_ratings_protocol,
)
from ais.validation.plots import cumulative_png, deletion_png
from ais.validation.protocol import CumulativeCurve
from ais.validation.separation import Separation, mask_on_cells
from ais.validation.verdict import Findings, checks_of, conclusion, describe, localisation_means

_BATCH = 16
ERROR_COLUMNS = ("uri", "stage", "reason", "error")


@dataclass(frozen=True)
class PreparedValidation:
    """A validation that can start.

    Args:
        config: with local paths absolute.
        storage: how to reach addresses.
        model: backbone, layer and weights.
        head: SHA-256 of the head's weights.
        images: ``(N,)`` as the table writes them.
        addresses: ``(N,)``.
        ratings: ``(N,)``.
    """

    config: ValidateConfig
    storage: Storage
    model: Model
    head: str
    images: np.ndarray
    addresses: np.ndarray
    ratings: np.ndarray

    def describe(self) -> str:
        """Say in a few lines what would be done."""
        weights, layer = self.model.weights, self.model.layer
        trained = f"UNTRAINED, random with seed {weights.seed}" if weights.untrained else weights.source
        seen = "of the head's test split" if self.config.held_out else "taken as not seen in training"
        return "\n".join(
            (
                f"images      {len(self.images):,} rated, {seen}; {self._curved:,} with deletion and insertion curves",
                f"backbone    {self.model.source.spec.name} ({trained})",
                f"layer       {layer.name}: {'×'.join(map(str, layer.map_shape))}, {layer.tail} tail",
                f"head        {self.config.head}",
                *protocol_cost(self.config, self.model, len(self.images)),
                f"output      {self.config.output}",
            )
        )

    @property
    def _curved(self) -> int:
        return min(self.config.images_limit, len(self.images))


def protocol_cost(config: ValidateConfig, model: Model, images: int) -> list[str]:
    """Say what the protocol costs where the tail has to be run for it; nothing where it costs next to nothing."""
    if model.layer.tail is TailKind.CHANNELWISE or not config.protocol:
        return []
    fits, counts = config.folds * config.seeds, min(config.protocol_counts or TAIL_NUMBERS, model.layer.map_shape[0])
    return [
        f"protocol    what follows {model.layer.name} mixes the maps: {fits} fits × 3 orders × {counts} numbers of "
        f"maps × {images} images = {3 * fits * counts * images:,} passes of it; protocol=false leaves it out"
    ]


@dataclass(frozen=True)
class Sample:
    """The images that could be read.

    Args:
        rows: ``(N,)`` which of the prepared images they are.
        pixels: ``(N, S, S, 3)`` uint8, the model's input.
        boxes: ``(N, 4)`` what the model saw, in pixels of the originals.
        curved: ``(M,)`` which of the N have deletion and insertion curves.
        masks: for each of the N, ``(H, W)`` bool; ``None`` where no masks are given.
        unreadable: rows of ``errors.parquet``.
    """

    rows: np.ndarray
    pixels: np.ndarray
    boxes: np.ndarray
    curved: np.ndarray
    masks: list[np.ndarray] | None
    unreadable: list[dict[str, Any]]


def prepare_validation(config: ValidateConfig) -> PreparedValidation:
    """Check everything that can be checked without reading an image.

    Raises:
        AisError: of the kind that fits: ratings, head or backbone cannot be used, or too few images are left.
    """
    storage = storage_of(config.storage)
    config = with_absolute_paths(config)
    assert config.head is not None, "refused before"
    record, document = read_record(config.head, storage)
    model = resolve_model(config.backbone, config.preprocessing.mode, record, storage)
    rated = read_ratings(config.ratings.table(), storage)
    if config.masks is not None:
        _refuse_shared_masks(config.masks, rated)
    chosen = np.arange(len(rated))
    if not config.held_out:
        _refuse_own_ratings(config, document, rated)
    else:
        chosen = np.flatnonzero(np.isin(rated.images, held_out_images(config.head, storage)))
    if len(chosen) > config.protocol_images:
        random = np.random.default_rng([config.seed, 2])
        chosen = np.sort(random.choice(chosen, config.protocol_images, replace=False))
    if len(chosen) < LEAST_PER_FOLD * config.folds:
        where = "in the test split of the head" if config.held_out else "rated"
        raise RatingsError(
            f"{len(chosen)} images of {config.ratings.path!r} are {where}; {config.folds} folds need at least "
            f"{LEAST_PER_FOLD * config.folds}: rate more, set fewer folds, or, if the head was trained on none of the "
            "rated images, held_out=false"
        )
    _refuse_constant(rated.scores[chosen], config)
    return PreparedValidation(
        config, storage, model, record.sha256, rated.images[chosen], rated.addresses[chosen], rated.scores[chosen]
    )


def _refuse_own_ratings(config: ValidateConfig, head: dict[str, Any], rated: Ratings) -> None:
    """Refuse the very table that the head was fitted to; a part of it, or a changed one, cannot be told."""
    identity = head.get("identity")
    if isinstance(identity, dict) and identity.get("ratings") == ratings_fingerprint(rated):
        raise ConfigError(
            f"held_out: false, but head {config.head!r} was fitted to {config.ratings.path!r}, whose images it has "
            "seen; held_out=true takes those of its test split, or give ratings of other images"
        )


def _refuse_constant(scores: np.ndarray, config: ValidateConfig) -> None:
    if np.ptp(scores) == 0:
        raise RatingsError(
            f"all {len(scores)} images of {config.ratings.path!r} to validate on have the rating {scores[0]:g}, with "
            "which nothing agrees or disagrees; give ratings of more images"
        )


def _refuse_shared_masks(masks: str, rated: Ratings) -> None:
    """Refuse images of the same file name, of which nothing says whose mask there is.

    Of all rated images, chosen or not: the mask could be that of one that was not.
    """
    seen: dict[str, str] = {}
    for address in rated.addresses.tolist():
        name = posixpath.basename(address)
        if (other := seen.setdefault(name, address)) != address:
            raise RunError(
                f"masks: {other!r} and {address!r} would share the mask {posixpath.join(masks, name)!r}; give rated "
                "images file names of their own, and each its mask"
            )


def with_absolute_paths(config: ValidateConfig) -> ValidateConfig:
    """Return the configuration with local paths absolute."""
    names = ("head", "output", "masks", "matrix", "images")
    found = {name: absolute(getattr(config, name)) for name in names if getattr(config, name) is not None}
    return config.model_copy(update=found | {"ratings": with_absolute_addresses(config.ratings)})


def read_sample(prepared: PreparedValidation) -> Sample:
    """Read the images, and their masks.

    Raises:
        RunError: more images than ``max_error_share`` could not be used, or too few are left.
        RatingsError: those that are left are all rated the same.
        ImageError: a mask cannot be read.
    """
    config, model = prepared.config, prepared.model
    geometry = geometry_of(model.source.spec, model.preprocessing)
    limits = Limits(**config.limits.model_dump())
    count = len(prepared.images)
    fetch = FetchDecode(geometry, limits, prepared.storage, config.compute.fetch_threads, None, config.compute.decoders)
    table = fetch(listing_table([ListedImage(address) for address in prepared.addresses.tolist()]))
    unreadable = [row for row in table.select(ERROR_COLUMNS).to_pylist() if row["stage"]]
    rows = np.flatnonzero([not stage for stage in table["stage"].to_pylist()])
    if len(unreadable) > config.max_error_share * count or len(rows) < LEAST_PER_FOLD * config.folds:
        raise RunError(
            f"{len(unreadable)} of {count} images could not be used, with max_error_share={config.max_error_share:g} "
            f"and {config.folds} folds; the first: {unreadable[0]['uri']!r} ({unreadable[0]['error']}); "
            "mend them, raise max_error_share or set fewer folds"
        )
    _refuse_constant(prepared.ratings[rows], config)
    side = geometry.input_size
    limit = min(config.images_limit, len(rows))
    curved = np.sort(np.random.default_rng([config.seed, 3]).choice(len(rows), limit, replace=False))
    sizes = np.stack([table[name].to_numpy() for name in ("height", "width")], axis=1)[rows]
    masks = None
    if config.masks is not None:
        places = [posixpath.join(config.masks, posixpath.basename(prepared.addresses[row])) for row in rows]
        masks = [
            _read_mask(place, tuple(size), limits, prepared.storage) for place, size in zip(places, sizes, strict=True)
        ]
    return Sample(
        rows,
        unpack(table["pixels"], (side, side, 3), np.uint8)[rows],
        unpack(table["box"], (4,), np.float32)[rows],
        curved,
        masks,
        unreadable,
    )


def _read_mask(address: str, size: tuple[int, ...], limits: Limits, storage: Storage) -> np.ndarray:
    try:
        mask = decode_image(read_image(address, None, limits, storage), limits)[..., 0] > 127
    except ImageError as error:
        raise RunError(f"masks: {address!r} cannot be read: {error}; draw one for each rated image") from error
    if mask.shape != size:
        raise RunError(
            f"masks: {address!r} has {mask.shape[0]} × {mask.shape[1]} pixels, its image {size[0]} × {size[1]}; "
            "draw it on the original"
        )
    return mask


def measure(prepared: PreparedValidation, sample: Sample) -> Findings:
    """Measure everything, in this process."""
    config, model = prepared.config, prepared.model
    backbone = model.source.load(choose_device(config.compute.device), compiled=config.compute.compile)
    assert config.head is not None
    assert backbone.layer is not None
    head = HeadSource(config.head, prepared.head, prepared.storage).load().to(backbone.mean.device).eval()
    check_belongs(head, backbone, model.preprocessing)
    subject = Subject(
        backbone=backbone,
        head=head,
        weighting=config.weighting,
        batch_size=config.compute.batch_size or _BATCH,
        trunk_dtype=getattr(torch, config.compute.precision),
        chunk=config.compute.chunk,
    )
    ratings, pixels, curved = prepared.ratings[sample.rows], sample.pixels, sample.curved
    protocol: dict[str, CumulativeCurve] = {}
    if config.protocol:
        protocol = run_ratings_protocol(subject, pixels, ratings, config.folds, config.seeds, config.protocol_counts)
    side, extent = backbone.spec.input_size, backbone.layer.extent
    inside = None
    if sample.masks is not None:
        places, cells = heatmap_boxes(sample.boxes, extent, side), backbone.layer.map_shape[1:]
        inside = np.stack([mask_on_cells(*each, cells) for each in zip(sample.masks, places, strict=True)])
    heatmaps = make_heatmaps(subject, pixels, inside, config.seed)
    on_curved = {method: InputMaps(maps.values[curved], maps.extent) for method, maps in heatmaps.maps.items()}
    fills = FILLS if config.fill == "both" else (config.fill,)
    curves = follow_curves(subject, pixels[curved], on_curved, config.steps, fills, config.seed)
    located = {}
    if sample.masks is not None:
        located = {
            method: localisation(maps, sample.boxes, side, sample.masks) for method, maps in heatmaps.maps.items()
        }
    return Findings(
        scores=heatmaps.scores,
        prediction=regression_metrics(heatmaps.scores, ratings),
        protocol=protocol,
        protocol_refused=None if config.protocol else "protocol=false",
        heatmaps=heatmaps,
        curves=curves,
        curved=curved,
        localisation=located,
        weighting=config.weighting,
        held_out=config.held_out,
    )


def write_validation(prepared: PreparedValidation, sample: Sample, findings: Findings) -> str:
    """Write everything, ``validation.json`` last; return the verdict in words."""
    folder = prepared.storage.open(prepared.config.output)
    done = folder / "validation.json"
    if done.exists():
        done.remove()  # of an earlier validation, which is being replaced
    checks = checks_of(findings)
    words = describe(findings, checks)
    if prepared.model.weights.untrained:
        words += "\nThe backbone is UNTRAINED: its weights are random."
    images = prepared.images[sample.rows]
    write_table(folder / "checks.parquet", pa.Table.from_pylist([check.as_dict() for check in checks]))
    write_table(folder / "images.parquet", _images_table(images, prepared.ratings[sample.rows], findings))
    write_table(folder / "faithfulness.parquet", _faithfulness_table(images[sample.curved], findings))
    write_table(folder / "deletion.parquet", _deletion_table(findings))
    if findings.localisation:
        write_table(folder / "localisation.parquet", _localisation_table(images, findings))
    if findings.heatmaps.separation is not None:
        write_table(folder / "maps.parquet", _maps_table(findings.heatmaps.separation))
    if findings.protocol:
        write_protocol(folder, findings.protocol, prepared.config.folds)
    (folder / "deletion.png").write_bytes(deletion_png(findings.curves))
    write_table(folder / "errors.parquet", errors_table(sample.unreadable))
    (folder / "config.yaml").write_text(to_yaml(prepared.config))
    (folder / "verdict.txt").write_text(words + "\n")
    model = prepared.model
    document = {
        "conclusion": conclusion(findings, checks),
        "checks": [check.as_dict() for check in checks],
        "prediction": {name: interval.as_dict() for name, interval in findings.prediction.items()},
        "images": {"rated": len(images), "curved": len(sample.curved), "unreadable": len(sample.unreadable)},
        "held_out": findings.held_out,
        "protocol_refused": findings.protocol_refused,
        "weighting": findings.weighting,
        "heatmaps": heatmap_figures(findings),
        "intervals": "95%; protocol: corrected resampled t-test (Nadeau and Bengio 2003); means over images: Student's "
        f"t, correlations: percentile bootstrap, neither of fewer than {ENOUGH_IMAGES}",
        "backbone": model.source.spec.name,
        "layer": model.layer.name,
        "weights": model.weights.as_dict(),
        "untrained": model.weights.untrained,
        "head": prepared.head,
        "versions": versions(),
    }
    done.write_text(json.dumps(document, indent=2, allow_nan=False) + "\n")
    return f"\n{words}\noutput      {folder.address}"


def heatmap_figures(findings: Findings) -> dict[str, Any]:
    """Figures about heatmaps that are no check, as JSON values."""
    found = findings.heatmaps
    figures: dict[str, Any] = {
        "random_head_correlation": {
            name: mean_over_images_and_heads(each.random_each).as_dict() for name, each in found.agreement.items()
        },
        "variant_correlation": {
            name: mean_over_images(each.variants).as_dict() for name, each in found.agreement.items()
        },
        "plain_correlation": mean_over_images(found.plain_correlation).as_dict(),
        "pointing": {
            method: {
                "hit_rate": hits.as_dict(),
                "overlap": overlap.as_dict(),
                "chance": float(findings.localisation[method].chance.mean()),
            }
            for method, (hits, overlap) in localisation_means(findings).items()
        },
    }
    if found.separation is not None:
        random = found.separation.random_correlations()  # NaN where no mask fills half of a cell
        figures["random_head_separation"] = [float(value) if np.isfinite(value) else None for value in random]
    return figures


def _images_table(images: np.ndarray, ratings: np.ndarray, findings: Findings) -> pa.Table:
    columns: dict[str, Any] = {"image": images.tolist(), "rating": ratings, "score": findings.scores}
    correlations = {"plain_correlation": findings.heatmaps.plain_correlation}
    for weighting, found in findings.heatmaps.agreement.items():
        correlations[f"random_head_correlation_{weighting}"] = found.random
        correlations[f"variant_correlation_{weighting}"] = found.variants
    return pa.table(columns | {name: pa.array(values, from_pandas=True) for name, values in correlations.items()})


def _maps_table(separation: Separation) -> pa.Table:
    ais, response = (pa.array(mean, from_pandas=True) for mean in separation.means())
    return pa.table({"map": np.arange(separation.ais.shape[1]), "ais": ais, "response": response})


def _faithfulness_table(images: np.ndarray, findings: Findings) -> pa.Table:
    tables = []
    for fill, methods in findings.curves.items():
        for method, curves in methods.items():
            normalised = curves.normalised_areas()
            for mode, area in curves.areas().items():
                columns = {"image": images.tolist()} | {
                    name: [value] * len(images) for name, value in (("fill", fill), ("mode", mode), ("method", method))
                }
                share = pa.array(normalised[mode], from_pandas=True)
                tables.append(pa.table({**columns, "area": area, "normalised_area": share}))
    return pa.concat_tables(tables)


def _deletion_table(findings: Findings) -> pa.Table:
    """The curves of ``deletion.png``."""
    tables = []
    for fill, methods in findings.curves.items():
        for method, curves in methods.items():
            for mode, scores in (("deletion", curves.deletion.mean(0)), ("insertion", curves.insertion.mean(0))):
                names = {"fill": fill, "mode": mode, "method": method}
                columns = {name: [value] * len(scores) for name, value in names.items()}
                tables.append(pa.table({**columns, "share": np.linspace(0, 1, len(scores)), "score": scores}))
    return pa.concat_tables(tables)


def _localisation_table(images: np.ndarray, findings: Findings) -> pa.Table:
    return pa.concat_tables(
        [
            pa.table(
                {
                    "image": images.tolist(),
                    "method": [method] * len(images),
                    "hit": found.hits,
                    "overlap": pa.array(found.overlaps, from_pandas=True),
                    "chance": found.chance,
                }
            )
            for method, found in findings.localisation.items()
        ]
    )


def write_protocol(folder: Folder, protocol: dict[str, CumulativeCurve], folds: int) -> None:
    """Write the fits, the mean curves and their picture."""
    write_table(folder / "protocol.parquet", _protocol_table(protocol, folds))
    write_table(folder / "curves.parquet", _curves_table(protocol))
    (folder / "cumulative.png").write_bytes(cumulative_png(protocol))


def errors_table(unreadable: list[dict[str, Any]]) -> pa.Table:
    """Table of the images that could not be used."""
    return pa.Table.from_pylist(unreadable, schema=pa.schema([(name, pa.string()) for name in ERROR_COLUMNS]))


def _protocol_table(protocol: dict[str, CumulativeCurve], folds: int) -> pa.Table:
    return pa.Table.from_pylist(
        [
            {
                "measure": measure,
                "order": order,
                "seed": index // folds,
                "fold": index % folds,
                "maps": int(fits.maps[index]),
                "train": float(fits.train[index]),
                "test": float(fits.test[index]),
                "along": float(fits.along[index]),
                "all_train": float(curve.all_train[index]),
                "all_test": float(curve.all_test[index]),
            }
            for measure, curve in protocol.items()
            for order, fits in curve.orders.items()
            for index in range(len(fits.maps))
        ]
    )


def _curves_table(protocol: dict[str, CumulativeCurve]) -> pa.Table:
    return pa.concat_tables(
        [
            pa.table(
                {
                    "measure": [measure] * len(curve.counts),
                    "order": [order] * len(curve.counts),
                    "maps": curve.counts,
                    "test": fits.curve,
                }
            )
            for measure, curve in protocol.items()
            for order, fits in curve.orders.items()
        ]
    )

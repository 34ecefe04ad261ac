"""The validation of a backbone's maps on images that people compared: the paper's protocol, and nothing about a head.

Writes of the same files as `ais.pipeline.validation_job` those that there are: verdict.txt, checks.parquet,
protocol.parquet, curves.parquet, cumulative.png, config.yaml and, last, validation.json.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch

from ais.config import LEAST_PER_FOLD, ValidateConfig
from ais.errors import SimilarityError
from ais.explainer import geometry_of
from ais.heads import read_record
from ais.images import Limits
from ais.importance.jackknife import agreement_interval
from ais.pipeline.explain import choose_device
from ais.pipeline.fetch import FetchDecode
from ais.pipeline.importance_job import compared_images, compared_pixels
from ais.pipeline.prepare import Model, resolve_model, storage_of, versions
from ais.pipeline.validation_job import protocol_cost, with_absolute_paths, write_protocol
from ais.runs import ListedImage, write_table
from ais.settings import to_yaml
from ais.storage import Storage
from ais.validation.intervals import Mean
from ais.validation.measure import Network, run_similarity_protocol
from ais.validation.verdict import SimilarityFindings, describe_similarity, similarity_checks_of, similarity_conclusion

_BATCH = 16


@dataclass(frozen=True)
class PreparedSimilarityValidation:
    """A validation that can start.

    Args:
        config: with local paths absolute.
        storage: how to reach addresses.
        model: backbone, layer and weights.
        images: N, in the order of the matrix.
        human: ``(N, N)``, checked.
    """

    config: ValidateConfig
    storage: Storage
    model: Model
    images: list[ListedImage]
    human: np.ndarray

    def describe(self) -> str:
        """Say in a few lines what would be done."""
        weights, layer = self.model.weights, self.model.layer
        trained = f"UNTRAINED, random with seed {weights.seed}" if weights.untrained else weights.source
        return "\n".join(
            (
                f"images      {len(self.images):,}, compared by people",
                f"backbone    {self.model.source.spec.name} ({trained})",
                f"layer       {layer.name}: {'×'.join(map(str, layer.map_shape))}, {layer.tail} tail",
                *protocol_cost(self.config, self.model, len(self.images)),
                f"output      {self.config.output}",
            )
        )


def prepare_validation(config: ValidateConfig) -> PreparedSimilarityValidation:
    """Check everything that can be checked without reading an image.

    Raises:
        AisError: of the kind that fits: the matrix or the backbone cannot be used, or there are too few images.
    """
    storage = storage_of(config.storage)
    config = with_absolute_paths(config)
    assert config.matrix is not None
    record = read_record(config.head, storage)[0] if config.head else None
    model = resolve_model(config.backbone, config.preprocessing.mode, record, storage)
    images, human = compared_images(config.matrix, config.images, storage)
    if len(images) < LEAST_PER_FOLD * config.folds:
        raise SimilarityError(
            f"{len(images)} images were compared; {config.folds} folds need at least {LEAST_PER_FOLD * config.folds}: "
            "set fewer folds"
        )
    return PreparedSimilarityValidation(config, storage, model, images, human)


def read_sample(prepared: PreparedSimilarityValidation) -> np.ndarray:
    """Read the images: pixels ``(N, S, S, 3)`` uint8.

    Raises:
        RunError: one cannot be used: a matrix has no room for a gap.
    """
    config = prepared.config
    geometry = geometry_of(prepared.model.source.spec, prepared.model.preprocessing)
    limits = Limits(**config.limits.model_dump())
    fetch = FetchDecode(geometry, limits, prepared.storage, config.compute.fetch_threads, None, config.compute.decoders)
    return compared_pixels(prepared.images, fetch)


def measure(prepared: PreparedSimilarityValidation, pixels: np.ndarray) -> SimilarityFindings:
    """Measure everything, in this process."""
    config = prepared.config
    backbone = prepared.model.source.load(choose_device(config.compute.device), compiled=config.compute.compile)
    network = Network(
        backbone=backbone,
        batch_size=config.compute.batch_size or _BATCH,
        trunk_dtype=getattr(torch, config.compute.precision),
        chunk=config.compute.chunk,
    )
    intact, protocol = run_similarity_protocol(
        network, pixels, prepared.human, config.folds, config.seeds, config.protocol_counts
    )
    return SimilarityFindings(Mean.of_images(*agreement_interval(intact, prepared.human), len(intact)), protocol)


def write_validation(prepared: PreparedSimilarityValidation, pixels: np.ndarray, findings: SimilarityFindings) -> str:
    """Write everything, ``validation.json`` last; return the verdict in words."""
    config, model = prepared.config, prepared.model
    folder = prepared.storage.open(config.output)
    done = folder / "validation.json"
    if done.exists():
        done.remove()  # of an earlier validation, which is being replaced
    checks = similarity_checks_of(findings)
    words = describe_similarity(checks)
    if model.weights.untrained:
        words += "\nThe backbone is UNTRAINED: its weights are random."
    write_table(folder / "checks.parquet", pa.Table.from_pylist([check.as_dict() for check in checks]))
    write_protocol(folder, findings.protocol, config.folds)
    (folder / "config.yaml").write_text(to_yaml(config))
    (folder / "verdict.txt").write_text(words + "\n")
    document = {
        "objective": "similarity",
        "conclusion": similarity_conclusion(checks),
        "checks": [check.as_dict() for check in checks],
        "images": {"compared": len(pixels)},
        "intervals": "95%; protocol: corrected resampled t-test (Nadeau and Bengio 2003); agreement: jackknife",
        "backbone": model.source.spec.name,
        "layer": model.layer.name,
        "weights": model.weights.as_dict(),
        "untrained": model.weights.untrained,
        "versions": versions(),
    }
    done.write_text(json.dumps(document, indent=2, allow_nan=False) + "\n")
    return f"\n{words}\noutput      {folder.address}"

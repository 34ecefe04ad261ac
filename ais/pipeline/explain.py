"""Second stage: pixels → score and heatmap, in actors that each hold the frozen backbone and the head."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from ais.backbones import Backbone, BackboneSpec, load_backbone
from ais.errors import WeightsError
from ais.explainer import Explainer
from ais.heads import load_head
from ais.heatmaps import Weighting
from ais.pipeline.columns import pack, replace, unpack
from ais.storage import Storage


@dataclass(frozen=True)
class BackboneSource:
    """Everything an actor needs to load the same backbone as the driver checked.

    Args:
        spec: its record.
        layer: that is ablated; ``None`` for the default.
        weights: ``"published"``, ``"random"`` or an address.
        seed: of random weights.
        sha256: expected digest of the weights file.
        fingerprint: of the weights that the driver saw.
        storage: how to reach the address.
    """

    spec: BackboneSpec
    layer: str | None
    weights: str
    seed: int | None
    sha256: str | None
    fingerprint: str
    storage: Storage

    def load(self, device: str) -> Backbone:
        """Load it.

        Raises:
            WeightsError: these are not the weights that the driver saw.
        """
        backbone = load_backbone(
            self.spec,
            weights=self.weights,
            seed=self.seed,
            layer=self.layer,
            sha256=self.sha256,
            storage=self.storage,
            device=device,
        )
        if backbone.weights.fingerprint != self.fingerprint:
            raise WeightsError(
                f"the weights here have fingerprint {backbone.weights.fingerprint}, the driver saw {self.fingerprint}: "
                "the file changed, or this machine has another release of torch"
            )
        return backbone


def choose_device(device: str) -> str:
    """Return ``"cuda"`` or ``"cpu"``; decided where the actor runs, not where the job was started."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return device


class Explain:
    """Callable stage: table with ``pixels`` → ``score``, ``score_std`` and ``heatmap`` instead.

    Args:
        source: of the backbone.
        head: address of the head bundle.
        importance: ``(C,)`` AIS for all images, or ``None`` for each image's own.
        weighting: of the maps.
        preprocessing: mode under which the pixels were made.
        device: ``"auto"``, ``"cpu"`` or ``"cuda"``.
        threads: of torch on the CPU.
        chunk: maps ablated at once.
        precision: of the trunk.
        progress: actor that counts, or ``None``.
    """

    def __init__(
        self,
        source: BackboneSource,
        head: str,
        importance: np.ndarray | None,
        weighting: Weighting,
        preprocessing: str,
        device: str,
        threads: int | None,
        chunk: int | None,
        precision: str,
        progress: Any = None,
    ) -> None:
        if threads is not None:
            torch.set_num_threads(threads)
        self._explainer = Explainer(
            source.load(choose_device(device)),
            load_head(head, source.storage),
            weighting=weighting,
            importance=importance,
            preprocessing=preprocessing,
            chunk=chunk,
            trunk_dtype=getattr(torch, precision),
        )
        self._progress = progress

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Explain the rows that have pixels; rows with an error pass through."""
        started = time.perf_counter()
        side = self._explainer.geometry.input_size
        layer = self._explainer.backbone.layer
        assert layer is not None
        count = batch.num_rows
        scores, spreads = np.full(count, np.nan, np.float32), np.full(count, np.nan, np.float32)
        heatmaps = np.zeros((count, *layer.map_shape[1:]), np.float32)
        stages, reasons, errors = (np.array(batch[name].to_pylist(), object) for name in ("stage", "reason", "error"))
        good = np.flatnonzero(stages == "")
        if len(good):
            pixels = unpack(batch["pixels"], (side, side, 3), np.uint8)[good]
            boxes = unpack(batch["box"], (4,), np.float32)[good]
            result = self._explainer.explain_pixels(torch.from_numpy(pixels), torch.from_numpy(boxes))
            scores[good], spreads[good] = result.scores.numpy(), result.score_stds.numpy()
            heatmaps[good] = result.heatmaps.numpy()
            unusable = good[~(np.isfinite(scores[good]) & np.isfinite(heatmaps[good]).all((1, 2)))]
            stages[unusable], reasons[unusable] = "score", "not finite"
            errors[unusable] = "the network gave a score or heatmap that is not finite"
        if self._progress is not None:
            self._progress.add.remote(count, int((stages != "").sum()))
        seconds = (time.perf_counter() - started) / max(1, count)
        return replace(
            batch,
            ["pixels"],
            score=pa.array(scores),
            score_std=pc.if_else(pc.is_nan(pa.array(spreads)), None, pa.array(spreads)),
            heatmap=pack(heatmaps),
            stage=pa.array(stages, pa.string()),
            reason=pa.array(reasons, pa.string()),
            error=pa.array(errors, pa.string()),
            explain_s=pa.array(np.full(count, seconds, np.float32)),
        )

"""Second stage: pixels → score, or score and heatmap, in actors that each hold the frozen backbone and the head."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from ais.backbones import Backbone, BackboneSpec, load_backbone
from ais.errors import ConfigError, WeightsError
from ais.explainer import Explainer
from ais.heads import HeadSource
from ais.memory import keep_freed_memory
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

    def load(self, device: str, *, compiled: bool = False) -> Backbone:
        """Load it.

        Args:
            device: ``"cuda"`` or ``"cpu"``.
            compiled: its trunk by `torch.compile`.

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
            inspected=True,  # by the driver
        )
        if backbone.weights.fingerprint != self.fingerprint:
            raise WeightsError(
                f"the weights here have fingerprint {backbone.weights.fingerprint}, the driver saw {self.fingerprint}: "
                "the file changed, or this machine has another release of torch; give all machines the same"
            )
        if compiled:
            backbone.compile_trunk()
        return backbone


def choose_device(device: str) -> str:
    """Return ``"cuda"`` or ``"cpu"``, made ready; decided where the actor runs, not where the job was started.

    Raises:
        ConfigError: a GPU is asked for, and there is none.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("compute.device: cuda, and this machine has no GPU that torch can use; set cpu or auto")
    if device == "cuda":
        # Where float32 is asked for it is meant: torch would let convolutions round to 10 bits.
        torch.backends.cudnn.allow_tf32 = False
    return device


def set_up_process(threads: int | None) -> None:
    """Make a worker's process ready to run a network on a CPU.

    Args:
        threads: of torch; ``None`` where a GPU does the work.
    """
    if threads is not None:
        torch.set_num_threads(threads)
        keep_freed_memory()


class Score:
    """Callable stage: table with ``pixels`` → ``score`` and ``score_std`` instead.

    Args:
        source: of the backbone.
        head: to score with.
        preprocessing: mode under which the pixels were made.
        device: ``"auto"``, ``"cpu"`` or ``"cuda"``.
        threads: of torch on the CPU.
        precision: of the trunk.
        progress: the `Meter` that counts, or ``None``.
        compile_trunk: by `torch.compile`.
        options: further ones of `ais.Explainer`.
    """

    timed = "score_s"

    def __init__(
        self,
        source: BackboneSource,
        head: HeadSource,
        preprocessing: str,
        device: str,
        threads: int | None,
        precision: str,
        progress: Any = None,
        compile_trunk: bool = False,
        **options: Any,
    ) -> None:
        set_up_process(threads)
        self._device = choose_device(device)
        backbone = source.load(self._device, compiled=compile_trunk)
        self._explainer = Explainer(
            backbone,
            head.load(),
            preprocessing=preprocessing,
            trunk_dtype=getattr(torch, precision),
            **options,
        )
        self._progress = progress
        self._told: int | None = None

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Work on the rows that have pixels; rows with an error pass through."""
        started = time.perf_counter()
        side = self._explainer.geometry.input_size
        count = batch.num_rows
        values = self._without_values(count)
        stages, reasons, errors = (np.array(batch[name].to_pylist(), object) for name in ("stage", "reason", "error"))
        good = np.flatnonzero(stages == "")
        if len(good):
            pixels = unpack(batch["pixels"], (side, side, 3), np.uint8)[good]
            for name, found in self._values(torch.from_numpy(pixels)).items():
                values[name][good] = found.numpy()
            finite = np.ones(len(good), bool)
            for name in values.keys() - {"score_std"}:  # which a single head does not have
                finite &= np.isfinite(values[name][good]).reshape(len(good), -1).all(1)
            unusable = good[~finite]
            stages[unusable], reasons[unusable] = "score", "not finite"
            errors[unusable] = "the network gave a score or heatmap that is not finite"
        if self._progress is not None:
            waited = {
                "fetch": float(pc.sum(batch["fetch_s"]).as_py() or 0),
                "decode": float(pc.sum(batch["decode_s"]).as_py() or 0),
            }
            self._progress.batch(stages, reasons, self._device, time.perf_counter() - started, waited)
            if self._explainer.passes.limit != self._told:
                self._told = self._explainer.passes.limit
                self._progress.out_of_memory(self._told)
        spreads = pa.array(values.pop("score_std"))
        columns = {name: pa.array(found) if found.ndim == 1 else pack(found) for name, found in values.items()}
        columns |= {
            "score_std": pc.if_else(pc.is_nan(spreads), None, spreads),
            "stage": pa.array(stages, pa.string()),
            "reason": pa.array(reasons, pa.string()),
            "error": pa.array(errors, pa.string()),
            self.timed: pa.array(np.full(count, (time.perf_counter() - started) / max(1, count), np.float32)),
        }
        return replace(batch, ["pixels"], **columns)

    def _without_values(self, count: int) -> dict[str, np.ndarray]:
        """What rows with an error hold in each column."""
        return {name: np.full(count, np.nan, np.float32) for name in ("score", "score_std")}

    def _values(self, pixels: Tensor) -> dict[str, Tensor]:
        scores, spreads = self._explainer.score_pixels(pixels)
        return {"score": scores, "score_std": spreads}


class Explain(Score):
    """Callable stage: table with ``pixels`` → ``score``, ``score_std`` and ``heatmap`` instead.

    Args as `Score`; its options are ``importance``, ``weighting`` and ``chunk``.
    """

    timed = "explain_s"

    def _without_values(self, count: int) -> dict[str, np.ndarray]:
        layer = self._explainer.backbone.layer
        assert layer is not None
        return super()._without_values(count) | {"heatmap": np.zeros((count, *layer.map_shape[1:]), np.float32)}

    def _values(self, pixels: Tensor) -> dict[str, Tensor]:
        scores, spreads, heatmaps = self._explainer.heatmap_pixels(pixels)
        return {"score": scores, "score_std": spreads, "heatmap": heatmaps}

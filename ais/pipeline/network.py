"""What every stage shares that runs the network: the backbone on the actor's device, images from pixels, rows back."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from ais.explainer import geometry_of
from ais.pipeline.columns import pack, replace, unpack
from ais.pipeline.explain import BackboneSource, choose_device, set_up_process


class NetworkStage:
    """Base of callable stages that turn ``pixels`` into what a network says of them.

    Args:
        source: of the backbone.
        preprocessing: mode under which the pixels were made.
        device: ``"auto"``, ``"cpu"`` or ``"cuda"``.
        threads: of torch on the CPU.
        progress: the `Meter` that counts.
    """

    def __init__(
        self, source: BackboneSource, preprocessing: str, device: str, threads: int | None, progress: Any
    ) -> None:
        set_up_process(threads)
        self.device = choose_device(device)
        self.backbone = source.load(self.device)
        self.side = geometry_of(self.backbone.spec, preprocessing).input_size
        self._progress = progress

    def good_images(self, batch: pa.Table) -> tuple[np.ndarray, torch.Tensor]:
        """Indices of the rows without error, and their normalised images."""
        self._started = time.perf_counter()
        good = np.flatnonzero(np.array(batch["stage"].to_pylist(), object) == "")
        pixels = torch.from_numpy(unpack(batch["pixels"], (self.side, self.side, 3), np.uint8)[good])
        return good, self.backbone.normalise(pixels.to(self.device))

    def returned(self, batch: pa.Table, kept: Sequence[str], good: np.ndarray, **columns: np.ndarray) -> pa.Table:
        """Give a batch back, and count it.

        Args:
            batch: as it came.
            kept: names of columns that go on, besides the errors.
            good: indices of the rows that ``columns`` belong to.
            columns: ``(len(good), …)`` each, packed as float32 and zero in other rows; a good row in which one of them
                is not finite becomes an error.
        """
        stages, reasons, errors = (np.array(batch[name].to_pylist(), object) for name in ("stage", "reason", "error"))
        packed = {}
        for name, values in columns.items():
            unusable = good[~np.isfinite(values).all(axis=tuple(range(1, values.ndim)))]
            stages[unusable], reasons[unusable] = "score", "not finite"
            errors[unusable] = f"the network's {name} for this image is not finite"
            every = np.zeros((batch.num_rows, *values.shape[1:]), np.float32)
            every[good] = values
            packed[name] = pack(every)
        waited = {
            "fetch": float(pc.sum(batch["fetch_s"]).as_py() or 0),
            "decode": float(pc.sum(batch["decode_s"]).as_py() or 0),
        }
        self._progress.batch(stages, reasons, self.device, time.perf_counter() - self._started, waited)
        texts = {"stage": stages, "reason": reasons, "error": errors}
        texts_packed = {name: pa.array(values, pa.string()) for name, values in texts.items()}
        return replace(batch.select(list(kept)), [], **packed, **texts_packed)

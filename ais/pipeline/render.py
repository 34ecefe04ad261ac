"""Third stage: heatmap and picture → PNG bytes."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pyarrow as pa

from ais.pipeline.columns import replace, unpack
from ais.pipeline.metrics import spent
from ais.placement import HeatmapCells, Weighting, normalise_for_display, place_on_image
from ais.render import both_png, heatmap_png, overlay_png


class Render:
    """Callable stage: table with ``picture`` and ``heatmap`` → ``png`` bytes (null where there is no picture).

    Args:
        cells: of the heatmaps.
        weighting: decides the colour map.
        kind: ``"overlay"``, ``"heatmap"`` or ``"both"``.
        metadata: text put into every PNG.
        counter: actor that counts finished rows (`ais.pipeline.progress.Counter`), if they are not counted elsewhere.
    """

    def __init__(
        self, cells: HeatmapCells, weighting: Weighting, kind: str, metadata: dict[str, str], counter: Any = None
    ) -> None:
        self._cells = cells
        self._weighting: Weighting = weighting
        self._kind = kind
        self._metadata = metadata
        self._counter = counter

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Render every row that has a picture and no error."""
        heatmaps = unpack(batch["heatmap"], self._cells.shape, np.float32)
        boxes = unpack(batch["box"], (4,), np.float32)
        heatmap_boxes = self._cells.on_originals(boxes)
        pngs: list[bytes | None] = []
        seconds = np.zeros(batch.num_rows, np.float32)
        columns = ("stage", "picture", "picture_height", "picture_width", "width", "height", "score", "uri")
        for index, row in enumerate(batch.select(columns).to_pylist()):
            started = time.perf_counter()
            png = None
            if row["picture"] is not None and not row["stage"]:
                shown = (row["picture_height"], row["picture_width"])
                picture = np.frombuffer(row["picture"], np.uint8).reshape(*shown, 3)
                size = (row["height"], row["width"])
                placed = place_on_image(heatmaps[index], heatmap_boxes[index], size, shown, seen=boxes[index])
                metadata = {**self._metadata, "score": f"{row['score']:.6g}", "image": row["uri"]}
                png = self._draw(picture, normalise_for_display(placed, self._weighting), metadata)
            pngs.append(png)
            seconds[index] = time.perf_counter() - started
        spent(self._metadata.get("ais.run_id", ""), "render", float(seconds.sum()))
        if self._counter is not None:
            self._counter.add.remote(len(pngs), pngs.count(None))
        drop = ["picture", "picture_height", "picture_width"]
        return replace(batch, drop, png=pa.array(pngs, pa.large_binary()), render_s=pa.array(seconds))

    def _draw(self, picture: np.ndarray, heatmap: np.ndarray, metadata: dict[str, str]) -> bytes:
        if self._kind == "heatmap":
            return heatmap_png(heatmap, self._weighting, metadata)
        draw = both_png if self._kind == "both" else overlay_png
        return draw(picture, heatmap, self._weighting, metadata)

"""The runs of a comparison: that they can be compared, and their heatmaps within reach."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ais.errors import ConfigError, RunError
from ais.runs import Run
from ais.storage import Storage, absolute, reading

# An image is its address and etag; a file of a local disk has none, and its size tells at least some changes.
IMAGE_KEY = ["uri", "etag", "width", "height"]
_BOXES = ["box", "heatmap_box"]


@dataclass(frozen=True)
class ComparedRun:
    """A complete run.

    Args:
        name: what it is called in tables and pictures.
        run: its folder.
        summary: its ``summary.json``.
    """

    name: str
    run: Run
    summary: dict[str, Any]

    @property
    def weighting(self) -> str:
        """``"positive"`` or ``"signed"``: whether its heatmaps have negative values."""
        return str(self.summary["identity"]["weighting"])

    def facts(self) -> dict[str, Any]:
        """What its heatmaps were made with, as JSON values."""
        made_with = ("run_id", "backbone", "layer", "weights", "untrained", "identity", "images", "scored", "failed")
        return {"name": self.name, "address": self.run.folder.address} | {key: self.summary[key] for key in made_with}

    def describe(self) -> str:
        """Say in a line what its heatmaps are."""
        _, height, width = self.summary["layer"]["map_shape"]
        untrained = ", UNTRAINED" if self.summary["untrained"] else ""
        return (
            f"{self.name}: {self.summary['scored']:,} heatmaps, {self.weighting}, {height}×{width}, "
            f"{self.summary['backbone']} {self.summary['layer']['name']}{untrained}"
        )


def open_runs(addresses: Sequence[str], names: Sequence[str] | None, storage: Storage) -> list[ComparedRun]:
    """Open the runs of a comparison, without reading their results.

    Args:
        addresses: of run folders.
        names: one for each; their run ids by default.
        storage: how to reach them.

    Raises:
        ConfigError: a folder holds no run, or one without heatmaps, the run is not complete or there twice, or two have
            the same run id and no names.
    """
    runs = [Run(storage.open(absolute(address))) for address in addresses]
    folders = [run.folder.address for run in runs]
    for index, folder in enumerate(folders):
        if folder in folders[:index]:
            raise ConfigError(f"runs: {folder!r} is given twice; name each run once")
    ids = [run.run_id for run in runs]
    if names is None and len(set(ids)) < len(ids):
        raise ConfigError(f"runs: the run ids {', '.join(ids)} are not all different; give names=[…], one for each run")
    return [ComparedRun(name, run, _summary(run)) for name, run in zip(names or ids, runs, strict=True)]


def _summary(run: Run) -> dict[str, Any]:
    if run.record() is None:
        raise ConfigError(
            f"runs: {run.folder.address!r} holds no run; give a folder OUTPUT/runs/RUN_ID that jobs/heatmaps.py wrote"
        )
    summary = run.complete()
    if summary is None:
        raise ConfigError(
            f"runs: {run.folder.address!r} is not complete: it has no summary.json, or has lost shards since; the "
            "jobs/heatmaps.py command that started it continues it"
        )
    identity = summary.get("identity")
    if not isinstance(identity, dict) or "weighting" not in identity:
        raise ConfigError(
            f"runs: {run.folder.address!r} holds no heatmaps: its summary.json names no weighting; give a run of "
            "jobs/heatmaps.py, or of jobs/score.py with heatmaps=true"
        )
    return summary


@dataclass(frozen=True)
class RunHeatmaps:
    """Every heatmap of a run, by image.

    Args:
        name: of the run.
        images: `IMAGE_KEY` and ``row``, one row per distinct image; no etag is ``""``.
        boxes: ``(rows, 4)`` float32, what the model saw, in pixels of the original.
        heatmap_boxes: ``(rows, 4)`` float32, where the heatmaps' cells lie, likewise.
        heatmaps: ``(rows, h, w)`` float32, at the layer's resolution; may be a memory map.
    """

    name: str
    images: pa.Table
    boxes: np.ndarray
    heatmap_boxes: np.ndarray
    heatmaps: np.ndarray


def read_heatmaps(compared: ComparedRun, scratch: Path) -> RunHeatmaps:
    """Read a run's results once, shard by shard; the heatmaps stay in a memory-mapped file.

    Two runs hold the same images in different orders: with the heatmaps at hand by row, no shard is fetched twice,
    however many runs are compared, and memory holds little more than the addresses of the images.

    Args:
        compared: the run.
        scratch: folder for that file, whose size is that of the heatmaps; it has to outlive the result.

    Raises:
        RunError: the run has no results, or a shard is damaged.
        StorageError: a shard cannot be read.
    """
    tables = []
    shape: tuple[int, int] | None = None
    spool = scratch / f"{compared.run.run_id}-{len(list(scratch.iterdir()))}.float32"
    with spool.open("wb") as file:
        for shard in compared.run.results.files("*.parquet"):
            with reading(shard):
                try:
                    with shard.filesystem.open(shard.path, "rb") as source:
                        table = pq.read_table(source, columns=[*IMAGE_KEY, *_BOXES, "heatmap"]).combine_chunks()
                    stack = table["heatmap"].chunk(0).to_numpy_ndarray()
                except (pa.ArrowException, KeyError, IndexError) as error:
                    raise RunError(f"{shard.address!r} cannot be read: {error}; make the run anew") from error
            shape = stack.shape[1:]
            tables.append(table.drop_columns("heatmap"))
            file.write(np.ascontiguousarray(stack).data)  # unlike tofile, it says when there is no room
    if shape is None:
        raise RunError(f"{compared.run.folder.address!r} has no results: every image is in errors; leave the run out")
    table = pa.concat_tables(tables)
    heatmaps = np.memmap(spool, np.float32, "r", shape=(table.num_rows, *shape))
    boxes, heatmap_boxes = (table[name].combine_chunks().flatten().to_numpy().reshape(-1, 4) for name in _BOXES)
    return RunHeatmaps(compared.name, _distinct_images(table), boxes, heatmap_boxes, heatmaps)


def _distinct_images(table: pa.Table) -> pa.Table:
    """The first row of each image: a list may name one several times, and its heatmaps are then the same."""
    images = table.select(IMAGE_KEY).append_column("row", pa.array(np.arange(table.num_rows)))
    # Nulls match nothing in a join.
    images = images.set_column(IMAGE_KEY.index("etag"), "etag", pc.fill_null(images["etag"], ""))
    return images.group_by(IMAGE_KEY).aggregate([("row", "min")]).rename_columns([*IMAGE_KEY, "row"])

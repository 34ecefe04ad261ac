"""The pointing game on planted images: does the maximum of a heatmap fall on what the rating depends on?"""

from __future__ import annotations

import io
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ais.metrics import pointing_chance, pointing_hit
from ais.placement import place_on_image
from ais.planted import load_mask
from ais.runs import Run


@dataclass(frozen=True)
class PointingGame:
    """Outcome over a run.

    Args:
        images: that have a mask and a heatmap.
        hit_rate: share of them whose heatmap has its maximum inside the mask (Zhang et al., ECCV 2016, no tolerance).
        chance: the same for a point drawn anywhere in what the model saw.
    """

    images: int
    hit_rate: float
    chance: float


def play_pointing_game(run: Run, planted: str | Path) -> PointingGame:
    """Play the pointing game with the results of a run over a planted set.

    Args:
        run: complete or not.
        planted: folder that `ais.planted.make_planted` wrote.

    Raises:
        FileNotFoundError: an image of the run is not in the planted set.
        ValueError: the run has no results.
    """
    hits, chances = [], []
    for shard in run.results.files("*.parquet"):
        with shard.filesystem.open(shard.path, "rb") as file:
            table = pq.read_table(file, columns=["uri", "width", "height", "box", "heatmap_box", "heatmap"])
        heatmaps = np.concatenate([chunk.to_numpy_ndarray() for chunk in table["heatmap"].chunks])
        for row, heatmap in zip(table.drop_columns("heatmap").to_pylist(), heatmaps, strict=True):
            size = (row["height"], row["width"])
            placed = place_on_image(heatmap, np.array(row["heatmap_box"]), size, seen=np.array(row["box"]))
            mask = load_mask(planted, Path(row["uri"]).name)
            hits.append(pointing_hit(placed, mask))
            chances.append(pointing_chance(mask, np.isfinite(placed)))
    if not hits:
        raise ValueError(f"{run.folder.address} has no results to play with")
    return PointingGame(len(hits), float(np.mean(hits)), float(np.mean(chances)))


def extreme_pictures(run: Run, folder: Path, count: int) -> list[tuple[float, Path]]:
    """Unpack the pictures of the highest and lowest scores, highest first.

    Args:
        run: with pictures of all its images.
        folder: where to; created.
        count: of each end.

    Returns:
        scores and files; fewer where the run has fewer.
    """
    columns = ["image_id", "uri", "score", "png"]
    shards = [pq.read_table(io.BytesIO(shard.read_bytes()), columns=columns) for shard in run.results.files()]
    rows = pa.concat_tables(shards)
    ordered = [row for row in rows.sort_by([("score", "descending")]).to_pylist() if row["png"]]
    chosen = ordered if len(ordered) <= 2 * count else ordered[:count] + ordered[-count:]
    folder.mkdir(parents=True, exist_ok=True)
    pictures = []
    for row in chosen:
        with tarfile.open(fileobj=io.BytesIO((run.png / row["png"]).read_bytes())) as shard:
            member = shard.extractfile(f"{row['image_id']}.png")
            assert member is not None
            picture = folder / f"{Path(row['uri']).stem}.png"
            picture.write_bytes(member.read())
        pictures.append((row["score"], picture))
    return pictures

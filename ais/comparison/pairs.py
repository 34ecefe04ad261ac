"""Every two runs: their common images, the heatmaps on a common grid, and how far they agree."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from scipy import stats

from ais.agreement import METRICS, agreement
from ais.comparison.sources import IMAGE_KEY, RunHeatmaps
from ais.errors import RunError
from ais.placement import place_on_image
from ais.progress import ProgressLine

_IMAGES_AT_ONCE = 256


@dataclass(frozen=True)
class PairAgreement:
    """How far two runs agree.

    Args:
        first: name of one run.
        second: name of the other.
        images: the M common images: ``uri`` and ``etag``.
        values: ``(M,)`` float64 for each of `ais.agreement.METRICS`; NaN where it is undefined.
        only_in_first: images that only the one run has a heatmap of.
        only_in_second: likewise.
    """

    first: str
    second: str
    images: pa.Table
    values: dict[str, NDArray[np.float64]]
    only_in_first: int
    only_in_second: int


@dataclass(frozen=True)
class MeanAgreement:
    """A metric over images.

    Args:
        mean: over the images on which it is defined; NaN where there is none.
        low: lower end of the 95% interval; NaN for fewer than two such images.
        high: upper end, likewise.
        n: images on which it is defined.
        undefined: images on which it is not.
    """

    mean: float
    low: float
    high: float
    n: int
    undefined: int

    def as_dict(self) -> dict[str, float | int | None]:
        """Return the fields as JSON values, with ``None`` for NaN."""
        return {name: None if np.isnan(value) else value for name, value in asdict(self).items()}


def mean_agreement(values: NDArray[np.float64]) -> MeanAgreement:
    """Average over images, with a Student-t interval over them.

    Args:
        values: ``(M,)``; NaN where undefined.
    """
    defined = values[~np.isnan(values)]
    n, undefined = len(defined), len(values) - len(defined)
    if n < 2:
        return MeanAgreement(float(defined[0]) if n else np.nan, np.nan, np.nan, n, undefined)
    mean = float(defined.mean())
    reach = float(stats.t.ppf(0.975, n - 1) * defined.std(ddof=1) / np.sqrt(n))
    return MeanAgreement(mean, mean - reach, mean + reach, n, undefined)


def compare(runs: Sequence[RunHeatmaps], resolution: int, top_share: float) -> Iterator[PairAgreement]:
    """Compare every two runs on the images that both have; says how far it is while it is iterated over.

    Args:
        runs: at least two.
        resolution: cells along each side of the common grid.
        top_share: as `ais.agreement.top_overlap`.

    Raises:
        RunError: two runs have no image in common, or saw no common part of one; before any comparison.
    """
    pairs = [_Pair.match(first, second) for first, second in combinations(runs, 2)]
    return _compared(pairs, resolution, top_share)


def _compared(pairs: Sequence[_Pair], resolution: int, top_share: float) -> Iterator[PairAgreement]:
    with ProgressLine("pairs of heatmaps", sum(pair.images.num_rows for pair in pairs)) as progress:
        for pair in pairs:
            yield pair.compare(resolution, top_share, progress)


@dataclass(frozen=True)
class _Pair:
    """Two runs and the M images that both have: which rows, ``(M,)``, and what both saw, ``(M, 4)``, in pixels."""

    first: RunHeatmaps
    second: RunHeatmaps
    images: pa.Table
    first_rows: NDArray[np.int64]
    second_rows: NDArray[np.int64]
    regions: NDArray[np.float64]

    @classmethod
    def match(cls, first: RunHeatmaps, second: RunHeatmaps) -> _Pair:
        joined = first.images.join(second.images, IMAGE_KEY, join_type="inner", right_suffix="_second")
        if joined.num_rows == 0:
            one, other = first.images["uri"][0].as_py(), second.images["uri"][0].as_py()
            raise RunError(
                f"{first.name} and {second.name} have no image in common (the same address, etag and size): one has "
                f"{one!r}, the other {other!r}; compare runs over the same images"
            )
        joined = joined.sort_by("row")
        rows = joined["row"].to_numpy(), joined["row_second"].to_numpy()
        boxes = [run.boxes[index].astype(np.float64) for run, index in zip((first, second), rows, strict=True)]
        size = np.stack([joined["width"].to_numpy(), joined["height"].to_numpy()], axis=1)
        left_top = np.maximum(np.maximum(boxes[0][:, :2], boxes[1][:, :2]), 0)
        right_bottom = np.minimum(np.minimum(boxes[0][:, 2:], boxes[1][:, 2:]), size)
        if (empty := (right_bottom <= left_top).any(1)).any():
            uri = joined["uri"][int(empty.argmax())].as_py()
            raise RunError(f"{first.name} and {second.name} saw no common part of {uri!r}; use the same preprocessing")
        return cls(first, second, joined, *rows, np.concatenate([left_top, right_bottom], axis=1))

    def compare(self, resolution: int, top_share: float, progress: ProgressLine) -> PairAgreement:
        count = self.images.num_rows
        chunks = []
        for start in range(0, count, _IMAGES_AT_ONCE):
            part = slice(start, min(start + _IMAGES_AT_ONCE, count))
            first = self._on_common_grid(self.first, self.first_rows, part, resolution)
            second = self._on_common_grid(self.second, self.second_rows, part, resolution)
            chunks.append(agreement(first, second, self._extents(part), top_share))
            progress.advance(part.stop - part.start)
        return PairAgreement(
            self.first.name,
            self.second.name,
            self.images.select(["uri", "etag"]),
            {metric: np.concatenate([chunk[metric] for chunk in chunks]) for metric in METRICS},
            self.first.images.num_rows - count,
            self.second.images.num_rows - count,
        )

    def _on_common_grid(
        self, run: RunHeatmaps, rows: NDArray[np.int64], part: slice, resolution: int
    ) -> NDArray[np.float32]:
        """Sample heatmaps on a grid over what both runs saw of each image, ``(n, resolution, resolution)``."""
        regions = self.regions[part]
        origin, extent = np.tile(regions[:, :2], 2), np.tile(regions[:, 2:] - regions[:, :2], 2)
        # In units of the region, which is placed on as if it were an image, and seen whole.
        boxes = (run.heatmap_boxes[rows[part]] - origin) / extent
        shown, seen = (resolution, resolution), np.array([0, 0, 1, 1])
        placed = [
            place_on_image(heatmap, box, (1, 1), shown, seen)
            for heatmap, box in zip(run.heatmaps[rows[part]], boxes, strict=True)
        ]
        return np.stack(placed)

    def _extents(self, part: slice) -> NDArray[np.float64]:
        """Height and width of the common regions in diagonals of their images, ``(n, 2)``."""
        images, regions = self.images.slice(part.start, part.stop - part.start), self.regions[part]
        diagonals = np.hypot(images["width"].to_numpy(), images["height"].to_numpy())
        return (regions[:, [3, 2]] - regions[:, [1, 0]]) / diagonals[:, None]

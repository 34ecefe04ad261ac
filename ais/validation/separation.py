"""Does importance tell the maps apart: do those with a higher AIS respond more to what is known to matter?

N images, C maps of h × w cells, R heads that were never fitted.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import stats
from scipy.stats import rankdata

from ais.importance.similarity import pearson
from ais.validation.intervals import ENOUGH_IMAGES, Mean

_RESAMPLES = 500


def mask_response(feature_maps: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """How much more each map shows inside the mask than outside: the area under the ROC curve, in [0, 1].

    The chance that a cell inside has a higher value of the rectified map, which is what a heatmap adds up, than one
    outside; ties count half. 0.5: the map does not respond to the mask.

    Args:
        feature_maps: ``(B, C, h, w)``.
        inside: ``(B, h, w)`` bool, of `mask_on_cells`.

    Returns:
        ``(B, C)``; NaN for an image with no cell inside, or none outside.
    """
    batch, maps = feature_maps.shape[:2]
    found = np.full((batch, maps), np.nan)
    values = np.maximum(feature_maps, 0).reshape(batch, maps, -1)
    for image, cells in enumerate(inside.reshape(batch, -1)):
        count, others = int(cells.sum()), int((~cells).sum())
        if count and others:
            # Mann and Whitney's U, from the sum of ranks.
            ranks = rankdata(values[image], axis=1)[:, cells].sum(1)
            found[image] = (ranks - count * (count + 1) / 2) / (count * others)
    return found


def mask_on_cells(mask: np.ndarray, heatmap_box: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Cells ``(h, w)`` of which more than half lies in the mask; outside of the image there is no mask.

    Args:
        mask: ``(H, W)`` bool, of the original's size.
        heatmap_box: left, top, right, bottom of the cells in pixels of the original.
        shape: h, w.
    """
    left, top, right, bottom = np.asarray(heatmap_box, np.float64)
    total = np.pad(mask.astype(np.float64), ((1, 0), (1, 0))).cumsum(0).cumsum(1)  # pixels above and left of a corner
    rows, columns = np.linspace(top, bottom, shape[0] + 1), np.linspace(left, right, shape[1] + 1)
    # Corners between pixels: interpolated, along rows and then along columns.
    along = np.stack([np.interp(rows, np.arange(len(total)), column) for column in total.T], axis=1)
    corners = np.stack([np.interp(columns, np.arange(total.shape[1]), row) for row in along])
    covered = np.diff(np.diff(corners, axis=0), axis=1)
    return covered > 0.5 * (right - left) * (bottom - top) / (shape[0] * shape[1])


@dataclass(frozen=True)
class Separation:
    """AIS of each map and its response to the masks.

    Args:
        ais: ``(N, C)`` effect on the score, of each image.
        response: ``(N, C)``, of `mask_response`.
        random_ais: ``(R, C)`` mean effect on the scores of heads that were never fitted.
    """

    ais: np.ndarray
    response: np.ndarray
    random_ais: np.ndarray

    @property
    def kept(self) -> np.ndarray:
        """Which images tell maps apart, ``(N,)`` bool: their mask fills half of some cell, but not of every one."""
        return np.asarray(np.isfinite(self.response).all(1))

    def means(self) -> tuple[np.ndarray, np.ndarray]:
        """AIS and response ``(C,)`` of each map, over those images; NaN where there is none."""
        if not self.kept.any():
            nothing = np.full(self.ais.shape[1], np.nan)
            return nothing, nothing
        return self.ais[self.kept].mean(0, dtype=np.float64), self.response[self.kept].mean(0)

    def correlation(self, seed: int = 0) -> Mean:
        """Spearman correlation, over maps, of mean AIS and mean response; percentile bootstrap over images.

        No interval for fewer than `ENOUGH_IMAGES`.
        """
        kept = self.kept
        count = int(kept.sum())
        if count == 0:
            return Mean(np.nan, np.nan, np.nan, 0)
        ais, response = self.ais[kept].astype(np.float64), self.response[kept]
        value = float(_rank_correlation(ais.mean(0), response.mean(0)))
        if count < ENOUGH_IMAGES:
            return Mean(value, np.nan, np.nan, count)
        weights = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=_RESAMPLES) / count
        low, high = np.quantile(_rank_correlation(weights @ ais, weights @ response), [0.025, 0.975])
        return Mean(value, float(low), float(high), count)

    def random_correlations(self) -> np.ndarray:
        """The same correlation ``(R,)`` of each unfitted head; NaN where there is no image to tell by."""
        if not self.kept.any():
            return np.full(len(self.random_ais), np.nan)
        return np.asarray(_rank_correlation(self.random_ais.astype(np.float64), self.means()[1]))

    def lead(self) -> Mean:
        """How much higher the correlation is than that of an unfitted head.

        The interval holds both the choice of the images and the spread of the unfitted heads, of which a further one
        may lie ``t · s · √(1 + 1/R)`` from their mean.
        """
        own, random = self.correlation(), self.random_correlations()
        value = own.value - float(random.mean())
        spread = stats.t.ppf(0.975, len(random) - 1) * random.std(ddof=1) * np.sqrt(1 + 1 / len(random))
        low, high = np.hypot([own.value - own.low, own.high - own.value], spread)
        return Mean(value, float(value - low), float(value + high), own.n)


def _rank_correlation(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    return pearson(rankdata(first, axis=-1), rankdata(second, axis=-1))

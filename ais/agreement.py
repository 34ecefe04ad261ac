"""How far two models' heatmaps agree, image by image.

Every function takes two stacks ``(N, h, w)`` of heatmaps of the same N images, sampled on the same grid, raw and signed
(not normalised for display), and returns ``(N,)`` float64: NaN for an image on which the metric is undefined, and the
others as they are. Arithmetic is float64.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from scipy.ndimage import gaussian_filter
from scipy.optimize import linprog

# What two heatmaps that agree, or have nothing to do with each other, give.
METRICS = {
    "pearson": "Pearson correlation over the grid: 1 the same pattern, 0 unrelated, -1 opposite",
    "cosine": "cosine similarity: 1 the same up to scale, 0 orthogonal, -1 opposite",
    "mse": "mean squared difference of the raw values: 0 equal; grows with the square of their scale",
    "ssim": "structural similarity of the raw values: 1 equal, 0 no common structure; sensitive to their scale",
    "emd": "earth mover's distance of the positive parts, in diagonals of the image: 0 the same places",
    "top_overlap": "intersection over union of the highest cells: 1 the same cells, 0 disjoint",
}

# Heatmaps are upsampled in float32, which turns equal values into values that differ in their last digits.
_ROUNDING = 1e-6
_SSIM_SIGMA, _SSIM_TRUNCATE, _SSIM_RADIUS = 1.5, 3.5, 5
_SSIM_K1, _SSIM_K2 = 0.01, 0.03
MIN_SIDE = 2 * _SSIM_RADIUS + 1


def agreement(
    first: NDArray[np.floating], second: NDArray[np.floating], extents: NDArray[np.floating], top_share: float = 0.1
) -> dict[str, NDArray[np.float64]]:
    """Compute all of `METRICS`, in their order.

    Args:
        first: ``(N, h, w)``; h and w at least `MIN_SIDE`.
        second: ``(N, h, w)``.
        extents: ``(N, 2)``, as `earth_movers_distance`.
        top_share: as `top_overlap`.

    Raises:
        ValueError: as the functions that it calls.
    """
    return {
        "pearson": pearson(first, second),
        "cosine": cosine(first, second),
        "mse": mean_squared_error(first, second),
        "ssim": structural_similarity(first, second),
        "emd": earth_movers_distance(first, second, extents),
        "top_overlap": top_overlap(first, second, top_share),
    }


def pearson(first: NDArray[np.floating], second: NDArray[np.floating]) -> NDArray[np.float64]:
    """Pearson correlation over cells, in [-1, 1]: 1 the same pattern, 0 unrelated, -1 opposite.

    Blind to offset and positive scale. Undefined where a heatmap is constant.
    """
    a, b = _flat_pair(first, second)
    constant = _constant(a) | _constant(b)
    similarity = _cosine(a - a.mean(1, keepdims=True), b - b.mean(1, keepdims=True))
    return np.where(constant, np.nan, similarity)


def cosine(first: NDArray[np.floating], second: NDArray[np.floating]) -> NDArray[np.float64]:
    """Cosine of the angle between the heatmaps, in [-1, 1]: 1 equal up to scale, 0 orthogonal, -1 opposite.

    Blind to positive scale, but not to the zero: heatmaps that are nowhere negative have no cosine below 0. Undefined
    where a heatmap is zero everywhere.
    """
    return _cosine(*_flat_pair(first, second))


def mean_squared_error(first: NDArray[np.floating], second: NDArray[np.floating]) -> NDArray[np.float64]:
    """Mean over cells of the squared difference, at least 0, in squared units of the heatmaps: 0 where they are equal.

    Depends on the scale of the raw values, which differs between backbones: compare it between pairs of runs only
    where the scales are the same, as for heads on one layer. Always defined.
    """
    a, b = _flat_pair(first, second)
    return np.mean((a - b) ** 2, axis=1)


def structural_similarity(first: NDArray[np.floating], second: NDArray[np.floating]) -> NDArray[np.float64]:
    """Mean structural similarity, in [-1, 1]: 1 where the heatmaps are equal, 0 where they share no structure.

    Wang, Bovik, Sheikh and Simoncelli, *Image Quality Assessment: From Error Visibility to Structural Similarity*, IEEE
    Transactions on Image Processing 13, 2004: Gaussian window of 11 × 11 cells with σ = 1.5, K1 = 0.01, K2 = 0.03,
    averaged over the windows that lie inside the grid. The same as scikit-image's ``structural_similarity`` with
    ``gaussian_weights=True, sigma=1.5, use_sample_covariance=False``, and as ``data_range`` the maximum minus the
    minimum over both heatmaps of the image.

    Compares local means and variances, hence offset and scale as well as pattern. Undefined where both heatmaps are
    the same constant, which has no range.

    Raises:
        ValueError: a side of the grid is shorter than the window.
    """
    a, b = _pair(first, second)
    if min(a.shape[1:]) < MIN_SIDE:
        raise ValueError(f"the grid is {a.shape[1]} × {a.shape[2]}; the window needs at least {MIN_SIDE} cells a side")
    highest, lowest = np.maximum(a, b).max((1, 2)), np.minimum(a, b).min((1, 2))
    data_range = (highest - lowest)[:, None, None]
    undefined = data_range <= _ROUNDING * np.maximum(np.abs(highest), np.abs(lowest))[:, None, None]
    scale = np.where(undefined, 1, data_range)
    c1, c2 = (_SSIM_K1 * scale) ** 2, (_SSIM_K2 * scale) ** 2
    mean_a, mean_b = _window_mean(a), _window_mean(b)
    variance_a, variance_b = _window_mean(a * a) - mean_a**2, _window_mean(b * b) - mean_b**2
    covariance = _window_mean(a * b) - mean_a * mean_b
    similarity = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    similarity /= (mean_a**2 + mean_b**2 + c1) * (variance_a + variance_b + c2)
    return np.where(undefined[:, 0, 0], np.nan, similarity.mean((1, 2)))


def earth_movers_distance(
    first: NDArray[np.floating], second: NDArray[np.floating], extents: NDArray[np.floating], side: int = 12
) -> NDArray[np.float64]:
    """How far the evidence of one heatmap has to be moved over the image to become that of the other.

    The evidence is the positive part of a heatmap, what raises the score, as a distribution with sum one; negative
    values would need a transport of their own, and their absolute value would count opposite claims as agreement. The
    distance is the least mean way that its mass has to go (Rubner, Tomasi and Guibas, *The Earth Mover's Distance as a
    Metric for Image Retrieval*, IJCV 40, 2000), with straight ways between the centres of ``side`` × ``side`` cells, to
    which the heatmaps are reduced by area averaging. It is the exact optimum of the linear programme. In diagonals of
    the image: 0 for the same places, at most 1, from corner to corner. Undefined where a heatmap is nowhere positive.

    About 20 ms an image on one core.

    Args:
        first: ``(N, h, w)``.
        second: ``(N, h, w)``.
        extents: ``(N, 2)`` height and width of what the grid covers, in diagonals of the image.
        side: cells along each side of the reduced grid.

    Raises:
        ValueError: the shapes differ.
    """
    a, b = (_reduce(np.maximum(maps, 0), side).reshape(len(maps), -1) for maps in _pair(first, second))
    if extents.shape != (len(a), 2):
        raise ValueError(f"extents has shape {extents.shape}; it must be (N, 2), here ({len(a)}, 2)")
    centres = np.stack(np.divmod(np.arange(side * side), side), axis=1) + 0.5  # (side², 2): row, column
    distances = np.full(len(a), np.nan)
    totals_a, totals_b = a.sum(1), b.sum(1)
    for image in np.flatnonzero((totals_a > 0) & (totals_b > 0)):
        excess = a[image] / totals_a[image] - b[image] / totals_b[image]
        distances[image] = _transport_cost(excess, centres / side * extents[image])
    return distances


def top_overlap(first: NDArray[np.floating], second: NDArray[np.floating], share: float = 0.1) -> NDArray[np.float64]:
    """Intersection over union (Jaccard index) of the highest cells, in [0, 1]: 1 the same cells, 0 disjoint.

    Sets drawn at random have about ``share / (2 - share)``, 0.05 for a tenth. Cells that tie for the last places share
    them as fractional members, and intersection and union are sums of minima and maxima of membership. Undefined where
    a heatmap is constant: all its cells tie.

    Args:
        first: ``(N, h, w)``.
        second: ``(N, h, w)``.
        share: of the cells that count as highest, in (0, 1).

    Raises:
        ValueError: the shapes differ, or the share is out of range.
    """
    if not 0 < share < 1:
        raise ValueError(f"share is {share}; it lies between 0 and 1, such as 0.1")
    a, b = _flat_pair(first, second)
    count = max(1, round(share * a.shape[1]))
    in_a, in_b = top_membership(a, count), top_membership(b, count)
    overlap = np.minimum(in_a, in_b).sum(1) / np.maximum(in_a, in_b).sum(1)
    return np.where(_constant(a) | _constant(b), np.nan, overlap)


def top_membership(flat: NDArray[np.float64], count: int) -> NDArray[np.float64]:
    """Membership ``(N, P)``, in [0, 1] with sum ``count``, in the ``count`` highest cells.

    Cells that tie for the last places share them: which of them come first in memory must not matter.

    Args:
        flat: ``(N, P)``.
        count: from 1 to P.
    """
    last = -np.partition(-flat, count - 1, axis=1)[:, count - 1, None]
    rounding = _ROUNDING * np.abs(flat).max(1, keepdims=True)
    above, tied = flat > last + rounding, np.abs(flat - last) <= rounding
    places_left = count - above.sum(1, keepdims=True)
    return above + tied * (places_left / tied.sum(1, keepdims=True))


def _pair(first: NDArray[np.floating], second: NDArray[np.floating]) -> Sequence[NDArray[np.float64]]:
    if first.ndim != 3 or first.shape != second.shape:
        raise ValueError(f"the heatmaps have shapes {first.shape} and {second.shape}; both must be the same (N, h, w)")
    return first.astype(np.float64), second.astype(np.float64)


def _flat_pair(first: NDArray[np.floating], second: NDArray[np.floating]) -> Sequence[NDArray[np.float64]]:
    return [maps.reshape(len(maps), -1) for maps in _pair(first, second)]


def _constant(flat: NDArray[np.float64]) -> NDArray[np.bool_]:
    return np.ptp(flat, axis=1) <= _ROUNDING * np.abs(flat).max(1)


def _cosine(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return np.divide(np.sum(a * b, axis=1), norms, out=np.full(len(a), np.nan), where=norms > 0)


def _window_mean(maps: NDArray[np.float64]) -> NDArray[np.float64]:
    means = gaussian_filter(maps, _SSIM_SIGMA, truncate=_SSIM_TRUNCATE, axes=(1, 2))
    return means[:, _SSIM_RADIUS:-_SSIM_RADIUS, _SSIM_RADIUS:-_SSIM_RADIUS]


def _reduce(maps: NDArray[np.float64], side: int) -> NDArray[np.float64]:
    """Average ``(N, h, w)`` over the areas of ``side`` × ``side`` cells, which may cut through those of the grid."""
    rows, columns = (_area_weights(cells, side) for cells in maps.shape[1:])
    return rows @ maps @ columns.T


def _area_weights(cells: int, side: int) -> NDArray[np.float64]:
    """Share of each of ``cells`` in each of ``side`` wider or narrower ones along the same length, (side, cells)."""
    fine, coarse = np.arange(cells + 1) / cells, np.arange(side + 1) / side
    ends = np.minimum(coarse[1:, None], fine[None, 1:])
    starts = np.maximum(coarse[:-1, None], fine[None, :-1])
    return np.maximum(ends - starts, 0) * side


def _transport_cost(excess: NDArray[np.float64], places: NDArray[np.float64]) -> float:
    """Least cost of moving mass from where ``excess`` is positive to where it is negative, (P,), over (P, 2) places.

    What two distributions share need not move, as the ground distance is a metric; leaving it out makes the linear
    programme several times smaller.
    """
    sources, sinks = np.flatnonzero(excess > 0), np.flatnonzero(excess < 0)
    if not (len(sources) and len(sinks)):
        return 0.0
    costs = np.linalg.norm(places[sources, None] - places[None, sinks], axis=-1)
    leaving = sparse.kron(sparse.eye_array(len(sources)), np.ones((1, len(sinks))))
    arriving = sparse.kron(np.ones((1, len(sources))), sparse.eye_array(len(sinks)))
    moved = np.concatenate([excess[sources], -excess[sinks]])
    # The last equation follows from the others, and in floating point would contradict them.
    result = linprog(
        costs.ravel(), A_eq=sparse.vstack([leaving, arriving]).tocsc()[:-1], b_eq=moved[:-1], method="highs"
    )
    if not result.success:
        raise ArithmeticError(f"the transport of {len(sources)} to {len(sinks)} cells was not solved: {result.message}")
    return float(result.fun)

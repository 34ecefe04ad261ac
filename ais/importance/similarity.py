"""AIS of the similarity objective: how much each feature map adds to the agreement with human similarity.

From *Explaining Human Comparisons using Alignment-Importance Heatmaps* (Truong, Pesenti and Hasson, arXiv 2409.16292).
N images, C maps, D embedding coordinates. The model's similarity of two images is the Pearson correlation of their
embeddings (``numpy.corrcoef``); its agreement with people is the Pearson correlation between the upper triangles of
that matrix and of the human one.

Ablating map k changes one column of the embeddings on a channelwise tail, from ``e`` to ``r``. The Gram matrix then
changes by ``r rᵀ - e eᵀ`` and the row sums by ``r - e``, so that every leave-one-out correlation matrix costs O(N²)
instead of O(N² D). Everything is float64: Gram matrices of raw embeddings lose half of their digits to the means.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import lru_cache

import numpy as np

from ais.errors import SimilarityError

_NUMBERS_AT_ONCE = 2**17  # a chunk and its temporaries stay in the cache


def check_human_matrix(human: np.ndarray, images: int) -> np.ndarray:
    """Return a human similarity matrix as float64 ``(N, N)``, or refuse it.

    Args:
        human: similarities (larger is more alike); the diagonal is never read and may be anything.
        images: N.

    Raises:
        SimilarityError: it is not square, of another size, not symmetric, has values that are not finite or are all the
            same, or there are fewer than 3 images.
    """
    if human.ndim != 2 or human.shape[0] != human.shape[1]:
        raise SimilarityError(
            f"the human matrix has shape {human.shape}; a square one has a row and a column for each image: give that"
        )
    if len(human) != images:
        raise SimilarityError(
            f"the human matrix is of {len(human)} images, the list has {images}; "
            "give one image for each row, in their order"
        )
    if images < 3:
        raise SimilarityError(f"{images} images have no pattern of similarity; at least 3 are needed; compare more")
    human = human.astype(np.float64)
    above = upper_triangle(human)
    unknown = np.argwhere(~np.isfinite(human) & ~np.eye(images, dtype=bool))
    if len(unknown):
        row, column = unknown[0]
        raise SimilarityError(
            f"the human matrix is not finite at row {row}, column {column} (counted from 0); "
            "fill it in, or take the image out"
        )
    uneven = np.abs(human - human.T)
    np.fill_diagonal(uneven, 0)
    if uneven.max() > 1e-6 * max(1.0, float(np.abs(above).max())):
        row, column = np.unravel_index(int(uneven.argmax()), uneven.shape)
        raise SimilarityError(
            f"the human matrix is not symmetric: {human[row, column]:g} at row {row}, column {column}, and "
            f"{human[column, row]:g} the other way; average it with its transpose if both are measurements"
        )
    if np.ptp(above) == 0:
        raise SimilarityError(
            f"all human similarities are {above[0]:g}; nothing can agree with that; check that it is the right matrix"
        )
    return human


def upper_triangle(matrices: np.ndarray) -> np.ndarray:
    """Return the pairs i < j of ``(…, N, N)`` as ``(…, N (N - 1) / 2)``."""
    count = matrices.shape[-1]
    return np.take(matrices.reshape(*matrices.shape[:-2], count * count), _pairs(count), axis=-1)


@lru_cache(maxsize=16)
def _pairs(count: int) -> np.ndarray:
    """Where the pairs i < j are in a flat matrix; finding them takes as long as using them."""
    rows, columns = np.triu_indices(count, k=1)
    return rows * count + columns


def off_diagonal(matrices: np.ndarray) -> np.ndarray:
    """Return each row of ``(…, N, N)`` without its own image, ``(…, N, N - 1)``."""
    count = matrices.shape[-1]
    flat = matrices.reshape(*matrices.shape[:-2], count * count)
    # After the first number, every (N + 1)-th lies on the diagonal.
    return flat[..., 1:].reshape(*flat.shape[:-1], count - 1, count + 1)[..., :-1].reshape(*flat.shape[:-1], count, -1)


def pearson(values: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Pearson correlation of ``(…, P)`` with ``(P,)`` or ``(…, P)`` along the last axis; 0 where one is constant.

    NaN where either has NaN: it must not pass for "no correlation".
    """
    values = values - values.mean(-1, keepdims=True)
    target = target - target.mean(-1, keepdims=True)
    norm = np.sqrt((values**2).sum(-1) * (target**2).sum(-1))
    product = (values * target).sum(-1)
    return np.divide(product, norm, out=np.zeros_like(product), where=norm != 0)


def alignment(embeddings: np.ndarray, human: np.ndarray) -> float:
    """R: Pearson correlation between the upper triangles of ``corrcoef(embeddings)`` and of the human matrix."""
    return float(pearson(upper_triangle(similarity_of(embeddings)), upper_triangle(human)))


def similarity_of(embeddings: np.ndarray) -> np.ndarray:
    """Similarity ``(N, N)`` of the images with embeddings ``(N, D)``: ``numpy.corrcoef``, in float64.

    Raises:
        SimilarityError: an embedding has values that are not finite or are all the same.
    """
    for problem, found in (
        ("has values that are not finite", ~np.isfinite(embeddings).all(1)),
        ("is the same in all coordinates", (embeddings == embeddings[:, :1]).all(1)),
    ):
        if found.any():
            raise SimilarityError(
                f"the embedding of image {found.argmax()} (counted from 0) {problem}, and correlates with nothing; "
                "take the image out, or check the weights"
            )
    return np.asarray(np.corrcoef(embeddings.astype(np.float64)))


def collective_ais(embeddings: np.ndarray, replacements: np.ndarray, first: int, human: np.ndarray) -> np.ndarray:
    """Collective AIS ``(C,)``: ``R²(all maps) - R²(without map k)``, k ablated in every image; channelwise tails.

    Args:
        embeddings: ``(N, D)`` intact.
        replacements: ``(N, C)`` value of coordinate ``first + k`` with map k ablated.
        first: coordinate of map 0.
        human: ``(N, N)``, checked by `check_human_matrix`.
    """
    return collective_ais_of(collective_similarities(embeddings, replacements, first), similarity_of(embeddings), human)


def individual_ais(embeddings: np.ndarray, replacements: np.ndarray, first: int, human: np.ndarray) -> np.ndarray:
    """Individual AIS ``(N, C)``: ``r_i - r_i(k)``, only image i's map k ablated; channelwise tails.

    ``r_i`` is the correlation, over the other images j, of the model's similarity of i and j with the human one.
    Arguments as `collective_ais`.
    """
    return individual_ais_of(individual_similarities(embeddings, replacements, first), similarity_of(embeddings), human)


def collective_ais_of(ablated: Iterable[np.ndarray], intact: np.ndarray, human: np.ndarray) -> np.ndarray:
    """Collective AIS ``(C,)`` for any tail.

    Args:
        ablated: parts ``(c, N, N)`` of the C similarities with one map ablated in all images, map 0 first.
        intact: ``(N, N)`` similarity with all maps.
        human: ``(N, N)``.
    """
    target = upper_triangle(human)
    without = np.concatenate([pearson(upper_triangle(part), target) for part in ablated])
    return pearson(upper_triangle(intact), target) ** 2 - without**2


def individual_ais_of(ablated: Iterable[np.ndarray], intact: np.ndarray, human: np.ndarray) -> np.ndarray:
    """Individual AIS ``(N, C)`` for any tail.

    Args:
        ablated: parts ``(c, N, N)`` of the C similarities of image i (row) with one map ablated, map 0 first, and the
            intact image j (column).
        intact: ``(N, N)`` similarity with all maps.
        human: ``(N, N)``.
    """
    target = off_diagonal(human)
    without = np.concatenate([pearson(off_diagonal(part), target) for part in ablated])  # (C, N)
    return (pearson(off_diagonal(intact), target) - without).T


def collective_similarities(embeddings: np.ndarray, replacements: np.ndarray, first: int) -> Iterator[np.ndarray]:
    """Yield the similarities ``(c, N, N)`` with one map ablated in all images, part after part of the C maps.

    Arguments as `collective_ais`.
    """
    count, dimensions = embeddings.shape
    maps = replacements.shape[1]
    intact, replaced = _shifted(embeddings, replacements)
    gram, sums = intact @ intact.T, intact.sum(1)
    owned = intact[:, first : first + maps]
    step = max(1, _NUMBERS_AT_ONCE // (count * count))
    for start in range(0, maps, step):
        old, new = owned[:, start : start + step].T, replaced[:, start : start + step].T  # (c, N)
        changed = gram + new[:, :, None] * new[:, None, :] - old[:, :, None] * old[:, None, :]
        yield correlations(changed, sums + new - old, dimensions)


def individual_similarities(embeddings: np.ndarray, replacements: np.ndarray, first: int) -> Iterator[np.ndarray]:
    """Yield the similarities ``(c, N, N)`` of image i (row) with one map ablated and the intact image j (column).

    Arguments as `collective_ais`.
    """
    count, dimensions = embeddings.shape
    maps = replacements.shape[1]
    intact, replaced = _shifted(embeddings, replacements)
    owned = intact[:, first : first + maps]
    gram, sums = intact @ intact.T, intact.sum(1)
    norms = np.sqrt(np.diag(gram) - sums**2 / dimensions)
    step = max(1, _NUMBERS_AT_ONCE // (count * count))
    for start in range(0, maps, step):
        old, new = owned[:, start : start + step].T, replaced[:, start : start + step].T  # (c, N)
        change = new - old
        products = gram + change[:, :, None] * old[:, None, :]
        totals = sums + change
        squares = np.diag(gram) + change * (2 * old + change) - totals**2 / dimensions
        centred = products - totals[:, :, None] * (sums / dimensions)
        scale = np.sqrt(np.maximum(squares, 0))[:, :, None] * norms
        yield np.divide(centred, scale, out=np.zeros_like(centred), where=scale != 0)


def _shifted(embeddings: np.ndarray, replacements: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both in float64 less the mean embedding: no correlation changes, and squares stay small."""
    shift = float(embeddings.mean())
    return embeddings.astype(np.float64) - shift, replacements.astype(np.float64) - shift


def unit_rows(rows: np.ndarray) -> np.ndarray:
    """Centre each row of ``(…, D)`` and divide it by its norm, so that products are Pearson correlations."""
    rows = rows - rows.mean(-1, keepdims=True)
    norms = np.linalg.norm(rows, axis=-1, keepdims=True)
    return np.divide(rows, norms, out=np.zeros_like(rows), where=norms != 0)


def correlations(grams: np.ndarray, sums: np.ndarray, dimensions: int) -> np.ndarray:
    """``corrcoef`` ``(c, N, N)`` of rows of D numbers from their Gram matrices ``(c, N, N)`` and sums ``(c, N)``.

    0 where a row is constant, as everywhere here.
    """
    found = grams - sums[:, :, None] * (sums / dimensions)[:, None, :]
    norms = np.sqrt(np.maximum(np.diagonal(found, axis1=1, axis2=2), 0))
    scale = np.divide(1, norms, out=np.zeros_like(norms), where=norms != 0)
    found *= scale[:, :, None]
    found *= scale[:, None, :]
    return found


def collective_ais_reference(
    embeddings: np.ndarray, replacements: np.ndarray, first: int, human: np.ndarray
) -> np.ndarray:
    """The slow, obvious twin of `collective_ais`: replace the column, correlate everything again."""
    full = alignment(embeddings, human) ** 2
    result = np.empty(replacements.shape[1])
    for k in range(len(result)):
        changed = embeddings.astype(np.float64).copy()
        changed[:, first + k] = replacements[:, k]
        rows, columns = np.triu_indices(len(human), k=1)
        similarity = np.asarray(np.corrcoef(changed))
        result[k] = full - np.corrcoef(similarity[rows, columns], human[rows, columns])[0, 1] ** 2
    return result


def individual_ais_reference(
    embeddings: np.ndarray, replacements: np.ndarray, first: int, human: np.ndarray
) -> np.ndarray:
    """The slow, obvious twin of `individual_ais`: one image and one map at a time."""
    count, maps = replacements.shape
    intact = embeddings.astype(np.float64)
    result = np.empty((count, maps))
    for i in range(count):
        others = [j for j in range(count) if j != i]
        rated = human[i, others]
        now = [np.corrcoef(intact[i], intact[j])[0, 1] for j in others]
        for k in range(maps):
            changed = intact[i].copy()
            changed[first + k] = replacements[i, k]
            without = [np.corrcoef(changed, intact[j])[0, 1] for j in others]
            result[i, k] = np.corrcoef(now, rated)[0, 1] - np.corrcoef(without, rated)[0, 1]
    return result

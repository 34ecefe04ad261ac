"""What a head or a similarity does with only some of the maps, added one after another from the top of a ranking.

A map that is not (yet) added is ablated. On a channelwise tail its embedding coordinate has then the ablated value, so
adding map k changes one column, and a whole curve over C maps costs about as much as one evaluation of all of them.
N images, C maps, D coordinates, H hidden units.
"""

from __future__ import annotations

import numpy as np

from ais.importance.similarity import pearson, upper_triangle

_CONSTANT = 1e-13  # of the sum of squares: what is left of it by rounding
_NUMBERS_AT_ONCE = 2**17  # a chunk and its temporaries stay in the cache: three times as fast as 2**22


def similarity_curve(
    embeddings: np.ndarray,
    replacements: np.ndarray,
    first: int,
    order: np.ndarray,
    humans: list[tuple[np.ndarray, np.ndarray]],
    counts: np.ndarray | None = None,
) -> np.ndarray:
    """R² with people after adding some numbers of maps in an order, on one or several subsets of the images.

    Args:
        embeddings: ``(N, D)`` intact.
        replacements: ``(N, C)`` value of coordinate ``first + k`` with map k ablated.
        first: coordinate of map 0.
        order: ``(C,)`` maps, first added first.
        humans: for each subset, its images ``(n,)`` and their human matrix ``(n, n)``.
        counts: ``(G,)`` ascending numbers of maps; 0, 1, …, C by default. Maps between two of them are
            added by one matrix product.

    Returns:
        ``(subsets, G)``.
    """
    maps, dimensions = replacements.shape[1], embeddings.shape[1]
    shift = float(embeddings.mean())
    intact, replaced = embeddings.astype(np.float64) - shift, replacements.astype(np.float64) - shift
    present = intact.copy()
    present[:, first : first + maps] = replaced
    counts = np.arange(maps + 1) if counts is None else counts
    curves = np.empty((len(humans), len(counts)))
    for row, (images, human) in enumerate(humans):
        # Of symmetric matrices only the pairs (i, j) with i < j, and the diagonals: half the work.
        target = upper_triangle(human)
        i, j = np.triu_indices(len(images), k=1)
        new = intact[np.ix_(images, first + order)].T  # (C, n), in the order of adding
        old = replaced[np.ix_(images, order)].T
        gram = present[images] @ present[images].T
        products, squares, sums = gram[i, j], np.diag(gram), present[images].sum(1)
        step = max(1, _NUMBERS_AT_ONCE // len(i))
        for start in range(0, len(counts), step):
            ends = counts[start : start + step]
            starts = np.concatenate([[counts[start - 1] if start else 0], ends[:-1]])
            part = slice(starts[0], ends[-1])
            steps = ends - starts
            squares_along = squares + _added(new[part] ** 2 - old[part] ** 2, steps)
            sums_along = sums + _added(new[part] - old[part], steps)
            products_along = products + _added_products(new[part], old[part], steps, i, j)
            # The few maps kept so far can leave an embedding constant, which correlates with nothing: 0.
            variance = squares_along - sums_along**2 / dimensions
            scale = np.zeros_like(variance)
            np.divide(1, np.sqrt(np.maximum(variance, 0)), out=scale, where=variance > _CONSTANT * squares_along)
            similarity = products_along - np.take(sums_along, i, 1) * np.take(sums_along / dimensions, j, 1)
            similarity *= np.take(scale, i, 1)
            similarity *= np.take(scale, j, 1)
            curves[row, start : start + len(ends)] = pearson(similarity, target) ** 2
            products, squares, sums = products_along[-1], squares_along[-1], sums_along[-1]
    return curves


def _added(changes: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """Running sums ``(g, n)`` of changes ``(c, n)``, after each of g steps of some numbers of them; c in all."""
    sums = np.concatenate([np.zeros((1, changes.shape[1])), np.cumsum(changes, axis=0)])
    return np.asarray(sums[np.cumsum(steps)])


def _added_products(new: np.ndarray, old: np.ndarray, steps: np.ndarray, i: np.ndarray, j: np.ndarray) -> np.ndarray:
    """The same ``(g, P)`` of the products of new less those of old values ``(c, n)``, for P pairs of columns."""
    if (steps == 1).all():
        changes = np.take(new, i, 1) * np.take(new, j, 1)
        changes -= np.take(old, i, 1) * np.take(old, j, 1)
    else:
        changes = np.empty((len(steps), len(i)))
        start = 0
        for index, size in enumerate(steps):
            block = slice(start, start + size)
            changes[index] = (new[block].T @ new[block] - old[block].T @ old[block])[i, j]
            start += size
    for index in range(1, len(changes)):  # np.cumsum along the first axis takes ten times as long
        changes[index] += changes[index - 1]
    return changes


def score_curve(
    embeddings: np.ndarray,
    replacements: np.ndarray,
    first: int,
    order: np.ndarray,
    hidden: tuple[np.ndarray, np.ndarray],
    output: tuple[np.ndarray, float],
    counts: np.ndarray | None = None,
) -> np.ndarray:
    """Standardised predictions ``(N, G)`` of one head after adding some numbers of maps in an order.

    Args:
        embeddings: ``(N, D)`` intact.
        replacements: ``(N, C)`` value of coordinate ``first + k`` with map k ablated.
        first: coordinate of map 0.
        order: ``(C,)`` maps, first added first.
        hidden: weight ``(H, D)`` and bias ``(H,)`` of the head's hidden layer.
        output: weight ``(H,)`` and bias of its output.
        counts: ``(G,)`` ascending numbers of maps; 0, 1, …, C by default. Maps between two of them are added by one
            matrix product, so that a grid of C / 8 counts costs a tenth of all of them.
    """
    images, maps = replacements.shape
    counts = np.arange(maps + 1) if counts is None else counts
    weight, bias = (value.astype(np.float64) for value in hidden)
    present = embeddings.astype(np.float64)
    changes = present[:, first + order] - replacements[:, order]  # (N, C)
    present[:, first : first + maps] = replacements
    units = present @ weight.T + bias  # (N, H)
    columns = weight[:, first + order].T  # (C, H)
    curve = np.empty((images, len(counts)))
    added = 0
    for index, count in enumerate(counts):
        units += changes[:, added:count] @ columns[added:count]
        curve[:, index] = np.maximum(units, 0) @ output[0] + output[1]
        added = count
    return curve

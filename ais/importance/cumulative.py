"""What a head or a similarity does with only some of the maps, added one after another from the top of a ranking.

A map that is not (yet) added is ablated. On a channelwise tail its embedding coordinate has then the ablated value, so
adding map k changes one column, and a whole curve over C maps costs about as much as one evaluation of all of them.
N images, C maps, D coordinates, H hidden units.
"""

from __future__ import annotations

import numpy as np

from ais.importance.similarity import correlations, pearson, upper_triangle

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
        counts: ``(G,)`` ascending numbers of maps, the first 0; 0, 1, …, C by default. Maps between two of them are
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
        target = upper_triangle(human)
        gram, sums = present[images] @ present[images].T, present[images].sum(1)
        curves[row, 0] = pearson(upper_triangle(correlations(gram[None], sums[None], dimensions)), target)[0] ** 2
        new = intact[np.ix_(images, first + order)].T  # (C, n), in the order of adding
        old = replaced[np.ix_(images, order)].T
        step = max(1, _NUMBERS_AT_ONCE // len(images) ** 2)
        for start in range(1, len(counts), step):
            ends = counts[start : start + step]
            starts = counts[start - 1 : start - 1 + len(ends)]
            part = slice(starts[0], ends[-1])
            if len(ends) == ends[-1] - starts[0]:  # one map at a time: outer products
                changes = new[part, :, None] * new[part, None, :] - old[part, :, None] * old[part, None, :]
            else:
                blocks = [slice(*pair) for pair in zip(starts, ends, strict=True)]
                changes = np.stack([new[block].T @ new[block] - old[block].T @ old[block] for block in blocks])
            grams = gram + np.cumsum(changes, axis=0)
            totals = sums + np.cumsum(new[part] - old[part], axis=0)[ends - starts[0] - 1]
            similarity = upper_triangle(correlations(grams, totals, dimensions))
            curves[row, start : start + len(ends)] = pearson(similarity, target) ** 2
            gram, sums = grams[-1], totals[-1]
    return curves


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

"""Effects over sets and cumulative curves, against the definitions written out. Nothing is faked."""

from itertools import pairwise

import numpy as np
import pytest

from ais.importance.cumulative import score_curve, similarity_curve
from ais.importance.effects import EffectSums
from ais.importance.similarity import alignment


def test_by_hand():
    """Two images, two maps: s = 3 and 5, y = 2 and 6."""
    sums = EffectSums.of(np.array([3.0, 5.0]), np.array([[1.0, -1.0], [0.5, 2.0]]), np.array([2.0, 6.0]))
    # Image 1: s_k = 2 and 4, errors 0 and 2 against 1. Image 2: s_k = 4.5 and 3, errors 1.5 and 3 against 1.
    assert sums.mean("effect").tolist() == [0.75, 0.5]
    assert sums.mean("error_effect").tolist() == [(-1 + 0.5) / 2, (1 + 2) / 2]
    assert sums.mean("dual").tolist() == [(-1 + 0.5) / 2, (1 + 2) / 2]


def test_a_map_that_helps_is_positive():
    rng = np.random.default_rng(0)
    ratings = rng.normal(size=500)
    effects = np.stack([ratings, -ratings, np.zeros(500)], axis=1) * 0.5
    sums = EffectSums.of(ratings + 0.01 * rng.normal(size=500), effects, ratings)
    error_effect = sums.mean("error_effect")
    assert error_effect[0] > 0.3
    assert error_effect[1] > 0.3  # removing what counteracts also moves a perfect score away
    assert error_effect[2] == 0


@pytest.mark.parametrize("sizes", [[1000], [1] * 1000, [7, 500, 493], [493, 7, 500]])
def test_sums_do_not_depend_on_batches(sizes):
    """Equal to 1e-15; measured worst difference 1e-20."""
    rng = np.random.default_rng(1)
    scores, effects, ratings = rng.normal(size=1000), 1e-4 * rng.normal(size=(1000, 6)), rng.normal(size=1000)
    bounds = np.cumsum([0, *sizes])
    parts = [EffectSums.of(scores[a:b], effects[a:b], ratings[a:b]) for a, b in pairwise(bounds)]
    whole = EffectSums.of(scores, effects, ratings)
    merged = EffectSums.merge(parts[::-1])
    assert merged.images == merged.rated == 1000
    for quantity in ("effect", "error_effect", "dual"):
        np.testing.assert_allclose(merged.mean(quantity), whole.mean(quantity), rtol=0, atol=1e-15)


def test_interval_covers_the_mean():
    rng = np.random.default_rng(2)
    covered = 0
    for _ in range(200):
        sums = EffectSums.of(np.zeros(20), rng.normal(0.3, 1, size=(20, 10)))
        low, high = sums.interval("effect")
        covered += int(((low < 0.3) & (high > 0.3)).sum())
    assert 0.93 < covered / 2000 < 0.97


def test_images_without_rating_count_for_the_score_only():
    sums = EffectSums.of(np.array([1.0, 1.0]), np.array([[0.2], [0.4]]), np.array([1.0, np.nan]))
    assert (sums.images, sums.rated) == (2, 1)
    assert sums.mean("effect") == pytest.approx(0.3)
    assert sums.mean("error_effect") == pytest.approx(0.2)


def case(images=9, dimensions=30, maps=12, first=6):
    rng = np.random.default_rng(3)
    embeddings = 4 + rng.normal(size=(images, dimensions))
    replacements = embeddings[:, first : first + maps] * rng.uniform(0, 1, (images, maps))
    return embeddings, replacements, first, rng.permutation(maps), rng


def partial(embeddings, replacements, first, kept):
    """Embeddings with every map ablated that is not kept: the definition."""
    changed = embeddings.copy()
    changed[:, first : first + replacements.shape[1]] = replacements
    changed[:, first + kept] = embeddings[:, first + kept]
    return changed


def test_similarity_curve_equals_the_definition():
    """Measured worst error 2e-15."""
    embeddings, replacements, first, order, rng = case()
    subsets = [np.arange(9), np.array([0, 2, 3, 7, 8])]
    humans = [(subset, np.corrcoef(rng.normal(size=(len(subset), 5)))) for subset in subsets]
    curves = similarity_curve(embeddings, replacements, first, order, humans)
    assert curves.shape == (2, 13)
    for added in range(13):
        kept = partial(embeddings, replacements, first, order[:added])
        for row, (subset, human) in enumerate(humans):
            assert curves[row, added] == pytest.approx(alignment(kept[subset], human) ** 2, abs=1e-13)


def test_score_curve_equals_the_definition():
    """Measured worst error 4e-14."""
    embeddings, replacements, first, order, rng = case()
    weight, bias, last, constant = rng.normal(size=(20, 30)), rng.normal(size=20), rng.normal(size=20), 0.7
    curve = score_curve(embeddings, replacements, first, order, (weight, bias), (last, constant))
    for added in range(13):
        kept = partial(embeddings, replacements, first, order[:added])
        expected = np.maximum(kept @ weight.T + bias, 0) @ last + constant
        np.testing.assert_allclose(curve[:, added], expected, rtol=0, atol=1e-12)

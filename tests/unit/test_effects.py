"""Effects over sets and cumulative curves, against the definitions written out. Nothing is faked."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from ais.ablation import run_trunk
from ais.importance.adding import embeddings_along, embeddings_along_reference
from ais.importance.cumulative import score_curve, similarity_curve
from ais.importance.effects import EffectSums
from ais.importance.similarity import alignment, pearson, unit_rows, upper_triangle
from tests.networks import MAPS, SIDE, small_backbone


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


def test_similarity_curve_where_few_maps_leave_an_embedding_constant():
    """As sparse maps do: an image of which none is kept yet correlates with nothing, and the others with each other."""
    rng = np.random.default_rng(0)
    embeddings = np.maximum(rng.normal(size=(9, 12)), 0)
    replacements = np.zeros_like(embeddings)
    human = np.corrcoef(rng.normal(size=(9, 5)))
    [curve] = similarity_curve(embeddings, replacements, 0, np.arange(12), [(np.arange(9), human)])
    target = upper_triangle(human)
    for added in range(13):
        rows = unit_rows(partial(embeddings, replacements, 0, np.arange(added)))
        assert curve[added] == pytest.approx(pearson(upper_triangle(rows @ rows.T), target) ** 2, abs=1e-12)
    assert curve[0] == 0
    assert curve[-1] == pytest.approx(alignment(embeddings, human) ** 2, abs=1e-12)


def test_similarity_curve_on_a_grid_is_the_same():
    """Measured worst difference 2e-16."""
    embeddings, replacements, first, order, rng = case()
    humans = [(np.arange(9), np.corrcoef(rng.normal(size=(9, 5))))]
    every = similarity_curve(embeddings, replacements, first, order, humans)
    for counts in ([0, 12], [0, 1, 2, 5, 9, 12], [2, 3, 12]):
        found = similarity_curve(embeddings, replacements, first, order, humans, np.array(counts))
        np.testing.assert_allclose(found, every[:, counts], rtol=0, atol=2e-15)


@pytest.mark.parametrize(
    "name",
    [
        "end of a residual block",
        "end of a dense block",
        "flatten to linear",
        "concatenate, flatten to linear",
        "strided, dilated, padded convolution",
        "convolution within a dense block",
        "squeeze and excitation",
        "two paths",
    ],
)
def test_embeddings_along_equal_the_reference(name):
    """A hook and the whole network for each number of maps, in float64. Measured worst error 5e-16."""
    backbone = small_backbone(name)
    images = torch.rand(3, 3, SIDE, SIDE, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    order, counts = np.random.default_rng(2).permutation(MAPS), np.array([0, 1, 3, 4, MAPS])
    maps, context = run_trunk(backbone.split, images)
    with torch.no_grad():
        found = torch.stack(list(embeddings_along(backbone.split, maps, context, order, counts)))
        torch.testing.assert_close(found[-1], backbone(images), rtol=0, atol=1e-14)
    expected = embeddings_along_reference(backbone, images, order, counts)
    assert (expected[0] - expected[-1]).abs().max() > 1e-2
    torch.testing.assert_close(found, expected, rtol=0, atol=4e-15)


def test_score_curve_equals_the_definition():
    """Measured worst error 4e-14."""
    embeddings, replacements, first, order, rng = case()
    weight, bias, last, constant = rng.normal(size=(20, 30)), rng.normal(size=20), rng.normal(size=20), 0.7
    curve = score_curve(embeddings, replacements, first, order, (weight, bias), (last, constant))
    for added in range(13):
        kept = partial(embeddings, replacements, first, order[:added])
        expected = np.maximum(kept @ weight.T + bias, 0) @ last + constant
        np.testing.assert_allclose(curve[:, added], expected, rtol=0, atol=1e-12)

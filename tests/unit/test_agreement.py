"""Metrics of agreement: by hand, against obvious twins, and against values that scikit-image and POT gave.

Nothing is faked.
"""

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from scipy.stats import pearsonr, wasserstein_distance

from ais.agreement import (
    METRICS,
    agreement,
    cosine,
    earth_movers_distance,
    mean_squared_error,
    pearson,
    structural_similarity,
    top_overlap,
)

UNIT = np.array([[0.6, 0.8]])  # height and width, in diagonals, of an image of 3 : 4 seen whole


def stack(*maps: object) -> NDArray[np.float64]:
    return np.array(maps, dtype=np.float64)


def random_maps(count: int, side: int = 16) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    first, noise = np.random.default_rng(0).normal(size=(2, count, side, side))
    return first, 0.5 * first + noise


class TestPearson:
    def test_by_hand(self) -> None:
        first = stack([[1, 2], [3, 4]])
        # Deviations -1.5, -0.5, 0.5, 1.5 and -2, 0, -1, 3: products 3 + 0 - 0.5 + 4.5, squares 5 and 14.
        assert pearson(first, stack([[0, 2], [1, 5]])) == pytest.approx([7 / np.sqrt(5 * 14)], abs=1e-15)

    def test_every_image_is_as_in_scipy_whatever_offset_and_scale(self) -> None:
        first, second = random_maps(5)
        expected = [pearsonr(a.ravel(), b.ravel()).statistic for a, b in zip(first, second, strict=True)]
        assert pearson(first, second) == pytest.approx(expected, abs=1e-12)
        assert pearson(1e-3 * first - 7, second) == pytest.approx(expected, abs=1e-10)
        assert pearson(first, -second) == pytest.approx([-value for value in expected], abs=1e-12)

    def test_constant_up_to_the_rounding_of_float32_is_undefined(self) -> None:
        first = np.full((2, 4, 4), 0.1)
        first[0, 0, 0] += 1e-9
        second, _ = random_maps(2, 4)
        first[1] = second[1]
        assert pearson(first, second) == pytest.approx([np.nan, 1], nan_ok=True)


class TestCosine:
    def test_by_hand(self) -> None:
        first, second = stack([[3, 0], [0, 4]], [[1, 0], [0, 0]]), stack([[4, 0], [0, 3]], [[0, -2], [0, 0]])
        assert cosine(first, second) == pytest.approx([24 / 25, 0], abs=1e-15)
        assert cosine(5 * first, -second) == pytest.approx([-24 / 25, 0], abs=1e-15)

    def test_is_not_blind_to_the_zero(self) -> None:
        opposite = stack([[0, 1]]), stack([[1, 0]])
        assert cosine(*(maps.reshape(1, 1, 2) for maps in opposite)) == pytest.approx([0])
        assert pearson(*(maps.reshape(1, 1, 2) for maps in opposite)) == pytest.approx([-1])

    def test_nothing_has_no_direction_but_a_constant_has(self) -> None:
        first = stack(np.zeros((2, 2)), np.ones((2, 2)))
        assert cosine(first, np.ones((2, 2, 2))) == pytest.approx([np.nan, 1], nan_ok=True)


def test_mean_squared_error_by_hand_and_its_scale() -> None:
    first, second = stack([[1, 2], [3, -4]]), stack([[1, 0], [6, -3]])
    assert mean_squared_error(first, second) == pytest.approx([(0 + 4 + 9 + 1) / 4])
    assert mean_squared_error(10 * first, 10 * second) == pytest.approx([350])
    assert mean_squared_error(first, first).tolist() == [0]


def _structural_similarity_reference(first: NDArray[np.float64], second: NDArray[np.float64]) -> float:
    """Slow, obvious twin for one image: the formula of Wang et al. (2004), equation 13, window by window."""
    offsets = np.arange(-5, 6)
    window = np.exp(-(offsets[:, None] ** 2 + offsets[None] ** 2) / (2 * 1.5**2))
    window /= window.sum()
    data_range = max(first.max(), second.max()) - min(first.min(), second.min())
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    values = []
    for i in range(first.shape[0] - 10):
        for j in range(first.shape[1] - 10):
            x, y = first[i : i + 11, j : j + 11], second[i : i + 11, j : j + 11]
            mean_x, mean_y = (window * x).sum(), (window * y).sum()
            variance_x, variance_y = (window * (x - mean_x) ** 2).sum(), (window * (y - mean_y) ** 2).sum()
            covariance = (window * (x - mean_x) * (y - mean_y)).sum()
            numerator = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
            values.append(numerator / ((mean_x**2 + mean_y**2 + c1) * (variance_x + variance_y + c2)))
    return float(np.mean(values))


class TestStructuralSimilarity:
    def test_the_value_of_scikit_image(self) -> None:
        y, x = np.mgrid[:16, :20]
        first = np.sin(0.4 * x) + np.cos(0.3 * y)
        second = 1.5 * np.sin(0.4 * x + 0.5) - 0.2 + 0.02 * x * np.cos(0.9 * y)
        # scikit-image 0.26.0, with the arguments that the docstring names; it differs by less than 1e-15.
        assert structural_similarity(stack(first), stack(second)) == pytest.approx([0.4008503274241744], abs=1e-12)

    def test_equals_the_formula_window_by_window(self) -> None:
        first, second = random_maps(3)
        first[1] += 4
        second[2] *= 1e-3
        expected = [_structural_similarity_reference(a, b) for a, b in zip(first, second, strict=True)]
        assert structural_similarity(first, second) == pytest.approx(expected, abs=1e-12)  # measured: 2e-17

    def test_by_hand_two_constants_differ_in_luminance_only(self) -> None:
        first, second = np.full((1, 12, 12), 1.0), np.full((1, 12, 12), 3.0)
        c1 = (0.01 * 2) ** 2
        assert structural_similarity(first, second) == pytest.approx([(2 * 3 + c1) / (1 + 9 + c1)], abs=1e-12)

    def test_equal_is_one_and_the_same_constant_is_undefined(self) -> None:
        first, _ = random_maps(1)
        maps = np.concatenate([first, np.zeros((1, 16, 16)), np.full((1, 16, 16), 0.1)])
        assert structural_similarity(maps, maps) == pytest.approx([1, np.nan, np.nan], nan_ok=True)

    def test_a_grid_smaller_than_the_window_is_refused(self) -> None:
        with pytest.raises(ValueError, match="10 × 12; the window needs at least 11"):
            structural_similarity(np.ones((1, 10, 12)), np.ones((1, 10, 12)))


class TestEarthMoversDistance:
    def test_one_mass_moved_by_hand(self) -> None:
        first, second = np.zeros((2, 3, 12, 12))
        first[:, 0, 0] = 1, 5, 1
        second[0, 0, 3] = 2  # three cells to the right
        second[1, 11, 11] = 1  # from corner to corner
        second[2, 0, 0], second[2, 4, 3] = 3, 1  # a quarter of the mass, four cells down and three right
        extents = np.array([[0.6, 0.8], [0.6, 0.8], [0.5, 0.5]])
        expected = [3 / 12 * 0.8, 11 / 12, 0.25 * 5 / 12 * 0.5]
        assert earth_movers_distance(first, second, extents) == pytest.approx(expected, abs=1e-9)
        assert earth_movers_distance(second, first, extents) == pytest.approx(expected, abs=1e-9)

    def test_only_the_positive_part_has_mass(self) -> None:
        first, second = np.full((2, 1, 12, 12), -9.0)
        first[0, 0, 0] = second[0, 0, 6] = 1
        assert earth_movers_distance(first, second, UNIT) == pytest.approx([0.4], abs=1e-9)

    def test_in_a_row_it_is_that_of_scipy(self) -> None:
        masses = np.random.default_rng(1).random((2, 12))
        first, second = np.zeros((2, 1, 12, 12))
        first[0, 5], second[0, 5] = masses
        expected = wasserstein_distance(np.arange(12), np.arange(12), *masses) / 12 * 0.8
        assert earth_movers_distance(first, second, UNIT) == pytest.approx([expected], abs=1e-9)

    def test_equal_masses_are_an_assignment(self) -> None:
        cells = np.random.default_rng(2).permutation(144).reshape(2, 72)[:, :40]
        first, second = np.zeros((2, 1, 144))
        first[0, cells[0]] = second[0, cells[1]] = 1
        places = (np.stack(np.divmod(cells, 12), axis=-1) + 0.5) / 12 * UNIT[0]
        costs = np.linalg.norm(places[0][:, None] - places[1][None], axis=-1)
        expected = costs[linear_sum_assignment(costs)].mean()
        distance = earth_movers_distance(first.reshape(1, 12, 12), second.reshape(1, 12, 12), UNIT)
        assert distance == pytest.approx([expected], abs=1e-9)  # measured: 3e-17

    def test_the_value_of_pot(self) -> None:
        y, x = np.mgrid[:6, :6]
        first, second = 1.0 + (3 * x + 5 * y) % 7, 1.0 + (2 * x * y + x) % 5
        # ot.emd2 of POT 0.9.7 on all 36 × 36 ways.
        distance = earth_movers_distance(stack(first), stack(second), UNIT, side=6)
        assert distance == pytest.approx([0.05235402641928064], abs=1e-9)

    def test_is_reduced_by_averaging_areas_that_cut_through_cells(self) -> None:
        # Of three columns the middle one goes half to the left, half to the right of two.
        middle, ends, left = np.zeros((3, 1, 3, 3))
        middle[0, 0, 1] = 6
        ends[0, 0, [0, 2]] = 1
        left[0, 0, 0] = 1
        assert earth_movers_distance(middle, ends, UNIT, side=2) == pytest.approx([0], abs=1e-12)
        assert earth_movers_distance(middle, left, UNIT, side=2) == pytest.approx([0.5 * 0.4], abs=1e-9)

    def test_nowhere_positive_is_undefined_and_leaves_the_others_alone(self) -> None:
        first, second = random_maps(3, 12)
        first[0], second[1] = -1, 0
        distance = earth_movers_distance(first, second, np.repeat(UNIT, 3, 0))
        assert np.isnan(distance).tolist() == [True, True, False]
        assert distance[2] == earth_movers_distance(first[2:], second[2:], UNIT)[0] > 0

    def test_extents_of_another_number_of_images_are_refused(self) -> None:
        with pytest.raises(ValueError, match=r"extents has shape \(1, 2\); it must be \(N, 2\), here \(2, 2\)"):
            earth_movers_distance(np.ones((2, 4, 4)), np.ones((2, 4, 4)), UNIT)


class TestTopOverlap:
    def test_by_hand(self) -> None:
        first = np.arange(20.0).reshape(1, 4, 5)  # the highest fifth: cells 16 to 19
        second = np.roll(first, 1, axis=2)  # cells 16 to 19 hold 15, 16, 17, 18; cell 15 holds 19
        assert top_overlap(first, second, 0.2) == pytest.approx([3 / 5])
        assert top_overlap(first, first, 0.2).tolist() == [1]
        assert top_overlap(first, -first, 0.2).tolist() == [0]

    def test_ties_share_the_last_places(self) -> None:
        first, second = stack([[4, 1, 1, 1], [1, 0, 0, 0]]), stack([[0, 9, 8, 0], [0, 0, 0, 0]])
        # Two places: the first cell has one, the four ones a quarter each. Intersection 1/4 + 1/4, union 1 + 2 + 2/4.
        assert top_overlap(first, second, 0.25) == pytest.approx([0.5 / 3.5])

    def test_ties_up_to_the_rounding_of_float32(self) -> None:
        first = stack([[4, 1, 1 + 1e-8, 1 - 1e-8], [1, 0, 0, 0]])
        assert top_overlap(first, stack([[0, 9, 8, 0], [0, 0, 0, 0]]), 0.25) == pytest.approx([0.5 / 3.5])

    def test_a_constant_has_no_highest_cells(self) -> None:
        first, second = random_maps(2)
        first[0] = 0.1
        assert np.isnan(top_overlap(first, second)).tolist() == [True, False]

    def test_at_random_it_is_about_the_chance_that_the_docstring_names(self) -> None:
        first, second = np.random.default_rng(3).normal(size=(2, 400, 20, 20))
        assert top_overlap(first, second, 0.1).mean() == pytest.approx(0.1 / 1.9, abs=0.005)  # 4 standard errors

    @pytest.mark.parametrize("share", [0, 1, 1.5])
    def test_a_share_that_is_none_is_refused(self, share: float) -> None:
        with pytest.raises(ValueError, match=f"share is {share}; it lies between 0 and 1"):
            top_overlap(np.ones((1, 4, 4)), np.ones((1, 4, 4)), share)


def test_all_metrics_at_once() -> None:
    first, second = random_maps(2)
    extents = np.repeat(UNIT, 2, 0)
    values = agreement(first, second, extents, top_share=0.2)
    assert list(values) == list(METRICS)
    expected = {
        "pearson": pearson(first, second),
        "cosine": cosine(first, second),
        "mse": mean_squared_error(first, second),
        "ssim": structural_similarity(first, second),
        "emd": earth_movers_distance(first, second, extents),
        "top_overlap": top_overlap(first, second, 0.2),
    }
    for metric, value in expected.items():
        assert values[metric].tolist() == value.tolist()
    same = agreement(first, first, extents)
    assert [same[metric].mean() for metric in METRICS] == pytest.approx([1, 1, 0, 1, 0, 1], abs=1e-12)


@pytest.mark.parametrize("metric", [pearson, cosine, mean_squared_error, structural_similarity, top_overlap])
def test_heatmaps_of_different_grids_are_refused(metric) -> None:
    with pytest.raises(ValueError, match=r"shapes \(1, 12, 12\) and \(1, 12, 14\); both must be the same \(N, h, w\)"):
        metric(np.ones((1, 12, 12)), np.ones((1, 12, 14)))

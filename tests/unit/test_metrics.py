"""Agreement with ratings and the pointing game, against scipy, hand-made cases and simulated coverage."""

import json
import time

import numpy as np
import pytest
from scipy.stats import kendalltau, pearsonr, spearmanr

from ais.metrics import pointing_chance, pointing_hit, regression_metrics


@pytest.fixture
def tied_scores() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(7)
    rated = rng.integers(1, 6, size=40).astype(float)
    return rated + rng.integers(-1, 2, size=40), rated


def test_values_are_those_of_scipy_also_with_ties(tied_scores):
    predicted, rated = tied_scores
    metrics = regression_metrics(predicted, rated, resamples=10)
    assert list(metrics) == ["rmse", "plcc", "srcc", "krcc"]
    assert metrics["rmse"].value == pytest.approx(np.sqrt(np.mean((predicted - rated) ** 2)), abs=1e-12)
    assert metrics["plcc"].value == pytest.approx(pearsonr(predicted, rated).statistic, abs=1e-12)
    assert metrics["srcc"].value == pytest.approx(spearmanr(predicted, rated).statistic, abs=1e-12)
    assert metrics["krcc"].value == pytest.approx(kendalltau(predicted, rated).statistic, abs=1e-12)
    assert metrics["plcc"].n == 40


def test_intervals_are_percentiles_over_resampled_images(tied_scores):
    predicted, rated = tied_scores
    metrics = regression_metrics(predicted, rated, resamples=200, seed=3, confidence=0.9)
    picks = np.random.default_rng(3).integers(40, size=(200, 40))
    for name, reference in (("plcc", pearsonr), ("srcc", spearmanr), ("krcc", kendalltau)):
        resampled = [reference(predicted[pick], rated[pick]).statistic for pick in picks]
        assert (metrics[name].low, metrics[name].high) == pytest.approx(np.quantile(resampled, [0.05, 0.95]), abs=1e-12)
        assert metrics[name].undefined_resamples == 0


def test_chunks_of_resamples_make_no_difference(tied_scores, monkeypatch):
    whole = regression_metrics(*tied_scores, resamples=50)
    monkeypatch.setattr("ais.metrics._RESAMPLED_VALUES_PER_CHUNK", 90)
    assert regression_metrics(*tied_scores, resamples=50) == whole


def test_interval_covers_the_true_correlation_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    truth, covered = 0.8, 0
    for trial in range(60):
        x, noise = rng.normal(size=(2, 80))
        interval = regression_metrics(x, truth * x + 0.6 * noise, resamples=150, seed=trial)["plcc"]
        covered += interval.low <= truth <= interval.high
    assert covered >= 51  # 57 expected, standard deviation 1.7; percentile intervals run a little short


def test_a_seed_fixes_the_intervals(tied_scores):
    assert regression_metrics(*tied_scores, seed=1) == regression_metrics(*tied_scores, seed=1)
    assert regression_metrics(*tied_scores, seed=1) != regression_metrics(*tied_scores, seed=2)


def test_constant_predictions_leave_correlations_undefined():
    # 0.1 has no exact double: the mean of many misses it, which must not pass for variation.
    metrics = regression_metrics(np.full(30, 0.1), np.arange(30.0), resamples=20)
    for name in ("plcc", "srcc", "krcc"):
        assert np.isnan([metrics[name].value, metrics[name].low, metrics[name].high]).all()
        assert metrics[name].undefined_resamples == 20
        assert metrics[name].as_dict() == {"value": None, "low": None, "high": None, "n": 30, "undefined_resamples": 20}
    assert metrics["rmse"].value == pytest.approx(np.sqrt(np.mean((np.arange(30) - 0.1) ** 2)))
    json.dumps({name: interval.as_dict() for name, interval in metrics.items()}, allow_nan=False)


def test_undefined_resamples_are_left_out_and_counted():
    predicted, rated = np.array([1.0, 2.0, 3.0]), np.array([1.0, 2.0, 4.0])
    picks = np.random.default_rng(0).integers(3, size=(500, 3))
    constant = sum(len(set(pick)) == 1 for pick in picks)
    interval = regression_metrics(predicted, rated, resamples=500)["plcc"]
    assert constant > 0
    assert interval.undefined_resamples == constant
    assert interval.low == pytest.approx(
        pearsonr(predicted, rated).statistic
    )  # two distinct images correlate perfectly
    assert interval.high == pytest.approx(1)


@pytest.mark.parametrize(
    ("predicted", "rated", "message"),
    [
        ([1, 2, 3], [1, 2], r"shape \(3,\) and rated \(2,\)"),
        ([[1, 2, 3]], [[1, 2, 3]], r"must be \(n,\)"),
        ([1, 2], [1, 2], "2 images are too few"),
        ([1, np.nan, 3], [1, 2, 3], r"predicted\[1\] is nan"),
        ([1, 2, 3], [1, 2, np.inf], r"rated\[2\] is inf"),
        ([1, 2, 3], [4, 4, 4], "all 3 ratings are 4"),
    ],
)
def test_unusable_pairs_are_refused(predicted, rated, message):
    with pytest.raises(ValueError, match=message):
        regression_metrics(predicted, rated)


@pytest.mark.parametrize("option", [{"resamples": 0}, {"confidence": 95}, {"confidence": 0}])
def test_impossible_options_are_refused(option):
    with pytest.raises(ValueError, match=next(iter(option))):
        regression_metrics([1, 2, 3], [1, 2, 4], **option)


def test_five_hundred_images_take_seconds():
    rng = np.random.default_rng(0)
    rated = rng.normal(size=500)
    start_s = time.process_time()
    regression_metrics(rated + rng.normal(size=500), rated)
    assert time.process_time() - start_s < 3  # measured 0.9 s


def test_pointing_hit_asks_where_the_maximum_is():
    mask = np.zeros((4, 5), dtype=bool)
    mask[1:3, 1:4] = True
    heatmap = np.zeros((4, 5), dtype=np.float32)
    heatmap[2, 3] = 1
    assert pointing_hit(heatmap, mask) == 1
    heatmap[0, 0] = 2
    assert pointing_hit(heatmap, mask) == 0


def test_tied_maxima_share_the_hit():
    mask = np.array([[True, False], [False, False]])
    assert pointing_hit(np.array([[1, 1], [0, 1]], dtype=np.float32), mask) == pytest.approx(1 / 3)


def test_a_constant_heatmap_scores_chance():
    heatmap = np.zeros((6, 8), dtype=np.float32)
    heatmap[:, :2] = np.nan
    mask = np.zeros((6, 8), dtype=bool)
    mask[:3, :4] = True  # half of it where the model did not look
    assert pointing_hit(heatmap, mask) == pytest.approx(6 / 36)
    assert pointing_chance(mask, ~np.isnan(heatmap)) == pytest.approx(6 / 36)


def test_pointing_refuses_what_has_no_answer():
    mask = np.ones((2, 2), dtype=bool)
    with pytest.raises(ValueError, match="NaN everywhere"):
        pointing_hit(np.full((2, 2), np.nan), mask)
    with pytest.raises(ValueError, match="no pixel was looked at"):
        pointing_chance(mask, ~mask)
    with pytest.raises(ValueError, match=r"\(2, 2\).*\(2, 3\)"):
        pointing_hit(np.zeros((2, 3)), mask)

"""Splits, standardisation and the fit of one head in one process. Nothing is faked; no Ray."""

from pathlib import Path

import numpy as np
import pytest
import torch

from ais.backbones import Weights
from ais.config import BackboneConfig, FitConfig, HeadConfig, RatingsConfig, TrainConfig
from ais.embeddings import EmbeddingCache
from ais.errors import HeadError, RatingsError
from ais.heads import RegressionHead
from ais.ratings import Ratings
from ais.storage import Storage
from ais.training.bundle import describe_finished, held_out_mean, repeated
from ais.training.fit import _furthest
from ais.training.prepare import PreparedTraining
from ais.training.splits import Split, draw_test_split, variant_splits
from ais.training.standardisation import Standardisation
from ais.training.variant import VariantFit
from tests.tiny import TINY


def ratings_of(scores: np.ndarray, splits: np.ndarray | None = None) -> Ratings:
    names = np.array([f"{index}.png" for index in range(len(scores))])
    return Ratings(names, names, scores, splits, len(scores), 0, 0)


def images(count: int = 120, size: int = 16, magnitude: float = 1e5) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings as untrained networks make them, large and hardly varying, and ratings that they determine."""
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(count, size))
    embeddings = magnitude * (1 + 0.02 * hidden)
    embeddings[:, 3] = 0.0
    return embeddings.astype(np.float32), 5 + np.tanh(hidden[:, 0]) + 0.5 * hidden[:, 1]


def test_splits_are_disjoint_and_the_test_split_is_fixed() -> None:
    ratings = ratings_of(np.arange(100.0))
    fit = FitConfig(variants=3, seed=5)
    is_test = draw_test_split(ratings, fit)
    assert is_test.sum() == 20
    pool = np.flatnonzero(~is_test)
    splits = variant_splits(pool, 100, ratings, fit)
    for split in splits:
        assert len(split.validation) == 15
        assert sorted([*split.train, *split.validation]) == list(range(80))
    assert len({tuple(split.validation) for split in splits}) == 3
    np.testing.assert_array_equal(draw_test_split(ratings, fit.model_copy(update={"variants": 1})), is_test)
    assert (draw_test_split(ratings, FitConfig(seed=6)) != is_test).any()


def test_splits_of_the_table_are_kept() -> None:
    words = np.array(["train", "validation", "test", "train", "train"] * 4)
    ratings = ratings_of(np.arange(20.0), words)
    is_test = draw_test_split(ratings, FitConfig())
    np.testing.assert_array_equal(is_test, words == "test")
    pool = np.flatnonzero(~is_test)
    for split in variant_splits(pool, 20, ratings, FitConfig(variants=2)):
        assert set(words[pool[split.validation]]) == {"validation"}
        assert set(words[pool[split.train]]) == {"train"}


def test_too_few_or_constant_training_ratings_are_refused() -> None:
    with pytest.raises(RatingsError, match="1 images are left to train on beside 3"):
        variant_splits(np.arange(4), 4, ratings_of(np.arange(4.0)), FitConfig())
    words = np.array(["train"] * 10 + ["validation", "test"])
    with pytest.raises(RatingsError, match="all 10 training images of head 1 have the score 2"):
        variant_splits(np.arange(11), 12, ratings_of(np.array([2.0] * 10 + [1, 3]), words), FitConfig())
    with pytest.raises(RatingsError, match="1 images are marked for validation, too few to stop by"):
        variant_splits(np.arange(11), 12, ratings_of(np.arange(12.0), words), FitConfig())


def test_the_share_for_validation_is_of_what_the_test_split_of_the_table_leaves() -> None:
    words = np.array(["train"] * 60 + ["test"] * 240)
    [split] = variant_splits(np.arange(60), 300, ratings_of(np.arange(300.0), words), FitConfig(variants=1))
    assert (len(split.train), len(split.validation)) == (51, 9)


def test_the_same_picture_under_another_name_is_counted() -> None:
    embeddings = np.random.default_rng(0).standard_normal((6, 8)).astype(np.float32)
    again = np.concatenate([embeddings[[4, 1, 1]], embeddings[[0]] + 1])
    assert repeated(again, embeddings) == 3
    assert repeated(embeddings, embeddings[:0]) == 0


def test_heads_that_trained_on_an_image_have_no_say_in_its_held_out_prediction() -> None:
    each = np.array([[1.0, 2.0, 3.0, 4.0, 5.0], [10.0, 20.0, 30.0, 40.0, 50.0]])
    rows = np.arange(5)
    values, chosen = held_out_mean(each, [Split(rows[:3], rows[3:]), Split(rows[[0, 1, 4]], rows[2:4])])
    assert chosen.tolist() == [2, 3, 4], "of the others every head has seen the rating"
    assert values.tolist() == [30, 22, 5]


def test_standardisation_uses_the_given_rows_only_and_floors_dead_channels() -> None:
    embeddings, scores = images()
    rows = np.arange(50)
    measured = Standardisation.of(embeddings, scores, rows)
    changed = embeddings.copy()
    changed[50:] = np.nan
    again = Standardisation.of(changed, np.where(np.arange(120) < 50, scores, np.nan), rows)
    np.testing.assert_array_equal(measured.input_mean, again.input_mean)
    assert (measured.target_mean, measured.target_scale) == (again.target_mean, again.target_scale)
    alive = np.arange(16) != 3
    standardised = measured.inputs(torch.from_numpy(embeddings[rows])).numpy()
    np.testing.assert_allclose(standardised.mean(0), 0, atol=1e-3)
    np.testing.assert_allclose(standardised[:, alive].std(0), 1, rtol=1e-3)
    deviation = embeddings[rows].astype(np.float64).std(0)
    # A dead channel that comes alive elsewhere by as much as the others vary moves by 1/1000, not without bound.
    assert measured.input_scale[3] == pytest.approx(1e-3 * np.sqrt(np.mean(deviation**2)))


def test_folded_head_equals_the_standardised_one() -> None:
    embeddings, scores = images()
    measured = Standardisation.of(embeddings, scores, np.arange(100))
    torch.manual_seed(0)
    head = RegressionHead(16, 8)
    folded = measured.fold(head)
    with torch.no_grad():
        inside = head(measured.inputs(torch.from_numpy(embeddings)))
        outside = folded(torch.from_numpy(embeddings))
    expected = measured.target_mean + measured.target_scale * inside.numpy()
    # Measured 2e-6: float32 sums of numbers 50 times their deviation.
    np.testing.assert_allclose(outside.numpy(), expected, atol=1e-4)


def make_fit(fit: FitConfig, head: HeadConfig = HeadConfig(hidden=32), variant: int = 0) -> VariantFit:  # noqa: B008
    embeddings, scores = images()
    order = np.random.default_rng(1).permutation(120)
    return VariantFit(variant, Split(np.sort(order[:90]), np.sort(order[90:])), embeddings, scores, head, fit)


def test_fit_learns_and_keeps_the_best_epoch() -> None:
    fit = make_fit(FitConfig(epochs=60, patience=10))
    while not fit.done:
        fit.run_epoch()
    assert fit.best_rmse == min(fit.validation_rmse)
    assert fit.best_epoch == 1 + int(np.argmin(fit.validation_rmse))
    assert fit.epoch in (60, fit.best_epoch + 10)
    # Predicting the mean gives 0.74; measured 0.30 and 0.37.
    assert fit.train_rmse[-1] < 0.4
    assert fit.best_rmse < 0.5
    embeddings, scores = images()
    held_out = np.sort(np.random.default_rng(1).permutation(120)[90:])
    with torch.no_grad():
        predicted = fit.best_head()(torch.from_numpy(embeddings[held_out])).numpy()
    assert np.sqrt(np.mean((predicted - scores[held_out]) ** 2)) == pytest.approx(fit.best_rmse, rel=1e-4)


def test_patience_stops() -> None:
    fit = make_fit(FitConfig(epochs=500, patience=3, learning_rate=0.05))
    while not fit.done:
        fit.run_epoch()
    assert fit.epoch == fit.best_epoch + 3 < 500


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_resumed_fit_equals_the_undisturbed_one(tmp_path: Path, dropout: float) -> None:
    config, head = FitConfig(epochs=12), HeadConfig(hidden=8, dropout=dropout)
    whole = make_fit(config, head)
    for _ in range(5):
        whole.run_epoch()
    torch.save(whole.state(), tmp_path / "state.pt")
    torch.rand(7)
    resumed = make_fit(config, head)
    resumed.resume(torch.load(tmp_path / "state.pt", weights_only=True))
    for fit in (whole, resumed):
        while not fit.done:
            fit.run_epoch()
    assert resumed.validation_rmse == whole.validation_rmse
    for key, value in whole.best_head().state_dict().items():
        assert torch.equal(resumed.best_head().state_dict()[key], value)


def test_variants_differ() -> None:
    first, second = (make_fit(FitConfig(), variant=variant) for variant in (0, 1))
    first.run_epoch()
    second.run_epoch()
    assert first.validation_rmse != second.validation_rmse


def test_a_complete_bundle_without_its_metrics(tmp_path: Path) -> None:
    config = TrainConfig(
        ratings=RatingsConfig(path="r.csv"), output=str(tmp_path), backbone=BackboneConfig(name="tiny")
    )
    weights = Weights("random", "", seed=0)
    cache = EmbeddingCache(str(tmp_path), "", Storage())
    prepared = PreparedTraining(config, Storage(), ratings_of(np.arange(9.0)), TINY, weights, cache, {})
    with pytest.raises(HeadError, match=r"is complete, but its metrics\.json cannot be used: FileNotFoundError"):
        describe_finished(prepared)
    for content in ("{", "[]", '{"test": {"n": 3}}'):
        (tmp_path / "metrics.json").write_text(content)
        with pytest.raises(HeadError, match=r"metrics\.json cannot be used: .*copy the bundle whole"):
            describe_finished(prepared)


def test_a_state_of_another_version_is_passed_over(tmp_path: Path) -> None:
    for name, state in (("a", {"epochs": 3}), ("b", {"finished": [1], "running": None}), ("c", [1])):
        (tmp_path / name).mkdir()
        torch.save(state, tmp_path / name / "state.pt")
    furthest = _furthest(Storage().open(str(tmp_path)))
    assert furthest is not None
    assert furthest.path == str(tmp_path / "b" / "state.pt")

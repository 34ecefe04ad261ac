"""The validation: every fast or summed-up figure against its definition, and the whole job on planted images.

Nothing is faked. The job's backbone is an untrained ResNet-18 on 96 × 96 pixels, so that it takes seconds.
"""

import csv
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from scipy import stats
from torchvision.models import resnet18

from ais.backbones import Backbone, BackboneSpec, TailKind, families, load_backbone, register
from ais.command_line import load_config
from ais.config import RatingsConfig, ValidateConfig
from ais.errors import ConfigError, RatingsError, RunError, SimilarityError
from ais.explainer import Explainer
from ais.heads import HeadEnsemble, RegressionHead, load_head, save_head
from ais.images import decode_image
from ais.importance.adding import embeddings_along_reference
from ais.importance.similarity import alignment, collective_ais_reference, similarity_of
from ais.metrics import regression_metrics
from ais.planted import PlantedSpec, make_planted
from ais.ratings import ratings_fingerprint, read_ratings
from ais.runs import write_table
from ais.storage import Storage
from ais.training.standardisation import Standardisation
from ais.validation.faithfulness import (
    Curves,
    InputMaps,
    cell_order,
    centre_bias,
    filled,
    grad_cam,
    perturbation_curves,
    random_maps,
    scored,
)
from ais.validation.heads import correlation_between, correlation_with_each, random_heads, rank_correlation
from ais.validation.intervals import Mean, corrected_mean, mean_over_images, mean_over_images_and_heads
from ais.validation.localisation import Localisation, localisation, mask_overlap
from ais.validation.measure import BASELINES, HeadAgreement, Heatmaps, Subject, run_ratings_protocol
from ais.validation.protocol import (
    Coordinates,
    CumulativeCurve,
    HeadWeights,
    fold_images,
    number_grid,
    ratings_protocol,
    score_measures,
    similarity_protocol,
    similarity_protocol_of,
)
from ais.validation.separation import Separation, mask_on_cells, mask_response
from ais.validation.verdict import (
    Check,
    Findings,
    checks_of,
    conclusion,
    describe,
    similarity_conclusion,
)
from jobs.validate import main
from tests.networks import MAPS, SIDE, small_backbone

ROOT = Path(__file__).resolve().parents[2]


class TestIntervals:
    def test_corrected_mean_by_hand(self) -> None:
        """Four fits with variance 1: standard error √((1/4 + 1/4) · 1), three degrees of freedom."""
        mean = corrected_mean(np.array([0.0, 1.0, 1.0, 2.0]) * np.sqrt(1.5), 0.25)
        assert mean.value == pytest.approx(np.sqrt(1.5))
        assert mean.high - mean.value == pytest.approx(3.18245 * np.sqrt(0.5), rel=1e-5)
        assert mean.value - mean.low == pytest.approx(mean.high - mean.value)

    def test_corrected_mean_covers_what_the_plain_one_misses(self) -> None:
        """Fits that share noise with ρ = n_test / (n_test + n_train), which is what the correction assumes."""
        rng = np.random.default_rng(0)
        shared = np.sqrt(0.2) * rng.normal(size=(2000, 1)) + np.sqrt(0.8) * rng.normal(size=(2000, 40))
        corrected = [corrected_mean(fits, 0.25) for fits in shared]
        assert 0.93 < np.mean([mean.low < 0 < mean.high for mean in corrected]) < 0.975
        plain = stats.ttest_1samp(shared, 0, axis=1).confidence_interval()
        assert np.mean((plain.low < 0) & (plain.high > 0)) < 0.6

    def test_mean_over_images_by_hand(self) -> None:
        """Eight values with variance 8/7: standard error √(1/7), seven degrees of freedom."""
        mean = mean_over_images(np.array([1.0, 3, 1, 3, 1, 3, 1, 3, np.nan]))
        assert (mean.value, mean.n) == (2, 8)
        assert mean.high - 2 == pytest.approx(2.36462 * np.sqrt(1 / 7), rel=1e-5)
        assert 2 - mean.low == pytest.approx(mean.high - 2)

    @pytest.mark.parametrize("images", [8, 10, 20, 64])
    @pytest.mark.parametrize("tail_degrees", [4, 1000])
    def test_mean_over_images_covers(self, images: int, tail_degrees: int) -> None:
        """Of 2,000 samples without effect 2.5% are shown, and as many against, however few the images.

        Normal values and such with long tails. The share has a standard error of 0.35 points; bounds are three.
        """
        samples = np.random.default_rng(images).standard_t(tail_degrees, (2000, images))
        told = [mean_over_images(values).outcome for values in samples]
        assert 0.0145 < told.count("shown") / 2000 < 0.0355
        assert 0.0145 < told.count("against") / 2000 < 0.0355

    @pytest.mark.parametrize("images", [0, 1, 2, 4, 7])
    def test_few_images_show_nothing(self, images: int) -> None:
        mean = mean_over_images(np.append(np.full(images, 5.0), np.nan))
        assert (mean.outcome, mean.n) == ("not measured", images)
        assert mean.value == 5 or images == 0
        assert mean_over_images(np.full(8, 5.0)).outcome == "shown"

    def test_heads_by_hand(self) -> None:
        """Two heads with six images each and means 1 ± 1: variance 2 · (6² + 6²) / 12² = 1, one degree of freedom."""
        values, heads = np.repeat([0.0, 2.0], 6), np.repeat([3, 5], 6)
        mean = mean_over_images(values, heads)
        assert (mean.value, mean.n) == (1, 12)
        assert mean.high - 1 == pytest.approx(12.7062, rel=1e-5)
        # The same values dealt evenly to the heads: these add nothing to the spread of the images.
        assert mean_over_images(values, np.tile([3, 5], 6)) == mean_over_images(values)
        assert mean_over_images(values, np.full(12, 3)).as_dict() == {"value": 1, "low": None, "high": None, "n": 12}
        assert mean_over_images(np.append(values, np.nan), np.append(heads, 7)) == mean

    @pytest.mark.parametrize(("images", "of"), [(10, 84), (64, 84), (120, 120)])
    @pytest.mark.parametrize("between", [0.0, 0.5, 1.0])
    def test_intervals_hold_the_choice_of_eight_heads(self, images: int, of: int, between: float) -> None:
        """Images drawn from those dealt to eight heads in turn, whose effects have up to the spread of the images.

        At most 5% of 1,000 intervals miss; more than 7.5% have a chance of 1 in 1,000. Over images alone, more than a
        quarter do where there are many.
        """
        rng = np.random.default_rng(images)
        missed, naive = 0, 0
        for _ in range(1000):
            heads = np.sort(rng.choice(of, images, replace=False)) % 8
            values = rng.normal(size=images) + between * rng.normal(size=8)[heads]
            missed += mean_over_images(values, heads).outcome != "not shown"
            naive += mean_over_images(values).outcome != "not shown"
        assert missed <= 75
        if images >= 64 and between == 1:
            assert naive > 250

    def test_each_image_with_each_head(self) -> None:
        rng = np.random.default_rng(0)
        crossed = rng.normal(size=(500, 8, 1)) + rng.normal(size=(500, 1, 40)) + 0.3 * rng.normal(size=(500, 8, 40))
        told = [mean_over_images_and_heads(values).outcome for values in crossed]
        assert told.count("not shown") >= 465  # 475 expected at least
        naive = [mean_over_images(values.mean(0)).outcome for values in crossed]
        assert naive.count("not shown") < 350
        crossed[0, 3, 5] = np.nan
        assert mean_over_images_and_heads(crossed[0]).n == 39
        assert mean_over_images_and_heads(np.full((8, 40), np.nan)).as_dict() == {
            "value": None, "low": None, "high": None, "n": 0,
        }  # fmt: skip

    def test_a_rare_event_that_did_not_happen_is_no_proof(self) -> None:
        """Chance 0.1 for each of 15 images: with 0.9¹⁵ = 0.2 none happens, which is not evidence for less."""
        missed = -np.full(15, 0.1)
        assert mean_over_images(missed).outcome == "against"
        assert mean_over_images(missed, least_variance=0.1 * 0.9).outcome == "not shown"
        assert mean_over_images(np.full(15, 0.9), least_variance=0.1 * 0.9).outcome == "shown"

    @pytest.mark.parametrize(
        ("low", "high", "outcome"),
        [
            (0.1, 1, "shown"),
            (-0.1, 1, "not shown"),
            (-1, -0.1, "against"),
            (0, 1, "not shown"),
            (np.nan, np.nan, "not measured"),
        ],
    )
    def test_outcome(self, low: float, high: float, outcome: str) -> None:
        assert Mean(0.5, low, high, 5).outcome == outcome

    def test_too_few_have_no_interval(self) -> None:
        assert mean_over_images(np.array([np.nan, 2.0])).as_dict() == {"value": 2.0, "low": None, "high": None, "n": 1}
        assert corrected_mean(np.array([2.0]), 0.25).outcome == "not measured"


def case(images: int = 20, maps: int = 12, first: int = 2) -> tuple[Coordinates, np.random.Generator]:
    rng = np.random.default_rng(3)
    embeddings = 4 + rng.normal(size=(images, 20))
    replacements = embeddings[:, first : first + maps] * rng.uniform(0, 1, (images, maps))
    return Coordinates(embeddings, replacements, first), rng


def kept_only(coordinates: Coordinates, kept: np.ndarray) -> np.ndarray:
    """Embeddings with every map ablated that is not kept: the definition."""
    changed = coordinates.embeddings.copy()
    first, maps = coordinates.first, coordinates.replacements.shape[1]
    changed[:, first : first + maps] = coordinates.replacements
    changed[:, first + kept] = coordinates.embeddings[:, first + kept]
    return changed


def make_head(rng: np.random.Generator, size: int = 20) -> HeadWeights:
    return HeadWeights((rng.normal(size=(9, size)), rng.normal(size=9)), (rng.normal(size=9), 0.3), (5.0, 2.0))


def predict(head: HeadWeights, embeddings: np.ndarray) -> np.ndarray:
    units = np.maximum(embeddings @ head.hidden[0].T + head.hidden[1], 0)
    return head.target[0] + head.target[1] * (units @ head.output[0] + head.output[1])


def protocol_reference(
    found: CumulativeCurve,
    images: int,
    ais: Callable[[np.ndarray], np.ndarray],
    value: Callable[[np.ndarray, np.ndarray], float],
    better: Callable[[list[float]], int],
    folds: int,
    seeds: int,
) -> None:
    """The slow, obvious twin of the protocol: one fold, one number of maps at a time."""
    fits = [(seed, fold) for seed in range(seeds) for fold in range(folds)]
    for index, (seed, fold) in enumerate(fits):
        train, test = fold_images(images, folds, seed, fold)
        ranking = np.argsort(-ais(train), kind="stable")
        for order, maps in (("ais", ranking), ("reversed", ranking[::-1])):
            along = [[value(maps[:count], rows) for count in range(1, len(maps) + 1)] for rows in (train, test)]
            best = better(along[0])
            got = found.orders[order]
            assert got.maps[index] == best + 1
            assert (got.train[index], got.test[index]) == pytest.approx((along[0][best], along[1][best]), abs=1e-9)
            assert got.along[index] == pytest.approx(np.mean(along[1]), abs=1e-9)
            assert (found.all_train[index], found.all_test[index]) == pytest.approx(
                (along[0][-1], along[1][-1]), abs=1e-9
            )


class InFloat64(Subject):
    def batches(self, pixels: np.ndarray) -> Iterator[torch.Tensor]:
        return (images.double() for images in super().batches(pixels))


class TestProtocol:
    def test_ratings_equal_the_reference(self) -> None:
        """Measured worst error 4e-15."""
        coordinates, rng = case()
        heads = [make_head(rng), make_head(rng)]
        ratings = rng.normal(5, 2, 20)

        def score(kept: np.ndarray) -> np.ndarray:
            return np.mean([predict(head, kept_only(coordinates, kept)) for head in heads], axis=0)

        everything = np.arange(12)
        scores = score(everything)
        effects = np.stack([scores - score(np.delete(everything, k)) for k in everything], axis=1)
        found = ratings_protocol(coordinates, heads, scores, effects, ratings, folds=4, seeds=2)

        def ais(train: np.ndarray) -> np.ndarray:
            ablated = np.abs(scores[train, None] - effects[train] - ratings[train, None])
            return (ablated - np.abs(scores - ratings)[train, None]).mean(0)

        values: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
            "RMSE": lambda kept, rows: float(np.sqrt(np.mean((score(kept) - ratings)[rows] ** 2))),
            "PLCC": lambda kept, rows: float(np.corrcoef(score(kept)[rows], ratings[rows])[0, 1]),
            "SRCC": lambda kept, rows: float(stats.spearmanr(score(kept)[rows], ratings[rows]).statistic),
        }
        assert found.keys() == values.keys()
        for measure, value in values.items():
            better = np.argmin if measure == "RMSE" else np.argmax
            if measure == "SRCC":  # its ties are broken by rounding; the values are compared below
                continue
            protocol_reference(found[measure], 20, ais, value, better, 4, 2)
        train, test = fold_images(20, 4, 0, 0)
        ranking = np.argsort(-ais(train), kind="stable")
        stop = found["SRCC"].orders["ais"].maps[0]
        assert found["SRCC"].orders["ais"].train[0] == pytest.approx(values["SRCC"](ranking[:stop], train))
        assert found["SRCC"].orders["ais"].test[0] == pytest.approx(values["SRCC"](ranking[:stop], test))

    def test_similarity_equals_the_reference(self) -> None:
        """Measured worst error 2e-15."""
        coordinates, rng = case()
        human = np.corrcoef(rng.normal(size=(20, 6)))

        def ais(train: np.ndarray) -> np.ndarray:
            embeddings, replacements = coordinates.embeddings[train], coordinates.replacements[train]
            return collective_ais_reference(embeddings, replacements, 2, human[np.ix_(train, train)])

        def value(kept: np.ndarray, rows: np.ndarray) -> float:
            return alignment(kept_only(coordinates, kept)[rows], human[np.ix_(rows, rows)]) ** 2

        found = similarity_protocol(coordinates, human, folds=4, seeds=2)
        protocol_reference(found["R²"], 20, ais, value, np.argmax, 4, 2)

    @pytest.mark.parametrize("name", ["end of a residual block", "flatten to linear", "squeeze and excitation"])
    def test_ratings_with_any_tail_equal_the_reference(self, name: str) -> None:
        """The three kinds of tail, against a hook and the whole network. Measured worst error 9e-16."""
        backbone, rng = small_backbone(name), np.random.default_rng(0)
        head = HeadEnsemble([small_head(backbone, seed) for seed in (0, 1)])
        pixels = rng.integers(0, 255, (12, SIDE, SIDE, 3), dtype=np.uint8)
        subject = InFloat64(backbone=backbone, head=head, batch_size=5)
        images = torch.cat(list(subject.batches(pixels)))

        @torch.no_grad()
        def score(kept: np.ndarray) -> np.ndarray:
            order = np.append(kept, np.setdiff1d(np.arange(MAPS), kept))
            return head(embeddings_along_reference(backbone, images, order, np.array([len(kept)]))[0]).numpy()

        everything = np.arange(MAPS)
        scores = score(everything)
        ratings = scores + scores.std() * rng.normal(size=12)
        ablated = np.stack([score(np.delete(everything, k)) for k in everything], axis=1)

        def ais(train: np.ndarray) -> np.ndarray:
            return (np.abs(ablated - ratings[:, None]) - np.abs(scores - ratings)[:, None])[train].mean(0)

        def rmse(kept: np.ndarray, rows: np.ndarray) -> float:
            return float(np.sqrt(np.mean((score(kept) - ratings)[rows] ** 2)))

        found = run_ratings_protocol(subject, pixels, ratings, folds=3, seeds=1, numbers=None)
        protocol_reference(found["RMSE"], 12, ais, rmse, np.argmin, 3, 1)

    def test_similarity_of_any_tail_equals_channelwise(self) -> None:
        """Measured worst difference 4e-15."""
        coordinates, rng = case()
        human = np.corrcoef(rng.normal(size=(20, 6)))
        counts = number_grid(12, 5)

        def along(order: np.ndarray) -> np.ndarray:
            return np.stack([similarity_of(kept_only(coordinates, order[:count])) for count in counts])

        ablated = np.stack([similarity_of(kept_only(coordinates, np.delete(np.arange(12), k))) for k in range(12)])
        intact = similarity_of(coordinates.embeddings)
        found = similarity_protocol_of(ablated, intact, along, counts, human, 4, 2, threads=1)["R²"]
        expected = similarity_protocol(coordinates, human, 4, 2, numbers=5)["R²"]
        for order in ("ais", "random", "reversed"):
            assert found.orders[order].maps.tolist() == expected.orders[order].maps.tolist()
            np.testing.assert_allclose(found.orders[order].test, expected.orders[order].test, rtol=0, atol=4e-14)

    def test_folds_test_every_image_once_and_train_on_the_others(self) -> None:
        parts = [fold_images(23, 5, 4, fold) for fold in range(5)]
        assert sorted(np.concatenate([test for _, test in parts])) == list(range(23))
        for train, test in parts:
            assert sorted([*train, *test]) == list(range(23))
        assert not np.array_equal(fold_images(23, 5, 0, 0)[1], fold_images(23, 5, 1, 0)[1])

    def test_maps_that_carry_the_rating_are_found(self) -> None:
        """Ten of 60 maps carry the rating, the others noise of the same size that the head reads as well.

        PLCC of the ten is 10 / √(100 + 2.5) = 0.99, of all 10 / √(100 + 2.5 + 50) = 0.81.
        """
        rng = np.random.default_rng(0)
        ratings = rng.normal(size=100)
        embeddings = rng.normal(size=(100, 60))
        embeddings[:, :10] = ratings[:, None] + 0.5 * rng.normal(size=(100, 10))
        embeddings += 20
        weight = np.full((1, 60), 0.05)
        head = HeadWeights((weight, np.zeros(1)), (np.ones(1), -20 * weight.sum()), (0.0, 1.0))
        scores = predict(head, embeddings)
        coordinates = Coordinates(embeddings, np.full((100, 60), 20.0), 0)
        effects = (embeddings - 20) * weight
        found = ratings_protocol(coordinates, [head], scores, effects, ratings)
        for measure in ("RMSE", "PLCC", "SRCC"):
            curve = found[measure]
            assert curve.gain_along("random").outcome == "shown"
            assert curve.gain_along("reversed").outcome == "shown"
        assert found["PLCC"].gain_over_all().outcome == "shown"
        assert found["PLCC"].orders["ais"].test.mean() > 0.93 > 0.87 > found["PLCC"].all_test.mean()

    def test_nothing_is_found_where_there_is_nothing(self) -> None:
        """Of 30 sets without any relation, 2.5% should be shown by chance; more than 4 have a chance of 1 in 1,000."""
        rng = np.random.default_rng(0)
        shown = []
        for _ in range(30):
            embeddings = 20 + rng.normal(size=(50, 30))
            weight = rng.normal(size=(1, 30))
            head = HeadWeights((weight, np.zeros(1)), (np.ones(1), -20 * weight.sum()), (0.0, 1.0))
            coordinates = Coordinates(embeddings, np.full((50, 30), 20.0), 0)
            effects = np.maximum(embeddings @ weight.T, 0) - np.maximum(
                (embeddings @ weight.T) - (embeddings - 20) * weight, 0
            )
            found = ratings_protocol(coordinates, [head], predict(head, embeddings), effects, rng.normal(size=50))
            shown.append(
                [
                    gain.outcome == "shown"
                    for gain in (found["PLCC"].gain_along("random"), found["PLCC"].gain_over_all())
                ]
            )
        assert np.sum(shown, axis=0).max() <= 4

    def test_many_maps_are_measured_on_a_grid(self) -> None:
        rng = np.random.default_rng(1)
        embeddings = rng.normal(size=(15, 600))
        head = make_head(rng, 600)
        scores = predict(head, embeddings)
        coordinates = Coordinates(embeddings, np.zeros((15, 600)), 0)
        found = ratings_protocol(coordinates, [head], scores, rng.normal(size=(15, 600)), scores, 5, 1)["RMSE"]
        assert (found.counts[0], found.counts[-1], len(found.counts)) == (0, 600, 257)
        assert set(np.diff(found.counts)) == {2, 3}
        assert np.abs(found.all_test).max() < 1e-9  # with all maps these predictions are exact

    def test_a_constant_prediction_has_no_correlation(self) -> None:
        measures = score_measures(np.array([[2.0, 2, 2], [1, 2, 3]]), np.array([1.0, 2, 4]))
        assert measures["PLCC"].tolist() == [0, pytest.approx(np.corrcoef([1, 2, 3], [1, 2, 4])[0, 1])]
        assert measures["SRCC"].tolist() == [0, pytest.approx(1)]

    def test_too_few_images(self) -> None:
        coordinates, _ = case(images=11)
        with pytest.raises(ValueError, match="11 images in 5 folds leave fewer than 3 to test on"):
            similarity_protocol(coordinates, np.eye(11))


def mean_of_corner(images: torch.Tensor) -> torch.Tensor:
    """A score whose evidence is known: the mean of the first channel in the upper left 16 × 16 of 32 × 32 pixels."""
    return images[:, 0, :16, :16].mean((1, 2))


class TestCurves:
    @pytest.fixture
    def images(self) -> torch.Tensor:
        return torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))

    def curves(self, images: torch.Tensor, maps: InputMaps, steps: int = 4) -> Curves:
        blank = torch.zeros_like(images)
        ends = scored(mean_of_corner, images), scored(mean_of_corner, blank)
        return perturbation_curves(mean_of_corner, images, blank, ends, cell_order(maps, 32), steps)

    def test_by_hand(self, images: torch.Tensor) -> None:
        """A heatmap of that corner removes all of the score with the first quarter of the cells."""
        corner = np.zeros((3, 4, 4), np.float32)
        corner[:, :2, :2] = 1
        curves = self.curves(images, InputMaps(corner, (0, 0, 32, 32)))
        intact = mean_of_corner(images).double().numpy()
        np.testing.assert_allclose(curves.deletion, intact[:, None] * [1, 0, 0, 0, 0], atol=1e-7)
        np.testing.assert_allclose(curves.insertion, intact[:, None] * [0, 1, 1, 1, 1], atol=1e-7)
        assert curves.areas()["deletion"] == pytest.approx(intact / 8)
        assert curves.areas()["insertion"] == pytest.approx(intact * 7 / 8)
        assert curves.normalised_areas()["deletion"] == pytest.approx([1 / 8] * 3)
        worst = self.curves(images, InputMaps(-corner, (0, 0, 32, 32)))
        assert worst.areas()["deletion"] == pytest.approx(intact * 7 / 8)

    def test_equal_to_the_reference(self, images: torch.Tensor) -> None:
        """Cell after cell, in plain loops. Measured error 0."""
        maps = random_maps(InputMaps(np.zeros((3, 3, 3), np.float32), (-2, 1, 40, 30)))
        curves = self.curves(images, maps, steps=5)
        orders = cell_order(maps, 32)
        assert orders.shape == (3, 4, 4)
        for image, order in zip(range(3), orders, strict=True):
            for step in range(1, 5):
                left = images[image].clone()
                for place in range(round(16 * step / 5)):
                    row, column = np.argwhere(order == place)[0]
                    left[:, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8] = 0
                brought_back = images[image] - left
                assert curves.deletion[image, step] == pytest.approx(float(mean_of_corner(left[None])))
                assert curves.insertion[image, step] == pytest.approx(float(mean_of_corner(brought_back[None])))

    def test_share_is_undefined_where_the_fill_scores_higher(self) -> None:
        curves = Curves(np.array([[1.0, 2, 3], [3, 2, 1]]), np.array([[3.0, 2, 1], [1, 2, 3]]))
        assert np.isnan(curves.normalised_areas()["deletion"]).tolist() == [True, False]
        assert curves.areas()["deletion"].tolist() == [2, 2]

    def test_order_of_cells(self) -> None:
        values = np.zeros((2, 4, 4), np.float32)
        values[0, 1, 2], values[0, 3, 0] = 2, 1
        order = cell_order(InputMaps(values, (0, 0, 32, 32)), 32)
        assert (order[0, 1, 2], order[0, 3, 0]) == (0, 1)
        assert sorted(order[1].ravel()) == list(range(16))
        assert not np.array_equal(order[1], np.arange(16).reshape(4, 4))  # ties at random, not from the top left

    def test_order_follows_the_cells_not_the_square(self) -> None:
        """A map whose cells begin half a cell outside of the input, as those of a ResNet do."""
        values = np.zeros((1, 2, 2), np.float32)
        values[0, 1, 1] = 1
        order = cell_order(InputMaps(values, (-8, -8, 24, 24)), 32)
        # Centre of the highest cell at 16: all cells of the input from there on share the highest value.
        assert set(order[0, 2:, 2:].ravel()) == {0, 1, 2, 3}

    def test_fills(self, images: torch.Tensor) -> None:
        mean = filled(images, "mean")
        torch.testing.assert_close(mean[1, 2], images[1, 2].mean().expand(32, 32))
        ramp = torch.arange(64.0)[None, None, None].expand(1, 3, 64, 64)
        stripes = ramp + 10 * torch.cos(torch.pi * ramp)
        blurred = filled(stripes, "blurred")
        torch.testing.assert_close(blurred[..., 16:48], ramp[..., 16:48], rtol=0, atol=0.05)

    def test_centre_bias(self) -> None:
        values, extent = centre_bias(2, 32)
        assert extent == (0, 0, 32, 32)
        assert values[0, 1:3, 1:3].min() == values.max()
        assert values[1, 0, 0] / values[1, 1, 1] == pytest.approx(np.exp(-(2 * 0.375**2 - 2 * 0.125**2) / 0.125))


def small_head(backbone: Backbone, seed: int, hidden: int = 16) -> RegressionHead:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return RegressionHead(backbone.embedding_size, hidden).double().eval()


@pytest.mark.parametrize("name", ["end of a residual block", "flatten to linear", "squeeze and excitation"])
def test_grad_cam_equals_finite_differences(name: str) -> None:
    """Central differences of the score for each cell of each map, in float64. Measured worst relative error 1e-8."""
    backbone = small_backbone(name)
    head = HeadEnsemble([small_head(backbone, 0)])
    images = torch.rand(2, 3, SIDE, SIDE, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    split = backbone.split
    with torch.no_grad():
        maps, *context = split.trunk(images)
        gradients = torch.zeros_like(maps)
        for cell in range(MAPS * SIDE * SIDE):
            step = torch.zeros(MAPS * SIDE * SIDE, dtype=torch.float64)
            step[cell] = 1e-7
            ends = [head(split.tail(maps + sign * step.view(MAPS, SIDE, SIDE), *context)) for sign in (1, -1)]
            gradients.flatten(1)[:, cell] = (ends[0] - ends[1]) / 2e-7
    expected = (gradients.mean((2, 3))[:, :, None, None] * maps).sum(1).relu()
    found = grad_cam(backbone, head, images)
    assert expected.abs().max() > 0
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))
    assert not found.requires_grad


class TestHeads:
    def test_rank_correlation(self) -> None:
        rng = np.random.default_rng(0)
        first, second = rng.random((4, 5, 5)), rng.random((4, 5, 5))
        expected = [stats.spearmanr(a.ravel(), b.ravel()).statistic for a, b in zip(first, second, strict=True)]
        assert rank_correlation(first, second) == pytest.approx(expected)
        second[2] = 1
        assert np.isnan(rank_correlation(first, second)).tolist() == [False, False, True, False]

    def test_with_and_between_heads(self) -> None:
        rng = np.random.default_rng(1)
        maps = rng.random((3, 2, 4, 4))
        assert correlation_with_each(maps[0], maps[1:]) == pytest.approx(
            np.stack([rank_correlation(maps[0], maps[1]), rank_correlation(maps[0], maps[2])])
        )
        pairs = [rank_correlation(maps[i], maps[j]) for i, j in ((0, 1), (0, 2), (1, 2))]
        assert correlation_between(maps) == pytest.approx(np.mean(pairs, axis=0))
        assert np.isnan(correlation_between(maps[:1])).all()

    def test_random_heads_read_coordinates_at_the_fitted_scale(self) -> None:
        fitted = RegressionHead(30, 400)
        with torch.no_grad():
            fitted.hidden.weight.mul_(torch.logspace(-3, 3, 30))
        centre = torch.linspace(-5, 5, 30)
        heads = random_heads(HeadEnsemble([fitted]), centre)
        scale = heads[0].hidden.weight.std(0) / fitted.hidden.weight.std(0)
        torch.testing.assert_close(scale, torch.ones(30), rtol=0, atol=0.2)
        assert heads[0].hidden(centre).abs().max() < 1e-2 * heads[0].hidden.bias.abs().max()
        assert not torch.equal(heads[0].hidden.weight, heads[1].hidden.weight)
        again = random_heads(HeadEnsemble([fitted]), centre)
        torch.testing.assert_close(again[3].hidden.weight, heads[3].hidden.weight, rtol=0, atol=0)


class TestLocalisation:
    def test_overlap_by_hand(self) -> None:
        heatmap = np.array([[4.0, 3, 0], [2, 1, np.nan]])
        mask = np.array([[True, False, False], [True, False, True]])
        # Two masked pixels were looked at; the highest two are 4 and 3: one in common, three together.
        assert mask_overlap(heatmap, mask) == pytest.approx(1 / 3)
        assert np.isnan(mask_overlap(heatmap, np.isnan(heatmap)))

    @pytest.mark.parametrize("flip", [(1, 1), (-1, 1), (1, -1), (-1, -1)])
    def test_ties_overlap_as_by_chance_wherever_the_mask_is(self, flip: tuple[int, int]) -> None:
        """Of 64 × 64 equal pixels, and of all but one, the 400 highest lie in the mask as often as any 400."""
        mask = np.zeros((64, 64), bool)
        mask[:20, :20] = True
        mask = mask[:: flip[0], :: flip[1]]
        share = 400 / 64**2
        assert mask_overlap(np.zeros((64, 64), np.float32), mask) == pytest.approx(share / (2 - share))
        peak = np.zeros((64, 64), np.float32)
        peak[32, 32] = 1
        common = 399 * 400 / (64**2 - 1)
        assert mask_overlap(peak, mask) == pytest.approx(common / (800 - common))

    def test_placed_on_the_original(self) -> None:
        """The model saw the right half of a wide image; its map points at the lower right of it."""
        values = np.zeros((1, 2, 2), np.float32)
        values[0, 1, 1] = 1
        mask = np.zeros((20, 40), bool)
        mask[15:, 35:] = True
        found = localisation(InputMaps(values, (0, 0, 32, 32)), np.array([[20.0, 0, 40, 20]]), 32, [mask])
        assert found.hits == pytest.approx([1])
        assert found.chance == pytest.approx([25 / 400])
        elsewhere = localisation(InputMaps(values, (0, 0, 32, 32)), np.array([[0.0, 0, 20, 20]]), 32, [mask[:, ::-1]])
        assert elsewhere.hits == pytest.approx([0])


class TestSeparation:
    def test_response_by_hand(self) -> None:
        maps = np.array([[[[5.0, 1], [2, 3]], [[-1, 0], [0, -2]], [[0, 4], [4, 9]]]])
        inside = np.array([[[True, False], [False, True]]])
        # Map 0: 5 beats 1 and 2, 3 beats 1 and 2. Map 1 is nowhere positive: all ties. Map 2: 0 loses twice, 9 wins.
        assert mask_response(maps, inside).tolist() == [[1, 0.5, 0.5]]
        assert np.isnan(mask_response(maps, np.ones((1, 2, 2), bool))).all()

    def test_response_is_the_area_under_the_curve(self) -> None:
        rng = np.random.default_rng(0)
        maps, inside = rng.normal(size=(3, 4, 5, 5)).round(1), rng.random((3, 5, 5)) < 0.3
        rectified = np.maximum(maps, 0)
        expected = [
            [np.mean([(a > b) + 0.5 * (a == b) for a in values[cells] for b in values[~cells]]) for values in image]
            for image, cells in zip(rectified, inside, strict=True)
        ]
        np.testing.assert_allclose(mask_response(maps, inside), expected, rtol=0, atol=1e-12)

    def test_mask_on_cells_by_hand(self) -> None:
        mask = np.zeros((6, 8), bool)
        mask[0:3, 2:6] = True
        # Cells of 4 × 3 pixels whose first column begins 2 pixels left of the image: it is half outside.
        found = mask_on_cells(mask, np.array([-2, 0, 6, 6]), (2, 2))
        assert found.tolist() == [[False, True], [False, False]]
        # Of cells of 4 × 3 pixels from 0, each upper one is half covered: not more than half.
        assert not mask_on_cells(mask, np.array([0, 0, 8, 6]), (2, 2)).any()
        assert mask_on_cells(mask, np.array([0.5, 0, 8.5, 6]), (2, 2)).tolist() == [[True, False], [False, False]]

    def test_maps_that_respond_are_told_apart(self) -> None:
        """Half of 40 maps respond, and have a higher AIS in one case and not in the other."""
        rng = np.random.default_rng(0)
        response = np.repeat([0.7, 0.5], 20) + 0.1 * rng.normal(size=(30, 40))
        random = rng.normal(size=(8, 40))
        told = Separation(np.repeat([1.0, 0.0], 20) + rng.normal(size=(30, 40)), response, random)
        assert told.correlation().outcome == told.lead().outcome == "shown"
        assert told.random_correlations()[3] == pytest.approx(
            stats.spearmanr(random[3], response.mean(0)).statistic, abs=1e-12
        )
        shuffled = Separation(rng.permuted(told.ais, axis=1), response, random)
        assert shuffled.lead().outcome == "not shown"
        assert Separation(told.ais[:7], response[:7], random).lead().outcome == "not measured"
        response[4] = np.nan  # an image whose mask is on no cell
        assert Separation(told.ais, response, random).correlation().n == 29


def falling(rates: float | np.ndarray, images: int = 12) -> Curves:
    """Scores that fall by e to the rate on deletion, and rise as fast on insertion: a higher rate is sooner."""
    share = np.linspace(0, 1, 5)
    curve = np.exp(-np.broadcast_to(rates, images)[:, None] * share)
    return Curves(curve, 1 - curve)


def findings(
    fills: tuple[str, ...] = ("blurred", "mean"), protocol_refused: str | None = None, held_out: bool = True
) -> Findings:
    """Of a head that predicts, whose heatmaps lead all baselines on every fill; the protocol is not in it."""
    rates = np.linspace(3, 4, 12)
    methods = {"ais": falling(rates), **{name: falling(rates - lead) for lead, name in enumerate(BASELINES, 1)}}
    unlike = {name: HeadAgreement(np.full((8, 12), 0.1), np.full(12, 0.9)) for name in ("positive", "signed")}
    ratings = np.arange(12.0)
    return Findings(
        scores=ratings,
        prediction=regression_metrics(ratings + np.tile([0, 1], 6), ratings),
        protocol={},
        protocol_refused=protocol_refused,
        heatmaps=Heatmaps(ratings, {}, np.arange(12) % 8, unlike, np.full(12, 0.5), None),
        curves=dict.fromkeys(fills, methods),
        curved=np.arange(12),
        localisation={},
        weighting="positive",
        held_out=held_out,
    )


ESSENTIAL = {
    "PLCC along random": "maps added by their AIS beat a random order out of sample",
    **{
        f"deletion {fill} {baseline}": f"deleting by the heatmap ({fill} fill) lowers the score sooner than {other}"
        for fill in ("blurred", "mean")
        for baseline, other in (
            ("random", "deleting at random"),
            ("centre", "deleting from the centre"),
            ("random head", "by that of an unfitted head"),
        )
    },
    "pointing chance": "heatmaps point into the masks more often than chance",
    "ais separates random head": "maps with a higher AIS respond more to the masks, more so than for unfitted heads",
}
MEANS = {
    "shown": Mean(1, 0.5, 1.5, 30),
    "not shown": Mean(0, -1, 1, 30),
    "against": Mean(-1, -1.5, -0.5, 30),
    "not measured": Mean(1, np.nan, np.nan, 4),
}
WORDED = {
    "not shown": "it was not shown that {}",
    "against": "the opposite was shown of this: {}",
    "not measured": "it could not be measured whether {} (4 images are too few)",
}


def checks_with(changed: dict[str, str], leave_out: tuple[str, ...] = ()) -> list[Check]:
    """All essential checks, shown, and of them and others those that are ``changed``."""
    names = dict.fromkeys(["head predicts", *ESSENTIAL, *changed])
    return [
        Check(name, f"claim of {name}", MEANS[changed.get(name, "shown")]) for name in names if name not in leave_out
    ]


class TestConclusion:
    def test_all_that_is_required(self) -> None:
        words = conclusion(findings(), checks_with({}))
        assert words.startswith("PASSED: the head predicts ratings of images it has not seen; ")
        for claim in ESSENTIAL.values():
            assert claim in words
        assert "opposite" not in words

    @pytest.mark.parametrize("outcome", ["not shown", "against", "not measured"])
    @pytest.mark.parametrize("name", ESSENTIAL)
    def test_each_essential_check_is_needed(self, name: str, outcome: str) -> None:
        words = conclusion(findings(), checks_with({name: outcome}))
        assert words == f"PASSED IN PART: {WORDED[outcome].format(ESSENTIAL[name])}."

    def test_several_are_all_named(self) -> None:
        changed = {"deletion blurred centre": "against", "deletion mean random": "not shown"}
        assert conclusion(findings(), checks_with(changed)) == (
            "PASSED IN PART: the opposite was shown of this: deleting by the heatmap (blurred fill) lowers the score "
            "sooner than deleting from the centre; it was not shown that deleting by the heatmap (mean fill) lowers "
            "the score sooner than deleting at random."
        )

    @pytest.mark.parametrize("outcome", ["not shown", "not measured"])
    def test_what_is_not_required_changes_nothing_unless_the_opposite_was_shown(self, outcome: str) -> None:
        changed = {"insertion mean random": outcome, "deletion blurred Grad-CAM": outcome}
        assert conclusion(findings(), checks_with(changed)) == conclusion(findings(), checks_with({}))

    @pytest.mark.parametrize("also", [{}, {"pointing chance": "not shown"}])
    def test_the_opposite_of_what_is_not_required_is_said(self, also: dict[str, str]) -> None:
        changed = {"insertion mean random": "against", "deletion blurred Grad-CAM": "against"}
        assert conclusion(findings(), checks_with(changed | also)) == (
            conclusion(findings(), checks_with(also))
            + " Of this the opposite was shown, though it is not required: claim of insertion mean random; claim of "
            "deletion blurred Grad-CAM."
        )

    def test_masks_and_a_fill_that_was_not_asked_for_are_not_required(self) -> None:
        absent = ("pointing chance", "ais separates random head", *(name for name in ESSENTIAL if "mean" in name))
        assert conclusion(findings(), checks_with({}, absent)).startswith("PASSED: ")

    def test_without_the_protocol_it_passes_in_part_at_most(self) -> None:
        left_out = findings(protocol_refused="protocol=false")
        assert conclusion(left_out, checks_with({}, ("PLCC along random",))) == (
            "PASSED IN PART: the protocol was left out (protocol=false), so that nothing says whether "
            f"{ESSENTIAL['PLCC along random']}."
        )

    @pytest.mark.parametrize("outcome", ["not shown", "against", "not measured"])
    def test_a_head_that_does_not_predict_fails(self, outcome: str) -> None:
        words = conclusion(findings(), checks_with({"head predicts": outcome}))
        claim = "the head predicts ratings of images it has not seen"
        assert words.startswith(f"FAILED: {WORDED[outcome].format(claim)}. Its heatmaps show what moves ")

    @pytest.mark.parametrize("outcome", ["shown", "not shown"])
    def test_what_is_taken_on_trust_is_said(self, outcome: str) -> None:
        words = conclusion(findings(held_out=False), checks_with({"head predicts": outcome}))
        assert "the head predicts ratings of images taken as not seen in training" in words
        assert "has not seen" not in words

    def test_similarity(self) -> None:
        def concluded(agrees: str, ranks: str) -> str:
            outcomes = {"model agrees": agrees, "R² along random": ranks, "R² stop all": "against"}
            return similarity_conclusion([Check(name, name, MEANS[outcome]) for name, outcome in outcomes.items()])

        contrary = " Of this the opposite was shown, though it is not required: R² stop all."
        assert concluded("shown", "shown").startswith(
            "PASSED: the model's similarity agrees with people's; maps added "
        )
        assert concluded("shown", "shown").endswith(contrary)
        assert concluded("shown", "against") == (
            "PASSED IN PART: the opposite was shown of this: maps added by their AIS beat a random order out of sample."
            + contrary
        )
        assert concluded("against", "shown").startswith(
            "FAILED: the opposite was shown of this: the model's similarity agrees with people's. "
        )


class TestChecks:
    def test_signs_of_deletion_and_insertion(self) -> None:
        """Scores that fall and rise sooner by the heatmap than by any baseline speak for it on every fill."""
        checks = {check.name: check for check in checks_of(findings())}
        ours, theirs = (findings().curves["mean"][method].areas() for method in ("ais", "centre"))
        assert checks["deletion mean centre"].mean.value == pytest.approx(
            (theirs["deletion"] - ours["deletion"]).mean()
        )
        assert checks["deletion mean centre"].mean.value > 0
        for fill in ("blurred", "mean"):
            for baseline in BASELINES:
                assert checks[f"deletion {fill} {baseline}"].outcome == "shown"
                assert checks[f"insertion {fill} {baseline}"].outcome == "shown"

    def test_signs_where_the_baselines_lead(self) -> None:
        found = findings(("blurred",))
        curves = {**dict.fromkeys(BASELINES, found.curves["blurred"]["ais"]), "ais": found.curves["blurred"]["random"]}
        checks = checks_of(replace(found, curves={"blurred": curves}))
        told = {check.outcome for check in checks if check.name.startswith(("deletion", "insertion"))}
        assert told == {"against"}
        assert "the opposite was shown of this: deleting by the heatmap (blurred fill)" in conclusion(found, checks)

    @pytest.mark.parametrize(("hit", "outcome"), [(1.0, "shown"), (0.0, "not shown")])
    def test_pointing(self, hit: float, outcome: str) -> None:
        """All of twelve hit where chance is 0.1 is evidence; none hit is not, as chance alone gives that in 28%."""
        unfitted = np.tile([hit, 1 - hit], 6)
        ours = Localisation(np.full(12, hit), np.linspace(0.4, 0.5, 12), np.full(12, 0.1))
        theirs = Localisation(unfitted, np.linspace(0.2, 0.4, 12), np.full(12, 0.1))
        located = {"ais": ours, **dict.fromkeys(BASELINES, theirs)}
        checks = {check.name: check.mean for check in checks_of(replace(findings(), localisation=located))}
        assert checks["pointing chance"].outcome == outcome
        assert checks["pointing chance"].value == pytest.approx(hit - 0.1)
        for baseline in BASELINES:
            assert checks[f"pointing {baseline}"].value == pytest.approx(hit - 0.5)
            assert checks[f"overlap {baseline}"].outcome == "shown"

    def test_against_unfitted_heads_the_choice_of_heads_counts(self) -> None:
        """Images of the same head are led by as much: only those of unfitted heads know of it."""
        found, curved = findings(("blurred",)), np.array([0, 1, 2, 3, 4, 8, 9, 10, 11, 16, 17, 18])
        lead = falling(1 + np.array([0.0, 1, 2, 3, 4, 0, 1, 2, 3, 0, 1, 2]))
        curves = {**found.curves["blurred"], "random head": lead, "random": lead}
        heatmaps = replace(found.heatmaps, random_head=np.arange(20) % 8)
        checks = checks_of(replace(found, curves={"blurred": curves}, curved=curved, heatmaps=heatmaps))
        unfitted, noise = (
            next(check.mean for check in checks if check.name == f"deletion blurred {baseline}")
            for baseline in ("random head", "random")
        )
        assert unfitted.value == noise.value
        assert unfitted.high - unfitted.low > 1.2 * (noise.high - noise.low)

    @pytest.mark.parametrize(("correlation", "said"), [(0.95, True), (0.5, False), (np.nan, False)])
    def test_heatmaps_that_hardly_depend_on_the_head(self, correlation: float, said: bool) -> None:
        found = findings()
        agreement = {
            "positive": HeadAgreement(np.full((8, 12), correlation), np.full(12, 0.9)),
            "signed": HeadAgreement(np.full((8, 12), correlation / 2), np.full(12, 0.9)),
        }
        found = replace(found, heatmaps=replace(found.heatmaps, agreement=agreement))
        words = describe(found, checks_of(found))
        assert ("These heatmaps hardly depend on the head" in words) is said
        assert ("With weighting=signed, maps that lower the score cancel it" in words) is said
        assert ("positive heatmaps with those of unfitted heads: undefined" in words) is bool(np.isnan(correlation))

    def test_described_under_their_outcomes(self) -> None:
        lines = describe(findings(), checks_of(findings())).split("\n")
        assert lines[0].startswith("PASSED: ")
        claims = [line for line in lines if line.startswith("shown        ")]
        assert len(claims) == 1 + 2 * 2 * len(BASELINES) + 1
        assert "held_out=false" not in "".join(lines)
        on_trust = findings(held_out=False)
        assert "\nheld_out=false: that the head was not fitted to these" in describe(on_trust, checks_of(on_trust))


register(
    BackboneSpec(
        name="resnet18_96",
        build=partial(resnet18, weights=None),
        adapt=families.adapt_resnet,
        published=None,
        input_size=96,
        resize_size=110,
        interpolation="bilinear",
        layer="features.7.1.conv2",
        map_shape=(512, 3, 3),
        embedding_size=512,
        tail=TailKind.CHANNELWISE,
        classifier=("fc.",),
        other_layers=(("features.7.0.conv1", (512, 3, 3)),),
    )
)
COUNT, TRAINED = 120, 70


def fit_head(embeddings: np.ndarray, scores: np.ndarray) -> RegressionHead:
    """Adam on all rows at once, as the training job does in batches."""
    standardisation = Standardisation.of(embeddings, scores, np.arange(len(scores)))
    inputs = standardisation.inputs(torch.from_numpy(embeddings))
    targets = torch.from_numpy(standardisation.targets(scores))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        head = RegressionHead(embeddings.shape[1], 64)
    optimiser = torch.optim.Adam(head.parameters(), 1e-3, weight_decay=1e-3)
    for _ in range(60):
        optimiser.zero_grad()
        torch.nn.functional.mse_loss(head.standardised(inputs), targets).backward()
        optimiser.step()
    return standardisation.fold(head)


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Planted images, a table with their ratings and one with the same shuffled, and a head fitted to each."""
    folder = tmp_path_factory.mktemp("planted")
    made = make_planted(folder, PlantedSpec(count=COUNT, size=110))
    backbone = load_backbone("resnet18_96", weights="random", seed=0)
    explainer = Explainer(backbone, RegressionHead(512, 4))
    names = [f"images/{image.name}" for image in made.images]
    with torch.inference_mode():
        pixels = [decode_image((folder / name).read_bytes()) for name in names]
        embeddings = torch.cat([backbone(explainer.preprocess([image])) for image in pixels]).numpy()
    scores = np.array([image.score for image in made.images])
    shuffled = np.random.default_rng(0).permutation(scores)
    for name, table in (("true", scores), ("shuffled", shuffled)):
        with (folder / f"{name}.csv").open("w") as file:
            csv.writer(file).writerows([("image", "score"), *zip(names, table, strict=True)])
        head = fit_head(embeddings[:TRAINED], table[:TRAINED])
        save_head(str(folder / name), HeadEnsemble([head]), backbone, "center_crop", {})
        place = Storage().open(str(folder / name)) / "predictions.parquet"
        write_table(place, pa.table({"image": names[TRAINED:], "score": table[TRAINED:]}))
    return folder


def arguments(planted: Path, out: Path, which: str, *more: str) -> list[str]:
    return [
        f"ratings.path={planted}/{which}.csv", f"head={planted}/{which}", f"output={out}", "compute.device=cpu",
        "images_limit=12", "steps=4", "seeds=3", *more,
    ]  # fmt: skip


def outcomes(out: Path) -> dict[str, str]:
    return {check["name"]: check["outcome"] for check in json.loads((out / "validation.json").read_text())["checks"]}


class TestJob:
    def test_a_fitted_head(self, planted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(arguments(planted, tmp_path, "true", f"masks={planted}/masks")) == 0
        document = json.loads((tmp_path / "validation.json").read_text())
        found = outcomes(tmp_path)
        assert document["images"] == {"rated": COUNT - TRAINED, "curved": 12, "unreadable": 0}
        assert found["head predicts"] == "shown"
        essential = [found[name] for name in ESSENTIAL]
        word = "PASSED" if essential == ["shown"] * len(essential) else "PASSED IN PART"
        assert document["conclusion"].startswith(f"{word}: ")
        printed = capsys.readouterr().out
        assert document["conclusion"] in printed
        assert "The backbone is UNTRAINED" in printed
        assert (tmp_path / "verdict.txt").read_text().strip() in printed

    def test_masks_that_fill_no_cell(self, planted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """Of objects smaller than half a cell of the maps, or none at all: nothing to tell the maps apart by."""
        (tmp_path / "masks").mkdir()
        for path in (planted / "masks").iterdir():
            with Image.open(path) as mask:
                Image.new("L", mask.size).save(tmp_path / "masks" / path.name)
        more = [f"masks={tmp_path}/masks", "images_limit=2", "steps=2", "protocol=false"]
        assert main(arguments(planted, tmp_path / "out", "true", *more)) == 0
        document = json.loads((tmp_path / "out" / "validation.json").read_text())
        assert set(document["heatmaps"]["random_head_separation"]) == {None}
        assert outcomes(tmp_path / "out")["ais separates"] == "not measured"
        maps = pq.read_table(tmp_path / "out" / "maps.parquet")
        assert maps["ais"].null_count == maps["response"].null_count == maps.num_rows > 0
        assert "nan" not in capsys.readouterr().out

    def test_a_head_fitted_to_shuffled_ratings_fails(self, planted: Path, tmp_path: Path) -> None:
        assert main(arguments(planted, tmp_path, "shuffled")) == 0
        assert outcomes(tmp_path)["head predicts"] != "shown"
        assert (tmp_path / "verdict.txt").read_text().startswith("FAILED: it was not shown that the head predicts")
        assert not (tmp_path / "localisation.parquet").exists()

    def test_tables_hold_what_the_figures_are_made_of(self, planted: Path, tmp_path: Path) -> None:
        main(arguments(planted, tmp_path, "true", f"masks={planted}/masks", "images_limit=3", "steps=2", "folds=3"))
        document = json.loads((tmp_path / "validation.json").read_text())
        checks = {check["name"]: check for check in document["checks"]}
        areas = pq.read_table(tmp_path / "faithfulness.parquet").to_pandas()
        assert len(areas) == 3 * 2 * 2 * 5
        chosen = areas[(areas["fill"] == "mean") & (areas["mode"] == "insertion")].groupby("method")["area"].mean()
        assert checks["insertion mean centre"]["value"] == pytest.approx(chosen["ais"] - chosen["centre"])
        for fill in ("blurred", "mean"):
            chosen = areas[(areas["fill"] == fill) & (areas["mode"] == "deletion")].groupby("method")["area"].mean()
            for baseline in BASELINES:
                assert checks[f"deletion {fill} {baseline}"]["value"] == pytest.approx(chosen[baseline] - chosen["ais"])
        fits = pq.read_table(tmp_path / "protocol.parquet").to_pandas()
        assert len(fits) == 3 * 3 * 3 * 3
        rmse = fits[fits["measure"] == "RMSE"].groupby("order")["test"].mean()
        assert checks["RMSE stop random"]["value"] == pytest.approx(rmse["random"] - rmse["ais"])
        images = pq.read_table(tmp_path / "images.parquet").to_pandas()
        assert len(images) == COUNT - TRAINED
        for weighting in ("positive", "signed"):
            recorded = document["heatmaps"]["random_head_correlation"][weighting]["value"]
            assert images[f"random_head_correlation_{weighting}"].mean() == pytest.approx(recorded)
        assert checks["head predicts"]["value"] == pytest.approx(images["rating"].corr(images["score"]))
        located = pq.read_table(tmp_path / "localisation.parquet").to_pandas()
        hits = located[located["method"] == "ais"]
        assert len(hits) == COUNT - TRAINED
        assert checks["pointing chance"]["value"] == pytest.approx((hits["hit"] - hits["chance"]).mean())
        maps = pq.read_table(tmp_path / "maps.parquet").to_pandas()
        assert checks["ais separates"]["value"] == pytest.approx(maps["ais"].corr(maps["response"], method="spearman"))
        assert load_config(ValidateConfig, ["--config", str(tmp_path / "config.yaml")], doc="").config.folds == 3

    def test_what_a_tail_that_mixes_maps_costs_is_said(
        self, planted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        more = ("backbone.layer=features.7.0.conv1", "protocol_counts=20", "folds=2", "--dry-run")
        assert main([*arguments(planted, tmp_path, "true"), *more]) == 0
        assert "6 fits × 3 orders × 20 numbers of maps × 50 images = 18,000 passes" in capsys.readouterr().out

    def test_the_protocol_can_be_left_out(self, planted: Path, tmp_path: Path) -> None:
        assert (
            main(
                [
                    *arguments(planted, tmp_path, "true"),
                    "images_limit=2",
                    "steps=2",
                    "protocol=false",
                    "protocol_images=15",
                ]
            )
            == 0
        )
        document = json.loads((tmp_path / "validation.json").read_text())
        assert document["protocol_refused"] == "protocol=false"
        assert not any(check["name"].startswith("PLCC") for check in document["checks"])
        assert document["conclusion"].startswith("PASSED IN PART: ")
        assert "the protocol was left out (protocol=false)" in document["conclusion"]
        assert not (tmp_path / "protocol.parquet").exists()

    def test_refused(self, planted: Path, tmp_path: Path) -> None:
        with pytest.raises(
            RatingsError, match=r"50 images of .* are in the test split of the head; 20 folds need at l"
        ):
            main(arguments(planted, tmp_path, "true", "folds=20"))
        with pytest.raises(RunError, match=r"masks: '.*planted-\d+.png' cannot be read: not found"):
            main(arguments(planted, tmp_path, "true", f"masks={tmp_path}"))
        assert not (tmp_path / "validation.json").exists()

    def test_constant_ratings_are_refused_before_any_work(self, planted: Path, tmp_path: Path) -> None:
        rows = list(csv.reader((planted / "true.csv").open()))
        with (planted / "constant.csv").open("w") as file:
            unseen = set(pq.read_table(planted / "true" / "predictions.parquet")["image"].to_pylist())
            csv.writer(file).writerows([[row[0], "2"] if row[0] in unseen else row[:2] for row in rows])
        given = [*arguments(planted, tmp_path, "true"), f"ratings.path={planted}/constant.csv", "--dry-run"]
        with pytest.raises(RatingsError, match=r"all 50 images of .*constant.csv' to validate on have the rating 2"):
            main(given)

    def test_images_that_would_share_a_mask_are_refused(self, planted: Path, tmp_path: Path) -> None:
        rows = list(csv.reader((planted / "true.csv").open()))
        rows.append([f"other/{Path(rows[7][0]).name}", "3"])
        with (planted / "repeated.csv").open("w") as file:
            csv.writer(file).writerows(rows)
        more = [f"ratings.path={planted}/repeated.csv", "--dry-run"]
        with pytest.raises(RunError, match=r"masks: '.*/images/(.*)' and '.*/other/\1' would share the mask '.*/m/\1'"):
            main([*arguments(planted, tmp_path, "true", f"masks={tmp_path}/m"), *more])
        assert main([*arguments(planted, tmp_path, "true"), *more]) == 0

    def test_ratings_that_the_head_was_fitted_to_are_refused(
        self, planted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        rated = read_ratings(RatingsConfig(path=str(planted / "true.csv")), Storage())
        backbone = load_backbone("resnet18_96", weights="random", seed=0)
        save_head(
            str(tmp_path / "head"), load_head(str(planted / "true")), backbone, "center_crop",
            {"identity": {"ratings": ratings_fingerprint(rated)}},
        )  # fmt: skip
        monkeypatch.chdir(planted)
        more = [f"head={tmp_path}/head", "held_out=false", f"output={tmp_path}/out", "--dry-run"]
        with pytest.raises(ConfigError, match=r"held_out: false, but head .*head' was fitted to '.*true.csv', whose"):
            main(["ratings.path=true.csv", *more])
        assert main(["ratings.path=shuffled.csv", *more]) == 0  # other ratings: taken on trust
        assert "120 rated, taken as not seen in training" in capsys.readouterr().out

    def test_held_out_is_recorded(self, planted: Path, tmp_path: Path) -> None:
        quick = ("images_limit=2", "steps=2", "protocol=false", "fill=mean")
        for name, more in (("true", ()), ("false", ("held_out=false", "protocol_images=20"))):
            assert main([*arguments(planted, tmp_path / name, "true"), *quick, *more]) == 0
            document = json.loads((tmp_path / name / "validation.json").read_text())
            assert document["held_out"] is (name == "true")
            verdict = (tmp_path / name / "verdict.txt").read_text()
            assert ("taken as not seen in training" in verdict) is (name == "false")
            assert "it could not be measured whether deleting by the heatmap (mean fill)" in verdict
            assert "(2 images are too few)" in verdict

    def test_a_dry_run_writes_nothing(self, planted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main([*arguments(planted, tmp_path / "out", "true"), "--dry-run"]) == 0
        assert "50 rated, of the head's test split; 12 with deletion" in capsys.readouterr().out
        assert not (tmp_path / "out").exists()


class TestSimilarityJob:
    """The matrix says how alike the ratings of thirty images are."""

    @pytest.fixture
    def matrix(self, planted: Path) -> Path:
        ratings = np.array([float(row["score"]) for row in csv.DictReader((planted / "true.csv").open())][:30])
        names = np.array([f"images/planted-{index:05d}.png" for index in range(30)])
        np.savez(planted / "human.npz", similarity=-np.abs(ratings[:, None] - ratings), images=names)
        return planted / "human.npz"

    def run(self, matrix: Path, out: Path, *more: str) -> dict[str, dict[str, float]]:
        backbone = ["backbone.name=resnet18_96", "backbone.weights=random", "backbone.seed=0", "compute.device=cpu"]
        assert main(["objective=similarity", f"matrix={matrix}", f"output={out}", "seeds=2", *backbone, *more]) == 0
        document = json.loads((out / "validation.json").read_text())
        assert (out / "verdict.txt").read_text().startswith(document["conclusion"])
        return {check["name"]: check for check in document["checks"]}

    def test_agreement_and_protocol(self, matrix: Path, planted: Path, tmp_path: Path) -> None:
        checks = self.run(matrix, tmp_path)
        backbone = load_backbone("resnet18_96", weights="random", seed=0)
        explainer = Explainer(backbone, RegressionHead(512, 4))
        names = np.load(matrix)["images"]
        with torch.inference_mode():
            images = explainer.preprocess([decode_image((planted / name).read_bytes()) for name in names])
            embeddings = backbone(images).numpy()
        expected = alignment(embeddings, np.load(matrix)["similarity"])
        assert checks["model agrees"]["value"] == pytest.approx(expected, abs=1e-6)
        assert checks["model agrees"]["low"] < expected < checks["model agrees"]["high"]
        fits = pq.read_table(tmp_path / "protocol.parquet").to_pandas()
        assert len(fits) == 2 * 5 * 3
        assert len(pq.read_table(tmp_path / "curves.parquet")) == 3 * 513

    def test_a_grid_measures_the_same_curve(self, matrix: Path, tmp_path: Path) -> None:
        self.run(matrix, tmp_path / "all")
        self.run(matrix, tmp_path / "grid", "protocol_counts=8")
        curves = [pq.read_table(tmp_path / name / "curves.parquet").to_pandas() for name in ("all", "grid")]
        joined = curves[0].merge(curves[1], on=["order", "maps"])
        assert len(joined) == 3 * 9
        np.testing.assert_allclose(joined["test_x"], joined["test_y"], rtol=0, atol=1e-10)

    def test_a_tail_that_mixes_maps(self, matrix: Path, planted: Path, tmp_path: Path) -> None:
        human = np.load(matrix)
        small = tmp_path / "small.npz"
        names = np.array([str(planted / name) for name in human["images"][:8]])
        np.savez(small, similarity=human["similarity"][:8, :8], images=names)
        more = ("backbone.layer=features.7.0.conv1", "protocol_counts=2", "folds=2", "seeds=1", "compute.chunk=64")
        checks = self.run(small, tmp_path, *more)
        assert set(checks) == {"model agrees", *(f"R² {kind}" for kind in (
            "along random", "along reversed", "stop random", "stop all"
        ))}  # fmt: skip

    def test_refused(self, matrix: Path, tmp_path: Path) -> None:
        more = ["backbone.name=resnet18_96", "backbone.weights=random", "backbone.seed=0", f"output={tmp_path}"]
        with pytest.raises(SimilarityError, match="30 images were compared; 11 folds need at least 33"):
            main(["objective=similarity", f"matrix={matrix}", "folds=11", *more])
        with pytest.raises(
            ConfigError, match=r"matrix: required with objective=similarity(?s:.*)backbone.name: required"
        ):
            main(["objective=similarity", f"output={tmp_path}"])
        with pytest.raises(ConfigError, match=r'ratings.path: "r.csv" has no use with objective=similarity'):
            main(["objective=similarity", f"matrix={matrix}", "ratings.path=r.csv", *more])


def test_the_production_example_loads() -> None:
    config = load_config(ValidateConfig, ["--config", str(ROOT / "configs" / "validate.yaml")], doc="").config
    assert config.output.startswith("s3://")

"""The importance job with real Ray, real files and the tiny backbone. Nothing is faked."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from PIL import Image

import tests.tiny  # noqa: F401 - registers the backbone
from ais import Explainer, RegressionHead, load_backbone, load_head
from ais.config import AblatingComputeConfig, ImportanceConfig, OptionalRatingsConfig, RatingsConfig
from ais.errors import ConfigError, ImportanceError, RatingsError, RunError, SimilarityError
from ais.images import decode_image
from ais.importance import load_importance, load_importance_by_image
from ais.importance.general import general_similarities
from ais.importance.jackknife import agreement_interval, jackknifed_ais
from ais.importance.similarity import (
    collective_ais_reference,
    individual_ais_reference,
    similarity_of,
)
from ais.ratings import ratings_fingerprint, read_ratings
from ais.storage import Storage
from jobs import heatmaps, importance
from tests.tiny import TINY

COUNT = 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty small images of smooth noise, one of them broken, and ratings of all."""
    folder = tmp_path_factory.mktemp("rated")
    rng = np.random.default_rng(0)
    for n in range(COUNT):
        coarse = Image.fromarray(rng.integers(0, 255, (4, 4, 3), dtype=np.uint8))
        coarse.resize((48, 40 + n), Image.Resampling.BICUBIC).save(folder / f"{n:02d}.png")
    (folder / "07.png").write_bytes(b"no image")
    ratings = pa.table({"image": [f"{n:02d}.png" for n in range(COUNT)], "score": rng.normal(3, 1, COUNT)})
    pa.csv.write_csv(ratings, folder / "ratings.csv")
    return folder


def good_images(folder: Path) -> tuple[list[np.ndarray], np.ndarray]:
    ratings = pa.csv.read_csv(folder / "ratings.csv")["score"].to_numpy()
    kept = [n for n in range(COUNT) if n != 7]
    return [decode_image((folder / f"{n:02d}.png").read_bytes()) for n in kept], ratings[kept]


@pytest.fixture(scope="module")
def explainer(head: Path) -> Explainer:
    return Explainer(load_backbone("tiny", weights="random", seed=3), load_head(str(head)))


@pytest.fixture(scope="module")
def bundle(folder: Path, head: Path, tmp_path_factory: pytest.TempPathFactory, local_ray: None) -> Path:  # noqa: ARG001
    """An importance bundle of the objective error, made by one actor."""
    output = tmp_path_factory.mktemp("bundle")
    assert importance.run(error_config(folder, head, output, actors=1)) == 0
    return output


def error_config(folder: Path, head: Path, output: Path, actors: int) -> ImportanceConfig:
    return ImportanceConfig(
        objective="error",
        ratings=OptionalRatingsConfig(path=str(folder / "ratings.csv")),
        head=str(head),
        held_out=False,  # it was never fitted
        output=str(output),
        compute=AblatingComputeConfig(scoring_actors=actors, batch_size=4),
    )


@pytest.fixture(scope="module")
def matrix(folder: Path) -> tuple[Path, np.ndarray, list[int]]:
    """A .csv that names its twelve images, in an order of its own."""
    order = [5, 3, 11, 0, 1, 2, 4, 6, 8, 9, 10, 12]
    human = np.corrcoef(np.random.default_rng(5).normal(size=(12, 5)))
    names = [f"{n:02d}.png" for n in order]
    rows = [",".join(["", *names])]
    rows += [",".join([name, *map(repr, row)]) for name, row in zip(names, human.tolist(), strict=True)]
    (folder / "human.csv").write_text("\n".join(rows))
    return folder / "human.csv", human, order


@pytest.mark.usefixtures("local_ray")
class TestError:
    def test_equals_the_definition(self, bundle: Path, folder: Path, explainer: Explainer) -> None:
        """Measured worst error 3e-8 of AIS up to 1, from float32 scores computed in other batches."""
        images, ratings = good_images(folder)
        result = explainer(images)
        assert result.ablated_scores is not None
        scores, ablated = result.scores.double().numpy(), result.ablated_scores.double().numpy()
        error_effect = np.abs(ablated - ratings[:, None]) - np.abs(scores - ratings)[:, None]
        table = pq.read_table(bundle / "importance.parquet")
        np.testing.assert_allclose(table["ais"].to_numpy(), error_effect.mean(0), rtol=0, atol=2e-7)
        np.testing.assert_allclose(
            table["mean_effect"].to_numpy(), (scores[:, None] - ablated).mean(0), rtol=0, atol=2e-7
        )
        dual = np.abs(scores[:, None] - ablated) * np.sign(error_effect)
        np.testing.assert_allclose(table["mean_dual"].to_numpy(), dual.mean(0), rtol=0, atol=2e-7)
        assert sorted(table["rank"].to_pylist()) == list(range(1, 9))
        assert table["rank"].to_numpy()[table["ais"].to_numpy().argmax()] == 1

    def test_says_what_it_belongs_to(self, bundle: Path) -> None:
        document = json.loads((bundle / "importance.json").read_bytes())
        assert (document["objective"], document["images"], document["rated"]) == ("error", COUNT - 1, COUNT - 1)
        assert [row["reason"] for row in document["unreadable"]] == ["not an image"]
        assert document["untrained"] is True
        assert document["held_out"] is False
        assert document["measured_on"] == "images that the head may have been fitted to"
        assert document["sign"].endswith(f"nearer to the ratings; measured on {document['measured_on']}")
        with Image.open(bundle / "importance.png") as picture:
            assert picture.size == (1280, 800)

    def test_only_of_images_that_the_head_has_not_seen(self, folder, head, tmp_path, explainer, capsys) -> None:
        """Those of its test split, unless told otherwise; measured worst error 3e-8, as above."""
        tested = [n for n in range(3, 30, 2) if n != 7]
        split = with_test_split(head, tmp_path / "head", tested)
        argv = ["objective=error", f"ratings.path={folder}/ratings.csv", f"head={split}", f"output={tmp_path}/out"]
        assert importance.main([*argv, "max_error_share=0"]) == 0  # the broken one is not among them
        assert "images      13 of the head's test split" in capsys.readouterr().out
        document = json.loads((tmp_path / "out" / "importance.json").read_bytes())
        assert (document["images"], document["rated"], document["held_out"]) == (13, 13, True)
        assert document["measured_on"] == "images of the head's test split"
        assert document["sign"].endswith("nearer to the ratings")
        images, ratings = good_images(folder)
        places = [n - (n > 7) for n in tested]
        result = explainer([images[place] for place in places])
        assert result.ablated_scores is not None
        ratings, scores = ratings[places], result.scores.double().numpy()
        error_effect = np.abs(result.ablated_scores.double().numpy() - ratings[:, None])
        error_effect -= np.abs(scores - ratings)[:, None]
        found, _, _ = load_importance(str(tmp_path / "out"), Storage())
        np.testing.assert_allclose(found, error_effect.mean(0), rtol=0, atol=2e-7)

    def test_actors_do_not_change_a_digit(self, bundle: Path, folder: Path, head: Path, tmp_path: Path) -> None:
        """One actor and three: the same batches and exact sums, so the vectors are equal to the last bit."""
        assert importance.run(error_config(folder, head, tmp_path, actors=3)) == 0
        one, three = (load_importance(str(output), Storage())[0] for output in (bundle, tmp_path))
        np.testing.assert_array_equal(one, three)

    def test_heatmaps_take_it(
        self, bundle: Path, folder: Path, head: Path, tmp_path: Path, explainer: Explainer
    ) -> None:
        argv = [f"images={folder}", f"output={tmp_path}", f"head={head}", f"importance={bundle}", "run_id=r"]
        assert heatmaps.main([*argv, "png.select=none"]) == 0
        results = pq.read_table(tmp_path / "runs/r/results").sort_by("image_id")
        own = Explainer(explainer.backbone, explainer.head, importance=load_importance(str(bundle), Storage())[0])
        expected = own(good_images(folder)[0]).heatmaps.numpy()
        found = results["heatmap"].combine_chunks().to_numpy_ndarray()
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6 * expected.max())

    def test_not_for_another_layer(self, bundle: Path, folder: Path, head: Path, tmp_path: Path) -> None:
        argv = [f"images={folder}", f"output={tmp_path}", f"head={head}", f"importance={bundle}"]
        with pytest.raises(ImportanceError, match=r"layer 'features.6', not 'features.7'"):
            heatmaps.main([*argv, "backbone.layer=features.7"])
        assert not (tmp_path / "runs").exists()


@pytest.mark.usefixtures("local_ray")
class TestSimilarity:
    @pytest.mark.parametrize(
        ("level", "reference"),
        [("collective", collective_ais_reference), ("individual", individual_ais_reference)],
    )
    def test_equals_the_slow_way(self, level, reference, matrix, folder, explainer, tmp_path) -> None:
        """Ablate with a hook, embed, correlate.

        Measured worst errors, of AIS up to 0.8: 3e-15 by rank-one updates, 4e-7 by ablated embeddings in float32; 6e-8
        between the intervals of the two ways.
        """
        path, human, order = matrix
        config = ImportanceConfig.model_validate(
            {
                "objective": "similarity",
                "level": level,
                "matrix": str(path),
                "output": str(tmp_path),
                "backbone": {"name": "tiny", "weights": "random", "seed": 3},
            }
        )
        assert importance.run(config) == 0
        backbone = explainer.backbone
        images = explainer.preprocess([decode_image((folder / f"{n:02d}.png").read_bytes()) for n in order])
        embeddings = backbone(images).numpy()
        replacements = np.stack([ablated_coordinate(backbone, images, k) for k in range(8)], axis=1)
        expected = reference(embeddings, replacements, 0, human)
        found, record, _ = load_importance(str(tmp_path), Storage())
        assert record.head is None
        np.testing.assert_allclose(found, expected if expected.ndim == 1 else expected.mean(0), rtol=0, atol=3e-14)
        intact, parts = general_similarities(backbone, [images[:5], images[5:]], level, chunk=3)
        general = jackknifed_ais(parts, intact, human, level)
        np.testing.assert_allclose(general.ais, expected, rtol=0, atol=4e-6)
        table = pq.read_table(tmp_path / "importance.parquet")
        for name, end in zip(("ais_low", "ais_high"), general.interval(), strict=True):
            np.testing.assert_allclose(table[name].to_numpy(), end, rtol=0, atol=6e-7)
        if level == "collective":
            with pytest.raises(ImportanceError, match=r"has no AIS by image; .* level=individual writes it"):
                load_importance_by_image(str(tmp_path), Storage())
        else:
            uris, by_image = load_importance_by_image(str(tmp_path), Storage())
            assert uris == [str(folder / f"{n:02d}.png") for n in order]
            np.testing.assert_allclose(by_image, expected, rtol=0, atol=3e-14)

    @pytest.mark.parametrize("level", ["collective", "individual"])
    def test_a_matrix_of_distances_is_noticed(self, level, matrix, folder, explainer, tmp_path, capsys) -> None:
        """The same matrix both ways round: R² is the same, and R tells them apart."""
        _, _, order = matrix
        images = explainer.preprocess([decode_image((folder / f"{n:02d}.png").read_bytes()) for n in order])
        noise = np.random.default_rng(1).normal(size=(12, 12))
        alike = similarity_of(explainer.backbone(images).numpy()) + (noise + noise.T) / 10
        pa.csv.write_csv(pa.table({"uri": [f"{folder}/{n:02d}.png" for n in order]}), tmp_path / "order.csv")
        found, said = {}, {}
        for name, human in (("alike", alike), ("distances", -alike)):
            np.save(tmp_path / f"{name}.npy", human)
            argv = [f"matrix={tmp_path}/{name}.npy", f"images={tmp_path}/order.csv", f"output={tmp_path}/{name}"]
            seed = ["backbone.name=tiny", "backbone.weights=random", "backbone.seed=3", f"level={level}"]
            assert importance.main(["objective=similarity", *argv, *seed]) == 0
            found[name] = json.loads((tmp_path / name / "importance.json").read_bytes())
            said[name] = capsys.readouterr().out
        r, low, high = agreement_interval(similarity_of(explainer.backbone(images).numpy()), alike)
        assert r > 0.5
        assert found["alike"]["correlation"] == pytest.approx({"value": r, "low": low, "high": high}, abs=1e-12)
        assert found["distances"]["correlation"] == pytest.approx({"value": -r, "low": -high, "high": -low}, abs=1e-12)
        assert found["distances"]["agreement"] == pytest.approx(found["alike"]["agreement"], abs=1e-12)
        assert f"agreement   R of all maps with people {r:.3f} [{low:.3f}, {high:.3f}], R² {r**2:.3f}" in said["alike"]
        assert "warning" not in found["alike"]
        assert "\nWARNING" not in said["alike"]
        assert "Larger numbers of the matrix must mean more alike" in found["distances"]["warning"]
        assert f"\nWARNING     {found['distances']['warning']}\n" in said["distances"]
        assert ("disagreement" in found["distances"]["sign"]) == (level == "collective")

    def test_a_tail_that_mixes_maps(self, matrix, folder, tmp_path, capsys) -> None:
        """One task for all images, which says how far it is; the same as in this process."""
        path, human, order = matrix
        seed = ["backbone.name=tiny", "backbone.weights=random", "backbone.seed=3", "backbone.layer=features.0"]
        assert importance.main(["objective=similarity", f"matrix={path}", f"output={tmp_path}", *seed]) == 0
        assert "maps: 16 of 16" in capsys.readouterr().out
        explainer = Explainer(load_backbone("tiny", weights="random", seed=3, layer="features.0"), RegressionHead(8, 4))
        images = explainer.preprocess([decode_image((folder / f"{n:02d}.png").read_bytes()) for n in order])
        intact, parts = general_similarities(explainer.backbone, [images], "collective")
        found, _, _ = load_importance(str(tmp_path), Storage())
        np.testing.assert_allclose(found, jackknifed_ais(parts, intact, human, "collective").ais, rtol=0, atol=1e-6)

    def test_an_image_that_is_lost_is_named_from_within_the_task(self, matrix, folder, tmp_path) -> None:
        path, _, order = matrix
        lost = folder / f"{order[3]:02d}.png"
        data = lost.read_bytes()
        lost.unlink()
        seed = ["backbone.name=tiny", "backbone.weights=random", "backbone.seed=3", "backbone.layer=features.0"]
        try:
            with pytest.raises(RunError, match=f"{lost.name}' could not be used") as caught:
                importance.main(["objective=similarity", f"matrix={path}", f"output={tmp_path}", *seed])
        finally:
            lost.write_bytes(data)
        assert "\n" not in str(caught.value)

    def test_another_order_is_refused(self, matrix, folder, tmp_path) -> None:
        path, _, order = matrix
        wrong = [*order[:4], order[5], order[4], *order[6:]]
        pa.csv.write_csv(pa.table({"uri": [f"{n:02d}.png" for n in wrong]}), folder / "wrong.csv")
        config = {"objective": "similarity", "matrix": str(path), "images": str(folder / "wrong.csv")}
        config |= {"output": str(tmp_path), "backbone": {"name": "tiny", "weights": "random", "seed": 3}}
        with pytest.raises(RunError, match="another order from number 5 on"):
            importance.run(ImportanceConfig.model_validate(config))

    def test_a_matrix_without_names_needs_a_list(self, matrix, tmp_path) -> None:
        np.save(tmp_path / "human.npy", matrix[1])
        config = {"objective": "similarity", "matrix": str(tmp_path / "human.npy"), "output": str(tmp_path)}
        config |= {"backbone": {"name": "tiny", "weights": "random", "seed": 3}}
        with pytest.raises(RunError, match="does not say which image a row is"):
            importance.run(ImportanceConfig.model_validate(config))

    def test_a_pickled_matrix_is_not_loaded(self, tmp_path) -> None:
        np.save(tmp_path / "human.npy", np.array([[{}]], dtype=object), allow_pickle=True)
        config = {"objective": "similarity", "matrix": str(tmp_path / "human.npy"), "output": str(tmp_path)}
        config |= {"backbone": {"name": "tiny", "weights": "random", "seed": 3}}
        with pytest.raises(SimilarityError, match="cannot be read"):
            importance.run(ImportanceConfig.model_validate(config))


def ablated_coordinate(backbone, images, k: int) -> np.ndarray:
    """Embedding coordinate k with map k zeroed by a hook, on the whole network."""

    def zero(_module, _inputs, output):
        output = output.clone()
        output[:, k] = 0
        return output

    handle = backbone.network.get_submodule(TINY.layer).register_forward_hook(zero)
    try:
        return backbone(images)[:, k].numpy()
    finally:
        handle.remove()


@pytest.mark.parametrize(
    ("objective", "scores", "error", "message"),
    [
        ("prediction", [1, 2], RunError, "2 are too few for intervals over them"),
        ("error", [1, 2], RatingsError, "rates 2 images; at least 10"),
        ("error", [3] * 12, RatingsError, "all 12 images have the score 3"),
    ],
)
def test_sets_that_say_nothing_are_refused(folder, head, tmp_path, objective, scores, error, message) -> None:
    rows = [f"{folder}/{number:02d}.png,{score}" for number, score in enumerate(scores)]
    listed = tmp_path / "listed.csv"
    listed.write_text("\n".join([f"{'image' if objective == 'error' else 'uri'},score", *rows]))
    key = "ratings.path" if objective == "error" else "images"
    with pytest.raises(error, match=message):
        importance.main([f"objective={objective}", f"{key}={listed}", f"head={head}", f"output={tmp_path}/out"])
    assert not (tmp_path / "out").exists()


def with_test_split(head: Path, copy: Path, tested: list[int], **details: object) -> Path:
    """A copy of the head that says which of the images were its test split."""
    shutil.copytree(head, copy)
    pq.write_table(pa.table({"image": [f"{n:02d}.png" for n in tested]}), copy / "predictions.parquet")
    document = json.loads((copy / "head.json").read_bytes())
    (copy / "head.json").write_text(json.dumps(document | details))
    return copy


def test_errors_are_measured_on_images_that_the_head_has_not_seen(folder, head, tmp_path, capsys) -> None:
    argv = ["objective=error", f"ratings.path={folder}/ratings.csv", f"output={tmp_path}/out"]
    with pytest.raises(RatingsError, match=r"has no predictions.parquet.*held_out=false"):
        importance.main([*argv, f"head={head}"])
    few = with_test_split(head, tmp_path / "few", [1, 2, 3])
    with pytest.raises(RatingsError, match=r"held_out: 3 images of .* at least 10 are needed: .*held_out=false"):
        importance.main([*argv, f"head={few}"])
    rated = read_ratings(RatingsConfig(path=str(folder / "ratings.csv")), Storage())
    own = with_test_split(head, tmp_path / "own", [1], identity={"ratings": ratings_fingerprint(rated)})
    for bundle, said in ((few, "that the head may have been fitted to"), (own, "that the head was fitted to")):
        assert importance.main([*argv, f"head={bundle}", "held_out=false", "--dry-run"]) == 0
        assert f"images      40 {said}\n" in capsys.readouterr().out


def test_keys_that_do_not_go_together_are_refused() -> None:
    for argv, message in (
        (["objective=prediction", "output=o", "head=h", "images=i", "held_out=false"], "held_out.*false has no use"),
        (["objective=error", "output=o", "head=h"], "ratings.*required with objective=error"),
        (["objective=error", "output=o", "head=h", "ratings.path=r", "images=i"], "no use with objective=error"),
        (["objective=similarity", "output=o", "matrix=m.npy"], r"backbone.name.*required"),
        (["objective=beauty", "output=o"], "prediction"),
    ):
        with pytest.raises(ConfigError, match=message):
            importance.main(argv)

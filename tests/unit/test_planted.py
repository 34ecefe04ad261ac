"""Planted images: what the files show is what the truth says, and nothing else tells the rating."""

import csv
import json
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ais.errors import StorageError
from ais.planted import PlantedImage, PlantedSet, PlantedSpec, load_mask, make_planted, write_judgments

SPEC = PlantedSpec(count=60, seed=5)


@pytest.fixture(scope="module")
def planted(tmp_path_factory) -> PlantedSet:
    return make_planted(tmp_path_factory.mktemp("planted"), SPEC)


def pixels(planted: PlantedSet, image: PlantedImage) -> np.ndarray:
    with Image.open(planted.images_directory / image.name) as file:
        return np.asarray(file)


def files(directory: Path) -> dict[str, bytes]:
    return {
        path.relative_to(directory).as_posix(): path.read_bytes() for path in directory.rglob("*") if path.is_file()
    }


def crop_box(image: PlantedImage) -> tuple[float, float, float, float]:
    """What resizing the shorter side to 256 and cropping 224 from the centre leaves, as left, top, right, bottom."""
    side = min(image.width, image.height) * 224 / 256
    left, top = (image.width - side) / 2, (image.height - side) / 2
    return left, top, left + side, top + side


def test_the_same_spec_writes_the_same_bytes_again_and_elsewhere(planted, tmp_path):
    written = files(planted.directory)
    few = replace(SPEC, count=8)
    first = make_planted(tmp_path, few)
    before = files(tmp_path)
    assert make_planted(tmp_path, few) == first
    assert files(tmp_path) == before
    images = {name: data for name, data in before.items() if name.endswith(".png")}
    assert images == {name: written[name] for name in images}  # image i does not depend on count
    assert first.images == planted.images[:8]


def test_another_seed_plants_other_images(planted, tmp_path):
    other = make_planted(tmp_path, PlantedSpec(count=3, seed=6))
    assert all(a.centre != b.centre and a.score != b.score for a, b in zip(other.images, planted.images, strict=False))


def test_files_on_disk_are_those_of_the_truth(planted):
    with_second = {image.name for image in planted.images if image.second_box}
    names = {image.name for image in planted.images}
    expected = {f"images/{name}" for name in names} | {f"masks/{name}" for name in names}
    expected |= {f"masks_second/{name}" for name in with_second} | {"ratings.csv", "planted.json"}
    assert files(planted.directory).keys() == expected

    truth = json.loads((planted.directory / "planted.json").read_text())
    assert truth["spec"] == {"count": 60, "size": 256, "seed": 5, "second_share": 0.3}
    assert truth["images"] == json.loads(json.dumps([asdict(image) for image in planted.images]))
    with planted.ratings_path.open() as file:
        ratings = {row["image"]: float(row["score"]) for row in csv.DictReader(file)}
    assert ratings == {f"images/{image.name}": image.score for image in planted.images}


def test_shapes_vary_and_masks_fit_their_images(planted):
    assert {(image.width, image.height) for image in planted.images} == {(256, 256), (320, 256), (256, 320)}
    for image in planted.images:
        mask = load_mask(planted.directory, image.name)
        assert mask.dtype == bool
        assert mask.shape == (image.height, image.width) == pixels(planted, image).shape[:2]
        assert mask.sum() == image.disc_area_px
        assert mask.sum() == pytest.approx(np.pi * image.radius**2, rel=0.02)
        ys, xs = np.nonzero(mask)
        assert (xs.mean() + 0.5, ys.mean() + 0.5) == pytest.approx(image.centre, abs=0.5)


def test_objects_lie_inside_the_centre_crop_and_do_not_touch(planted):
    for image in planted.images:
        left, top, right, bottom = crop_box(image)
        x, y = image.centre
        assert left <= x - image.radius < x + image.radius <= right
        assert top <= y - image.radius < y + image.radius <= bottom
        if image.second_box is not None:
            l2, t2, r2, b2 = image.second_box
            assert left <= l2 < r2 <= right
            assert top <= t2 < b2 <= bottom
            with Image.open(planted.directory / "masks_second" / image.name) as file:
                second = np.asarray(file) > 0
            assert second.sum() == second[t2:b2, l2:r2].sum() == image.second_area_px
            assert not (second & load_mask(planted.directory, image.name)).any()


def test_the_disc_is_the_only_thing_of_high_contrast(planted):
    for image in planted.images:
        grey, mask = pixels(planted, image).mean(-1), load_mask(planted.directory, image.name)
        outside = ~mask
        if image.second_box is not None:
            left, top, right, bottom = image.second_box
            outside[top:bottom, left:right] = False
            assert grey[top:bottom, left:right].std() < 5
        assert grey[mask].std() > 75
        assert grey[outside].std() < 20


def test_rating_is_linear_in_both_areas(planted):
    disc, second, score = np.array([[i.disc_area_px, i.second_area_px, i.score] for i in planted.images]).T
    columns = np.stack([np.ones(60), disc / 256**2, second / 256**2], axis=1)
    (base, per_disc, per_second), *_ = np.linalg.lstsq(columns, score)
    assert base == pytest.approx(0.75, abs=0.06)
    assert per_disc == pytest.approx(32, abs=0.8)
    assert per_second == pytest.approx(-10, abs=2)
    assert np.std(score - columns @ [0.75, 32, -10]) == pytest.approx(0.05, rel=0.3)


def test_areas_are_spread_and_chance_is_low(planted):
    shares = np.array([image.disc_area_px / 256**2 for image in planted.images])
    assert 0.028 < shares.min() < 0.035
    assert 0.11 < shares.max() < 0.123
    assert shares.mean() * (256 / 224) ** 2 < 0.1  # the chance level of the pointing game, over what is looked at


def test_nothing_but_the_objects_tells_the_rating(planted):
    """Shape, place and background must not give the area away; 60 images correlate by 0.25 at random."""
    disc = np.array([image.disc_area_px for image in planted.images])
    background = [pixels(planted, image)[~load_mask(planted.directory, image.name)].mean() for image in planted.images]
    for clue in (
        [image.width for image in planted.images],
        [image.centre[0] - image.width / 2 for image in planted.images],
        [image.centre[1] - image.height / 2 for image in planted.images],
        background,
    ):
        assert abs(np.corrcoef(clue, disc)[0, 1]) < 0.35


@pytest.mark.parametrize(("share", "expected"), [(0, 0), (1, 12)])
def test_second_share_is_the_share_of_second_objects(tmp_path, share, expected):
    planted = make_planted(tmp_path, PlantedSpec(count=12, size=64, second_share=share))
    assert sum(image.second_box is not None for image in planted.images) == expected
    assert {min(image.width, image.height) for image in planted.images} == {64}


def test_files_of_another_set_are_refused(tmp_path):
    make_planted(tmp_path, PlantedSpec(count=5, size=64))
    before = files(tmp_path)
    with pytest.raises(StorageError, match=r"not of this set, such as images/planted-00003.png"):
        make_planted(tmp_path, PlantedSpec(count=3, size=64))
    assert files(tmp_path) == before


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError, match=r"file' cannot be written: NotADirectoryError"):
        make_planted(tmp_path / "file", PlantedSpec(count=1, size=64))


@pytest.mark.parametrize("wrong", [{"count": 0}, {"size": 63}, {"seed": -1}, {"second_share": 1.1}])
def test_impossible_specs_are_refused(wrong):
    ((name, value),) = wrong.items()
    with pytest.raises(ValueError, match=f"{name} is {value}"):
        PlantedSpec(**wrong)


def test_a_mask_that_does_not_exist_is_an_error(planted):
    with pytest.raises(FileNotFoundError):
        load_mask(planted.directory, "planted-99999.png")


def test_judgments_shuffle_what_a_head_sees_and_leave_the_test_images_alone(tmp_path: Path) -> None:
    planted = make_planted(tmp_path, PlantedSpec(count=40, size=64))
    files = write_judgments(planted, test_share=0.35, validation_share=0.15)
    true, shuffled = (list(csv.DictReader(path.open())) for path in (files.true, files.shuffled))
    assert Counter(row["split"] for row in true) == {"train": 20, "validation": 6, "test": 14}
    assert [float(row["score"]) for row in true] == [image.score for image in planted.images]
    for mine, other in zip(true, shuffled, strict=True):
        assert (mine["image"], mine["split"]) == (other["image"], other["split"])
        assert mine["split"] != "test" or mine["score"] == other["score"]
    assert sorted(row["score"] for row in true) == sorted(row["score"] for row in shuffled)
    assert sum(a["score"] != b["score"] for a, b in zip(true, shuffled, strict=True)) > 20
    test = [row["image"] for row in true if row["split"] == "test"]
    assert [row["uri"] for row in csv.DictReader(files.test.open())] == test
    judged = np.load(files.similarity)
    assert judged["images"].tolist() == test
    areas = {f"images/{image.name}": image.disc_area_px for image in planted.images}
    assert judged["similarity"][2, 5] == pytest.approx(-abs(areas[test[2]] - areas[test[5]]) / 64**2)

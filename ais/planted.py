"""Images with known truth: a striped disc on noise whose area sets the rating.

Every image shows one striped disc. Its rating grows linearly with the area of the disc; some images also show a plain
square, which lowers the rating in proportion to its own area. Where the evidence for a score lies is therefore
known pixel by pixel, so that predictions and heatmaps can be measured without any download.

Position, size, stripes, colours and background vary independently of each other, and both objects lie inside the
centre crop that a classification model sees (224/256 of the shorter side): nothing but the objects tells the rating.
"""

import csv
import io
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ais.errors import StorageError
from ais.storage import explain

RATING_AT_ZERO = 0.75
RATING_PER_DISC_SHARE = 32.0
RATING_PER_SECOND_SHARE = -10.0
RATING_NOISE_SD = 0.05
RATING_FORMULA = (
    f"score = {RATING_AT_ZERO} + {RATING_PER_DISC_SHARE} * disc_area_px / size^2 "
    f"- {-RATING_PER_SECOND_SHARE} * second_area_px / size^2 + normal(0, {RATING_NOISE_SD})"
)

_CROP_SHARE = 224 / 256
# Uniform radii between these give discs of 2.8% to 12.2% of size², 7.0% on average. The smallest is still as large as
# one of the 7×7 cells that a ResNet sees, without which pointing into it would be luck.
_RADIUS_SHARES = (0.095, 0.197)
# A square of the largest side fits into a corner of the crop whatever the disc: see _second_box.
_SECOND_SIDE_SHARES = (0.10, 0.22)
# Of ImageNet, and so about zero to a backbone: an untrained one, having no biases, answers little to it.
_MEAN_COLOUR = np.array([124.0, 116.0, 104.0])
_ASPECTS = ((1.0, 1.0), (1.25, 1.0), (1.0, 1.25))  # width, height in units of size


@dataclass(frozen=True)
class PlantedSpec:
    """What to plant.

    Image ``i`` depends on ``size``, ``seed``, ``second_share`` and ``i`` alone, never on ``count``.

    Args:
        count: number of images.
        size: shorter side of every image in pixels, at least 64; a third each are square, wide (5:4) and tall (4:5).
        seed: seed of every random choice.
        second_share: expected share of images with a second object, in [0, 1].

    Raises:
        ValueError: a value is out of range.
    """

    count: int = 300
    size: int = 256
    seed: int = 0
    second_share: float = 0.3

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f"count is {self.count}; plant at least 1 image")
        if self.size < 64:
            raise ValueError(f"size is {self.size} pixels; stripes need at least 64")
        if self.seed < 0:
            raise ValueError(f"seed is {self.seed}; it must not be negative")
        if not 0 <= self.second_share <= 1:
            raise ValueError(f"second_share is {self.second_share}; it is a share, from 0 to 1")


@dataclass(frozen=True)
class PlantedImage:
    """The truth about one image; all lengths in pixels, x to the right and y down from the top left corner."""

    name: str
    width: int
    height: int
    centre: tuple[float, float]
    radius: float
    disc_area_px: int
    second_box: tuple[int, int, int, int] | None  # left, top, right, bottom
    second_area_px: int
    score: float


@dataclass(frozen=True)
class PlantedSet:
    """A written set: its folder, what was asked for, and the truth about every image, in order."""

    directory: Path
    spec: PlantedSpec
    images: tuple[PlantedImage, ...]

    @property
    def images_directory(self) -> Path:
        """The folder that holds the images and nothing else."""
        return self.directory / "images"

    @property
    def ratings_path(self) -> Path:
        """CSV with the columns ``image`` (path relative to ``directory``) and ``score``."""
        return self.directory / "ratings.csv"


def make_planted(directory: str | Path, spec: PlantedSpec) -> PlantedSet:
    """Write a planted set; the same spec writes the same bytes.

    Writes ``images/planted-00000.png`` …, ``masks/`` (255 inside the disc, else 0), ``masks_second/`` (the same for the
    second object, only where there is one), ``ratings.csv`` and, last, ``planted.json`` (spec, rating formula, truth of
    every image).

    Raises:
        StorageError: the folder holds images or masks that are not of this set, such as those of a larger one, or
            cannot be written.
    """
    directory = Path(directory)
    planted = PlantedSet(directory, spec, tuple(_plan(spec, index) for index in range(spec.count)))
    _refuse_strangers(planted)
    with _writing(directory):
        _write_set(planted)
    return planted


@contextmanager
def _writing(directory: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"{str(directory)!r} cannot be written: {explain(error)}; check the address, its permissions and the space"
        ) from error


def _write_set(planted: PlantedSet) -> None:
    directory, spec = planted.directory, planted.spec
    for folder in ("images", "masks", "masks_second"):
        (directory / folder).mkdir(parents=True, exist_ok=True)
    for index, image in enumerate(planted.images):
        _write_png(directory / "images" / image.name, _paint(spec, index, image))
        _write_png(directory / "masks" / image.name, np.where(_disc_mask(image), 255, 0).astype(np.uint8))
        if image.second_box is not None:
            second = np.where(_second_mask(image), 255, 0).astype(np.uint8)
            _write_png(directory / "masks_second" / image.name, second)
    planted.ratings_path.write_text(_ratings_csv(planted))
    truth = {
        "spec": asdict(spec),
        "rating": RATING_FORMULA,
        "images": [asdict(image) for image in planted.images],
    }
    (directory / "planted.json").write_text(json.dumps(truth, indent=1) + "\n")


def load_mask(directory: str | Path, name: str) -> NDArray[np.bool_]:
    """Where the disc is: ``(H, W)`` bool, for the image called ``name`` (such as ``planted-00000.png``).

    Raises:
        FileNotFoundError: the set has no image of this name.
    """
    with Image.open(Path(directory) / "masks" / name) as mask:
        return np.asarray(mask) > 0


@dataclass(frozen=True)
class PlantedJudgments:
    """What a validation of a planted set works with; addresses of files beside ``ratings.csv``.

    Args:
        true: ratings with a ``split`` column.
        shuffled: the same, with the ratings of ``train`` and ``validation`` dealt out anew among their images.
        test: list of the test images, with a ``uri`` column.
        similarity: ``.npz`` of how alike the test images are by the area of their discs.
    """

    true: Path
    shuffled: Path
    test: Path
    similarity: Path


def write_judgments(planted: PlantedSet, test_share: float = 0.35, validation_share: float = 0.15) -> PlantedJudgments:
    """Write the ratings, true and shuffled, and the similarity judgments of a planted set.

    Shuffled ratings have the same distribution and say nothing about their images. The test images keep theirs, so that
    a head fitted to shuffled ratings is measured against the truth.
    """
    names = [f"images/{image.name}" for image in planted.images]
    scores = np.array([image.score for image in planted.images])
    rng = np.random.default_rng([planted.spec.seed, 4])
    order = rng.permutation(len(names))
    splits = np.full(len(names), "train", dtype=object)
    splits[order[: round(test_share * len(names))]] = "test"
    splits[order[len(names) - round(validation_share * len(names)) :]] = "validation"
    seen, test = np.flatnonzero(splits != "test"), np.flatnonzero(splits == "test")
    shuffled = scores.copy()
    shuffled[seen] = scores[rng.permutation(seen)]
    files = PlantedJudgments(
        *(planted.directory / name for name in ("true.csv", "shuffled.csv", "test.csv", "similarity.npz"))
    )
    for path, values in ((files.true, scores), (files.shuffled, shuffled)):
        _write_csv(path, ["image", "score", "split"], zip(names, values.tolist(), splits, strict=True))
    _write_csv(files.test, ["uri"], ([names[index]] for index in test))
    areas = np.array([image.disc_area_px for image in planted.images])[test] / planted.spec.size**2
    np.savez(files.similarity, similarity=-np.abs(areas[:, None] - areas), images=np.array([names[i] for i in test]))
    return files


def _write_csv(path: Path, header: list[str], rows: Iterable[Iterable[object]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)


def _plan(spec: PlantedSpec, index: int) -> PlantedImage:
    """Choose shape, objects and rating of image ``index``."""
    rng = np.random.default_rng([spec.seed, index, 0])
    width, height = (round(spec.size * share) for share in _ASPECTS[rng.integers(len(_ASPECTS))])
    crop = round(spec.size * _CROP_SHARE)
    left, top = (width - crop) // 2, (height - crop) // 2

    radius = spec.size * rng.uniform(*_RADIUS_SHARES)
    centre_x, centre_y = np.array([left, top]) + rng.uniform(radius, crop - radius, size=2)
    has_second = rng.random() < spec.second_share
    side = round(spec.size * rng.uniform(*_SECOND_SIDE_SHARES))
    second_box = None
    if has_second:
        second_box = _second_box(rng, (left, top), crop, side, (centre_x, centre_y), radius)

    xs, ys = _pixel_centres(width, height)
    disc_area_px = int(np.count_nonzero((xs - centre_x) ** 2 + (ys - centre_y) ** 2 <= radius**2))
    second_area_px = side**2 if has_second else 0
    score = (
        RATING_AT_ZERO
        + RATING_PER_DISC_SHARE * disc_area_px / spec.size**2
        + RATING_PER_SECOND_SHARE * second_area_px / spec.size**2
        + rng.normal(0, RATING_NOISE_SD)
    )
    return PlantedImage(
        name=f"planted-{index:05d}.png",
        width=width,
        height=height,
        centre=(float(centre_x), float(centre_y)),
        radius=float(radius),
        disc_area_px=disc_area_px,
        second_box=second_box,
        second_area_px=second_area_px,
        score=round(float(score), 4),
    )


def _second_box(
    rng: np.random.Generator,
    origin: tuple[int, int],
    crop: int,
    side: int,
    centre: tuple[float, float],
    radius: float,
) -> tuple[int, int, int, int]:
    """Place a square uniformly over all places of the crop where it does not touch the disc.

    There always is one: seen from the corner farthest from the disc, the nearest point of a disc of 0.197 sizes lies at
    least 0.875·√2/2 − 0.197 = 0.42 sizes away, more than the diagonal of the largest square, 0.31 sizes.
    """
    tops, lefts = np.mgrid[0 : crop - side + 1, 0 : crop - side + 1]
    lefts, tops = lefts + origin[0], tops + origin[1]
    away_x = centre[0] - np.clip(centre[0], lefts, lefts + side)
    away_y = centre[1] - np.clip(centre[1], tops, tops + side)
    free = np.flatnonzero(away_x**2 + away_y**2 > (radius + 1) ** 2)
    place = rng.choice(free)
    left, top = int(lefts.flat[place]), int(tops.flat[place])
    return left, top, left + side, top + side


def _paint(spec: PlantedSpec, index: int, image: PlantedImage) -> NDArray[np.uint8]:
    """``(H, W, 3)``: the image that the plan describes."""
    rng = np.random.default_rng([spec.seed, index, 1])
    canvas = _background(rng, image.width, image.height)
    canvas[_disc_mask(image)] = _stripes(rng, spec.size, image)[_disc_mask(image)]
    canvas[_second_mask(image)] = rng.choice([60, 180], size=3) + rng.uniform(-20, 20, size=3)
    canvas += rng.normal(0, 4, size=canvas.shape)
    return np.clip(np.rint(canvas), 0, 255).astype(np.uint8)


def _background(rng: np.random.Generator, width: int, height: int) -> NDArray[np.float64]:
    """``(H, W, 3)``: a smooth coloured gradient with faint blotches."""
    xs, ys = _pixel_centres(width, height)
    angle = rng.uniform(0, 2 * np.pi)
    ramp = (xs / width - 0.5) * np.cos(angle) + (ys / height - 0.5) * np.sin(angle)
    gradient = _MEAN_COLOUR + rng.uniform(-10, 10, size=3) + ramp[..., None] * rng.uniform(-20, 20, size=3)
    blotches = rng.normal(128, 6, size=(height // 16, width // 16, 3)).clip(0, 255).astype(np.uint8)
    smooth = Image.fromarray(blotches).resize((width, height), Image.Resampling.BICUBIC)
    return gradient + (np.asarray(smooth, dtype=np.float64) - 128)


def _stripes(rng: np.random.Generator, size: int, image: PlantedImage) -> NDArray[np.float64]:
    """``(H, W, 3)``: stripes between a dark and a bright colour, in a random direction."""
    xs, ys = _pixel_centres(image.width, image.height)
    angle, phase = rng.uniform(0, np.pi), rng.uniform(0, 2 * np.pi)
    period = size * rng.uniform(0.028, 0.036)
    wave = np.sin(2 * np.pi * (xs * np.cos(angle) + ys * np.sin(angle)) / period + phase)
    # A clipped steep sine is a square wave whose edges do not alias.
    share_bright = np.clip(0.5 + 1.5 * wave, 0, 1)[..., None]
    dark, bright = rng.uniform(0, 30, size=3), rng.uniform(225, 255, size=3)
    return dark + share_bright * (bright - dark)


def _disc_mask(image: PlantedImage) -> NDArray[np.bool_]:
    xs, ys = _pixel_centres(image.width, image.height)
    return (xs - image.centre[0]) ** 2 + (ys - image.centre[1]) ** 2 <= image.radius**2


def _second_mask(image: PlantedImage) -> NDArray[np.bool_]:
    mask = np.zeros((image.height, image.width), dtype=bool)
    if image.second_box is not None:
        left, top, right, bottom = image.second_box
        mask[top:bottom, left:right] = True
    return mask


def _pixel_centres(width: int, height: int) -> tuple[NDArray[np.floating], NDArray[np.floating]]:
    """x as ``(1, W)`` and y as ``(H, 1)``, in pixels."""
    return np.arange(width)[None, :] + 0.5, np.arange(height)[:, None] + 0.5


def _refuse_strangers(planted: PlantedSet) -> None:
    """A leftover image would be scored without a rating, a leftover mask be taken for the truth."""
    expected = set(_relative_paths(planted))
    found = {
        path.relative_to(planted.directory).as_posix()
        for folder in ("images", "masks", "masks_second")
        for path in (planted.directory / folder).glob("*")
    }
    if strangers := sorted(found - expected):
        raise StorageError(
            f"{planted.directory} holds {len(strangers)} files that are not of this set, such as {strangers[0]}; "
            "choose another folder or empty this one"
        )


def _relative_paths(planted: PlantedSet) -> Iterator[str]:
    for image in planted.images:
        yield f"images/{image.name}"
        yield f"masks/{image.name}"
        if image.second_box is not None:
            yield f"masks_second/{image.name}"


def _ratings_csv(planted: PlantedSet) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["image", "score"])
    writer.writerows([f"images/{image.name}", image.score] for image in planted.images)
    return text.getvalue()


def _write_png(path: Path, pixels: NDArray[np.uint8]) -> None:
    Image.fromarray(pixels).save(path, format="PNG", compress_level=3)

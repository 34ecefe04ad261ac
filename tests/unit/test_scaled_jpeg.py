"""JPEGs decoded no larger than they are needed, against the same decoded whole."""

import io

import numpy as np
import pytest
from PIL import ExifTags, Image

from ais.command_line import load_config
from ais.config import HeatmapsConfig, TrainConfig
from ais.decoding import Decoding
from ais.images import Geometry, Limits

GEOMETRY = Geometry(input_size=32, resize_size=36, interpolation="bilinear")
LETTERBOX = Geometry(input_size=32, resize_size=36, interpolation="bilinear", mode="letterbox")


def smooth(width: int, height: int) -> Image.Image:
    rows, columns = np.mgrid[0:height, 0:width]
    planes = [np.sin(rows / 40), np.cos(columns / 55), np.sin((rows + columns) / 70)]
    return Image.fromarray(np.rint(127.5 + 120 * np.stack(planes, 2)).astype(np.uint8))


def encoded(image: Image.Image, form: str = "JPEG", orientation: int = 1) -> bytes:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    file = io.BytesIO()
    image.save(file, form, exif=exif, **({"quality": 95} if form == "JPEG" else {}))
    return file.getvalue()


@pytest.mark.parametrize("geometry", [GEOMETRY, LETTERBOX])
@pytest.mark.parametrize("orientation", [1, 3, 6])
@pytest.mark.parametrize("size", [(640, 480), (481, 643), (301, 300), (30, 20)])
def test_shows_the_same_at_the_same_place(size: tuple[int, int], orientation: int, geometry: Geometry) -> None:
    data = encoded(smooth(*size), orientation=orientation)
    whole = Decoding(geometry, Limits(), max_side=64)(data, picture=True)
    scaled = Decoding(geometry, Limits(scaled_jpeg=True), max_side=64)(data, picture=True)
    assert (scaled.width, scaled.height) == (whole.width, whole.height)
    # A side that is no multiple of 8 ends within the last pixel of the scaled image, and its share of the square is
    # rounded elsewhere. Measured: 0.41 pixels of the square.
    input_pixel = (whole.box[2] - whole.box[0]) / geometry.input_size
    np.testing.assert_allclose(scaled.box, whole.box, atol=0.6 * input_pixel)
    # Measured: at most 18 levels, on average 4, where the box is shifted so; where it is not, 1 and 0.23.
    difference = np.abs(scaled.pixels.astype(int) - whole.pixels)
    assert difference.any() == (size != (30, 20)), "scaled, but for the image that is small already"
    assert difference.max() <= 32
    assert difference.mean() < 6
    assert whole.picture is not None
    assert scaled.picture is not None
    assert np.abs(np.subtract(scaled.picture.shape, whole.picture.shape)).max() <= 1


def test_what_is_decoded_is_small() -> None:
    """640×480 for 36 pixels of the shorter side: an eighth would leave 60, less than twice 36; a quarter leaves 120."""
    decoding = Decoding(GEOMETRY, Limits(scaled_jpeg=True), max_side=16)
    needed = decoding._needed(picture=False)(640, 480)
    assert needed == (96, 72)
    assert decoding._needed(picture=True)(640, 480) == needed
    image = Image.open(io.BytesIO(encoded(smooth(640, 480))))
    image.draft(None, (96, 72))
    assert image.size == (160, 120)


def test_other_formats_and_pictures_keep_their_size() -> None:
    png = encoded(smooth(640, 480), "PNG")
    plain, scaled = (Decoding(GEOMETRY, Limits(scaled_jpeg=flag))(png) for flag in (False, True))
    np.testing.assert_array_equal(scaled.pixels, plain.pixels)
    shown = Decoding(GEOMETRY, Limits(scaled_jpeg=True), max_side=512)(encoded(smooth(640, 480)), picture=True)
    assert shown.picture is not None
    assert shown.picture.shape == (384, 512, 3)


def test_bounds_are_those_of_the_whole_image() -> None:
    with pytest.raises(Exception, match="307200 pixels, the limit is 1000"):
        Decoding(GEOMETRY, Limits(max_pixels=1000, scaled_jpeg=True))(encoded(smooth(640, 480)))


def test_it_is_configured_with_the_limits() -> None:
    """Which are part of the identity of runs and trainings; the cache of embeddings keeps the two apart."""
    argv = ["images=i", "output=o", "head=h", "limits.scaled_jpeg=true"]
    assert load_config(HeatmapsConfig, argv, doc="").config.limits.scaled_jpeg
    argv = ["ratings.path=r.csv", "output=o", "backbone.name=vgg16", "limits.scaled_jpeg=true"]
    assert load_config(TrainConfig, argv, doc="").config.limits.scaled_jpeg

"""Decoding, limits and geometry, on real files of every allowed format. Nothing is faked."""

import dataclasses
import io
import struct
import subprocess
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torchvision.transforms import v2

from ais.errors import ImageError
from ais.images import (
    DecodeReason,
    Geometry,
    Limits,
    _center_crop_reference,
    as_rgb_array,
    decode_image,
)
from tests.zoo import (
    BLUE,
    HEIGHT,
    RED,
    WIDTH,
    ZOO_LIMITS,
    encode,
    exif,
    picture,
    png_of_size,
    stored_picture,
    write_zoo,
)

# pytest puts its own warning filters in place of those that the module sets; the test about them runs in a
# fresh interpreter.
pytestmark = pytest.mark.filterwarnings("ignore:::PIL")

PRESET = Geometry(input_size=224, resize_size=256, interpolation="bilinear")


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


LIMITS = Limits()


def outcome(data: bytes, limits: Limits = LIMITS) -> np.ndarray | ImageError:
    """Pixels or refusal; any other exception gets through and fails the test."""
    try:
        return decode_image(data, limits)
    except ImageError as error:
        return error


def refusal(data: bytes, limits: Limits = LIMITS) -> ImageError:
    error = outcome(data, limits)
    assert isinstance(error, ImageError)
    assert error.stage == "decode"
    assert error.reason in list(DecodeReason)
    assert error.detail
    return error


# --- decoding -----------------------------------------------------------------------------------------------


def test_every_animal_of_the_zoo_is_decoded_or_refused_as_expected(tmp_path: Path) -> None:
    cases = write_zoo(tmp_path)
    assert len({case.name for case in cases}) == len(cases) == len(list(tmp_path.iterdir()))
    elsewhere = {DecodeReason.CRASHED, DecodeReason.TOO_SLOW, DecodeReason.OUT_OF_MEMORY}  # test_decoding
    assert {case.expect for case in cases} == {"ok", *DecodeReason} - elsewhere
    for case in cases:
        data = case.path.read_bytes()
        if case.expect != "ok":
            error = refusal(data, ZOO_LIMITS)
            assert error.reason == case.expect, f"{case.name}: {error}"
            continue
        pixels = decode_image(data, ZOO_LIMITS)
        assert pixels.dtype == np.uint8
        assert pixels.shape == (case.size[1], case.size[0], 3), case.name
        if case.corner is not None:
            quarter = pixels[: max(1, case.size[1] // 2), : max(1, case.size[0] // 2)]
            np.testing.assert_allclose(quarter.mean((0, 1)), case.corner, atol=6, err_msg=case.name)


def test_decodes_the_zoo_the_same_in_many_threads(tmp_path: Path) -> None:
    files = [case.path.read_bytes() for case in write_zoo(tmp_path)]

    def summary(data: bytes) -> bytes | str:
        result = outcome(data, ZOO_LIMITS)
        return str(result) if isinstance(result, ImageError) else result.tobytes()

    with ThreadPoolExecutor(16) as pool:
        assert list(pool.map(summary, files * 2)) == [summary(data) for data in files] * 2


def test_decoding_writes_nothing_to_stderr(tmp_path: Path) -> None:
    write_zoo(tmp_path)
    # The one place where Pillow reports by logging: more samples per pixel than it knows.
    tiff = encode(Image.fromarray(picture()), "TIFF")
    samples = tiff.index(struct.pack("<HHL", 277, 3, 1)) + 8
    (tmp_path / "samples.tiff").write_bytes(tiff[:samples] + b"\xff\x7f" + tiff[samples + 2 :])
    script = """
import sys, pathlib
from ais.errors import ImageError
from ais.images import decode_image
for path in sorted(pathlib.Path(sys.argv[1]).iterdir()):
    try:
        decode_image(path.read_bytes())
    except ImageError as error:
        print(path.name, error.reason)
"""
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True)
    assert "large.png too many pixels" in done.stdout
    assert "samples.tiff corrupt" in done.stdout
    assert done.stderr == ""


def test_metadata_is_bounded_before_pixels_are_decoded() -> None:
    image = Image.fromarray(picture())
    files = {
        "profile": encode(image, "JPEG", icc_profile=bytes(50_000)),
        "EXIF": encode(image, "JPEG", exif=b"Exif\0\0" + bytes(50_000)),
        "comment": encode(image, "JPEG", comment=bytes(50_000)),
        "XMP": encode(image, "WEBP", xmp=bytes(50_000)),
        "profile of a PNG": encode(image, "PNG", icc_profile=np.random.default_rng(0).bytes(50_000)),
    }
    for name, data in files.items():
        decode_image(data, Limits(max_metadata_bytes=51_000))
        error = refusal(data, Limits(max_metadata_bytes=49_000))
        assert error.reason == "too much metadata", name
        assert "the limit is 49000" in error.detail


def test_empty_and_oversized_files_name_their_numbers() -> None:
    assert refusal(b"").reason == "empty file"
    data = encode(Image.fromarray(picture()), "PNG")
    decode_image(data, Limits(max_bytes=len(data)))
    error = refusal(data, Limits(max_bytes=len(data) - 1))
    assert error.reason == "too many bytes"
    assert error.detail == f"{len(data)} bytes, the limit is {len(data) - 1}"


def test_pixel_bound_is_inclusive_and_checked_before_decoding() -> None:
    data = encode(Image.fromarray(picture()), "PNG")
    decode_image(data, Limits(max_pixels=WIDTH * HEIGHT))
    error = refusal(data, Limits(max_pixels=WIDTH * HEIGHT - 1))
    assert (error.reason, error.detail) == ("too many pixels", "48 × 32 = 1536 pixels, the limit is 1535")
    # Decoding these would end in "truncated".
    assert refusal(png_of_size(9_500, 9_500)).detail == "9500 × 9500 = 90250000 pixels, the limit is 89478485"
    assert refusal(png_of_size(50_000, 50_000)).reason == "too many pixels"
    assert refusal(png_of_size(9_500, 9_500), Limits(max_pixels=10**8)).reason == "truncated"


@pytest.mark.parametrize(
    "bad", [{"max_bytes": 0}, {"max_pixels": 0}, {"max_pixels": 178_956_971}, {"max_metadata_bytes": 0}, {"seconds": 0}]
)
def test_impossible_limits_are_refused(bad: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=str(next(iter(bad.values())))):
        Limits(**bad)


def test_refused_formats_are_named() -> None:
    assert refusal(b"%PDF-1.7\n").detail.startswith("PDF; allowed are JPEG, PNG")
    assert refusal(b"\xef\xbb\xbf <svg/>").detail.startswith("SVG")
    assert refusal(b"%!PS-Adobe-3.0 EPSF-3.0\n").detail.startswith("PostScript")
    assert refusal(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic").detail.startswith("HEIF")
    assert refusal(encode(Image.fromarray(picture()), "JPEG2000")).detail.startswith("JPEG 2000")
    assert refusal(b"<!doctype html><p>404").detail == "21 bytes that begin with b'<!doctype html><'"


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(image_format: str, orientation: int) -> None:
    lossless = {"quality": 95} if image_format in ("JPEG", "AVIF") else {"lossless": True}
    stored = stored_picture(orientation)
    data = encode(stored, image_format, exif=exif(orientation), **lossless)
    turned = stored if orientation < 5 else stored.transpose(Image.Transpose.TRANSPOSE)
    assert turned.size == (WIDTH, HEIGHT)
    # The edge of the red quarter smears under chroma subsampling: compare away from it.
    pixels = decode_image(data).astype(int)
    assert pixels.shape == (HEIGHT, WIDTH, 3)
    difference = np.abs(pixels - picture())
    inside = np.r_[0:12, 20:HEIGHT], np.r_[0:20, 28:WIDTH]
    assert difference[np.ix_(*inside)].max() <= (0 if image_format in ("PNG", "WEBP", "TIFF") else 6)


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_an_orientation_that_does_not_exist_is_ignored(orientation: int) -> None:
    data = encode(Image.fromarray(picture()), "PNG", exif=exif(orientation))
    np.testing.assert_array_equal(decode_image(data), picture())


@pytest.mark.parametrize(
    "malformed", [b"Exif\0\0", b"Exif\0\0II*\0", b"Exif\0\0MM\0*\xff\xff\xff\xff", b"Exif\0\0garbage" * 9]
)
@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP"])
def test_malformed_exif_is_ignored(image_format: str, malformed: bytes) -> None:
    data = encode(Image.fromarray(picture()), image_format, exif=malformed)
    pixels = decode_image(data)
    np.testing.assert_allclose(pixels[: HEIGHT // 2 - 8, : WIDTH // 2 - 8].mean((0, 1)), RED, atol=6)


def png(bits: int, colour_type: int, rows: list[bytes], transparency: bytes = b"", width: int = 2) -> bytes:
    """PNG written by hand, for the kinds that Pillow reads and does not write."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    body = chunk(b"IHDR", struct.pack(">IIBBBBB", width, len(rows), bits, colour_type, 0, 0, 0))
    if transparency:
        body += chunk(b"tRNS", transparency)
    body += chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows))) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def tiff(bits: int, photometric: int, width: int, data: bytes, sample_format: int = 1) -> bytes:
    """Little-endian TIFF of one row, written by hand likewise."""
    long, short = 4, 3
    tags = [
        (256, long, width),
        (257, long, 1),
        (258, short, bits),
        (259, short, 1),
        (262, short, photometric),
    ]
    tags += [
        (273, long, 8),
        (277, short, 1),
        (278, long, 1),
        (279, long, len(data)),
        (339, short, sample_format),
    ]
    entries = b"".join(struct.pack("<HHLL", tag, kind, 1, value) for tag, kind, value in tags)
    directory = struct.pack("<H", len(tags)) + entries + struct.pack("<L", 0)
    return b"II*\0" + struct.pack("<L", 8 + len(data)) + data + directory


# round(v / 257): 128 is the last that rounds down to 0, 129 the first that rounds up to 1.
SAMPLES_16 = [0, 128, 129, 257, 25700, 65406, 65407, 65535]
LEVELS_16 = [0, 0, 1, 1, 100, 254, 255, 255]


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(encode(Image.fromarray(np.array([SAMPLES_16], np.uint16)), "PNG"), id="png"),
        pytest.param(encode(Image.fromarray(np.array([SAMPLES_16], np.uint16)), "PPM"), id="pgm"),
        pytest.param(encode(Image.fromarray(np.array([SAMPLES_16], np.uint16)), "TIFF"), id="tiff"),
        pytest.param(encode(Image.fromarray(np.array([SAMPLES_16], ">u2")), "TIFF"), id="big-endian tiff"),
        pytest.param(b"P2 8 1 65535 " + " ".join(map(str, SAMPLES_16)).encode(), id="plain pgm"),
        pytest.param(tiff(16, 1, 8, struct.pack("<8H", *SAMPLES_16)), id="hand-made tiff"),
        pytest.param(tiff(16, 0, 8, struct.pack("<8H", *(65535 - v for v in SAMPLES_16))), id="white is 0"),
    ],
)
def test_16_bit_samples_are_scaled_and_rounded(data: bytes) -> None:
    pixels = decode_image(data)
    assert pixels.shape == (1, 8, 3)
    for channel in range(3):
        assert pixels[0, :, channel].tolist() == LEVELS_16


def test_12_bit_tiff_reaches_white() -> None:
    two_samples = bytes([0xFF, 0xF8, 0x00])  # 4095, 2048
    assert decode_image(tiff(12, 1, 2, two_samples))[0, :, 0].tolist() == [255, 128]


def test_32_bit_samples_have_no_white() -> None:
    integers = encode(Image.fromarray(np.array([[1, 2**20]], np.int32)), "TIFF")
    floats = encode(Image.fromarray(np.array([[0.0, 1.0]], np.float32)), "TIFF")
    signed = tiff(16, 1, 2, struct.pack("<2h", -5, 100), sample_format=2)
    for data in (integers, floats, signed, b"Pf 1 1 -1.0\n" + struct.pack("<f", 0.5)):
        error = refusal(data)
        assert error.reason == "unsupported pixel format"
        assert "no defined white" in error.detail


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        pytest.param(png(8, 6, [bytes([200, 30, 40, 255, 200, 30, 40, 51])]), [RED, (244, 210, 212)], id="rgba"),
        pytest.param(png(8, 4, [bytes([100, 255, 100, 51])]), [(100,) * 3, (224,) * 3], id="grey, alpha"),
        pytest.param(png(16, 4, [bytes([100, 0, 255, 255, 7, 0, 0, 0])]), [(100,) * 3, (255,) * 3], id="16 bit LA"),
        pytest.param(png(8, 0, [bytes([7, 9])], b"\0\x09"), [(7,) * 3, (255,) * 3], id="transparent grey"),
        pytest.param(
            png(16, 0, [struct.pack(">2H", 25700, 999)], struct.pack(">H", 999)),
            [(100,) * 3, (255,) * 3],
            id="transparent 16-bit grey",
        ),
        pytest.param(
            png(8, 2, [bytes([*RED, *BLUE])], bytes([0, 20, 0, 60, 0, 180])),
            [RED, (255,) * 3],
            id="transparent colour",
        ),
    ],
)
def test_alpha_is_composited_on_white(data: bytes, expected: list[tuple[int, ...]]) -> None:
    assert [tuple(pixel) for pixel in decode_image(data)[0].tolist()] == expected


def test_cmyk_jpeg_of_adobe_is_not_inverted() -> None:
    cyan = encode(Image.new("CMYK", (16, 16), (255, 0, 0, 0)), "JPEG", quality=95)
    assert b"Adobe" in cyan[:64]
    np.testing.assert_allclose(decode_image(cyan).mean((0, 1)), (0, 255, 255), atol=2)


def test_a_name_is_not_needed_and_buffers_will_do() -> None:
    data = encode(Image.fromarray(picture()), "PNG")
    for buffer in (bytearray(data), memoryview(data)):
        np.testing.assert_array_equal(decode_image(buffer), picture())


FUZZED = {
    "jpeg": encode(Image.fromarray(noise(24, 40)), "JPEG", exif=exif(6)),
    "progressive jpeg": encode(Image.fromarray(noise(24, 40)), "JPEG", progressive=True),
    "cmyk jpeg": encode(Image.fromarray(noise(24, 40)).convert("CMYK"), "JPEG"),
    "mpo": encode(Image.fromarray(noise(24, 40)), "MPO", save_all=True, append_images=[Image.new("RGB", (40, 24))]),
    "png": encode(Image.fromarray(noise(24, 40)), "PNG", exif=exif(5)),
    "palette png": encode(Image.fromarray(noise(24, 40)).convert("P"), "PNG", transparency=3),
    "webp": encode(Image.fromarray(noise(24, 40)), "WEBP", exif=exif(8)),
    "gif": encode(Image.fromarray(noise(24, 40)), "GIF", save_all=True, append_images=[Image.new("RGB", (40, 24))]),
    "bmp": encode(Image.fromarray(noise(24, 40)), "BMP"),
    "tiff": encode(Image.fromarray(noise(24, 40)), "TIFF"),
    "lzw tiff": encode(Image.fromarray(noise(24, 40)), "TIFF", compression="tiff_lzw"),
    "ppm": encode(Image.fromarray(noise(24, 40)), "PPM"),
    "plain ppm": b"P3 2 1 255 1 2 3 4 5 6",
    "avif": encode(Image.fromarray(noise(24, 40)), "AVIF", exif=exif(3)),
}


@pytest.mark.parametrize("kind", FUZZED)
def test_damaged_files_are_decoded_or_refused_and_never_raise_anything_else(kind: str) -> None:
    rng = np.random.default_rng(zlib.crc32(kind.encode()))
    limits = Limits(max_pixels=2**20)  # a damaged header must not make the test decode a gigabyte
    original = np.frombuffer(FUZZED[kind], dtype=np.uint8)
    assert decode_image(FUZZED[kind]).shape[2] == 3
    refusals = []
    for trial in range(80):
        damaged = original.copy()
        # Headers are where parsers are fragile: half of the trials damage only them.
        reach = len(damaged) if trial % 2 else min(len(damaged), 200)
        where = rng.integers(0, reach, int(rng.choice([1, 3, 20])))
        damaged[where] ^= rng.integers(1, 256, len(where)).astype(np.uint8)
        if trial % 4 == 0:
            damaged = damaged[: rng.integers(0, len(damaged))]
        result = outcome(damaged.tobytes(), limits)
        if isinstance(result, ImageError):
            refusals.append(result)
        else:
            assert result.dtype == np.uint8
            assert result.ndim == 3
            assert 0 < result.size <= 3 * limits.max_pixels
    assert len(refusals) >= 10
    for error in refusals:
        assert error.stage == "decode"
        assert error.reason in list(DecodeReason)
        assert error.detail
        assert " at 0x" not in error.detail  # the same file gives the same row in every run


def test_random_bytes_behind_every_signature() -> None:
    rng = np.random.default_rng(3)
    starts = [data[:n] for data in FUZZED.values() for n in (4, 12, 16)] + [b"", b"P5 999 999 65535\n", b"BM"]
    reasons = [
        refusal(start + rng.integers(0, 256, 200, dtype=np.uint8).tobytes(), Limits(max_pixels=2**20)).reason
        for start in starts
    ]
    assert set(reasons) <= set(DecodeReason)
    assert "corrupt" in reasons


# --- images in memory ---------------------------------------------------------------------------------------


def test_arrays_pass_or_are_brought_to_rgb() -> None:
    rgb = picture()
    assert as_rgb_array(rgb) is rgb
    grey = as_rgb_array(rgb[:, :, 0])
    assert grey.shape == (HEIGHT, WIDTH, 3)
    np.testing.assert_array_equal(grey[:, :, 1], rgb[:, :, 0])
    rgba = np.dstack([rgb, np.zeros((HEIGHT, WIDTH), np.uint8)])
    np.testing.assert_array_equal(as_rgb_array(rgba), np.full_like(rgb, 255))


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((4, 5, 3), np.float32),
        np.zeros((4, 5, 3), np.int64),
        np.zeros((3, 4, 5), np.uint8),
        np.zeros((1, 4, 5, 3), np.uint8),
        np.zeros((4, 5, 2), np.uint8),
        np.zeros((0, 5, 3), np.uint8),
        np.zeros(5, np.uint8),
    ],
    ids=lambda array: f"{array.shape}-{array.dtype}",
)
def test_other_arrays_are_refused_by_shape_and_dtype(array: np.ndarray) -> None:
    with pytest.raises(ValueError, match="an image is uint8") as caught:
        as_rgb_array(array)
    assert f"shape {array.shape} and dtype {array.dtype}" in str(caught.value)


def test_pil_images_equal_their_files() -> None:
    data = encode(stored_picture(6), "PNG", exif=exif(6))
    np.testing.assert_array_equal(as_rgb_array(Image.open(io.BytesIO(data))), picture())
    np.testing.assert_array_equal(as_rgb_array(Image.fromarray(picture())), picture())


@pytest.mark.parametrize("mode", ["1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr"])
def test_every_mode_of_white_is_white(mode: str) -> None:
    white = Image.new("RGB", (3, 2), "white")
    if mode in ("La", "RGBa"):
        white = white.convert({"La": "LA", "RGBa": "RGBA"}[mode])
    pixels = as_rgb_array(white.convert(mode))
    np.testing.assert_array_equal(pixels, np.full((2, 3, 3), 255, np.uint8))


def test_half_transparent_premultiplied_grey() -> None:
    premultiplied = Image.new("LA", (1, 1), (100, 51)).convert("La")
    np.testing.assert_allclose(as_rgb_array(premultiplied), 224, atol=1)  # 100 × 0.2 + 255 × 0.8


@pytest.mark.parametrize(("mode", "tolerance"), [("HSV", 3), ("LAB", 7)])
def test_other_colour_spaces_are_converted(mode: str, tolerance: int) -> None:
    # Both have 8 bits per channel, so the way there and back loses a little; an untouched or clipped channel
    # would be off by tens.
    difference = as_rgb_array(Image.fromarray(picture()).convert(mode)).astype(int) - picture()
    assert np.abs(difference).max() <= tolerance


@pytest.mark.parametrize("mode", ["I;16", "I;16L", "I;16B"])
def test_16_bit_modes_in_memory(mode: str) -> None:
    samples = np.array([SAMPLES_16], dtype=">u2" if mode == "I;16B" else "<u2")
    image = Image.frombytes(mode, (8, 1), samples.tobytes())
    assert as_rgb_array(image)[0, :, 2].tolist() == LEVELS_16


@pytest.mark.parametrize("mode", ["I", "F"])
def test_32_bit_modes_in_memory_are_refused(mode: str) -> None:
    with pytest.raises(ImageError, match="unsupported pixel format") as caught:
        as_rgb_array(Image.new(mode, (2, 2)))
    assert caught.value.reason == "unsupported pixel format"


def test_lazily_opened_file_that_is_broken() -> None:
    image = Image.open(io.BytesIO(encode(Image.fromarray(noise(20, 20)), "JPEG")[:-300]))
    with pytest.raises(ImageError, match="truncated"):
        as_rgb_array(image)


# --- geometry -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize(
    ("width", "height"),
    # The longer side of the resized image is a whole, even number for each of these.
    [(512, 512), (640, 512), (768, 1152), (256, 256), (320, 256), (128, 160), (1000, 500), (300, 900)],
)
def test_center_crop_equals_torchvision_where_sizes_are_whole(width: int, height: int, interpolation: str) -> None:
    """Bit-equal to resize-then-crop: measured difference 0 levels for every size here."""
    geometry = dataclasses.replace(PRESET, interpolation=interpolation)
    image = noise(height, width)
    pixels, _ = geometry.apply(image)
    transform = v2.Compose([v2.Resize(256, v2.InterpolationMode(interpolation), antialias=True), v2.CenterCrop(224)])
    expected = np.asarray(transform(Image.fromarray(image)))
    np.testing.assert_array_equal(_center_crop_reference(image, geometry), expected)
    np.testing.assert_array_equal(pixels, expected)


@pytest.mark.parametrize(("width", "height"), [(500, 375), (375, 500), (1023, 767), (225, 401), (3000, 701), (30, 41)])
def test_center_crop_is_shifted_by_less_than_a_pixel_from_torchvision_elsewhere(width: int, height: int) -> None:
    """torchvision rounds the longer side down and the margins to whole pixels.

    So its crop is off the middle by half an input pixel where a margin is odd, and stretched by less than one
    over the whole longer side. Measured over these sizes: a mean shift of 0.50 input pixels, at most 1 level.
    """
    pixel = min(width, height) / 256  # of the input, in pixels of the image
    columns = np.clip((np.arange(width) + 0.5 - width / 2) / pixel + 128, 0, 255)
    rows = np.clip((np.arange(height) + 0.5 - height / 2) / pixel + 128, 0, 255)
    # One level per input pixel along each axis: the difference of two levels is the shift.
    ramp = np.zeros((height, width, 3), np.uint8)
    ramp[:, :, 0] = np.round(columns)
    ramp[:, :, 1] = np.round(rows)[:, None]
    pixels, _ = PRESET.apply(ramp)
    difference = np.abs(pixels.astype(float) - _center_crop_reference(ramp, PRESET))
    assert difference.mean((0, 1)).max() <= 0.51
    assert difference.max() <= 1


def test_center_crop_box_is_the_central_square_unrounded() -> None:
    def box(width: int, height: int) -> list[float]:
        return PRESET.apply(np.zeros((height, width, 3), np.uint8))[1].tolist()

    assert box(256, 256) == [16, 16, 240, 240]
    assert box(640, 512) == [96, 32, 544, 480]
    assert box(512, 640) == [32, 96, 480, 544]
    assert box(375, 501) == [23.4375, 86.4375, 351.5625, 414.5625]
    assert box(1, 1) == [0.0625, 0.0625, 0.9375, 0.9375]
    assert box(1, 5000) == [0.0625, 2499.5625, 0.9375, 2500.4375]
    whole = Geometry(input_size=300, resize_size=300, interpolation="bicubic")
    assert whole.apply(noise(200, 301))[1].tolist() == [50.5, 0, 250.5, 200]


@pytest.mark.parametrize("mode", ["center_crop", "letterbox"])
@pytest.mark.parametrize(("width", "height"), [(1, 1), (1, 5000), (5000, 1), (2, 3), (224, 224), (900, 611)])
def test_apply_gives_a_writable_square_and_a_float32_box(width: int, height: int, mode: str) -> None:
    image = np.full((height, width, 3), RED, np.uint8)
    image.setflags(write=False)
    pixels, box = dataclasses.replace(PRESET, mode=mode, pad_rgb=RED).apply(image)
    assert (pixels.shape, pixels.dtype, box.shape, box.dtype) == ((224, 224, 3), np.uint8, (4,), np.float32)
    assert pixels.flags.writeable
    np.testing.assert_array_equal(pixels, np.broadcast_to(np.uint8(RED), pixels.shape))
    assert (box[2:] > box[:2]).all()
    # The centre of the input is the centre of the image, to half an input pixel.
    centre, step = (box[:2] + box[2:]) / 2, (box[2:] - box[:2]) / 224
    assert (np.abs(centre - (width / 2, height / 2)) <= step / 2 + 1e-3).all()


@pytest.mark.parametrize("mode", ["center_crop", "letterbox"])
@pytest.mark.parametrize(("width", "height"), [(700, 467), (467, 700), (90, 50), (640, 512), (333, 334)])
def test_the_box_says_where_each_input_pixel_came_from(width: int, height: int, mode: str) -> None:
    """A ramp over the image holds its own coordinates: reading them through the box must give them back."""
    ramp = np.zeros((height, width, 3), np.uint8)
    ramp[:, :, 0] = np.round(np.arange(width) * 255 / width)
    ramp[:, :, 1] = np.round(np.arange(height) * 255 / height)[:, None]
    pixels, (left, top, right, bottom) = dataclasses.replace(PRESET, mode=mode).apply(ramp)
    centres = (np.arange(224) + 0.5) / 224
    x, y = left + centres * (right - left) - 0.5, top + centres * (bottom - top) - 0.5
    # Away from the border, where the filter has nothing to read on one side.
    inside_x = (x > 0.03 * width + 2) & (x < 0.97 * width - 2)
    inside_y = (y > 0.03 * height + 2) & (y < 0.97 * height - 2)
    assert inside_x.sum() > 100
    assert inside_y.sum() > 100
    seen = pixels[np.ix_(inside_y, inside_x)].astype(float)
    # One level for the rounding of the ramp and of the result; half a pixel of shift would be 2.5 on 50 rows.
    assert np.abs(seen[:, :, 0] - x[inside_x] * 255 / width).max() <= 1
    assert np.abs(seen[:, :, 1] - y[inside_y][:, None] * 255 / height).max() <= 1


def test_letterbox_pads_beside_a_tall_image() -> None:
    geometry = Geometry(8, 8, "bilinear", "letterbox", pad_rgb=(1, 2, 3))
    pixels, box = geometry.apply(np.full((400, 200, 3), 200, np.uint8))
    assert box.tolist() == [-100, 0, 300, 400]
    padded = np.broadcast_to(np.uint8([1, 2, 3]), (8, 2, 3))
    np.testing.assert_array_equal(pixels[:, :2], padded)
    np.testing.assert_array_equal(pixels[:, 6:], padded)
    np.testing.assert_array_equal(pixels[:, 2:6], 200)


def test_letterbox_honours_rounded_sizes_and_uneven_padding() -> None:
    geometry = Geometry(10, 10, "bicubic", "letterbox", pad_rgb=(0, 0, 0))
    # 300 × 100 becomes 10 × round(3.33) = 3: 3 rows of padding above, 4 below, 100/3 of the original each.
    pixels, box = geometry.apply(np.full((100, 300, 3), 200, np.uint8))
    np.testing.assert_allclose(box, [0, -100, 300, 100 + 400 / 3], rtol=1e-6)
    assert pixels[:, 5, 0].tolist() == [0, 0, 0, 200, 200, 200, 0, 0, 0, 0]
    # 1 × 5000 keeps one column.
    pixels, box = geometry.apply(np.full((5000, 1, 3), 200, np.uint8))
    assert box.tolist() == [-4, 0, 6, 5000]
    assert pixels[0, :, 0].tolist() == [0, 0, 0, 0, 200, 0, 0, 0, 0, 0]


def test_letterbox_content_is_pillows_resize() -> None:
    geometry = Geometry(224, 224, "bicubic", "letterbox")
    image = noise(300, 448)
    pixels, box = geometry.apply(image)
    assert box.tolist() == [0, -74, 448, 374]
    expected = np.asarray(Image.fromarray(image).resize((224, 150), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(pixels[37:187], expected)
    assert pixels[0, 0].tolist() == [124, 116, 104]


def test_fingerprint_tells_everything_that_changes_pixels() -> None:
    assert PRESET.fingerprint == "center_crop-224-of-256-bilinear"
    letterbox = dataclasses.replace(PRESET, mode="letterbox")
    assert letterbox.fingerprint == "letterbox-224-bilinear-pad-7c7468"
    variants = [
        PRESET,
        letterbox,
        dataclasses.replace(PRESET, input_size=200),
        dataclasses.replace(PRESET, resize_size=232),
        dataclasses.replace(PRESET, interpolation="bicubic"),
        dataclasses.replace(letterbox, pad_rgb=(0, 0, 0)),
        dataclasses.replace(letterbox, interpolation="bicubic"),
    ]
    assert len({geometry.fingerprint for geometry in variants}) == len(variants)
    # What does not change pixels does not change the identity.
    assert dataclasses.replace(PRESET, pad_rgb=(0, 0, 0)).fingerprint == PRESET.fingerprint
    assert dataclasses.replace(letterbox, resize_size=300).fingerprint == letterbox.fingerprint


@pytest.mark.parametrize(
    ("bad", "named"),
    [
        ({"input_size": 0}, "input_size is 0"),
        ({"input_size": 257}, "input_size is 257 and resize_size 256"),
        ({"interpolation": "nearest"}, "'nearest': must be one of"),
        ({"mode": "stretch"}, "mode is 'stretch'"),
        ({"pad_rgb": (0, 0, 256)}, r"pad_rgb is \(0, 0, 256\)"),
        ({"pad_rgb": (0, 0)}, r"pad_rgb is \(0, 0\)"),
    ],
)
def test_impossible_geometry_is_refused(bad: dict[str, object], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        dataclasses.replace(PRESET, **bad)

"""A zoo of odd and bad image files: what real collections hold, each with what must become of it.

The unit tests decode it, the tests of the jobs run over it. Files that vanish or cannot be opened are not
in it: those are matters of storage.
"""

import io
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import ExifTags, Image

from ais.images import DecodeReason, Limits

ZOO_LIMITS = Limits(max_bytes=2**20)
"""Limits to decode the zoo under: one file is over a mebibyte, all others are far below."""

WIDTH, HEIGHT = 48, 32
RED, BLUE, WHITE = (200, 30, 40), (20, 60, 180), (255, 255, 255)

_UPRIGHT_TO_STORED = {
    1: lambda picture: picture,
    2: lambda picture: picture[:, ::-1],
    3: lambda picture: picture[::-1, ::-1],
    4: lambda picture: picture[::-1],
    5: lambda picture: picture.transpose(1, 0, 2),
    6: lambda picture: np.rot90(picture, 1),
    7: lambda picture: picture.transpose(1, 0, 2)[::-1, ::-1],
    8: lambda picture: np.rot90(picture, -1),
}


@dataclass(frozen=True)
class ZooCase:
    """One file of the zoo.

    Args:
        name: unique, readable in a test's id.
        path: of the file.
        expect: ``"ok"`` or the reason of the refusal.
        size: (width, height) after EXIF orientation, None where refused.
        corner: mean RGB of the top left quarter after decoding, to 6 levels; None where refused or undefined.
        note: why the file is here.
    """

    name: str
    path: Path
    expect: Literal["ok"] | DecodeReason
    size: tuple[int, int] | None
    corner: tuple[int, int, int] | None
    note: str


def picture() -> np.ndarray:
    """Upright picture, (HEIGHT, WIDTH, 3) uint8: blue, top left quarter red, so that every turn shows."""
    pixels = np.empty((HEIGHT, WIDTH, 3), dtype=np.uint8)
    pixels[:] = BLUE
    pixels[: HEIGHT // 2, : WIDTH // 2] = RED
    return pixels


def stored_picture(orientation: int) -> Image.Image:
    """The picture as a camera stores it that writes this EXIF orientation, 1 to 8."""
    return Image.fromarray(np.ascontiguousarray(_UPRIGHT_TO_STORED[orientation](picture())))


def encode(image: Image.Image, image_format: str, **options: Any) -> bytes:
    """Bytes of the image in a format of Pillow, with options of ``Image.save``."""
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def exif(orientation: int) -> Image.Exif:
    """EXIF with nothing but this orientation."""
    tags = Image.Exif()
    tags[ExifTags.Base.Orientation] = orientation
    return tags


def png_chunk(kind: bytes, body: bytes) -> bytes:
    """One chunk of a PNG."""
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png_of_size(width: int, height: int) -> bytes:
    """PNG of a few bytes that declares this size and holds no more than a row."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = png_chunk(b"IHDR", header) + png_chunk(b"IDAT", zlib.compress(bytes(100))) + png_chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def png_with(chunk: bytes) -> bytes:
    """The picture as a PNG, with one chunk more after its header."""
    plain = encode(Image.fromarray(picture()), "PNG")
    after_header = 8 + 25
    return plain[:after_header] + chunk + plain[after_header:]


def gif_of_frames(count: int) -> bytes:
    """GIF whose first frame is red, followed by so many blue ones of one pixel."""
    start = encode(Image.new("RGB", (WIDTH, HEIGHT), RED), "GIF").removesuffix(b";")
    frame = b"\x2c" + struct.pack("<HHHHB", 0, 0, 1, 1, 0x80) + bytes((*BLUE, 0, 0, 0)) + b"\x02\x02\x44\x01\x00"
    return start + frame * count + b";"


DEADLY = {
    "segfault": DecodeReason.CRASHED,
    "abort": DecodeReason.CRASHED,
    "exit": DecodeReason.CRASHED,
    "killed": DecodeReason.OUT_OF_MEMORY,
    "memory": DecodeReason.OUT_OF_MEMORY,
    "spin": DecodeReason.TOO_SLOW,
    "sleep": DecodeReason.TOO_SLOW,
}
"""Ways in which an image ends its decoder, under `HOSTILE_PATH`, and what must become of it."""

HOSTILE_PATH = str(Path(__file__).parent / "hostile")
"""On ``PYTHONPATH``, makes decoding processes do what `deadly` images say; see the module there for what is faked."""


def deadly(way: str) -> bytes:
    """An image, good elsewhere, that ends its decoder in a way of `DEADLY`."""
    return b"P6 # " + way.encode() + b"\n48 32 255\n" + picture().tobytes()


def write_zoo(directory: Path) -> list[ZooCase]:
    """Write every file of the zoo into a directory, which is made if missing.

    Returns:
        One case per file, always the same ones and the same bytes.
    """
    directory.mkdir(parents=True, exist_ok=True)
    cases: list[ZooCase] = []

    def add(
        file_name: str,
        data: bytes,
        expect: Literal["ok"] | DecodeReason,
        note: str,
        size: tuple[int, int] | None = None,
        corner: tuple[int, int, int] | None = None,
    ) -> None:
        path = directory / file_name
        path.write_bytes(data)
        name = file_name.replace("\n", "\\n")
        cases.append(ZooCase(name, path, expect, size, corner, note))

    def good(file_name: str, data: bytes, note: str, corner: tuple[int, int, int] | None = RED) -> None:
        add(file_name, data, "ok", note, (WIDTH, HEIGHT), corner)

    _write_formats_and_modes(good)
    _write_frames_and_orientations(good)
    _write_names(good)

    add("1x1.png", encode(Image.new("RGB", (1, 1), RED), "PNG"), "ok", "one pixel", (1, 1), RED)
    add("tall.png", encode(Image.new("RGB", (1, 5000), RED), "PNG"), "ok", "1 × 5000", (1, 5000), RED)

    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8))
    for image_format in ("JPEG", "PNG", "WEBP", "GIF", "BMP"):
        data = encode(noise, image_format)
        name = f"truncated.{image_format.lower()}"
        add(name, data[: len(data) // 2], DecodeReason.TRUNCATED, "half of the file")
    png = bytearray(encode(noise, "PNG"))
    middle = len(png) // 2
    png[middle : middle + 16] = bytes(16)
    add("corrupt_middle.png", bytes(png), DecodeReason.CORRUPT, "zeros in the middle of the pixels")
    add("first_marker.jpg", encode(noise, "JPEG")[:4], DecodeReason.CORRUPT, "4 bytes: too few to tell why")

    add("empty.jpg", b"", DecodeReason.EMPTY_FILE, "an upload that failed")
    add("text.jpg", b"This is not an image.\n", DecodeReason.NOT_AN_IMAGE, "plain text")
    page = b"<!DOCTYPE html>\n<html><head><title>404 Not Found</title></head><body>404</body></html>\n"
    add("error_page.jpg", page, DecodeReason.NOT_AN_IMAGE, "what a server answered instead of the image")
    random_bytes = np.random.default_rng(1).integers(0, 256, 4096, dtype=np.uint8).tobytes()
    add("random.png", random_bytes, DecodeReason.NOT_AN_IMAGE, "noise that begins like no format")

    svg = b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>\n'
    add("vector.svg", svg, DecodeReason.FORMAT_NOT_ALLOWED, "vector graphics")
    add("vector.eps", encode(noise, "EPS"), DecodeReason.FORMAT_NOT_ALLOWED, "would start Ghostscript")
    add("document.pdf", encode(noise, "PDF"), DecodeReason.FORMAT_NOT_ALLOWED, "a document")
    add("icon.ico", encode(noise, "ICO", sizes=[(32, 32)]), DecodeReason.FORMAT_NOT_ALLOWED, "an icon")
    heic = struct.pack(">I", 24) + b"ftypheic\0\0\0\0mif1heic" + bytes(64)
    add("phone.heic", heic, DecodeReason.FORMAT_NOT_ALLOWED, "the start of a HEIC file")

    floats = Image.fromarray(np.full((HEIGHT, WIDTH), 0.5, dtype=np.float32))
    add("float32.tiff", encode(floats, "TIFF"), DecodeReason.UNSUPPORTED_PIXEL_FORMAT, "no defined white")

    text_bomb = png_chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(2**26), 9))
    add("text_bomb.png", png_with(text_bomb), DecodeReason.TOO_MUCH_METADATA, "64 MiB of text in 64 KiB")
    profile_bomb = png_chunk(b"iCCP", b"icc\0\0" + zlib.compress(bytes(2**26), 9))
    add("profile_bomb.png", png_with(profile_bomb), DecodeReason.TOO_MUCH_METADATA, "a profile of 64 MiB in 64 KiB")
    frames = gif_of_frames(20_000)
    add("frame_bomb.gif", frames, "ok", "20,000 frames: only the first is read", (WIDTH, HEIGHT), RED)

    add("bomb.png", png_of_size(50_000, 50_000), DecodeReason.TOO_MANY_PIXELS, "beyond what Pillow reads")
    add("large.png", png_of_size(10_000, 10_000), DecodeReason.TOO_MANY_PIXELS, "where Pillow only warns")
    heavy = encode(Image.fromarray(np.random.default_rng(2).integers(0, 256, (640, 640, 3), np.uint8)), "BMP")
    add("heavy.bmp", heavy, DecodeReason.TOO_MANY_BYTES, "over a mebibyte")
    return cases


def _write_formats_and_modes(good: Callable[..., None]) -> None:
    red_and_blue = Image.fromarray(picture())
    for image_format in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF"):
        data = encode(red_and_blue, image_format)
        good(f"plain.{image_format.lower()}", data, "an allowed format")
    good("png_named.jpg", encode(red_and_blue, "PNG"), "the content decides, not the name")
    good("progressive.jpg", encode(red_and_blue, "JPEG", progressive=True), "progressive JPEG")
    good("lzw.tiff", encode(red_and_blue, "TIFF", compression="tiff_lzw"), "TIFF through libtiff")

    cmyk = Image.new("CMYK", (WIDTH, HEIGHT), (0, 255, 255, 0))
    good("cmyk.jpg", encode(cmyk, "JPEG"), "full magenta and yellow", (255, 0, 0))

    bilevel = Image.new("1", (WIDTH, HEIGHT), 1)
    good("bilevel.png", encode(bilevel, "PNG"), "one bit", WHITE)
    grey16 = Image.fromarray(np.full((HEIGHT, WIDTH), 100 * 257, dtype=np.uint16))
    good("grey16.png", encode(grey16, "PNG"), "16 bits, 100 / 255 of white", (100, 100, 100))
    good("grey16.tiff", encode(grey16, "TIFF"), "16 bits, 100 / 255 of white", (100, 100, 100))
    good("grey16.pgm", encode(grey16, "PPM"), "16 bits, 100 / 255 of white", (100, 100, 100))

    # Half of red over white is the mean of the two.
    pale_red = (228, 142, 148)
    rgba = np.dstack([picture(), np.full((HEIGHT, WIDTH), 128, dtype=np.uint8)])
    good("rgba.png", encode(Image.fromarray(rgba), "PNG"), "half transparent", pale_red)
    good("rgba.webp", encode(Image.fromarray(rgba), "WEBP", lossless=True), "half transparent", pale_red)
    grey_alpha = Image.new("LA", (WIDTH, HEIGHT), (100, 0))
    good("grey_alpha.png", encode(grey_alpha, "PNG"), "fully transparent grey", WHITE)
    palette = red_and_blue.quantize(2)
    red_index = palette.getpixel((0, 0))
    good("palette.png", encode(palette, "PNG"), "palette")
    transparent = encode(palette, "PNG", transparency=red_index)
    good("palette_transparent.png", transparent, "palette, red is transparent", WHITE)

    malformed = encode(red_and_blue, "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + b"\xee" * 40)
    good("malformed_exif.jpg", malformed, "EXIF that declares 65535 tags and holds garbage")
    jpeg = bytearray(encode(red_and_blue, "JPEG", quality=95))
    scan = jpeg.index(b"\xff\xda")
    middle = (scan + len(jpeg)) // 2
    jpeg[middle : middle + 4] = b"\x5a\xa5\x5a\xa5"
    good("corrupt_middle.jpg", bytes(jpeg), "libjpeg conceals what it cannot decode, as a browser does", None)


def _write_frames_and_orientations(good: Callable[..., None]) -> None:
    red = Image.new("RGB", (WIDTH, HEIGHT), RED)
    blue = Image.new("RGB", (WIDTH, HEIGHT), BLUE)
    for image_format in ("GIF", "WEBP", "PNG", "TIFF", "AVIF", "MPO"):
        data = encode(red, image_format, save_all=True, append_images=[blue])
        good(f"frames.{image_format.lower()}", data, "the first frame is red, the second blue")
    for orientation in range(1, 9):
        image, tags = stored_picture(orientation), exif(orientation)
        good(f"orientation_{orientation}.jpg", encode(image, "JPEG", exif=tags), "turned by its EXIF")
        good(f"orientation_{orientation}.png", encode(image, "PNG", exif=tags), "turned by its EXIF")


def _write_names(good: Callable[..., None]) -> None:
    data = encode(Image.fromarray(picture()), "PNG")
    for name in ("with space", "ünïcode 画像", "hash#1", "question?", "percent%20", "plus+", "new\nline"):
        good(f"{name}.png", data, "a name that addresses and URLs trip over")

"""Bytes → RGB array, limits, and the geometry from an image to the square a backbone sees.

H and W are the height and width of an image after its EXIF orientation was applied, S is the side of the
square input of a backbone. Needs numpy and Pillow only. Colour profiles are not applied, as in the training
pipelines of the published weights.
"""

import io
import logging
import math
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

import numpy as np
from PIL import ExifTags, Image, TiffImagePlugin

from ais.errors import ImageError

# What Pillow remarks on while reading (odd EXIF, odd APNG, many pixels) either does not touch the pixels
# or is refused below, and a line per image drowns a log of millions. warnings.catch_warnings would swap the
# filters of the whole process, which is unsafe in threads, so one permanent filter for Pillow's readers; the
# null handler keeps logging's last resort, stderr, out of a program that set up no logging. What libtiff says
# of a corrupt file it writes to stderr in C, out of reach.
warnings.filterwarnings("ignore", module=r"PIL\.(Image|\w+ImagePlugin)$")
logging.getLogger("PIL").addHandler(logging.NullHandler())

# How files of each format begin. Only the readers of _READABLE ever run: none of them starts another program
# (as PostScript would) and all are in wide use. JPEG includes MPO, the multi-picture JPEGs of phones.
_READABLE = {
    "JPEG": rb"\xff\xd8\xff",
    "PNG": rb"\x89PNG\r\n\x1a\n",
    "WEBP": rb"RIFF.{4}WEBP",
    "GIF": rb"GIF8[79]a",
    "BMP": rb"BM",
    "TIFF": rb"II[*+]\x00|MM\x00[*+]",
    "PPM": rb"P[1-6f]\s",
    "AVIF": rb".{4}ftyp.{0,56}avi[fs]",
}
ALLOWED_FORMATS = tuple(_READABLE)
# Formats that are likely in a collection of images, so that their rows can be counted by name.
_NOT_ALLOWED = {
    "SVG": rb"(\xef\xbb\xbf)?\s*(<\?xml.{0,1000}?)?<svg",
    "PDF": rb"%PDF",
    "PostScript": rb"%!PS|\xc5\xd0\xd3\xc6",
    "HEIF or MP4": rb".{4}ftyp",
    "JPEG 2000": rb"\xff\x4f\xff\x51|.{4}jP  ",
    "JPEG XL": rb"\xff\x0a|.{4}JXL ",
    "ICO": rb"\x00\x00\x01\x00",
    "PSD": rb"8BPS",
}
_SIGNATURES = {name: re.compile(pattern, re.DOTALL) for name, pattern in (_READABLE | _NOT_ALLOWED).items()}

_TRANSPOSES = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

_RESAMPLING = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}

_PILLOW_WARNS_AT = 89_478_485
_PILLOW_REFUSES_AT = 2 * _PILLOW_WARNS_AT


class DecodeReason(StrEnum):
    """Every reason that an `ImageError` of stage ``decode`` can carry."""

    EMPTY_FILE = "empty file"
    NOT_AN_IMAGE = "not an image"
    FORMAT_NOT_ALLOWED = "format not allowed"
    TRUNCATED = "truncated"
    CORRUPT = "corrupt"
    TOO_MANY_BYTES = "too many bytes"
    TOO_MANY_PIXELS = "too many pixels"
    UNSUPPORTED_PIXEL_FORMAT = "unsupported pixel format"
    TOO_MUCH_METADATA = "too much metadata"
    OUT_OF_MEMORY = "out of memory"
    TOO_SLOW = "too slow"
    CRASHED = "crashed"


@dataclass(frozen=True)
class Limits:
    """Bounds on one image, checked before its pixels are decoded.

    Args:
        max_bytes: size of the file in bytes.
        max_pixels: width × height. The default is where Pillow starts to warn of decompression bombs; Pillow
            itself refuses more than twice that.
        max_metadata_bytes: colour profile, EXIF, XMP, comments and texts together, in bytes, uncompressed.
        seconds: of processor time, from bytes to pixels. Kept by `ais.decoding`, which decodes in processes that can be
            stopped; `decode_image` itself knows no time.
        scaled_jpeg: decode a JPEG at a half, quarter or eighth of its size where that leaves at least twice the
            resolution that is needed (the gap that Pillow's own thumbnails keep). Kept by `ais.decoding`.

    Raises:
        ValueError: a bound is below 1, ``max_pixels`` is beyond what Pillow reads, or ``seconds`` is not above 0.
    """

    max_bytes: int = 64 * 2**20
    max_pixels: int = _PILLOW_WARNS_AT
    max_metadata_bytes: int = 16 * 2**20
    seconds: float = 30.0
    scaled_jpeg: bool = False

    def __post_init__(self) -> None:
        if self.max_bytes < 1:
            raise ValueError(f"max_bytes is {self.max_bytes}: must be at least 1")
        if not 1 <= self.max_pixels <= _PILLOW_REFUSES_AT:
            raise ValueError(f"max_pixels is {self.max_pixels}: must be from 1 to {_PILLOW_REFUSES_AT}")
        if self.max_metadata_bytes < 1:
            raise ValueError(f"max_metadata_bytes is {self.max_metadata_bytes}: must be at least 1")
        if not 0 < self.seconds < float("inf"):
            raise ValueError(f"seconds is {self.seconds}: must be above 0")


def decode_image(data: bytes, limits: Limits = Limits()) -> np.ndarray:
    """Decode the bytes of one image file.

    The content decides the format, never a name. EXIF orientation is applied, malformed EXIF ignored. Alpha
    is composited on white, as a page shows it. 16-bit samples are scaled to 8 bits, with rounding where they are
    grey or of a PPM; of other colours Pillow keeps the high byte. The first frame stands for an animation or a
    multi-picture file.

    Returns:
        RGB pixels, (H, W, 3) uint8, read-only.

    Raises:
        ImageError: the stage is ``decode``, the reason one of `DecodeReason`. Nothing else is raised whatever
            the bytes, save `MemoryError`.
    """
    return np.asarray(decode_scaled(data, limits, None)[0])


def decode_scaled(
    data: bytes, limits: Limits, needed: Callable[[int, int], tuple[float, float]] | None
) -> tuple[Image.Image, tuple[int, int], int]:
    """Decode as `decode_image`; a JPEG only as large as it is needed, which its blocks of 8×8 pixels make cheap.

    Args:
        data: of the file.
        limits: of which the size of the whole image has to keep.
        needed: of an image's width and height, the least width and height to decode it at; ``None``: all of it. JPEG
            knows halves, quarters and eighths; other formats are decoded whole.

    Returns:
        An RGB image, upright (making an array of it would cost a third of the decoding); width and height of the whole
        image, its EXIF orientation applied; and the side of a returned pixel in pixels of the whole image (1, 2, 4, 8).
        The last ones may reach beyond it.

    Raises:
        ImageError: as `decode_image`.
    """
    if not data:
        raise _error(DecodeReason.EMPTY_FILE, "0 bytes")
    if len(data) > limits.max_bytes:
        raise _error(DecodeReason.TOO_MANY_BYTES, f"{len(data)} bytes, the limit is {limits.max_bytes}")
    found = next((name for name, signature in _SIGNATURES.items() if signature.match(data)), None)
    if found is None:
        raise _error(DecodeReason.NOT_AN_IMAGE, f"{len(data)} bytes that begin with {bytes(data[:16])!r}")
    if found not in ALLOWED_FORMATS:
        raise _error(DecodeReason.FORMAT_NOT_ALLOWED, f"{found}; allowed are {', '.join(ALLOWED_FORMATS)}")
    if found == "WEBP" and len(data) < 8 + (declared := int.from_bytes(data[4:8], "little")):
        # libwebp does not tell a truncated file from a corrupt one.
        raise _error(DecodeReason.TRUNCATED, f"WEBP of {len(data)} bytes, its header says {8 + declared}")
    with (
        _image_errors(f"{found} of {len(data)} bytes"),
        Image.open(io.BytesIO(data), formats=(found,)) as image,
    ):
        width, height = image.size
        if width * height > limits.max_pixels:
            raise _error(
                DecodeReason.TOO_MANY_PIXELS,
                f"{width} × {height} = {width * height} pixels, the limit is {limits.max_pixels}",
            )
        metadata = sum(len(value) for value in image.info.values() if isinstance(value, bytes | str))
        if metadata > limits.max_metadata_bytes:
            raise _error(DecodeReason.TOO_MUCH_METADATA, f"{metadata} bytes, the limit is {limits.max_metadata_bytes}")
        step = 1
        if needed is not None:
            wanted = needed(width, height)
            drafted = image.draft(None, (max(1, math.ceil(wanted[0])), max(1, math.ceil(wanted[1]))))
            step = round(width / drafted[1][2]) if drafted else 1
        rgb = _upright(image)
        turned = _exif_orientation(image) >= 5  # on its side
        return rgb, ((height, width) if turned else (width, height)), step


def as_rgb_array(image: Image.Image | np.ndarray) -> np.ndarray:
    """Bring an image in memory to the form that `decode_image` returns.

    Args:
        image: a PIL image of any mode but 32-bit integer and float, treated as `decode_image` treats a file,
            or a uint8 array: RGB (H, W, 3), grey (H, W), or RGBA (H, W, 4), which is composited on white.

    Returns:
        RGB pixels, (H, W, 3) uint8; an RGB array comes back as it is, not copied.

    Raises:
        TypeError: neither a PIL image nor an array.
        ValueError: an array of another dtype or shape, or without pixels; a PIL image without pixels.
        ImageError: a PIL image whose file cannot be read or whose pixel format has no defined white.
    """
    if isinstance(image, Image.Image):
        if 0 in image.size:
            raise ValueError(f"PIL image of size {image.width} × {image.height} has no pixels: leave it out")
        with _image_errors(f"PIL image of mode {image.mode} and size {image.width} × {image.height}"):
            return _rgb_pixels(image)
    if not isinstance(image, np.ndarray):
        raise TypeError(
            f"{image!r:.80} of type {type(image).__name__} is no image: give a PIL image or a uint8 array;"
            " PIL.Image.open reads a file"
        )
    is_grey, is_colour = image.ndim == 2, image.ndim == 3 and image.shape[2] in (3, 4)
    if image.dtype != np.uint8 or not (is_grey or is_colour) or image.size == 0:
        raise ValueError(
            f"array of shape {image.shape} and dtype {image.dtype}: an image is uint8 with levels 0 to 255,"
            " of shape (H, W, 3), (H, W) or (H, W, 4), channels last and without a batch axis"
        )
    if is_colour and image.shape[2] == 3:
        return image
    return _rgb_pixels(Image.fromarray(image))


@dataclass(frozen=True)
class Geometry:
    """How an image is brought to the square input of a backbone, known exactly in both directions.

    ``center_crop`` is the preset of torchvision's classification models: the shorter side becomes
    ``resize_size``, then the central square of ``input_size`` is cut out. Both steps are one resampling here,
    with no rounding of sizes in between, and pixels outside the crop are never computed.
    ``letterbox`` scales the longer side to ``input_size``, centres the image and fills the rest.

    Args:
        input_size: S, in pixels.
        resize_size: of the shorter side, in pixels, at least ``input_size``; not used by ``letterbox``.
        interpolation: Pillow's filter of that name, which antialiases when it shrinks.
        mode: ``center_crop`` or ``letterbox``.
        pad_rgb: fill of ``letterbox``; the default is ImageNet's mean colour, 0 after normalisation.

    Raises:
        ValueError: one of the above does not hold.
    """

    input_size: int
    resize_size: int
    interpolation: Literal["bilinear", "bicubic"]
    mode: Literal["center_crop", "letterbox"] = "center_crop"
    pad_rgb: tuple[int, int, int] = (124, 116, 104)

    def __post_init__(self) -> None:
        if not 1 <= self.input_size <= self.resize_size:
            raise ValueError(
                f"input_size is {self.input_size} and resize_size {self.resize_size}:"
                " must be 1 ≤ input_size ≤ resize_size"
            )
        if self.interpolation not in _RESAMPLING:
            raise ValueError(f"interpolation is {self.interpolation!r}: must be one of {list(_RESAMPLING)}")
        if self.mode not in ("center_crop", "letterbox"):
            raise ValueError(f"mode is {self.mode!r}: must be 'center_crop' or 'letterbox'")
        if len(self.pad_rgb) != 3 or not all(0 <= level <= 255 for level in self.pad_rgb):
            raise ValueError(f"pad_rgb is {self.pad_rgb}: must be three levels from 0 to 255")

    @property
    def fingerprint(self) -> str:
        """Short name of everything that changes pixels, such as ``center_crop-224-of-256-bilinear``."""
        if self.mode == "center_crop":
            return f"center_crop-{self.input_size}-of-{self.resize_size}-{self.interpolation}"
        pad = "".join(f"{level:02x}" for level in self.pad_rgb)
        return f"letterbox-{self.input_size}-{self.interpolation}-pad-{pad}"

    def scale(self, width: int, height: int) -> float:
        """Pixels of the input for each pixel of an image of this size."""
        if self.mode == "center_crop":
            return self.resize_size / min(width, height)
        return self.input_size / max(width, height)

    def apply(self, image: np.ndarray | Image.Image) -> tuple[np.ndarray, np.ndarray]:
        """Resample one image to the input of the backbone.

        Args:
            image: (H, W, 3) uint8, as `decode_image` and `as_rgb_array` return it, or the same as a PIL image.

        Returns:
            The pixels, (S, S, 3) uint8, and the box, (4,) float32: left, top, right, bottom of the region of
            the original that the S×S square covers, in its pixels, with (0, 0) the outer corner of the first.
            Under ``letterbox`` it reaches beyond the image where padding is: left or top below 0, right above
            W, bottom above H.
        """
        picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
        return self._center_crop(picture) if self.mode == "center_crop" else self._letterbox(picture)

    def _center_crop(self, image: Image.Image) -> tuple[np.ndarray, np.ndarray]:
        width, height = image.size
        side = min(width, height) * self.input_size / self.resize_size
        left, top = (width - side) / 2, (height - side) / 2
        # Pillow takes the box as four float32: rounding here makes the box returned the one used.
        box = np.array([left, top, left + side, top + side], dtype=np.float32)
        size = (self.input_size, self.input_size)
        left, top, right, bottom = box.tolist()
        resized = image.resize(size, _RESAMPLING[self.interpolation], box=(left, top, right, bottom))
        return np.array(resized), box

    def _letterbox(self, image: Image.Image) -> tuple[np.ndarray, np.ndarray]:
        width, height = image.size
        scale = self.input_size / max(width, height)
        content_width, content_height = max(1, round(width * scale)), max(1, round(height * scale))
        left, top = (self.input_size - content_width) // 2, (self.input_size - content_height) // 2
        pixels = np.empty((self.input_size, self.input_size, 3), dtype=np.uint8)
        pixels[:] = self.pad_rgb
        content = image.resize((content_width, content_height), _RESAMPLING[self.interpolation])
        pixels[top : top + content_height, left : left + content_width] = np.asarray(content)
        # Pixels of the original per pixel of the input; they differ where the content size was rounded.
        step_x, step_y = width / content_width, height / content_height
        box = np.array(
            [
                -left * step_x,
                -top * step_y,
                (self.input_size - left) * step_x,
                (self.input_size - top) * step_y,
            ],
            dtype=np.float32,
        )
        return pixels, box


def _center_crop_reference(image: np.ndarray, geometry: Geometry) -> np.ndarray:
    """Slow, obvious twin of the centre crop: resize the whole image, then crop, rounding as torchvision does.

    Source: ``torchvision.transforms.v2.Resize`` and ``CenterCrop``.
    """
    height, width = image.shape[:2]
    shorter = min(width, height)
    # The longer side is cut, not rounded, to a whole number.
    resized_width = int(geometry.resize_size * width / shorter)
    resized_height = int(geometry.resize_size * height / shorter)
    resized = Image.fromarray(image).resize((resized_width, resized_height), _RESAMPLING[geometry.interpolation])
    side = geometry.input_size
    left, top = round((resized_width - side) / 2), round((resized_height - side) / 2)
    return np.array(resized.crop((left, top, left + side, top + side)))


def _error(reason: DecodeReason, detail: str) -> ImageError:
    return ImageError("decode", reason.value, detail)


@contextmanager
def _image_errors(source: str) -> Iterator[None]:
    """Turn what Pillow raises into an `ImageError`: its readers raise every kind, even AssertionError."""
    try:
        yield
    except (ImageError, MemoryError):
        raise
    except Image.DecompressionBombError as error:
        raise _error(DecodeReason.TOO_MANY_PIXELS, f"{source}: {error}") from error
    except Image.UnidentifiedImageError as error:
        raise _error(
            DecodeReason.CORRUPT, f"{source}: damaged header, or a variant that Pillow does not read"
        ) from error
    except Exception as error:
        # Pillow has no class for a file that ends too early; these are the ways its readers say so.
        said = str(error).lower()
        if "max_text" in said or "memory used in text" in said:  # compressed texts and profiles of a PNG
            raise _error(DecodeReason.TOO_MUCH_METADATA, f"{source}: {error}") from error
        ends_early = isinstance(error, EOFError) or "truncated" in said or "not enough image data" in said
        reason = DecodeReason.TRUNCATED if ends_early else DecodeReason.CORRUPT
        raise _error(reason, f"{source}: {error or type(error).__name__}") from error


def _rgb_pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(_upright(image))


def _upright(image: Image.Image) -> Image.Image:
    image.load()
    rgb = _rgb_image(image)
    transpose = _TRANSPOSES.get(_exif_orientation(image))
    return rgb if transpose is None else rgb.transpose(transpose)


def _exif_orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 to 8; 1, upright, where EXIF is missing or malformed."""
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # the parser of EXIF raises many kinds, and no orientation is worth losing an image
        return 1


def _rgb_image(image: Image.Image) -> Image.Image:
    # Pillow reads a PGM of more than 8 bits as 32-bit integers, scaled to 0..65535.
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):
        return Image.fromarray(_grey_levels(image)).convert("RGB")
    if image.mode in ("I", "F"):
        kind = "32-bit integer" if image.mode == "I" else "float"
        raise _error(
            DecodeReason.UNSUPPORTED_PIXEL_FORMAT,
            f"{kind} samples (Pillow mode {image.mode}) have no defined white: convert to 8 or 16 bits",
        )
    if image.mode == "La":  # Pillow converts premultiplied grey to LA only
        image = image.convert("LA")
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _grey_levels(image: Image.Image) -> np.ndarray:
    """(H, W) uint8 levels of an image with one 16-bit sample per pixel; ``convert`` would clip at 255.

    Pillow hands out 12-bit samples of a TIFF unscaled, and "white is zero" not inverted; and it keeps the
    transparent grey of a PNG as a note.
    """
    tags = image.tag_v2 if isinstance(image, TiffImagePlugin.TiffImageFile) else {}
    white = 2 ** tags.get(TiffImagePlugin.BITSPERSAMPLE, (16,))[0] - 1
    samples = np.asarray(image).astype(np.uint32)
    levels = ((samples * 255 + white // 2) // white).astype(np.uint8)
    if tags.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == 0:
        levels = 255 - levels
    if "transparency" in image.info:
        levels[samples == image.info["transparency"]] = 255
    return levels

"""Colour maps, overlays and PNG files of heatmaps.

Heatmaps come in at the size of their picture and normalised for display: ``(H, W)`` float32, in [0, 1] for the
weighting ``positive`` and in [-1, 1] for ``signed``, NaN where the model did not look. Images are ``(H, W, 3)``
uint8 RGB. Equal input gives equal bytes.
"""

import io
from collections.abc import Mapping
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ais.colours import colours

Weighting = Literal["positive", "signed"]

NOT_LOOKED_AT = 96  # a grey as dark is on neither colour map
_DIMMED_TO = 0.35
_GAP_PX = 4
_REDUCING_GAP = 2.0  # of Pillow: 40 → 10 ms for a picture of 2048×1536
_LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)  # ITU-R BT.601


def colorize(heatmap: NDArray[np.float32], weighting: Weighting) -> NDArray[np.uint8]:
    """Colour a heatmap: dark blue to yellow for ``positive``, blue over neutral (zero) to red for ``signed``.

    Args:
        heatmap: ``(H, W)``; NaN becomes dark grey.
        weighting: how the heatmap was made, which says its range.

    Returns:
        ``(H, W, 3)`` uint8.

    Raises:
        ValueError: the heatmap is not ``(H, W)`` or leaves its range.
    """
    _check_heatmap(heatmap, weighting)
    picture = _coloured(heatmap, weighting)
    unseen = np.isnan(heatmap)
    if unseen.any():
        picture[unseen] = NOT_LOOKED_AT
    return picture


def overlay(
    image: NDArray[np.uint8],
    heatmap: NDArray[np.float32],
    weighting: Weighting,
    strength: float = 0.6,
) -> NDArray[np.uint8]:
    """Blend the colours of a heatmap over its image.

    The opacity is ``strength`` times the absolute value of the heatmap, so that the image shows clearly where there
    is no evidence. What the model did not look at loses its colours and most of its light.

    Args:
        image: ``(H, W, 3)``.
        heatmap: ``(H, W)``.
        weighting: how the heatmap was made.
        strength: opacity of the strongest evidence, in [0, 1].

    Returns:
        ``(H, W, 3)`` uint8.

    Raises:
        ValueError: shapes do not fit, or a value leaves its range.
    """
    if not 0 <= strength <= 1:
        raise ValueError(f"strength is {strength}; it is an opacity, from 0 to 1")
    _check_image(image)
    if image.shape[:2] != heatmap.shape:
        raise ValueError(
            f"the image is {image.shape[:2]} (H, W), the heatmap {heatmap.shape}; place it on the image first"
        )
    _check_heatmap(heatmap, weighting)
    opacity = np.nan_to_num(heatmap, nan=0.0)
    np.abs(opacity, out=opacity)
    opacity *= strength
    # In place: whole pictures of floats cost more to allocate than to compute.
    blended = _coloured(heatmap, weighting).astype(np.float32)
    blended -= image
    blended *= opacity[..., None]
    blended += image
    unseen = np.isnan(heatmap)
    if unseen.any():
        blended[unseen] = _DIMMED_TO * (image[unseen] @ _LUMA)[:, None]
    return np.rint(blended, out=blended).astype(np.uint8)


def _coloured(heatmap: NDArray[np.float32], weighting: Weighting) -> NDArray[np.uint8]:
    """The colours ``(H, W, 3)`` of a heatmap; NaN counts as zero."""
    table = colours(weighting)
    lowest = 0 if weighting == "positive" else -1
    share = np.nan_to_num(heatmap, nan=0.0)
    share -= lowest
    share *= (len(table) - 1) / (1 - lowest)
    return np.take(table, np.rint(share, out=share).astype(np.uint8), axis=0)


def side_by_side(image: NDArray[np.uint8], heatmap: NDArray[np.float32], weighting: Weighting) -> NDArray[np.uint8]:
    """Set image, overlay and coloured heatmap next to each other: ``(H, 3 W + 8, 3)`` uint8, white gaps between.

    Raises:
        ValueError: as ``overlay``.
    """
    gap = np.full((len(image), _GAP_PX, 3), 255, dtype=np.uint8)
    blended, coloured = overlay(image, heatmap, weighting), colorize(heatmap, weighting)
    return np.hstack([image, gap, blended, gap, coloured])


def heatmap_png(heatmap: NDArray[np.float32], weighting: Weighting, metadata: Mapping[str, str]) -> bytes:
    """Encode ``colorize`` as a PNG file; errors as there and in ``png``."""
    return png(colorize(heatmap, weighting), metadata)


def overlay_png(
    image: NDArray[np.uint8], heatmap: NDArray[np.float32], weighting: Weighting, metadata: Mapping[str, str]
) -> bytes:
    """Encode ``overlay`` as a PNG file; errors as there and in ``png``."""
    return png(overlay(image, heatmap, weighting), metadata)


def both_png(
    image: NDArray[np.uint8], heatmap: NDArray[np.float32], weighting: Weighting, metadata: Mapping[str, str]
) -> bytes:
    """Encode ``side_by_side`` as a PNG file; errors as there and in ``png``."""
    return png(side_by_side(image, heatmap, weighting), metadata)


def png(image: NDArray[np.uint8], metadata: Mapping[str, str]) -> bytes:
    """Encode an image as a PNG file.

    Args:
        image: ``(H, W, 3)``.
        metadata: text of the file by keyword, stored as tEXt chunks (iTXt where Latin-1 does not reach). Keywords are
            1 to 79 printable Latin-1 characters (PNG specification, section 11.3.3).

    Raises:
        ValueError: the image is not ``(H, W, 3)`` uint8, or a keyword is not one of PNG.
    """
    _check_image(image)
    texts = PngInfo()
    for keyword, text in sorted(metadata.items()):
        if not (0 < len(keyword) < 80 and keyword.isprintable() and max(keyword) <= "ÿ"):
            raise ValueError(f"{keyword!r} is not a PNG keyword; use 1 to 79 printable Latin-1 characters")
        # File names that are not UTF-8 reach Python as lone surrogates, which no chunk can hold.
        texts.add_text(keyword, text.encode("utf-8", "backslashreplace").decode("utf-8"))
    file = io.BytesIO()
    # Stronger compression takes up to several times as long and saves a few per cent on photographs.
    Image.fromarray(image).save(file, format="PNG", pnginfo=texts, compress_level=1)
    return file.getvalue()


def fit_within(image: NDArray[np.uint8] | Image.Image, max_side: int) -> NDArray[np.uint8]:
    """Shrink an image, antialiased, until its longer side is ``max_side`` pixels; a smaller one is returned as it is.

    For display: beyond four times too large, blocks of pixels are averaged first, which a level or two of 255 tell.

    Args:
        image: ``(H, W, 3)``, or of Pillow, mode RGB.
        max_side: bound in pixels, at least 1.

    Returns:
        ``(h, w, 3)`` uint8 of the same aspect ratio, to the nearest pixel.

    Raises:
        ValueError: the image is not ``(H, W, 3)`` uint8, or ``max_side`` is below 1.
    """
    if max_side < 1:
        raise ValueError(f"max_side is {max_side} pixels; it must be at least 1")
    if isinstance(image, np.ndarray):
        _check_image(image)
        if max(image.shape) <= max_side:
            return image
        image = Image.fromarray(image)
    elif max(image.size) <= max_side:
        return np.asarray(image)
    scale = max_side / max(image.size)
    width, height = (max(1, round(length * scale)) for length in image.size)
    return np.asarray(image.resize((width, height), Image.Resampling.LANCZOS, reducing_gap=_REDUCING_GAP))


def _check_heatmap(heatmap: NDArray[np.float32], weighting: Weighting) -> None:
    if heatmap.ndim != 2:
        raise ValueError(f"the heatmap has shape {heatmap.shape}; it must be (H, W)")
    lowest = 0 if weighting == "positive" else -1
    outside = (heatmap < lowest) | (heatmap > 1)
    if outside.any():
        raise ValueError(
            f"the heatmap holds {heatmap[outside][0]:g}, outside [{lowest}, 1]; normalise it for display, "
            f"with the weighting it was made with ({weighting!r} was given)"
        )


def _check_image(image: NDArray[np.uint8]) -> None:
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ValueError(f"the image has shape {image.shape} and dtype {image.dtype}; it must be (H, W, 3) uint8")

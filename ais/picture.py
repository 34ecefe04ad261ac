"""What a notebook shows of a few explained images: each image, its heatmap, and the heatmap on the image.

Needs Pillow and numpy only. The jobs write their own pictures with `ais.render`; this is for looking.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from ais.colours import colours
from ais.placement import Weighting, cell_size, normalise_for_display, place_on_image
from ais.render import NOT_LOOKED_AT, colorize, fit_within, overlay

_MARGIN, _GAP, _INSET = 12, 8, 4
_TEXT, _SMALL = 14, 12
_INK, _FAINT, _WARNING, _PAPER = (34, 34, 34), (110, 110, 110), (176, 32, 32), (255, 255, 255)
_BAR_WIDTH = 120
_LEAST_WIDTH = 640  # of the legend
_COLUMNS = ("image", "heatmap", "heatmap on the image")


@dataclass(frozen=True)
class Explained:
    """One image and what was found.

    Args:
        image: ``(H, W, 3)`` uint8 RGB.
        score: in rating units.
        score_std: over the heads, NaN for a single one.
        heatmap: ``(h, w)`` at the layer's resolution.
        box: ``(4,)`` left, top, right, bottom of what the model saw, in pixels of the image.
        heatmap_box: ``(4,)`` the same of the heatmap's cells.
    """

    image: NDArray[np.uint8]
    score: float
    score_std: float
    heatmap: NDArray[np.float32]
    box: NDArray[np.float32]
    heatmap_box: NDArray[np.float32]

    @property
    def whole(self) -> bool:
        """Whether the model saw all of the image."""
        height, width = self.image.shape[:2]
        return bool((self.box[:2] <= 0).all() and self.box[2] >= width and self.box[3] >= height)

    @property
    def words(self) -> str:
        """The score in words."""
        spread = "" if np.isnan(self.score_std) else f" ± {self.score_std:.2g}"
        return f"score {self.score:.4g}{spread}"


@dataclass(frozen=True)
class Picture:
    """A picture that a notebook shows by itself, and a script saves.

    Args:
        image: the picture.
        alt: what it shows, in words, for those who do not see it.
    """

    image: Image.Image
    alt: str

    def save(self, path: str | Path) -> None:
        """Write it as a file; the suffix says the format."""
        self.image.save(path)

    def _repr_png_(self) -> bytes:
        file = io.BytesIO()
        self.image.save(file, format="PNG")
        return file.getvalue()

    def _repr_html_(self) -> str:
        data = base64.b64encode(self._repr_png_()).decode()
        return f'<img alt="{html.escape(self.alt)}" width="{self.image.width}" src="data:image/png;base64,{data}">'


def draw(
    shown: Sequence[Explained], weighting: Weighting, caption: str, *, own: bool, untrained: bool, side: int
) -> Picture:
    """Draw one row an image: the image, the heatmap and both, with the score and the size of one cell to scale.

    Each heatmap is normalised by its own maximum, so that colours compare within an image and not between images.

    Args:
        shown: at least one.
        weighting: with which the heatmaps were made.
        caption: of what the heatmaps were made.
        own: each image has its own importance, by ablation, and its heatmap speaks of its score.
        untrained: warns that the backbone's weights are random.
        side: longest side of each of the three, in pixels.
    """
    rows = [_row(explained, weighting, side) for explained in shown]
    width = max(_LEAST_WIDTH, max(row.width for row in rows) + 2 * _MARGIN)
    small = ImageFont.load_default(_SMALL)
    footer = [(caption, _FAINT), *([("UNTRAINED backbone: its weights are random", _WARNING)] if untrained else [])]
    line = _SMALL + 6
    head = _MARGIN + line
    height = head + sum(row.height + _GAP for row in rows) + line * (len(footer) + 1) + _MARGIN
    width = max(width, *(round(small.getlength(text)) + 2 * _MARGIN for text, _ in footer))
    canvas = Image.new("RGB", (width, height), _PAPER)
    pen = ImageDraw.Draw(canvas)
    for column, text in enumerate(_COLUMNS):
        pen.text((_MARGIN + column * (side + _GAP), _MARGIN), text, _FAINT, small)
    y = head
    for row in rows:
        canvas.paste(row, (_MARGIN, y))
        y += row.height + _GAP
    _legend(canvas, y, weighting, own=own, unseen=any(not explained.whole for explained in shown))
    for text, colour in footer:
        y += line
        pen.text((_MARGIN, y), text, colour, small)
    words = "; ".join(explained.words for explained in shown)
    warning = ", with an untrained backbone" if untrained else ""
    return Picture(canvas, f"{len(shown)} images, each with its heatmap{warning}: {words}. {caption}")


def _row(explained: Explained, weighting: Weighting, side: int) -> Image.Image:
    """The score above the image, the heatmap and both."""
    view = _view(explained.image, side)
    size, shown = explained.image.shape[:2], view.shape[:2]
    placed = place_on_image(explained.heatmap, explained.heatmap_box, size, shown, explained.box)
    heatmap = normalise_for_display(placed, weighting)
    tiles = [view, colorize(heatmap, weighting), overlay(view, heatmap, weighting)]
    font = ImageFont.load_default(_TEXT)
    top = _TEXT + 8
    row = Image.new("RGB", (3 * side + 2 * _GAP, top + shown[0]), _PAPER)
    pen = ImageDraw.Draw(row)
    pen.text((0, 2), explained.words, _INK, font)
    for column, tile in enumerate(tiles):
        row.paste(Image.fromarray(tile), (column * (side + _GAP), top))
    scale = shown[1] / size[1]
    width, height = (length * scale for length in cell_size(explained.heatmap.shape, explained.heatmap_box))
    left, bottom = side + _GAP + _INSET, top + shown[0] - _INSET - 1
    _outline(pen, (left, bottom - height, left + width, bottom))
    return row


def _view(image: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    """The image at the size at which it is shown; a small one is enlarged pixel by pixel."""
    if max(image.shape[:2]) >= side:
        return fit_within(image, side)
    height, width = (round(length * side / max(image.shape[:2])) for length in image.shape[:2])
    return np.asarray(Image.fromarray(image).resize((max(width, 1), max(height, 1)), Image.Resampling.NEAREST))


def _outline(pen: ImageDraw.ImageDraw, box: tuple[float, float, float, float]) -> None:
    """A square that can be seen on every colour."""
    left, top, right, bottom = box
    pen.rectangle(box, outline=(0, 0, 0), width=3)
    if min(right - left, bottom - top) > 3:
        pen.rectangle((left + 1, top + 1, right - 1, bottom - 1), outline=(255, 255, 255))


def _legend(canvas: Image.Image, y: int, weighting: Weighting, *, own: bool, unseen: bool) -> None:
    """What the colours, the outline and, where there is any, the grey say."""
    pen = ImageDraw.Draw(canvas)
    font = ImageFont.load_default(_SMALL)
    x = float(_MARGIN)

    def say(text: str) -> None:
        nonlocal x
        pen.text((x, y), text, _FAINT, font)
        x += pen.textlength(text, font) + 6

    low, high = ("no evidence", "most, in its image")
    if weighting == "signed":
        # One importance for all images may be of errors or of agreement, and only who made it knows.
        low, high = ("lowers", "raises the score") if own else ("negative", "positive importance")
    say(low)
    canvas.paste(Image.fromarray(colours(weighting)[None]).resize((_BAR_WIDTH, _SMALL)), (round(x), y + 2))
    x += _BAR_WIDTH + 6
    say(high)
    x += 2 * _GAP
    _outline(pen, (x, y + 1, x + _SMALL, y + 1 + _SMALL))
    x += _SMALL + 6
    say("one cell, to scale")
    if unseen:
        x += 2 * _GAP
        pen.rectangle((x, y + 2, x + _SMALL, y + 1 + _SMALL), fill=(NOT_LOOKED_AT,) * 3)
        x += _SMALL + 6
        say("not seen by the model")

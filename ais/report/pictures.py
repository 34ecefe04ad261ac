"""An image of the run as it is shown: thumbnail, heatmap and overlay, all of one size, and what can be said of it."""

from __future__ import annotations

import io
import os
import posixpath
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, urlsplit

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ais.decoding import DecoderPool, Decoding
from ais.errors import ImageError, StorageError
from ais.images import Geometry, Limits
from ais.listing import ListedImage
from ais.pipeline.fetch import CHANGED, read_image
from ais.placement import Weighting, cell_size, normalise_for_display, place_on_image
from ais.render import colorize
from ais.secrets import redact, secret_in
from ais.storage import Folder, Storage, is_local, local_path, scheme

_FETCHERS = 8
_DECODERS = 2  # each may need the memory of the largest image allowed
_NO_INPUT = Geometry(1, 1, "bilinear")  # of a backbone, which nothing here needs
# The strongest compression takes three times as long and saves a tenth.
_PHOTO = {"quality": 76, "method": 4}
_HEATMAP = {"lossless": True, "exact": True, "quality": 25, "method": 2}


@dataclass(frozen=True)
class Row:
    """A row of ``results``, with its place in the run.

    Args:
        image_id: of the image.
        uri: its address.
        width: of the original, in pixels.
        height: likewise.
        box: ``(4,)`` what the model saw.
        heatmap_box: ``(4,)`` where the heatmap's cells lie.
        heatmap: ``(h, w)``.
        score: in rating units.
        spread: standard deviation over heads; ``None`` where there is one head.
        rank: 1 for the highest score; equal scores share a rank.
        below: share of the run's scores that are lower.
        listed: the image as it was listed; what is not known of it is not held against what is there now.
    """

    image_id: int
    uri: str
    width: int
    height: int
    box: NDArray[np.float32]
    heatmap_box: NDArray[np.float32]
    heatmap: NDArray[np.float32]
    score: float
    spread: float | None
    rank: int
    below: float
    listed: ListedImage


@dataclass(frozen=True)
class Picture:
    """What a page shows of an image.

    Args:
        row: the image.
        size: ``(width, height)`` of all three, in pixels.
        thumbnail: WebP; ``None`` where the original could not be read again.
        missing: why not.
        changed: whether that is because it is no longer the image that was scored.
        heatmap: WebP without loss, opaque.
        overlay: WebP without loss, whose opacity is the heatmap's absolute value.
        cell: left, top, width, height of the strongest cell in pixels of the original.
        strongest: where that cell is, in words.
        link: where the original can be opened from the page; ``None`` where it cannot.
        looked_at: share of the image's area that the model saw.
    """

    row: Row
    size: tuple[int, int]
    thumbnail: bytes | None
    missing: str
    changed: bool
    heatmap: bytes
    overlay: bytes
    cell: tuple[float, float, float, float]
    strongest: str
    link: str | None
    looked_at: float

    @property
    def bytes(self) -> int:
        """Of its three files."""
        return len(self.thumbnail or b"") + len(self.heatmap) + len(self.overlay)


class PictureMaker:
    """Fetches and draws, several images at a time; decodes in child processes. Close it, or use it in ``with``.

    Args:
        weighting: of the run's heatmaps.
        max_side: of a thumbnail, in pixels.
        limits: on an original.
        storage: how to reach the originals.
        output: where the pages go, for links.
        blue: what a negative cell is, in words that go on from where it is.
    """

    def __init__(
        self, weighting: Weighting, max_side: int, limits: Limits, storage: Storage, output: Folder, blue: str
    ) -> None:
        self._weighting: Weighting = weighting
        self._blue = blue
        self._max_side = max_side
        self._limits = limits
        self._storage = storage
        self._output = output
        self._decoders = DecoderPool(Decoding(_NO_INPUT, limits, max_side), _DECODERS)
        self._pool = ThreadPoolExecutor(_FETCHERS)

    def __enter__(self) -> PictureMaker:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)
        self._decoders.close()

    def __call__(self, rows: Iterable[Row]) -> Iterator[Picture]:
        """Draw images of the run, in their order."""
        return self._pool.map(self._draw, rows)

    def _draw(self, row: Row) -> Picture:
        scale = min(1.0, self._max_side / max(row.width, row.height))
        size = max(1, round(row.width * scale)), max(1, round(row.height * scale))
        thumbnail, missing, changed = None, "", False
        try:
            small = self._thumbnail(row)
            thumbnail, size = _webp(small, **_PHOTO), (small.shape[1], small.shape[0])
        except (ImageError, StorageError) as error:
            missing = redact(str(error))[:300]
            changed = isinstance(error, ImageError) and error.reason == CHANGED
        placed = place_on_image(row.heatmap, row.heatmap_box, (row.height, row.width), size[::-1], seen=row.box)
        shown = normalise_for_display(placed, self._weighting)
        colours = colorize(shown, self._weighting)
        opacity = np.rint(255 * np.abs(np.nan_to_num(shown))).astype(np.uint8)
        cell, strongest = strongest_cell(row, self._blue)
        return Picture(
            row,
            size,
            thumbnail,
            missing,
            changed,
            _webp(colours, **_HEATMAP),
            _webp(np.dstack([colours, opacity]), **_HEATMAP),
            cell,
            strongest,
            link_to(row.uri, self._output),
            looked_at(row),
        )

    def _thumbnail(self, row: Row) -> NDArray[np.uint8]:
        listed = row.listed
        data = read_image(row.uri, listed.size, self._limits, self._storage, etag=listed.etag, mtime=listed.mtime)
        decoded = self._decoders.decode(data, picture=True)
        if (decoded.width, decoded.height) != (row.width, row.height):
            then, now = f"{row.width} × {row.height}", f"{decoded.width} × {decoded.height}"
            raise ImageError("decode", CHANGED, f"it had {then} pixels, and has {now}")
        assert decoded.picture is not None
        return decoded.picture


def strongest_cell(row: Row, blue: str) -> tuple[tuple[float, float, float, float], str]:
    """Left, top, width, height in pixels of the original of the cell with the largest absolute value; and in words.

    Of cells that the model did not see whole, only those whose middle it saw are looked at.

    Args:
        row: the image.
        blue: what a negative cell is; goes on from the words for its place.
    """
    height, width = row.heatmap.shape
    left, top = float(row.heatmap_box[0]), float(row.heatmap_box[1])
    cell_width, cell_height = cell_size((height, width), row.heatmap_box)
    x = left + (np.arange(width) + 0.5) * cell_width
    y = top + (np.arange(height) + 0.5) * cell_height
    inside_x = (x >= max(0.0, row.box[0])) & (x <= min(row.width, row.box[2]))
    inside_y = (y >= max(0.0, row.box[1])) & (y <= min(row.height, row.box[3]))
    values = np.where(inside_y[:, None] & inside_x[None, :], np.abs(np.nan_to_num(row.heatmap)), -1.0)
    index_y, index_x = np.unravel_index(int(values.argmax()), values.shape)
    place = (left + index_x * cell_width, top + index_y * cell_height, cell_width, cell_height)
    if values.max() <= 0:
        return place, "no evidence anywhere"
    third_x = ("left", "middle", "right")[min(2, int(3 * x[index_x] / row.width))]
    third_y = ("upper", "middle", "lower")[min(2, int(3 * y[index_y] / row.height))]
    if third_x == third_y:
        where = "in the middle"
    elif "middle" in (third_x, third_y):
        side = {"upper": "at the top", "lower": "at the bottom", "left": "at the left", "right": "at the right"}
        where = side[third_x if third_y == "middle" else third_y]
    else:
        where = f"at the {third_y} {third_x}"
    return place, f"strongest {where}{blue if row.heatmap[index_y, index_x] < 0 else ''}"


def looked_at(row: Row) -> float:
    """Share of the image's area that the model saw."""
    left, top, right, bottom = (float(value) for value in row.box)
    width = max(0.0, min(right, row.width) - max(left, 0))
    height = max(0.0, min(bottom, row.height) - max(top, 0))
    return width * height / (row.width * row.height)


def link_to(uri: str, output: Folder) -> str | None:
    """Return an address that a browser may follow from the pages: http(s), or a relative path between local files.

    Anything else is text: a scheme that the browser does not open, or one that it runs, or an address with a secret.
    """
    if secret_in(uri):
        return None
    if scheme(uri) in ("http", "https"):
        parts = urlsplit(uri)
        return quote(uri, safe="%/:?#[]@!$&'()*+,;=~") if parts.hostname else None
    if is_local(uri) and output.local:
        path = posixpath.relpath(local_path(uri), os.path.realpath(output.path))
        return quote(path if path.startswith("../") else f"./{path}")
    return None


def _webp(pixels: NDArray[np.uint8], **options: Any) -> bytes:
    """Encode a photograph with some loss, and a heatmap with none: a lossy one has steps and bleeds at its edges."""
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "WEBP", **options)
    return data.getvalue()


def as_rows(table: Any, ranks: Iterable[int], below: Iterable[float], listed: Iterable[ListedImage]) -> Iterator[Row]:
    """Rows of a ``results`` table."""
    heatmaps = [heatmap for chunk in table["heatmap"].chunks for heatmap in chunk.to_numpy_ndarray()]
    plain = table.drop_columns("heatmap").to_pylist()
    for row, heatmap, rank, share, image in zip(plain, heatmaps, ranks, below, listed, strict=True):
        yield Row(
            row["image_id"],
            row["uri"],
            row["width"],
            row["height"],
            np.array(row["box"], np.float32),
            np.array(row["heatmap_box"], np.float32),
            heatmap,
            row["score"],
            row["score_std"],
            int(rank),
            float(share),
            image,
        )

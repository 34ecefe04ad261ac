"""First stage: address → pixels. An image that cannot be used becomes a row with its reason, never an exception."""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import UTC, datetime

import numpy as np
import pyarrow as pa

from ais.config import PngSelection
from ais.decoding import DecoderPool, Decoding
from ais.errors import ChangedError, ImageError
from ais.images import DecodeReason, Geometry, Limits
from ais.listing import ListedImage
from ais.pipeline.columns import pack
from ais.pipeline.columns import replace as replace_columns
from ais.secrets import redact
from ais.storage import Storage, explain

_ERROR_LENGTH = 500
CHANGED = "changed since it was listed"


@dataclass(frozen=True)
class Fetched:
    """What became of one address; ``box`` is ``None`` where ``stage`` names the stage that failed."""

    width: int = 0
    height: int = 0
    box: np.ndarray | None = None
    picture: np.ndarray | None = None
    stage: str = ""
    reason: str = ""
    error: str = ""
    fetch_s: float = 0.0
    decode_s: float = 0.0


@dataclass(frozen=True)
class Pictures:
    """Which images carry a copy for display along, and how large.

    Args:
        selection: of ``png.select``; ``top`` and ``bottom`` are known only when all scores are, and carry none.
        max_side: longest side in pixels.
    """

    selection: PngSelection
    max_side: int

    def wanted(self, image_id: int) -> bool:
        """Whether this image gets a picture in the stream; the same images on every start of a run."""
        if self.selection.kind == "sample":
            assert self.selection.share is not None
            return _uniform(image_id) < self.selection.share
        return self.selection.kind == "all"


def _uniform(image_id: int) -> float:
    """A number in [0, 1) that looks random and depends on the id alone (the finaliser of SplitMix64)."""
    mask = 2**64 - 1
    x = (image_id + 0x9E3779B97F4A7C15) & mask
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
    return (x ^ (x >> 31)) / 2**64


def listing_table(images: Sequence[ListedImage]) -> pa.Table:
    """Make the table that `FetchDecode` takes; ``image_id`` counts from 0, in the order of the images."""
    return pa.table(
        {
            "image_id": pa.array(range(len(images)), pa.int64()),
            "uri": pa.array([image.uri for image in images], pa.string()),
            "size": pa.array([image.size for image in images], pa.int64()),
            "etag": pa.array([image.etag for image in images], pa.string()),
            "mtime": pa.array([image.mtime for image in images], pa.float64()),
        }
    )


class FetchDecode:
    """Callable stage, held by an actor: table with ``image_id, uri, size`` → the same with pixels.

    What else a listing says (``etag, mtime``) is held against what is read, where the table has it.

    Args:
        geometry: brings an image to the backbone's input.
        limits: on bytes and pixels.
        storage: how to reach the addresses.
        threads: images read at once.
        pictures: display copies to carry along, if any.
        decoders: processes that decode; see `ais.decoding`.
    """

    def __init__(
        self,
        geometry: Geometry,
        limits: Limits,
        storage: Storage,
        threads: int,
        pictures: Pictures | None = None,
        decoders: int = 2,
    ) -> None:
        self.side = geometry.input_size
        self._limits = limits
        self._storage = storage.for_threads(threads)
        self._pictures = pictures
        self._pool = ThreadPoolExecutor(threads)
        decoding = Decoding(geometry, limits) if pictures is None else Decoding(geometry, limits, pictures.max_side)
        self._decoders = DecoderPool(decoding, decoders)

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Fetch and decode a batch; every row comes back."""
        nothing = [None] * batch.num_rows
        ids, uris, sizes, etags, mtimes = (
            batch[name].to_pylist() if name in batch.column_names else nothing
            for name in ("image_id", "uri", "size", "etag", "mtime")
        )
        pixels = np.zeros((batch.num_rows, self.side, self.side, 3), np.uint8)
        rows = list(self._pool.map(self._one, ids, uris, sizes, etags, mtimes, pixels))
        boxes = np.zeros((len(rows), 4), np.float32)
        for index, row in enumerate(rows):
            if row.box is None:
                pixels[index] = 0
            else:
                boxes[index] = row.box
        pictures = [None if row.picture is None else row.picture.tobytes() for row in rows]
        shapes = [(0, 0) if row.picture is None else row.picture.shape[:2] for row in rows]
        return replace_columns(
            batch,
            ["size", "mtime"],
            width=pa.array([row.width for row in rows], pa.int32()),
            height=pa.array([row.height for row in rows], pa.int32()),
            box=pack(boxes),
            pixels=pack(pixels),
            picture=pa.array(pictures, pa.large_binary()),
            picture_height=pa.array([height for height, _ in shapes], pa.int32()),
            picture_width=pa.array([width for _, width in shapes], pa.int32()),
            stage=pa.array([row.stage for row in rows], pa.string()),
            reason=pa.array([row.reason for row in rows], pa.string()),
            error=pa.array([row.error for row in rows], pa.string()),
            fetch_s=pa.array([row.fetch_s for row in rows], pa.float32()),
            decode_s=pa.array([row.decode_s for row in rows], pa.float32()),
        )

    def _one(
        self, image_id: int, uri: str, size: int | None, etag: str | None, mtime: float | None, pixels: np.ndarray
    ) -> Fetched:
        started = time.perf_counter()
        fetched = started
        try:
            data = read_image(uri, size, self._limits, self._storage, etag=etag, mtime=mtime)
            fetched = time.perf_counter()
            picture = self._pictures is not None and self._pictures.wanted(image_id)
            found = self._decoders.decode(data, picture, into=pixels)
            result = Fetched(found.width, found.height, found.box, found.picture)
        except ImageError as error:
            result = Fetched(stage=error.stage, reason=error.reason, error=str(error)[:_ERROR_LENGTH])
        if result.stage == "fetch":
            fetched = time.perf_counter()
        return replace(result, fetch_s=fetched - started, decode_s=time.perf_counter() - fetched)


def read_image(
    uri: str,
    size: int | None,
    limits: Limits,
    storage: Storage,
    *,
    etag: str | None = None,
    mtime: float | None = None,
) -> bytes:
    """Read the bytes of one image, at most one more than the limit.

    Passing faults (throttling, resets, timeouts, bodies that end early) are tried again; what will not change is not.
    An image that is no longer the one that was listed is refused: a row says which version it is of.

    Args:
        uri: address.
        size: in bytes, as listed.
        limits: on the size.
        storage: how to reach it.
        etag: as listed; held against objects of S3.
        mtime: as listed; held against local files.

    Raises:
        ImageError: with stage ``"fetch"`` and a reason, or ``"decode"`` where it is larger than the limit.
    """
    if size is not None and size > limits.max_bytes:
        raise ImageError("decode", DecodeReason.TOO_MANY_BYTES, f"{size:,} bytes, the limit is {limits.max_bytes:,}")
    try:
        place = storage.open(uri)
        if place.local:
            _check_local(os.stat(place.path), mtime)
        data = place.read_bytes(limits.max_bytes, etag=etag)
    except FileNotFoundError as error:
        raise ImageError("fetch", "not found", redact(str(error))) from error
    except PermissionError as error:
        raise ImageError("fetch", "permission denied", redact(str(error))) from error
    except ChangedError as error:
        raise ImageError("fetch", CHANGED, str(error)) from error
    except ImageError:
        raise
    except Exception as error:  # every filesystem raises its own kinds
        raise ImageError("fetch", "unreadable", explain(error)) from error
    if size is not None and len(data) != size:
        raise ImageError("fetch", CHANGED, f"it had {size:,} bytes, and has {len(data):,}")
    return data


def _check_local(found: os.stat_result, mtime: float | None) -> None:
    if not stat.S_ISREG(found.st_mode):
        raise ImageError("fetch", "not a file", "a folder or a special file")
    # Lists may give whole seconds.
    if mtime is not None and abs(found.st_mtime - mtime) >= (1 if mtime.is_integer() else 1e-3):
        then, now = (datetime.fromtimestamp(when, UTC).isoformat(" ") for when in (mtime, found.st_mtime))
        raise ImageError("fetch", CHANGED, f"it was last changed at {then}, and is at {now}")

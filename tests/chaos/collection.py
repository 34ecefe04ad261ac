"""A seeded collection of small images, some of them bad in every way of the zoo, on S3 and as local files."""

from __future__ import annotations

import hashlib
import io
import itertools
import random
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from tests.s3.server import S3Server
from tests.zoo import DEADLY, deadly, write_zoo

BAD_SHARE = 0.06
NOT_FOUND, CHANGED = "fetch: not found", "fetch: changed since it was listed"
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF")


@dataclass(frozen=True)
class Item:
    """One image of the collection.

    Args:
        name: its key below the collection, or a whole address.
        expect: ``""`` of a good one, otherwise stage and reason of its row in errors.
        data: ``None`` where nothing is there.
        listed: what was there when it was listed, if that was something else.
        kind: of bad images, numbered.
    """

    name: str
    expect: str
    data: bytes | None
    listed: bytes | None = None
    kind: int = 0


def collect(count: int, seed: int) -> list[Item]:
    """The collection: always the same of the same seed, bad images anywhere in it, all kinds equally often."""
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        kinds: list[tuple[str, str, bytes | None, bytes | None]] = [
            (case.path.suffix, f"decode: {case.expect.value}", case.path.read_bytes(), None)
            for case in write_zoo(Path(folder))
            if case.expect != "ok"
        ]
    kinds += [(".ppm", f"decode: {reason.value}", deadly(way), None) for way, reason in DEADLY.items()]
    kinds += [(".png", NOT_FOUND, None, None), (".png", CHANGED, _picture(0, 0)[1], _picture(0, 1)[1])]
    kinds += [("bogus://", "fetch: unreadable", None, None)]
    places = rng.sample(range(count), max(len(kinds), round(count * BAD_SHARE)))
    bad = dict(zip(places, itertools.cycle(enumerate(kinds)), strict=False))
    items = []
    for number in range(count):
        if number in bad:
            kind, (suffix, expect, data, listed) = bad[number]
            name = f"{suffix}{number}" if "://" in suffix else f"{number % 7}/{number:06d}{suffix}"
            items.append(Item(name, expect, data, listed, kind))
        else:
            suffix, data = _picture(seed, number)
            items.append(Item(f"{number % 7}/{number:06d}.{suffix}", "", data))
    return items


def _picture(seed: int, number: int) -> tuple[str, bytes]:
    """Format and bytes of a picture of random blotches."""
    rng = np.random.default_rng((seed, number))
    levels = Image.fromarray(rng.integers(0, 256, (5, 5, 3), np.uint8))
    kind = _FORMATS[number % len(_FORMATS)]
    file = io.BytesIO()
    width, height = (int(side) for side in rng.integers(24, 96, 2))
    levels.resize((width, height), Image.Resampling.NEAREST).save(file, kind)
    return kind.lower(), file.getvalue()


def put(items: list[Item], s3: S3Server, address: str) -> str:
    """Write the collection to S3, with a list of it that knows sizes and etags; return the list's address."""

    def one(item: Item) -> None:
        if item.data is not None:
            s3.put(f"{address}/{item.name}", item.data)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(one, items))
    seen = [item.listed or item.data for item in items]
    listing = io.BytesIO()
    columns = {
        "uri": [item.name for item in items],
        "size": [None if data is None else len(data) for data in seen],
        "etag": [None if data is None else hashlib.md5(data).hexdigest() for data in seen],
    }
    pq.write_table(pa.table(columns), listing)
    s3.put(f"{address}/list.parquet", listing.getvalue())
    return f"{address}/list.parquet"


def put_locally(items: list[Item], folder: Path) -> Path:
    """Write the good images to a folder, with a list of them in the same order; return the list."""
    good = [item for item in items if not item.expect]
    for item in good:
        path = folder / item.name
        path.parent.mkdir(parents=True, exist_ok=True)
        assert item.data is not None
        path.write_bytes(item.data)
    pq.write_table(pa.table({"uri": [item.name for item in good]}), folder / "list.parquet")
    return folder / "list.parquet"

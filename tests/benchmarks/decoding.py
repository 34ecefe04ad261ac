"""What isolation costs: decoding in child processes against decoding in threads, side by side.

python -m tests.benchmarks.decoding

Photograph-like JPEGs through the fetch stage, from a local folder, as `ais.pipeline.fetch` runs it: threads that read,
and either the same threads decode, or children do. Counted is processor time, of this process and of its children, so
that other work on the machine changes little; rates are images per core and second. The order is A B B A.
"""

from __future__ import annotations

import io
import os
import resource
import statistics
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from ais.decoding import DecoderPool, Decoding
from ais.images import Geometry, Limits
from ais.pipeline.fetch import read_image
from ais.storage import Storage

IMAGES, THREADS, CHILDREN, ROUNDS = 200, 16, 2, 6
SIZES = {"500 × 375": (500, 375), "1600 × 1200": (1600, 1200)}
GEOMETRY = Geometry(224, 256, "bilinear")


def photograph(rng: np.random.Generator, width: int, height: int) -> bytes:
    """A JPEG about as rich in detail as a photograph: noise of every scale."""
    pixels = np.zeros((height, width, 3), np.float32)
    for scale in (4, 16, 64, 256):
        coarse = rng.normal(0, 25, (height // scale + 2, width // scale + 2, 3)).astype(np.float32)
        for channel in range(3):
            layer = Image.fromarray(coarse[..., channel]).resize((width, height), Image.Resampling.BICUBIC)
            pixels[..., channel] += np.asarray(layer)
    data = io.BytesIO()
    Image.fromarray(np.clip(pixels + 128, 0, 255).astype(np.uint8)).save(data, "JPEG", quality=85)
    return data.getvalue()


def processor_s() -> float:
    """Seconds of this process and of children that ended."""
    own, ended = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return own.ru_utime + own.ru_stime + ended.ru_utime + ended.ru_stime


def measure(uris: list[str], decoding: Decoding, pool: DecoderPool | None) -> tuple[float, float]:
    """Processor and wall seconds of reading and decoding all images."""
    storage, limits = Storage(), Limits()

    pixels = np.zeros((len(uris), 224, 224, 3), np.uint8)  # of a batch, as the stage hands it on

    def one(uri: str, row: np.ndarray) -> None:
        data = read_image(uri, None, limits, storage)
        if pool is None:
            row[:] = decoding(data).pixels
        else:
            pool.decode(data, into=row)

    before, started = processor_s() + (children_s(pool) if pool else 0), time.perf_counter()
    with ThreadPoolExecutor(THREADS) as threads:
        list(threads.map(one, uris, pixels))
    wall = time.perf_counter() - started
    return processor_s() + (children_s(pool) if pool else 0) - before, wall


def children_s(pool: DecoderPool) -> float:
    """Processor seconds of the children that live."""
    ticks = 0
    for pid in pool.pids():
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def main() -> None:
    """Print a table."""
    print(f"{IMAGES} JPEGs, {THREADS} threads, {CHILDREN} children, median of {ROUNDS} rounds (smallest to largest)\n")
    print("| image | threads, images per core·s | children, images per core·s | ratio | by the clock |")
    print("|---|---|---|---|---|")
    rng = np.random.default_rng(0)
    for name, (width, height) in SIZES.items():
        with tempfile.TemporaryDirectory() as folder:
            uris = []
            for number in range(IMAGES):
                path = Path(folder) / f"{number}.jpg"
                path.write_bytes(
                    photograph(rng, width, height) if number < 20 else Path(uris[number % 20]).read_bytes()
                )
                uris.append(str(path))
            decoding = Decoding(GEOMETRY, Limits())
            pool = DecoderPool(decoding, CHILDREN)
            measure(uris, decoding, None)
            measure(uris, decoding, pool)
            here, there = [], []
            for number in range(ROUNDS):
                for in_children in (False, True) if number % 2 else (True, False):
                    if in_children:
                        there.append(measure(uris, decoding, pool))
                    else:
                        here.append(measure(uris, decoding, None))
            pool.close()
        ratios = [a[0] / b[0] for a, b in zip(here, there, strict=True)]
        walls = [a[1] / b[1] for a, b in zip(here, there, strict=True)]
        rates = [IMAGES / statistics.median(seconds for seconds, _ in results) for results in (here, there)]
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        print(f"| {name} | {rates[0]:.0f} | {rates[1]:.0f} | {spread} | {statistics.median(walls):.2f} |", flush=True)


if __name__ == "__main__":
    main()

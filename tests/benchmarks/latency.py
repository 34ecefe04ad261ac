"""Does an object store that takes 100 ms to answer keep the network waiting?

Moto's S3 in a process of its own, behind a proxy that waits before every answer. The fetching stage reads and decodes
(`ais.pipeline.fetch.FetchDecode`, 16 and 64 threads) as in an actor; what it delivers is held against what a core of
this machine can score, and against the most that so many requests at once can give (threads ÷ latency).
"""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from ais.backbones import get_spec
from ais.explainer import geometry_of
from ais.images import Limits
from ais.pipeline.fetch import FetchDecode
from ais.storage import Storage
from tests.benchmarks.job_against_loop import make_photographs
from tests.benchmarks.tables import grid, paragraph
from tests.s3.proxy import FaultyProxy
from tests.s3.server import S3Server

LATENCY_S = 0.1
IMAGES = 256
BATCH = 64


def rows() -> list[dict[str, Any]]:
    """Measure with few and many threads."""
    spec = get_spec("barlow_twins")
    geometry = geometry_of(spec, "center_crop")
    found = []
    with (
        S3Server() as s3,
        FaultyProxy(s3.endpoint_url, latency_s=LATENCY_S) as proxy,
        tempfile.TemporaryDirectory() as folder,
    ):
        bucket = s3.create_bucket("photographs")
        make_photographs(Path(folder), 16)
        files = [file.read_bytes() for file in sorted(Path(folder).iterdir())]
        for index in range(IMAGES):
            s3.put(f"{bucket}/{index:04d}.jpg", files[index % len(files)])
        os.environ |= s3.environment(proxy.endpoint_url)
        storage = Storage(endpoint_url=proxy.endpoint_url)
        table = pa.table(
            {
                "image_id": np.arange(IMAGES),
                "uri": [f"{bucket}/{index:04d}.jpg" for index in range(IMAGES)],
                "size": pa.nulls(IMAGES, pa.int64()),
            }
        )
        for threads in (16, 64):
            stage = FetchDecode(geometry, Limits(), storage, threads)
            stage(table.slice(0, threads))  # connections, decoders
            started = time.perf_counter()
            failed = 0
            for start in range(0, IMAGES, BATCH):
                batch = stage(table.slice(start, BATCH))
                failed += sum(map(bool, batch["stage"].to_pylist()))
            seconds = time.perf_counter() - started
            assert not failed, f"{failed} images could not be fetched: {batch['error'][0]}"
            found.append(
                {
                    "threads": threads,
                    "latency_ms": round(1000 * LATENCY_S),
                    "images_per_s": round(IMAGES / seconds, 1),
                    "at_most": round(threads / LATENCY_S),
                }
            )
    return found


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    text = f"""
        **An object store that takes {rows[0]["latency_ms"]} ms to answer** (moto behind a proxy that waits, both on the
        same two cores): what one fetching actor delivers, decoded. `compute.fetch_threads` is 16 by default.
        """
    cells = [(row["threads"], row["images_per_s"], row["at_most"]) for row in rows]
    return paragraph(text) + "\n" + grid(("threads", "images/s", "threads ÷ latency"), cells)

"""Peak memory of the heatmaps job for some images and for ten times as many: it must not grow with the collection.

    python -m tests.benchmarks.memory 1000

The real command line with a private Ray of two CPUs, on a list that names the same few files again and again. All are
watched all the time; of memory that processes share (the object store, libraries) each is charged its part
(PSS, Linux), so that the sum is what the machine gives.
"""

from __future__ import annotations

import re
import shutil
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from ais.runs import Tally
from tests.kills import Job, Process, descendants
from tests.tiny import save_tiny_head

FILES, BOUND = 50, 1.15
_EVERY_S = 0.5
_COMMAND = """
import sys
import tests.tiny
import ray
from ais.config import run_job
from jobs.heatmaps import main
ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=300 * 2**20)
run_job(main)
"""


@dataclass(frozen=True)
class Peak:
    """Largest memory at any moment, in MiB.

    Args:
        everything: all processes of the job and its Ray together.
        driver: the job's own process.
        workers: all of Ray's workers together.
        seconds: that the job took.
    """

    everything: float
    driver: float
    workers: float
    seconds: float


def measure(root: Path, images: int) -> Peak:
    """Run the job over so many images and watch it."""
    pq.write_table(pa.table({"uri": [f"{number % FILES}.jpg" for number in range(images)]}), root / "list.parquet")
    arguments = [f"images={root}/list.parquet", f"head={root}/head", f"output={root}/out", f"run_id=of-{images}"]
    started = time.monotonic()
    job = Job([*arguments, "png.max_side=32"], {"RAY_TMPDIR": str(root / "r")}, ["-c", _COMMAND])
    peaks: dict[str, int] = defaultdict(int)
    try:
        while job.code is None:
            kinds: dict[str, int] = defaultdict(int)
            for process in [Process.of(job.pid), *descendants(job.pid)]:
                if process is None:
                    continue
                kind = "driver" if process.pid == job.pid else "worker" if "ray::" in process.title else "ray"
                kinds[kind] += _pss(process.pid)
            for kind, size in {**kinds, "everything": sum(kinds.values())}.items():
                peaks[kind] = max(peaks[kind], size)
            time.sleep(_EVERY_S)
        assert job.code == 0, job.said()
    finally:
        job.end()
    mib = {kind: size / 1024 for kind, size in peaks.items()}
    return Peak(mib["everything"], mib["driver"], mib["worker"], time.monotonic() - started)


def _pss(pid: int) -> int:
    """Proportional share of memory of a process, in KiB; 0 if it has ended."""
    try:
        match = re.search(r"^Pss:\s+(\d+) kB", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.MULTILINE)
    except OSError:
        return 0
    return int(match[1]) if match else 0


def bytes_an_image(images: int = 10_000_000) -> float:
    """Memory that accounting keeps of each listed image."""
    return Tally(images)._times.nbytes / images


def main() -> int:
    """Measure, print a table, and return 0 if nothing grows by more than the bound."""
    images = int(sys.argv[1]) if len(sys.argv) > 1 else 1000
    root = Path(tempfile.mkdtemp(prefix="mem-", dir="/tmp"))  # sockets below it: the path has to be short
    try:
        save_tiny_head(root / "head")
        rng = np.random.default_rng(0)
        for number in range(FILES):
            pixels = rng.integers(0, 256, (480, 640, 3), np.uint8)
            Image.fromarray(pixels).save(root / f"{number}.jpg")
        few, many = measure(root, images), measure(root, 10 * images)
    finally:
        shutil.rmtree(root, ignore_errors=True)
    print(f"| peak memory (PSS), MiB | {images:,} images | {10 * images:,} images | ratio |\n|---|---|---|---|")
    ratios = []
    for name in ("everything", "driver", "workers"):
        less, more = getattr(few, name), getattr(many, name)
        ratios.append(more / less)
        print(f"| {name} | {less:,.0f} | {more:,.0f} | {more / less:.3f} |")
    print(f"| seconds | {few.seconds:.0f} | {many.seconds:.0f} | |")
    print(f"\nAccounting keeps {bytes_an_image():g} byte of each listed image, and so does the record of what is done.")
    return 0 if max(ratios) <= BOUND else 1


if __name__ == "__main__":
    sys.exit(main())

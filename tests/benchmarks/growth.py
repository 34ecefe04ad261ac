"""More actors, and more images: what stays flat.

*Actors*: the job with 1, 2 and 4 scoring actors of one thread each, on a cluster of as many logical CPUs. This machine
may have fewer cores than that: then the last ones show what sharing costs, not what growing gives.
*Images*: the job over lists of more and more images with a tiny backbone, so that everything around the network counts:
listing, manifest, fetching, decoding, blocks, shards, accounting. Memory is that of the driver and of all processes.

    python -m tests.benchmarks.growth 100000    a single size, printed
"""

from __future__ import annotations

import csv
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.benchmarks.processes import Watched
from tests.benchmarks.tables import grid, paragraph

ACTORS = (1, 2, 4)
ACTOR_IMAGES = 160
SIZES = (1_000, 10_000)
FILES = 500


def rows() -> list[dict[str, Any]]:
    """Measure actors, then sizes."""
    from tests.benchmarks.job_against_loop import BACKBONE, make_head, make_photographs

    folder = Path(tempfile.mkdtemp(prefix="g", dir="/tmp"))  # Ray's sockets lie below it: the path has to be short
    try:
        make_photographs(folder / "images", ACTOR_IMAGES)
        make_head(folder / "head", BACKBONE)
        found = []
        for actors in ACTORS:
            given = [f"images={folder / 'images'}", f"head={folder / 'head'}", f"compute.scoring_actors={actors}"]
            found.append({"actors": actors, **_job(folder, actors, given)})
        return found + [of_size(images, folder) for images in SIZES]
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def of_size(images: int, folder: Path) -> dict[str, Any]:
    """Run the job over a list of so many images, which name a few files again and again."""
    from tests.benchmarks.job_against_loop import make_head, make_photographs
    from tests.tiny import TINY

    if not (folder / "tiny").exists():
        make_photographs(folder / "tiny", FILES, (160, 120))
        make_head(folder / "tiny-head", TINY)
    files = sorted((folder / "tiny").iterdir())
    listed = folder / f"{images}.csv"
    with listed.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["uri"])
        writer.writerows([files[index % FILES]] for index in range(images))
    given = [f"images={listed}", f"head={folder / 'tiny-head'}", "compute.batch_size=64"]
    return {"images": images, **_job(folder, os.cpu_count() or 1, given)}


def _job(folder: Path, cpus: int, given: list[str]) -> dict[str, Any]:
    output = folder / "out"
    command = ["-m", "tests.benchmarks.growth", "job", str(cpus), *given, f"output={output}", "png.select=none"]
    with Watched(command, {**os.environ, "RAY_TMPDIR": str(folder / "r")}) as watched:
        watched.wait()
    (summary_file,) = output.glob("runs/*/summary.json")
    summary = json.loads(summary_file.read_text())
    shutil.rmtree(output)
    start = summary["last_start"]
    wall_s = watched.seen[-1].at - watched.started
    last = watched.seen[-1]
    count = summary["images"]
    return {
        "images": count,
        "images_per_s": start["steady_images_per_s"],
        "wall_s": round(wall_s, 1),
        "before_pipeline_s": round(wall_s - start["pipeline_s"], 1),
        "first_batch_s": round(wall_s - start["pipeline_s"] + start["first_batch_s"], 1),
        "cpu_ms_per_image": round(1000 * sum(last.cpu_s.values()) / count, 2),
        "driver_peak_MiB": round(max(look.rss_bytes.get("driver", 0) for look in watched.seen) / 2**20),
        "peak_MiB": round(max(sum(look.rss_bytes.values()) for look in watched.seen) / 2**20),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    text = f"""
        **Growth** on {os.cpu_count()} cores. More scoring actors, one thread each ({ACTOR_IMAGES} images, ResNet-50);
        and more images (a tiny backbone, so that everything else counts). Memory without what processes share.
        """
    cells = [
        (
            f"{row['actors']} scoring actors" if "actors" in row else f"{row['images']:,} images",
            row["images_per_s"],
            row["cpu_ms_per_image"],
            row["first_batch_s"],
            row["wall_s"],
            row["driver_peak_MiB"],
            row["peak_MiB"],
        )
        for row in rows
    ]
    header = ("", "images/s, steady", "processor ms an image, start included", "first batch after, s", "all, s")
    return paragraph(text) + "\n" + grid((*header, "driver, MiB", "all processes, MiB"), cells)


def _run_job(cpus: int, given: list[str]) -> int:
    """The job on a private cluster of so many logical CPUs; in a process of its own."""
    import logging

    import ray

    from ais.config import HeatmapsConfig, load_config
    from jobs.heatmaps import run
    from tests.tiny import TINY

    assert TINY.name == "tiny"  # registered
    ray.init(address="local", num_cpus=cpus, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    return run(load_config(HeatmapsConfig, given, doc="").config)


def _one_size(images: int) -> int:
    folder = Path(tempfile.mkdtemp(prefix="g", dir="/tmp"))
    try:
        print(json.dumps(of_size(images, folder), indent=1))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return 0


if __name__ == "__main__":
    if sys.argv[1] == "job":
        sys.exit(_run_job(int(sys.argv[2]), sys.argv[3:]))
    sys.exit(_one_size(int(sys.argv[1])))

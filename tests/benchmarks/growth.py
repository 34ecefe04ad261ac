"""More actors, and more images: what stays flat.

*Actors*: the job with 1, 2 and 4 scoring actors of one thread each, on a cluster of as many logical CPUs. This machine
may have fewer cores than that: then the last ones show what sharing costs, not what growing gives.
*Images*: the job over lists of more and more images with a tiny backbone, so that everything around the network counts:
listing, manifest, fetching, decoding, blocks, shards, accounting. The lists name a few files again and again.

    python -m tests.benchmarks.growth 1000 100000    these sizes; exit code 1 if memory grows by more than 15%
"""

from __future__ import annotations

import csv
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.benchmarks.processes import Watched
from tests.benchmarks.tables import grid, paragraph

ACTORS = (1, 2, 4)
ACTOR_IMAGES = 160
SIZES = (1_000, 10_000, 100_000)
FILES = 500
# Small, so that it is full, and does not grow, in the smallest run already.
OBJECT_STORE_BYTES = 300 * 2**20
BOUND = 1.15
ACTOR_KINDS = ("fetch", "score")


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
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return found + of_sizes(SIZES)


def of_sizes(sizes: Sequence[int]) -> list[dict[str, Any]]:
    """Run the job over lists of so many images."""
    from tests.benchmarks.job_against_loop import make_head, make_photographs
    from tests.tiny import TINY

    folder = Path(tempfile.mkdtemp(prefix="g", dir="/tmp"))
    try:
        make_photographs(folder / "images", FILES, (160, 120))
        make_head(folder / "head", TINY)
        files = sorted((folder / "images").iterdir())
        found = []
        for images in sizes:
            with (folder / "list.csv").open("w", newline="") as file:
                writer = csv.writer(file)
                writer.writerow(["uri"])
                writer.writerows([files[index % FILES]] for index in range(images))
            given = [f"images={folder / 'list.csv'}", f"head={folder / 'head'}", "compute.batch_size=64"]
            given.append("compute.scoring_actors=2")  # few images would have one, and less memory
            found.append(_job(folder, os.cpu_count() or 1, given))
        return found
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _job(folder: Path, cpus: int, given: list[str]) -> dict[str, Any]:
    output = folder / "out"
    command = ["-m", "tests.benchmarks.growth", "job", str(cpus), *given, f"output={output}", "png.select=none"]
    with Watched(command, {**os.environ, "RAY_TMPDIR": str(folder / "r")}) as watched:
        watched.wait()
    (summary_file,) = output.glob("runs/*/summary.json")
    summary = json.loads(summary_file.read_text())
    # The summary is the last that is written; Ray's farewell comes after it.
    ended_s = summary_file.stat().st_mtime - watched.started
    shutil.rmtree(output)
    start = summary["last_start"]
    last = watched.seen[-1]
    count = summary["images"]
    return {
        "images": count,
        "images_per_s": start["steady_images_per_s"],
        "ended_s": round(ended_s, 1),
        "before_pipeline_s": round(ended_s - start["pipeline_s"], 1),
        "first_batch_s": round(ended_s - start["pipeline_s"] + start["first_batch_s"], 1),
        "cpu_ms_per_image": round(1000 * sum(last.cpu_s.values()) / count, 2),
        "peak_MiB": {
            "driver": _peak_mib(watched, ("driver",)),
            "actors": _peak_mib(watched, ACTOR_KINDS),
            "all": _peak_mib(watched, tuple({kind for look in watched.seen for kind in look.bytes})),
        },
    }


def _peak_mib(watched: Watched, kinds: Sequence[str]) -> int:
    return round(max(sum(look.bytes.get(kind, 0) for kind in kinds) for look in watched.seen) / 2**20)


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    text = f"""
        **Growth** on {os.cpu_count()} cores. More scoring actors, one thread each ({ACTOR_IMAGES} images, ResNet-50);
        and more images (a tiny backbone and an object store of {OBJECT_STORE_BYTES >> 20} MiB, so that everything else
        counts). Memory is the largest at any moment; what processes share is divided among them.
        """
    cells = [
        (
            f"scoring actors: {row['actors']}" if "actors" in row else f"{row['images']:,} images",
            row["images_per_s"],
            row["cpu_ms_per_image"],
            row["first_batch_s"],
            row["ended_s"],
            *(f"{row['peak_MiB'][kind]:,}" for kind in ("driver", "actors", "all")),
        )
        for row in rows
    ]
    header = ("", "images/s, steady", "processor ms an image, start included", "first batch after, s", "all, s")
    return paragraph(text) + "\n" + grid((*header, "driver, MiB", "actors, MiB", "all processes, MiB"), cells)


def _run_job(cpus: int, given: list[str]) -> int:
    """The job on a private cluster of so many logical CPUs; in a process of its own."""
    import logging

    import ray

    from ais.command_line import load_config
    from ais.config import HeatmapsConfig
    from jobs.heatmaps import run
    from tests.tiny import TINY

    assert TINY.name == "tiny"  # registered
    ray.init(
        address="local",
        num_cpus=cpus,
        object_store_memory=OBJECT_STORE_BYTES,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )
    return run(load_config(HeatmapsConfig, given, doc="").config)


def main(sizes: Sequence[int]) -> int:
    """Measure these sizes, print them, and return 0 if memory does not grow by more than the bound."""
    found = of_sizes(sizes)
    first, last = found[0], found[-1]
    ratios = {kind: last["peak_MiB"][kind] / first["peak_MiB"][kind] for kind in first["peak_MiB"]}
    print(table(found))
    print(
        f"{last['images'] / first['images']:g} times the images: "
        + ", ".join(f"{kind} {ratio:.3f} times the memory" for kind, ratio in ratios.items())
    )
    return 0 if max(ratios.values()) <= BOUND else 1


if __name__ == "__main__":
    if sys.argv[1] == "job":
        sys.exit(_run_job(int(sys.argv[2]), sys.argv[3:]))
    sys.exit(main([int(size) for size in sys.argv[1:]]))

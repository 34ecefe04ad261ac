"""What a report of a large run costs: time, memory and bytes do not grow with the run as its results do.

`python -m tests.benchmarks.report_size [ROWS …]` writes synthetic runs (real shards and images, random scores) and
makes a report of each in a process of its own. 10,000 and 1,000,000 rows by default, which take 300 MB of disk.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import Image

from ais.runs import Run, results_schema, write_table
from ais.storage import Storage

SHARD_ROWS, IMAGES, SHAPE, SIZE = 4096, 64, (7, 7), (640, 480)


def write_synthetic(place: Path, rows: int) -> str:
    """Write a run of ``rows`` images, which share 64 files; return its address."""
    random = np.random.default_rng(0)
    photos = [place / "photos" / f"{index}.jpg" for index in range(IMAGES)]
    photos[0].parent.mkdir(parents=True)
    for photo in photos:
        coarse = Image.fromarray(random.integers(0, 255, (12, 16, 3), dtype=np.uint8))
        coarse.resize(SIZE).save(photo, quality=88)
    run = Run.at(str(place), "synthetic", Storage())
    facts = {
        "images": rows,
        "listed_at": "",
        "run_id": "synthetic",
        "identity": {"weighting": "positive", "head": None},
        "backbone": "synthetic",
        "layer": {"name": "none", "map_shape": [1, *SHAPE]},
        "weights": {"source": "random", "fingerprint": "0", "seed": 0},
        "untrained": True,
        "versions": {},
    }
    box = np.array([[80, 0, 560, 480]], np.float32)
    for start in range(0, rows, SHARD_ROWS):
        count = min(SHARD_ROWS, rows - start)
        ids = np.arange(start, start + count)
        boxes = pa.FixedSizeListArray.from_arrays(np.repeat(box, count, 0).ravel(), 4)
        columns = {
            "image_id": ids,
            "uri": [str(photos[index % IMAGES]) for index in ids],
            "etag": pa.nulls(count, pa.string()),
            "width": np.full(count, SIZE[0], np.int32),
            "height": np.full(count, SIZE[1], np.int32),
            "box": boxes,
            "heatmap_box": boxes,
            "score": random.normal(5, 1, count).astype(np.float32),
            "score_std": random.gamma(2, 0.1, count).astype(np.float32),
            "heatmap": pa.FixedShapeTensorArray.from_numpy_ndarray(random.random((count, *SHAPE), np.float32)),
            "png": pa.nulls(count, pa.string()),
        }
        write_table(run.results / f"part-{start:010d}.parquet", pa.table(columns, schema=results_schema(SHAPE)))
    (run.folder / "run.json").write_text(json.dumps(facts))
    run.finish({**facts, "finished_at": "2026-11-25"})
    return run.folder.address


def measure(run: str, output: str) -> None:
    """Make the report in this process and print what it took as JSON."""
    from jobs.report import main as report

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.perf_counter()
    assert report([f"run={run}", f"output={output}"]) == 0
    book = json.loads((Path(output) / "report.json").read_text())
    print(
        json.dumps(
            {
                "seconds": round(time.perf_counter() - started, 1),
                "added_mb": round((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1e3),
                "images": book["images"],
                "site_mb": round(book["bytes"] / 1e6, 2),
                "largest_page_mb": round(max(book["pages"].values()) / 1e6, 2),
            }
        )
    )


def main(sizes: list[int]) -> int:
    """Measure each size and print a table."""
    print(
        "| images of the run | results, MB | seconds | memory added, MB | images shown | site, MB | largest page, MB |"
    )
    print("|---|---|---|---|---|---|---|")
    for rows in sizes:
        with tempfile.TemporaryDirectory() as folder:
            run = write_synthetic(Path(folder), rows)
            results = sum(path.stat().st_size for path in (Path(run) / "results").iterdir()) / 1e6
            command = [
                sys.executable,
                "-m",
                __spec__.name if __spec__ else __file__,
                "--measure",
                run,
                f"{folder}/site",
            ]
            out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        found = json.loads(out.splitlines()[-1])
        cells = (f"{rows:,}", f"{results:,.0f}", *found.values())
        print("| " + " | ".join(map(str, cells)) + " |", flush=True)
    return 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        measure(*sys.argv[2:4])
    else:
        sys.exit(main([int(size) for size in sys.argv[1:]] or [10_000, 1_000_000]))

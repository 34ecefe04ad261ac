"""Memory of listing a million images in one folder into a manifest, streamed and whole.

python -m tests.benchmarks.listing [COUNT]

Each measurement is a process of its own; shown is the peak of its resident memory above what it had before it began.
The folder on disk is real, with that many empty files. S3 is simulated: pages of a thousand objects, as
``list_objects_v2`` gives them, cost nothing to make and are listed like real ones. "Whole" is the simple listing that
the tests hold the streamed one equal to.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

COUNT = 1_000_000


def main(arguments: list[str]) -> None:
    """Print a table, or measure one row of it."""
    if len(arguments) == 3:
        print(*measure(*arguments))
        return
    count = int(arguments[0]) if arguments else COUNT
    print(f"{count:,} images in one folder\n\n| where | how | peak above start, MB | seconds |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for number in range(count):
            os.close(os.open(f"{folder}/{number:09d}.jpg", os.O_CREAT | os.O_WRONLY))
        for where, how in (("s3", "streamed"), (folder, "streamed"), (folder, "whole")):
            command = [sys.executable, "-m", "tests.benchmarks.listing", where, how, str(count)]
            row = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
            print(f"| {'S3, simulated' if where == 's3' else 'disk'} | {how} | {row[0]} | {row[1]} |", flush=True)


def measure(where: str, how: str, count: str) -> tuple[int, int]:
    """Peak memory in MB above the start, and seconds."""
    from ais.listing import _walked, _walked_reference
    from ais.runs import Run
    from ais.storage import Folder, Storage
    from tests.unit.test_listing import Pages

    pages: Any = Pages(int(count))
    place = Folder(pages, "bucket/photos") if where == "s3" else Storage().open(where)
    walk = _walked if how == "streamed" else _walked_reference
    with tempfile.TemporaryDirectory() as output:
        run = Run.at(output, "listing", Storage())
        before, started = resident_mb(), time.perf_counter()
        listed = run.set_out(walk(place, Counter()), "", {})
        assert listed == int(count)
        return peak_mb() - before, round(time.perf_counter() - started)


def resident_mb() -> int:
    """Resident memory now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") // 2**20


def peak_mb() -> int:
    """Its peak."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 2**10


if __name__ == "__main__":
    main(sys.argv[1:])

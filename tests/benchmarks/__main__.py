"""`make bench`: measure, print a table, and keep it under `tests/benchmarks/results`."""

from __future__ import annotations

import json
import os
import platform
import sys
from datetime import UTC, datetime
from pathlib import Path

import torch
import torchvision

from tests.benchmarks import explainer_cost

RESULTS = Path(__file__).parent / "results"


def processor() -> str:
    """Name of the processor, and how many cores of it."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    name = models[0] if models else name
    return f"{name}, {os.cpu_count()} cores"


def main() -> int:
    """Run what this machine can and write the table; a backbone's name as argument measures only that."""
    only = sys.argv[1:]
    # One thread: ratios of times on several hang on what else the machine does, OpenMP waiting for the slowest.
    torch.set_num_threads(1)
    where = {
        "machine": processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "date": datetime.now(UTC).date().isoformat(),
        "command": "make bench",
    }
    rows = []
    print("| backbone | layer | maps | forward, ms/image | explainer ÷ forward | one map at a time ÷ explainer |")
    print("|---|---|---|---|---|---|")
    for name, layer in explainer_cost.CASES:
        if only and name not in only:
            continue
        row = explainer_cost.measure(name, layer)
        rows.append(row)
        spread = f"{row['explainer_over_forward']} ({row['low']}–{row['high']})"
        speed_up = f"{row['one_map_at_a_time_over_explainer']}×"
        cells = (row["backbone"], f"`{row['layer']}`", row["maps"], row["forward_ms_per_image"], spread, speed_up)
        print("| " + " | ".join(map(str, cells)) + " |", flush=True)
    if not only:
        RESULTS.mkdir(exist_ok=True)
        file = RESULTS / f"explainer-cost-cpu{os.cpu_count()}-torch{torch.__version__.split('+')[0]}.json"
        file.write_text(json.dumps({**where, "rows": rows}, indent=1) + "\n")
        print(f"\nkept in {file.relative_to(Path.cwd())}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

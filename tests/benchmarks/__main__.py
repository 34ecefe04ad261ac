"""`make bench`: measure side by side, keep the figures under `tests/benchmarks/results`, show them in the README.

python -m tests.benchmarks              what this machine can, but for `memory`; 18 to 35 minutes on two cores
python -m tests.benchmarks explainer    only this part; the others keep their figures and dates
python -m tests.benchmarks --readme     only write the kept figures into the README again
"""

from __future__ import annotations

import importlib
import json
import os
import platform
import re
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import torchvision

from ais.memory import keep_freed_memory
from tests.benchmarks.tables import paragraph

FOLDER = Path(__file__).parent
README = FOLDER.parent.parent / "README.md"
BEGIN, END = "<!-- speed: written by make bench -->\n", "<!-- speed: end -->\n"
# In the order of the README; each module has `rows()` and `table(rows)`.
PARTS = {
    "explainer": "explainer_cost",
    "grad-cam": "against_grad_cam",
    "memory": "kept_memory",
    "precision": "precision",
    "sets": "whole_sets",
    "job": "job_against_loop",
    "decoding": "decode_speed",
    "latency": "latency",
    "growth": "growth",
    "protocol": "protocol_cost",
}
# Measured only when named: it shows what one setting of the C library brings, which no version of ours changes.
ON_REQUEST = ("memory",)
# What a reader of the README wants to know; the results have all of it.
IN_README = ("explainer", "grad-cam", "sets", "job")


def processor() -> str:
    """Name of the processor, and how many cores of it."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    name = models[0] if models else name
    return f"{name}, {os.cpu_count()} cores"


def results_file() -> Path:
    """Where figures of this machine and these versions are kept."""
    machine = re.sub("[^a-z0-9]+", "-", processor().lower()).strip("-")
    return FOLDER / "results" / f"{machine}-torch{torch.__version__.split('+')[0]}.json"


def main(arguments: list[str]) -> int:
    """Run what was asked for; return the exit code."""
    unknown = sorted(set(arguments) - set(PARTS) - {"--readme"})
    if unknown:
        print(f"there is no part {', '.join(unknown)}; choose of {', '.join(PARTS)}, or none for all")
        return 2
    file = results_file()
    kept = _kept(file)
    chosen = [part for part in PARTS if part in arguments]
    if not arguments:
        chosen = [part for part in PARTS if part not in ON_REQUEST]
    # One thread: ratios of times on several hang on what else the machine does, OpenMP waiting for the slowest.
    torch.set_num_threads(1)
    keep_freed_memory()  # as the jobs do; otherwise the order of two functions decides who waits for cleared pages
    for part in chosen:
        module = importlib.import_module(f"tests.benchmarks.{PARTS[part]}")
        started = time.monotonic()
        rows = module.rows()
        kept = _kept(file)  # parts may be measured by several commands at a time
        kept[part] = {
            "date": datetime.now(UTC).date().isoformat(),
            "machine": processor(),
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
            "python": platform.python_version(),
            "command": f"python -m tests.benchmarks {part}",
            "took_s": round(time.monotonic() - started),
            "rows": rows,
        }
        print(module.table(rows), flush=True)
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(kept, indent=1) + "\n")
    file.with_suffix(".md").write_text(markdown(kept, tuple(PARTS)))
    _into_readme(markdown(kept, IN_README))
    print(f"kept in {file.relative_to(Path.cwd())} and shown in {README.name}")
    return 0


def _kept(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    return found


def markdown(kept: dict[str, Any], parts: Sequence[str]) -> str:
    """The tables of the parts that were measured, and where and when that was."""
    parts = [part for part in parts if part in kept]
    dates = sorted({kept[part]["date"] for part in parts})
    minutes = round(sum(kept[part]["took_s"] for part in parts) / 60)
    head = f"""
        `make bench` on {kept[parts[0]]["machine"]}, torch {kept[parts[0]]["torch"]}, {dates[-1]}; these
        tables took {minutes} minutes. Ratios are of runs in turn: median (smallest–largest).
        """
    tables = [importlib.import_module(f"tests.benchmarks.{PARTS[part]}").table(kept[part]["rows"]) for part in parts]
    return "\n".join((paragraph(head), *tables))


def _into_readme(text: str) -> None:
    readme = README.read_text()
    before, rest = readme.split(BEGIN)
    README.write_text(before + BEGIN + text + END + rest.split(END)[1])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

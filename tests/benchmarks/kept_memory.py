"""What it brings to keep freed memory (`ais.memory`): the explainer in processes with and without, in turn.

Processor time of one thread, batches of four images, all maps of the default layer; each process is measured after two
batches, when it has all memory that it will ever have.
"""

from __future__ import annotations

import json
import re
import resource
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.benchmarks.tables import grid, paragraph, show
from tests.benchmarks.timing import Ratio

CASES = ("efficientnet_b3", "barlow_twins", "vgg16")
PAIRS, BATCH, BATCHES = 3, 4, 5


def measure(name: str, keep: bool) -> dict[str, float]:
    """Seconds of a batch, the share of them that the system takes, and the largest size; in this process."""
    import numpy as np
    import torch

    from ais import Explainer, RegressionHead, load_backbone
    from ais.memory import keep_freed_memory

    torch.set_num_threads(1)
    if keep and not keep_freed_memory():
        raise RuntimeError("this C library has no such setting")
    backbone = load_backbone(name, weights="random", seed=0)
    explainer = Explainer(backbone, RegressionHead(backbone.embedding_size, 512))
    side = backbone.spec.input_size
    images = [np.random.default_rng(0).integers(0, 255, (side, side, 3), dtype=np.uint8)] * BATCH
    for _ in range(2):
        explainer(images)
    before = resource.getrusage(resource.RUSAGE_SELF)
    for _ in range(BATCHES):
        explainer(images)
    after = resource.getrusage(resource.RUSAGE_SELF)
    own, system = after.ru_utime - before.ru_utime, after.ru_stime - before.ru_stime
    # Not ru_maxrss, which counts what the process was before it became this program.
    (peak,) = re.findall(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
    return {"s": (own + system) / BATCHES, "system": system / (own + system), "mib": int(peak) / 1024}


def rows(only: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Measure every case."""
    return [_row(name) for name in CASES if not only or name in only]


def _row(name: str) -> dict[str, Any]:
    found: dict[bool, list[dict[str, float]]] = {False: [], True: []}
    for _ in range(PAIRS):
        for keep in (False, True):
            command = [sys.executable, "-m", __spec__.name, name, str(int(keep))]
            said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            found[keep].append(json.loads(said))
    usual, kept = ([run["s"] for run in found[keep]] for keep in (False, True))
    ratios = [with_it / without for with_it, without in zip(kept, usual, strict=True)]
    middle = statistics.median
    ratio = Ratio(middle(ratios), min(ratios), max(ratios), middle(kept), middle(usual))
    return {
        "backbone": name,
        "kept_over_usual": ratio.as_dict(),
        "system_share": round(middle(run["system"] for run in found[False]), 3),
        "usual_mib": round(middle(run["mib"] for run in found[False])),
        "kept_mib": round(middle(run["mib"] for run in found[True])),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    text = """
        **Freed memory kept for the next batch** over the C library's usual way, processor time of the explainer, one
        thread; the share of the usual time that goes into clearing pages, and what the process takes at most.
        """
    cells = [
        (
            row["backbone"],
            show(row["kept_over_usual"]),
            f"{row['system_share']:.0%}",
            f"{row['usual_mib']:,}",
            f"{row['kept_mib']:,}",
        )
        for row in rows
    ]
    return paragraph(text) + "\n" + grid(("backbone", "kept ÷ usual", "cleared", "MiB, usual", "MiB, kept"), cells)


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1], sys.argv[2] == "1")))

"""Compare the heatmaps of two or more runs over the same images: where do the models agree?

Places the raw heatmaps of every two runs on what both looked at of each image, and writes six metrics of agreement per
image, their means with intervals, and a matrix of the runs per metric, into OUTPUT. Images that only one of two runs
has are counted.
"""

import sys
import time
from pathlib import Path

if __name__ == "__main__":  # so that a checkout works without being installed
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from ais.command_line import load_config, run_job
from ais.config import CompareConfig
from ais.settings import to_yaml


def main(argv: list[str]) -> int:
    """Read the configuration and compare; return the exit code."""
    loaded = load_config(CompareConfig, argv, doc=__doc__ or "")
    return run(loaded.config, dry_run=loaded.dry_run)


def run(config: CompareConfig, *, dry_run: bool = False) -> int:
    """Check the runs, read them, compare every two, report; return the exit code."""
    # After --help and configuration errors, which need not wait for SciPy and torch.
    from ais.comparison import (
        compare,
        describe_pairs,
        describe_runs,
        open_runs,
        read_heatmaps,
        write_report,
    )
    from ais.outputs import check_output
    from ais.storage import Storage, absolute, scratch_folder

    started = time.monotonic()
    storage = Storage(**config.storage.model_dump())
    output = storage.open(absolute(config.output))
    check_output(output.address, "matrices.parquet", storage)
    runs = open_runs(config.runs, config.names, storage)
    print(describe_runs(runs), flush=True)
    if dry_run:
        print(f"\n{to_yaml(config)}")
        return 0
    with scratch_folder("ais-compare-") as scratch:
        heatmaps = [read_heatmaps(compared, scratch) for compared in runs]
        pairs = list(compare(heatmaps, config.resolution, config.top_share))
    means = write_report(output, config, runs, pairs)
    print(f"\n{describe_pairs(pairs, means)}\n")
    print(f"output      {output.address}")
    print(f"took        {time.monotonic() - started:.0f} s")
    return 0


if __name__ == "__main__":
    run_job(main)

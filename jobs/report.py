"""Pages to look at, from a run: which images scored high, where the evidence lies, and how far to trust it.

Writes a folder of plain files into OUTPUT; index.html opens from disk and from a bucket, with no server and no
network. Of a run of any size it shows the ends, a sample, and images across the range; nothing of the run is changed.
"""

import sys
import time
from pathlib import Path

if __name__ == "__main__":  # so that a checkout works without being installed
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from ais.command_line import load_config, run_job
from ais.config import ReportConfig
from ais.settings import to_yaml


def main(argv: list[str]) -> int:
    """Read the configuration and write the pages; return the exit code."""
    loaded = load_config(ReportConfig, argv, doc=__doc__ or "")
    return run(loaded.config, dry_run=loaded.dry_run)


def run(config: ReportConfig, *, dry_run: bool = False) -> int:
    """Check, choose, draw, write; return the exit code."""
    # After --help and configuration errors, which need not wait for Arrow.
    from ais.report import open_sources, write_report

    started = time.monotonic()
    sources = open_sources(config)
    print(sources.describe(), flush=True)
    if dry_run:
        print(f"\n{to_yaml(sources.config)}")
        return 0
    report = write_report(sources)
    print(report.describe())
    print(f"took        {time.monotonic() - started:.0f} s")
    return 0


if __name__ == "__main__":
    run_job(main)

"""Score a whole collection, and on every later run only what is new or changed; mark what is gone.

Writes OUTPUT/latest.parquet, one row per image with its newest score, and the history of every run below
OUTPUT/series. What a scheduler starts: runs do not overlap, an interrupted one is continued, and an unchanged
collection costs one listing.

Exit codes: 0 done, or nothing to do, or another run is at it; 4 done, and a drift threshold says "look at me";
1 the work stopped, or too many images failed; 2 the configuration is refused; 3 the lock was lost to another run.
"""

import sys
from pathlib import Path

if __name__ == "__main__":  # so that a checkout works without being installed
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from ais.command_line import load_config, run_job
from ais.config import ScoreConfig
from ais.errors import LockedError
from ais.settings import to_yaml


def main(argv: list[str]) -> int:
    """Read the configuration and run; return the exit code."""
    loaded = load_config(ScoreConfig, argv, doc=__doc__ or "")
    return run(loaded.config, dry_run=loaded.dry_run)


def run(config: ScoreConfig, *, dry_run: bool = False) -> int:
    """Check, take the lock, score what changed; return the exit code."""
    # After --help and configuration errors, which need not wait for torch and Ray.
    from ais.lease import hold
    from ais.pipeline.score_job import prepare_scoring, run_ticks

    scoring = prepare_scoring(config)
    print(scoring.describe(), flush=True)
    if dry_run:
        print(f"\n{to_yaml(scoring.config)}")
        return 0
    try:
        with hold(scoring.series.output, wait=True) as lease:
            return run_ticks(scoring.under(lease))
    except LockedError as error:
        print(f"locked      {error}\n            nothing to do here: the next run will see what is new", flush=True)
        return 0


if __name__ == "__main__":
    run_job(main)

"""``make chaos``: 5,000 images on S3, 10 kills, one request in a hundred failing; prints what became of it."""

import argparse
import sys
import tempfile
from pathlib import Path

from tests.chaos.run import DRIVER, FETCHER, NODE, SCORER, Plan, run_chaos
from tests.s3.proxy import Faults
from tests.tiny import save_tiny_head


def main() -> int:
    """Run, print the table, and return 0 if everything survived."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fault-rate", type=float, default=0.01, help="of S3 requests")
    arguments = parser.parse_args()
    kills = {DRIVER: 4, SCORER: 2, FETCHER: 2, NODE: 2}
    with tempfile.TemporaryDirectory(prefix="head-") as folder:
        save_tiny_head(Path(folder))
        outcome = run_chaos(
            Plan(arguments.images, kills, Faults.each(arguments.fault_rate), arguments.seed), Path(folder)
        )
    print(outcome.said)
    print("\n".join([*outcome.wrong[:20], *outcome.orphans[:20]]))
    print(f"Seed {arguments.seed}.\n\n{outcome.table()}")
    return 0 if outcome.survived else 1


if __name__ == "__main__":
    sys.exit(main())

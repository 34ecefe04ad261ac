"""``make chaos``: 5,000 images on S3, 12 kills, one request in a hundred failing; prints what became of it."""

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
    parser.add_argument("--small", action="store_true", help="400 images and 4 kills")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fault-rate", type=float, default=0.01, help="of S3 requests")
    arguments = parser.parse_args()
    kills, least = {DRIVER: 4, SCORER: 2, FETCHER: 3, NODE: 3}, 10
    # A few images at a time, so that there is time to kill.
    overrides = ("compute.fetch_actors=1..2", "compute.fetch_threads=6")
    if arguments.small:
        overrides = ("compute.fetch_actors=1", "compute.fetch_threads=1")
        kills, least, arguments.images = dict.fromkeys(kills, 1), 3, 400
    with tempfile.TemporaryDirectory(prefix="head-") as folder:
        save_tiny_head(Path(folder))
        faults = Faults.each(arguments.fault_rate)
        plan = Plan(arguments.images, kills, faults, arguments.seed, 10 if arguments.small else 50, overrides, least)
        outcome = run_chaos(plan, Path(folder))
    print(outcome.said)
    print("\n".join([*outcome.wrong[:20], *outcome.orphans[:20]]))
    print(f"Seed {arguments.seed}.\n\n{outcome.table()}")
    return 0 if outcome.survived else 1


if __name__ == "__main__":
    sys.exit(main())

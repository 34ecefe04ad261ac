"""Make a published data set into a table of ratings or a similarity matrix.

Reads the files of AVA, KonIQ-10k, AIGCIQA2023 or the Peterson sets as they were unpacked, and writes what
jobs/train.py takes as ratings.path=, with the split that the data set publishes, or what jobs/importance.py takes as
matrix=. Reads names and numbers only, no image.
"""

import sys
from pathlib import Path

if __name__ == "__main__":  # so that a checkout works without being installed
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from ais.command_line import load_config, run_job
from ais.config import ConvertConfig
from ais.settings import to_yaml


def main(argv: list[str]) -> int:
    """Read the configuration and convert; return the exit code."""
    loaded = load_config(ConvertConfig, argv, doc=__doc__ or "")
    return run(loaded.config, dry_run=loaded.dry_run)


def run(config: ConvertConfig, *, dry_run: bool = False) -> int:
    """Read the data set, say what it holds, write; return the exit code."""
    # After --help and configuration errors, which need not wait for SciPy.
    from ais.datasets import read_dataset, write_converted
    from ais.storage import Storage

    storage = Storage(**config.storage.model_dump())
    converted = read_dataset(config, storage)
    print(converted.describe(config))
    if dry_run:
        print(f"\n{to_yaml(config)}")
        return 0
    write_converted(converted, config, storage)
    return 0


if __name__ == "__main__":
    run_job(main)

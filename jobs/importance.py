"""The alignment-importance score of every feature map over a set of images.

Writes a bundle that jobs/heatmaps.py takes as importance=: importance.parquet (a row a map), importance.json (what it
belongs to, and what its sign means) and importance.png (the ranking).
"""

import sys
from pathlib import Path

if __name__ == "__main__":  # so that a checkout works without being installed
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from ais.command_line import load_config, run_job
from ais.config import ImportanceConfig
from ais.settings import to_yaml


def main(argv: list[str]) -> int:
    """Read the configuration and run; return the exit code."""
    loaded = load_config(ImportanceConfig, argv, doc=__doc__ or "")
    return run(loaded.config, dry_run=loaded.dry_run)


def run(config: ImportanceConfig, *, dry_run: bool = False) -> int:
    """Check, ablate, write the bundle; return the exit code."""
    # After --help and configuration errors, which need not wait for torch and Ray.
    from ais.outputs import check_output
    from ais.pipeline.cluster import start_ray
    from ais.pipeline.importance_job import importance_of, prepare_importance, write_importance

    prepared = prepare_importance(config)
    check_output(prepared.config.output, "importance.json", prepared.storage)
    print(prepared.describe(), flush=True)
    if dry_run:
        print(f"\n{to_yaml(prepared.config)}")
        return 0
    start_ray()
    result = importance_of(prepared)
    print(write_importance(prepared, result))
    return 0


if __name__ == "__main__":
    run_job(main)

"""Are the heatmaps of a head true? Measured on rated images that the head was not trained on.

Runs the paper's protocol (do the maps with the highest AIS carry the evidence on other images?), deletion and insertion
curves, the randomised-head check and, where masks are given, the pointing game; writes every figure with its interval,
pictures, and a verdict in words into OUTPUT. Runs in one process, on a GPU where there is one.
"""

import sys
from pathlib import Path

if __name__ == "__main__":  # so that a checkout works without being installed
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from ais.config import ValidateConfig, load_config, run_job, to_yaml


def main(argv: list[str]) -> int:
    """Read the configuration and validate; return the exit code."""
    loaded = load_config(ValidateConfig, argv, doc=__doc__ or "")
    return run(loaded.config, dry_run=loaded.dry_run)


def run(config: ValidateConfig, *, dry_run: bool = False) -> int:
    """Check, read the images, measure, judge, write; return the exit code."""
    # After --help and configuration errors, which need not wait for torch.
    from ais.pipeline.validation_job import measure, prepare_validation, read_sample, write_validation

    prepared = prepare_validation(config)
    print(prepared.describe(), flush=True)
    if dry_run:
        print(f"\n{to_yaml(prepared.config)}")
        return 0
    sample = read_sample(prepared)
    findings = measure(prepared, sample)
    print(write_validation(prepared, sample, findings))
    return 0


if __name__ == "__main__":
    run_job(main)

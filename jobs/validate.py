"""Are the heatmaps of a head true? Measured on rated images that the head was not trained on.

Runs the paper's protocol (do the maps with the highest AIS carry the evidence on other images?), deletion and insertion
curves, the randomised-head check and, where masks are given, the pointing game and whether AIS tells apart the maps
that respond to the masks; writes every figure with its interval, pictures, and a verdict in words into OUTPUT. With
objective=similarity, runs the protocol on the maps of a backbone and a matrix of people's similarity judgments. Runs in
one process, on a GPU where there is one.
"""

import sys
from pathlib import Path
from types import ModuleType

if __name__ == "__main__":  # so that a checkout works without being installed
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from ais.command_line import load_config, run_job
from ais.config import ValidateConfig
from ais.settings import to_yaml


def main(argv: list[str]) -> int:
    """Read the configuration and validate; return the exit code."""
    loaded = load_config(ValidateConfig, argv, doc=__doc__ or "")
    return run(loaded.config, dry_run=loaded.dry_run)


def run(config: ValidateConfig, *, dry_run: bool = False) -> int:
    """Check, read the images, measure, judge, write; return the exit code."""
    # After --help and configuration errors, which need not wait for torch.
    from ais.pipeline import similarity_validation, validation_job

    if config.objective == "similarity":
        return _run(similarity_validation, config, dry_run)
    return _run(validation_job, config, dry_run)


def _run(stages: ModuleType, config: ValidateConfig, dry_run: bool) -> int:
    from ais.memory import keep_freed_memory
    from ais.outputs import check_output

    prepared = stages.prepare_validation(config)
    check_output(prepared.config.output, "validation.json", prepared.storage)
    print(prepared.describe(), flush=True)
    if dry_run:
        print(f"\n{to_yaml(prepared.config)}")
        return 0
    keep_freed_memory()
    sample = stages.read_sample(prepared)
    findings = stages.measure(prepared, sample)
    print(stages.write_validation(prepared, sample, findings))
    return 0


if __name__ == "__main__":
    run_job(main)

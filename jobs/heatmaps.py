"""Score every image of a collection and show where in the image the evidence lies.

Reads images from a folder, a glob or a list; writes scores, heatmaps, pictures and errors into one run folder,
OUTPUT/runs/RUN_ID. A run that was interrupted continues with the same command; a complete one does nothing. One start
at a time writes a run. With verify=true a run is only read back and checked; with repair=true damage is done again,
with retry_errors=true images that could not be fetched.
"""

import sys
import time
from pathlib import Path

if __name__ == "__main__":  # so that a checkout works without being installed
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from ais.command_line import load_config, run_job
from ais.config import HeatmapsConfig
from ais.settings import to_yaml


def main(argv: list[str]) -> int:
    """Read the configuration and run; return the exit code."""
    loaded = load_config(HeatmapsConfig, argv, doc=__doc__ or "")
    return run(loaded.config, dry_run=loaded.dry_run)


def run(config: HeatmapsConfig, *, dry_run: bool = False) -> int:
    """Check, set out, work, account; return the exit code (see `run_job`)."""
    # After --help and configuration errors, which need not wait for torch and Ray.
    from ais.lease import hold
    from ais.pipeline.cluster import start_ray
    from ais.pipeline.finish import finish, repair_run, report_complete, report_verified
    from ais.pipeline.heatmaps import run_heatmaps
    from ais.pipeline.prepare import prepare_heatmaps, set_out

    started = time.monotonic()
    prepared = prepare_heatmaps(config)
    prepared.check_existing()
    print(prepared.describe(), flush=True)
    if dry_run:
        print(f"\n{to_yaml(prepared.config)}")
        return 0
    if config.verify:
        return report_verified(prepared.run)
    if (summary := prepared.run.complete()) is not None and not (config.repair or config.retry_errors):
        return report_complete(prepared, summary)
    with hold(prepared.run.folder, wait=True, notice=print) as lease:
        prepared = prepared.under(lease)
        record = set_out(prepared)
        if config.repair:
            repair_run(prepared.run)
        if config.retry_errors:
            print(f"again       {prepared.run.retry_errors():,} images that failed may fare better now", flush=True)
        if (summary := prepared.run.complete()) is not None:  # by somebody for whom this start had to wait
            return report_complete(prepared, summary)
        prepared.run.reopen()
        start_ray()
        work = run_heatmaps(prepared.run, prepared.plan, record["images"])
        return finish(prepared, record, work, time.monotonic() - started)


if __name__ == "__main__":
    run_job(main)

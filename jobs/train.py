"""Fit a head to people's ratings of images.

Reads a table of ratings, computes each image's embedding once (a second training reads them from the cache), fits one
or more heads, and writes the bundle that the other jobs take as head=. A training that was interrupted continues with
the same command; a complete one does nothing. One start at a time writes a bundle.
"""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

if __name__ == "__main__":  # so that a checkout works without being installed
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from ais.command_line import load_config, run_job
from ais.config import TrainConfig
from ais.settings import to_yaml

if TYPE_CHECKING:
    from ais.lease import Lease
    from ais.training.prepare import PreparedTraining


def main(argv: list[str]) -> int:
    """Read the configuration and run; return the exit code."""
    loaded = load_config(TrainConfig, argv, doc=__doc__ or "")
    return run(loaded.config, dry_run=loaded.dry_run)


def run(config: TrainConfig, *, dry_run: bool = False) -> int:
    """Check, embed, fit, write the bundle; return the exit code."""
    # After --help and configuration errors, which need not wait for torch and Ray.
    from ais.lease import hold
    from ais.outputs import check_output
    from ais.pipeline.cluster import check_workers, start_ray
    from ais.training.prepare import prepare_training

    prepared = prepare_training(config)
    check_output(prepared.config.output, "head.json", prepared.storage)
    finished = prepared.finished()
    print(prepared.describe(), flush=True)
    if dry_run:
        print(f"\n{to_yaml(prepared.config)}")
        return 0
    if finished:
        return _report_complete(prepared)
    with hold(prepared.bundle, wait=True, notice=print) as lease:
        if prepared.finished():  # by somebody for whom this start had to wait
            return _report_complete(prepared)
        start_ray()
        check_workers(prepared.config.fit.workers, prepared.config.compute)
        return _train(prepared, lease)


def _report_complete(prepared: PreparedTraining) -> int:
    from ais.training.bundle import describe_finished

    print("complete    nothing to do (another output makes a new head)")
    print(describe_finished(prepared))
    return 0


def _train(prepared: PreparedTraining, lease: Lease) -> int:
    from ais.images import Limits
    from ais.pipeline.embed import embed_images
    from ais.pipeline.explain import BackboneSource
    from ais.training.bundle import describe_metrics, write_bundle
    from ais.training.fit import fit_heads
    from ais.training.prepare import fit_plan, keys_of, list_rated, usable_rows

    config = prepared.config
    source = BackboneSource(
        prepared.spec,
        config.backbone.layer,
        config.backbone.weights,
        config.backbone.seed,
        config.backbone.sha256,
        prepared.weights.fingerprint,
        prepared.storage,
    )
    images = list_rated(prepared.ratings, prepared.storage)
    keys = keys_of(images)
    missing = [images[index] for index in prepared.cache.missing(keys)]
    limits = Limits(**config.limits.model_dump())
    unreadable = embed_images(missing, prepared.cache, source, config.preprocessing.mode, limits, config.compute)
    errors = [asdict(image) for image in unreadable]
    rows = usable_rows(prepared, errors)
    plan = fit_plan(prepared, rows, keys)
    heads = fit_heads(plan, prepared.checkpoints, config.compute.device, config.compute.stall_minutes)
    lease.check()
    metrics = write_bundle(prepared, plan, rows, keys, heads, errors, source.load("cpu"))
    print(describe_metrics(prepared, metrics))
    return 0


if __name__ == "__main__":
    run_job(main)

"""The end of a run: is every image accounted for, and what a person wants to know about it."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from ais.errors import RunError
from ais.pipeline.heatmaps import Work
from ais.pipeline.prepare import Prepared, print_listed
from ais.progress import Line
from ais.runs import SELECTED_PICTURES, Run
from ais.verification import Verification, repair, verify


def finish(prepared: Prepared, record: dict[str, Any], work: Work, wall_s: float) -> int:
    """Account for every image, write ``summary.json`` and print it; return the exit code.

    Args:
        prepared: the job.
        record: ``run.json``.
        work: what this start did.
        wall_s: seconds since the start of the job.

    Raises:
        RunError: an image is missing or there twice; the run is then not complete.
    """
    summary = summarise(prepared, record, work, wall_s)
    prepared.run.finish(summary)
    print_summary(summary)
    return _exit_code(prepared, summary)


def summarise(prepared: Prepared, record: dict[str, Any], work: Work, wall_s: float) -> dict[str, Any]:
    """Account for every image and return what `summary.json` says.

    Arguments and errors as `finish`.
    """
    run = prepared.run
    accounting = run.account(record["images"])
    if not accounting.whole:
        raise RunError(
            f"{run.folder.address}: of {accounting.listed:,} listed images {accounting.missing:,} are in neither "
            f"results nor errors and {accounting.repeated:,} are there more than once; start the same command again"
        )
    summary = {
        **prepared.facts(),
        "finished_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "images": accounting.listed,
        "scored": accounting.scored,
        "failed": accounting.failed,
        "errors": accounting.reasons,
        "ignored_files": record["ignored"],
        # Of the last start only: a run may have been continued.
        "last_start": {
            "images": work.images,
            "wall_s": round(wall_s, 2),
            "pipeline_s": round(work.pipeline_s, 2),
            "images_per_s": round(work.images / work.pipeline_s, 2) if work.images else None,
            # Until the first batch: workers started, models loaded. Then the steady state.
            "first_batch_s": round(work.pace.first_s, 2) if work.pace else None,
            "steady_images_per_s": round(work.pace.per_s, 2) if work.pace and work.pace.per_s else None,
            # Of compute.batch_size images no more fitted into the memory of the device.
            "images_per_pass": work.pace.fitting if work.pace else None,
            "stage_s": {stage: round(seconds, 2) for stage, seconds in work.stage_s.items()},
        },
        "results": run.results.address,
        "error_rows": run.errors.address,
    }
    if prepared.plan.cells is not None:
        summary |= {
            "pictures": run.png.address,
            "pictures_not_rendered": work.pictures_failed,
            SELECTED_PICTURES: {shard.name: [shard.size, shard.sha256] for shard in work.selected},
        }
    return summary


def report_complete(prepared: Prepared, summary: dict[str, Any]) -> int:
    """Say that there is nothing to do; return the exit code.

    Raises:
        RunError: ``summary.json`` is not as this version writes it.
    """
    record = prepared.check_existing()
    assert record is not None
    print_listed(record)
    try:
        print(
            f"complete    finished {summary['finished_at']}; nothing to do (another run_id or output makes a new run, "
            "with a new listing)"
        )
        print_summary(summary)
        return _exit_code(prepared, summary)
    except KeyError as error:
        raise RunError(
            f"{(prepared.run.folder / 'summary.json').address!r} is not as this version writes it, it lacks {error}: "
            "delete it, and start the same command again"
        ) from error


def report_verified(run: Run) -> int:
    """Read a run back and say what was found; the exit code is 0 only if nothing is wrong and nothing left to do."""
    found = _verify(run)
    if found.whole:
        print("whole       every listed image is there exactly once, and every byte is as it was written", flush=True)
        return 0
    what = "delete that and do its images again" if found.damages else "continue"
    print(f"not whole   start the same command with repair=true instead of verify=true to {what}", flush=True)
    return 1


def repair_run(run: Run) -> None:
    """Verify a run and delete what is damaged; the start that this belongs to then does those images again."""
    removed = repair(run, _verify(run))
    print(f"repaired    {removed:,} damaged files deleted" if removed else "repaired    nothing is damaged", flush=True)


def _verify(run: Run) -> Verification:
    line = Line()
    found = verify(run, lambda shards: line.show(f"verifying: {shards:,} files"))
    line.close()
    accounting = found.accounting
    print(f"read        {found.shards:,} files, {found.size:,} bytes")
    print(f"images      {accounting.listed:,} listed: {accounting.scored:,} scored, {accounting.failed:,} errors")
    print(f"missing     {accounting.missing:,} in neither results nor errors")
    print(f"repeated    {accounting.repeated:,} there more than once")
    if accounting.foreign:
        print(f"foreign     {accounting.foreign:,} rows of images that are not listed")
    print(f"damaged     {len(found.damages):,}" + "".join(f"\n            {damage}" for damage in found.damages))
    print(f"orphaned    {len(found.orphans):,}" + "".join(f"\n            {file.address}" for file in found.orphans))
    if not found.complete:
        print("summary     is missing, or does not say the same: the run is not complete")
    return found


def print_summary(summary: dict[str, Any]) -> None:
    """Say what a person wants to know of a run."""
    start = summary["last_start"]
    print(f"scored      {summary['scored']:,} of {summary['images']:,} images", end="")
    print(f" at {start['images_per_s']:,} a second ({start['wall_s']:,} s in all)" if start["images"] else "")
    if summary["failed"]:
        print(f"errors      {summary['failed']:,}, see {summary['error_rows']}")
        for reason, count in summary["errors"].items():
            print(f"            {count:>7,}  {reason}")
    if summary.get("pictures_not_rendered"):
        print(f"pictures    {summary['pictures_not_rendered']:,} images could not be read again to be rendered")
    if start.get("images_per_pass"):
        print(f"memory      batches were too large for the device: passes of {start['images_per_pass']} images fitted")
    if start["stage_s"]:
        print("seconds     " + ", ".join(f"{stage} {seconds:,}" for stage, seconds in start["stage_s"].items()))
    if "pictures" in summary:
        height, width = summary["layer"]["map_shape"][1:]
        print(f"heatmaps    {height}×{width}: one cell covers 1/{width} of the width of what the model saw")
    if summary["untrained"]:
        print("            the backbone is UNTRAINED: its weights are random")
    print(f"results     {summary['results']}", flush=True)
    if "pictures" in summary:
        print(f"pictures    {summary['pictures']}", flush=True)


def _exit_code(prepared: Prepared, summary: dict[str, Any]) -> int:
    share = summary["failed"] / summary["images"]
    if share <= prepared.config.max_error_share:
        return 0
    print(
        f"failed      {share:.1%} of the images could not be used, more than max_error_share="
        f"{prepared.config.max_error_share:g}; everything good is kept",
        flush=True,
    )
    return 1

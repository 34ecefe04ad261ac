"""The heatmaps run on Ray Data: manifest → fetch and decode → score and explain → render → one sink."""

from __future__ import annotations

import re
import time
from collections import Counter
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray
from ray.data import Dataset

from ais.config import ComputeConfig, ExplainingComputeConfig, PngConfig, PngSelection
from ais.errors import RunError
from ais.heads import HeadSource
from ais.heatmaps import HeatmapCells, Weighting
from ais.images import Geometry, Limits
from ais.pipeline.cluster import Pools, cluster_pools, set_up_ray_data
from ais.pipeline.columns import pack, replace
from ais.pipeline.explain import BackboneSource, Explain, Score
from ais.pipeline.fetch import FetchDecode, Pictures
from ais.pipeline.manifest import manifest_rows, versions_of
from ais.pipeline.progress import Pace, Progress, TaskProgress
from ais.pipeline.render import Render
from ais.pipeline.sink import PngShard, PngSink, RunSink
from ais.runs import Run
from ais.shards import read_table
from ais.storage import Storage

_BATCHES_IN_FLIGHT = 3
_EXCEPTION = re.compile(r"^[\w.]*(Error|Exception|Exit|Interrupt)\b.*: ")
_PNGS_PER_SHARD = 512
_ROUNDS = 3


@dataclass(frozen=True)
class HeatmapPlan:
    """Everything the stages need to know; plain data.

    Args:
        source: of the backbone.
        head: to score with.
        importance: ``(C,)`` AIS for all images, or ``None`` for each image's own.
        weighting: of the maps.
        geometry: brings images to the backbone's input.
        cells: of the heatmaps; ``None``: scores only, and weighting, importance and pictures play no part.
        limits: on one image.
        png: which pictures.
        compute: where and how.
        storage: how to reach addresses.
        shard_rows: images in one shard.
        metadata: text carried by every shard and picture.
    """

    source: BackboneSource
    head: HeadSource
    importance: np.ndarray | None
    weighting: Weighting
    geometry: Geometry
    cells: HeatmapCells | None
    limits: Limits
    png: PngConfig
    compute: ExplainingComputeConfig
    storage: Storage
    shard_rows: int
    metadata: dict[str, str]


@dataclass(frozen=True)
class Work:
    """What one start of a run did.

    Args:
        images: worked on, errors included.
        pipeline_s: seconds from the first stage's start to the last shard.
        stage_s: seconds spent in each stage, summed over images and workers.
        selected: pictures of ``top:N`` or ``bottom:N``.
        pictures_failed: images chosen for one of them that could not be read again.
        pace: start-up and steady state of the scoring; ``None`` where there was nothing to do.
    """

    images: int
    pipeline_s: float
    stage_s: dict[str, float]
    selected: tuple[PngShard, ...] = ()
    pictures_failed: int = 0
    pace: Pace | None = None


def run_heatmaps(run: Run, plan: HeatmapPlan, listed: int) -> Work:
    """Work on every image of the manifest that is in neither results nor errors yet, then on the pictures.

    Args:
        run: set out already.
        plan: see there.
        listed: images of the manifest.

    Raises:
        RunError: the pipeline stopped; what was written stays, and the same command continues.
    """
    started = time.monotonic()
    done = run.recover(listed)
    images, seconds = int((~done).sum()), Counter[str]()
    pace: Pace | None = None
    for _ in range(_ROUNDS):
        if done.all():
            break
        spent, paced = _score_and_explain(run, plan, done)
        seconds.update(spent)
        pace = pace or paced  # of the first round; a further one is for what stragglers left
        done = run.recover(listed)  # what a straggler of a killed start wrote beside this one is cleared away
    late = plan.cells is not None and plan.png.selection.kind in ("top", "bottom")
    selected, failed = render_selected(run, plan) if late else ((), 0)
    return Work(images, time.monotonic() - started, dict(seconds), selected, failed, pace)


def _score_and_explain(run: Run, plan: HeatmapPlan, done: np.ndarray) -> tuple[dict[str, float], Pace | None]:
    set_up_ray_data()
    left = int((~done).sum())
    pools = cluster_pools(plan.compute, left)
    with Progress("images", left, run.run_id, plan.compute.stall_minutes) as progress:
        rows = manifest_rows(run.manifest, done, pools.batch, pools.task_cpus)
        pictures = _pictures(plan)
        rows = fetched(rows, plan.geometry, plan.limits, plan.storage, plan.compute, pools, pictures)
        rows = rows.map_batches(
            Score if plan.cells is None else Explain,
            batch_format="pyarrow",
            **pools.scoring_options(max_tasks_in_flight_per_actor=_BATCHES_IN_FLIGHT),
            fn_constructor_kwargs={
                "source": plan.source,
                "head": plan.head,
                "preprocessing": plan.geometry.mode,
                "device": plan.compute.device,
                "threads": pools.scoring_threads,
                "precision": plan.compute.precision,
                "compile_trunk": plan.compute.compile,
                "progress": progress.meter,
                **_heatmap_options(plan),
            },
        )
        if pictures is not None:
            rows = _rendered(rows, plan, pools)
        sink = RunSink(run, plan.cells, plan.metadata, plan.shard_rows)
        try:
            rows.write_datasink(sink, ray_remote_args={"num_cpus": pools.writing_cpus})
        except ray.exceptions.RayError as error:
            raise _stopped(run, error) from error
        return dict(sink.totals), progress.pace()


def _heatmap_options(plan: HeatmapPlan) -> dict[str, Any]:
    if plan.cells is None:
        return {}
    return {"importance": plan.importance, "weighting": plan.weighting, "chunk": plan.compute.chunk}


def _pictures(plan: HeatmapPlan) -> Pictures | None:
    selection = plan.png.selection
    in_the_stream = plan.cells is not None and selection.kind in ("all", "sample")
    return Pictures(selection, plan.png.max_side) if in_the_stream else None


def _rendered(rows: Dataset, plan: HeatmapPlan, pools: Pools, counter: Any = None) -> Dataset:
    assert plan.cells is not None
    render = Render(plan.cells, plan.weighting, plan.png.kind, plan.metadata, counter)
    return rows.map_batches(
        render, batch_format="pyarrow", batch_size=None, num_cpus=pools.task_cpus, concurrency=pools.tasks
    )


def _stopped(run: Run, error: ray.exceptions.RayError) -> RunError:
    run.check_lock()  # where another start has taken the run over, this is what stopped it
    return RunError(f"the run stopped: {worker_failure(error)}; what is written stays, and the same command continues")


def worker_failure(error: ray.exceptions.RayError) -> str:
    """Say in one line what a worker died of; the whole trace stays in Ray's logs and in ``__cause__``."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # Ray adds advice of its own after the line that names the exception.
    named = [line for line in lines if _EXCEPTION.match(line)]
    return (named or lines or [type(error).__name__])[-1]


def render_selected(run: Run, plan: HeatmapPlan) -> tuple[tuple[PngShard, ...], int]:
    """Render the pictures of ``png.select=top:N`` or ``bottom:N``, which are known only when all scores are.

    Their shards are ``png/top-*.tar`` or ``png/bottom-*.tar``; those of an interrupted attempt are replaced.

    Returns:
        their shards, and how many of the images could not be read again, or changed since they were listed.
    """
    kind, count = plan.png.selection.kind, plan.png.selection.count
    assert count is not None
    for leftover in run.png.files(f"{kind}-*.tar"):
        leftover.remove()
    chosen = _extreme(run, count, largest=kind == "top")
    if chosen is None:
        return (), 0
    heatmaps = np.concatenate([chunk.to_numpy_ndarray() for chunk in chosen["heatmap"].chunks])
    table = replace(chosen.select(["image_id", "uri", "score"]), [], heatmap=pack(heatmaps))
    versions = versions_of(run.manifest, table["image_id"].to_numpy())
    table = replace(table, [], **{name: versions[name] for name in versions.column_names})
    set_up_ray_data()
    pools = cluster_pools(plan.compute, chosen.num_rows)
    pictures = Pictures(PngSelection("all"), plan.png.max_side)
    # A table becomes a block, and a block is the work of one actor.
    chosen_rows = ray.data.from_arrow([table.slice(at, pools.batch) for at in range(0, table.num_rows, pools.batch)])
    rows = fetched(chosen_rows, plan.geometry, plan.limits, plan.storage, plan.compute, pools, pictures)
    sink = PngSink(run, kind, _PNGS_PER_SHARD)
    try:
        with TaskProgress("pictures", table.num_rows, plan.compute.stall_minutes) as progress:
            rows = _rendered(rows, plan, pools, progress.counter)
            rows.write_datasink(sink, ray_remote_args={"num_cpus": pools.writing_cpus})
    except ray.exceptions.RayError as error:
        raise _stopped(run, error) from error
    return tuple(sink.shards), sink.failed


def _extreme(run: Run, count: int, *, largest: bool) -> pa.Table | None:
    """The rows of results with the largest or smallest scores, best first; ties go to the lower id."""
    order: list[tuple[str, Literal["ascending", "descending"]]] = [
        ("score", "descending" if largest else "ascending"),
        ("image_id", "ascending"),
    ]
    best: pa.Table | None = None
    for shard in run.results.files("*.parquet"):
        table = read_table(shard, ["image_id", "uri", "score", "heatmap"])
        table = table if best is None else pa.concat_tables([best, table])
        # Arrow cannot take rows of tensor columns everywhere; indices and slices of the sorted order work.
        best = table.take(pc.sort_indices(table.drop_columns("heatmap"), sort_keys=order)[:count])
    return best


def fetched(
    rows: Dataset,
    geometry: Geometry,
    limits: Limits,
    storage: Storage,
    compute: ComputeConfig,
    pools: Pools,
    pictures: Pictures | None = None,
) -> Dataset:
    """Add the stage that fetches and decodes."""
    return rows.map_batches(
        FetchDecode,
        batch_format="pyarrow",
        zero_copy_batch=True,
        **pools.fetch_options(),
        fn_constructor_kwargs={
            "geometry": geometry,
            "limits": limits,
            "storage": storage,
            "threads": compute.fetch_threads,
            "decoders": compute.decoders,
            "pictures": pictures,
        },
    )

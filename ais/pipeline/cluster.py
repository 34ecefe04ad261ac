"""Join or start Ray, and divide what it has among the stages of a job."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass

import ray
import ray.data

from ais.config import ComputeConfig

# Ray Data needs room for tasks (reading, rendering, writing) beside the actor pools, or nothing moves at all. Small
# clusters are divided into shares of a CPU so that it stays, down to a single core.
_FULL_SHARE_CPUS = 8
_TASKS_AT_ONCE = 2
_CPU_SCORING_THREADS = 4
_FETCHING_PER_GPU = 8
_CPU_BATCH, _GPU_BATCH = 16, 64


def start_ray() -> None:
    """Join the cluster that this process belongs to, or start one on this machine.

    A cluster is found as Ray finds it: in a submitted job, by ``RAY_ADDRESS``, or one started here by ``ray start``.
    Ray's own remarks stay in its log files; the terminal is left to the job.
    """
    if ray.is_initialized():
        return
    # Ray's C++ core writes to stderr what it also logs, among it an error line for every actor pool (ray#53727).
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    # Not address="auto", which also joins the private cluster of any other job on this machine and dies with it.
    ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)


def quiet_ray_data() -> None:
    """Leave the terminal to our own progress line, and never drop a block to go on."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.max_errored_blocks = 0
    logging.getLogger("ray.data").setLevel(logging.ERROR)


@dataclass(frozen=True)
class Pools:
    """How many actors each stage has and what each of them and each task reserves.

    Args:
        scoring_actors: that hold the backbone.
        scoring_cpus: logical CPUs of each.
        scoring_gpus: GPUs of each, 0 on the CPU.
        scoring_threads: of torch in each; ``None`` leaves torch's default (with a GPU).
        fetch_actors: that fetch and decode.
        fetch_cpus: logical CPUs of each.
        task_cpus: logical CPUs of a reading, rendering or writing task.
        batch: images in one pass of the network.
    """

    scoring_actors: int
    scoring_cpus: float
    scoring_gpus: float
    scoring_threads: int | None
    fetch_actors: int
    fetch_cpus: float
    task_cpus: float
    batch: int


def divide(compute: ComputeConfig, cpus: float, gpus: float) -> Pools:
    """Divide a cluster's logical CPUs and GPUs among the stages.

    With GPUs: one scoring actor a GPU, and the remaining CPUs, at most eight a GPU, fetch and decode. Without:
    scoring takes most of the CPUs, one actor for every four, and fetching a quarter of them at most. The sum of all
    pools and of the room for tasks never exceeds the CPUs.

    Args:
        compute: the configuration; what it sets is taken as it is.
        cpus: logical CPUs of the cluster.
        gpus: GPUs of the cluster.
    """
    on_gpu = compute.device == "cuda" or (compute.device == "auto" and gpus > 0)
    batch = compute.batch_size or (_GPU_BATCH if on_gpu else _CPU_BATCH)
    if on_gpu:
        scoring = compute.scoring_actors or max(1, int(gpus))
        share = min(1.0, cpus / max(_FULL_SHARE_CPUS, 2 * scoring + _TASKS_AT_ONCE))
        rest = cpus - (scoring + _TASKS_AT_ONCE) * share
        fetching = compute.fetch_actors or max(1, min(_FETCHING_PER_GPU * scoring, int(rest)))
        return Pools(scoring, share, 1, None, fetching, min(share, rest / fetching), share, batch)
    scoring = compute.scoring_actors or max(1, int(cpus // _CPU_SCORING_THREADS))
    fetching = compute.fetch_actors or max(1, int(cpus // _CPU_SCORING_THREADS))
    share = min(1.0, cpus / _FULL_SHARE_CPUS)
    rest = cpus - _TASKS_AT_ONCE * share
    fetch_cpus = min(share, rest / 2 / fetching)
    scoring_cpus = (rest - fetching * fetch_cpus) / scoring
    threads = max(1, int(cpus // scoring))
    return Pools(scoring, scoring_cpus, 0, threads, fetching, fetch_cpus, share, batch)


def cluster_pools(compute: ComputeConfig) -> Pools:
    """Divide the cluster that this process has joined."""
    resources = ray.cluster_resources()
    return divide(compute, resources.get("CPU", 1), resources.get("GPU", 0))

"""Join or start Ray, and divide what the cluster has, or can grow to, among the stages of a job."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import signal
import socket
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import ray
import ray.data
from ray.data import ActorPoolStrategy

from ais.config import ComputeConfig, PoolSize
from ais.errors import ConfigError, RunError
from ais.pipeline.credentials import worker_setup
from ais.storage import explain

# Ray Data needs room for tasks (reading, rendering, writing) beside the actor pools, or nothing moves at all. Small
# clusters are divided into shares of a CPU so that it stays, down to a single core.
_FULL_SHARE_CPUS = 8
_TASKS_AT_ONCE = 2
_SHARES = (1.0, 0.5, 0.25, 0.125, 0.0625)
_CPU_SCORING_THREADS = 4
_FETCHING_PER_GPU = 8
_CPU_BATCH, _GPU_BATCH = 16, 64
# What a growing pool is for: no node is started for an actor that would see fewer batches than this.
_BATCHES_PER_ACTOR = 4
# On the cores of one small machine a second process takes more time to start than it saves in fewer batches than this:
# the first batch comes three seconds later (tests/benchmarks/LOG.md).
_BATCHES_PER_CORE = 24
# Ray Data shares a cluster among the executions that it has heard of in so many seconds. By its own 180, a start after
# a killed one would have half of each node for three minutes, and nothing at all of nodes with one CPU or GPU.
_RESERVED_S = 30  # renewed every ten
# Ray tries for nine minutes to reach an address where nothing listens.
_KNOCK_S = 10
_REMARK = b"Set ray log level from environment variable"

# Ray has no public way to ask how far a cluster may grow. Its head says so, as `ray start --head --labels` puts it.
MAX_CPUS_LABEL, MAX_GPUS_LABEL = "ais.max-cpus", "ais.max-gpus"


def start_ray() -> None:
    """Join the cluster that this process belongs to, or start one on this machine.

    A cluster is found as Ray finds it: in a submitted job, by ``RAY_ADDRESS``, or one started here by ``ray start``.
    Ray's own remarks stay in its log files; the terminal is left to the job, and so are signals.

    Raises:
        RunError: there is no cluster where ``RAY_ADDRESS`` says, it refuses, or none can be started here.
    """
    if ray.is_initialized():
        return
    # Ray's C++ core writes to stderr what it also logs, among it an error line for every actor pool (ray#53727).
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    # Background errors of Ray Data's statistics; what fails in a stage still ends the job.
    os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")
    # Workers of a cluster that starts here inherit this process's environment.
    setup = None if os.environ.get("RAY_ADDRESS") == "local" else worker_setup()
    on_sigterm = signal.getsignal(signal.SIGTERM)
    with _without_remark():
        # Not address="auto", which also joins the private cluster of any other job on this machine and dies with it.
        try:
            _knock(os.environ.get("RAY_ADDRESS", ""))
            ray.init(
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
                runtime_env=None if setup is None else {"worker_process_setup_hook": setup},
            )
        except Exception as error:  # Ray raises many kinds
            address = os.environ.get("RAY_ADDRESS")
            what = f"the cluster of RAY_ADDRESS={address} cannot be joined" if address else "Ray cannot be started"
            if "InvalidAuthToken" in f"{error} {error.__cause__}":  # Ray tells it as text
                why = "it wants a token, or another one"
                way_out = "set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN to what the cluster was started with"
            else:
                why = explain(error)
                way_out = "check with `ray status` that it is up, or leave RAY_ADDRESS unset to start one here"
            raise RunError(f"{what}: {why}; {way_out}") from error
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, on_sigterm)  # Ray's core prints a stack of C++ and aborts


def _knock(address: str) -> None:
    """Wait until something listens at an address ``host:port`` or ``ray://host:port``; others are left to Ray.

    Raises:
        OSError: nothing did for `_KNOCK_S` seconds.
    """
    parts = urlsplit(address if "://" in address else f"ray://{address}")
    if parts.scheme != "ray" or not parts.hostname or not parts.port:
        return
    last = time.monotonic() + _KNOCK_S
    while True:
        try:
            socket.create_connection((parts.hostname, parts.port), timeout=_KNOCK_S).close()
        except OSError:
            if time.monotonic() >= last:
                raise
            time.sleep(0.5)
        else:
            return


@contextlib.contextmanager
def _without_remark() -> Iterator[None]:
    """Hold standard error back, C++'s included, and let all of it through but Ray's remark on its own log level."""
    sys.stderr.flush()
    terminal = os.dup(2)
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(terminal, 2)
            os.close(terminal)
            held.seek(0)
            for line in held:
                if _REMARK not in line:
                    os.write(2, line)


def set_up_ray_data() -> None:
    """Leave the terminal to our own progress line, never drop a block to go on, and let go what a dead start held."""
    # Read when Ray Data first executes something.
    os.environ.setdefault("RAY_DATA_AUTOSCALING_REQUEST_EXPIRE_TIME_S", str(_RESERVED_S))
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.max_errored_blocks = 0
    context.execution_no_progress_timeout_s = -1  # compute.stall_minutes is ours, and says what to do
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    # Of `Pools.tasks`, where there are fewer images than they could draw.
    warnings.filterwarnings("ignore", "The maximum number of concurrent tasks")


@dataclass(frozen=True)
class Nodes:
    """Nodes of one size.

    Args:
        cpus: logical CPUs of each.
        gpus: GPUs of each.
        count: how many.
    """

    cpus: float
    gpus: float = 0
    count: int = 1


@dataclass(frozen=True)
class Cluster:
    """What a job can count on.

    Args:
        nodes: that are up, or can be.
        grows: there can be more than are up now, and there may be fewer.
    """

    nodes: tuple[Nodes, ...]
    grows: bool = False

    @property
    def cpus(self) -> float:
        """Logical CPUs of all nodes."""
        return sum(node.cpus * node.count for node in self.nodes)

    @property
    def gpus(self) -> float:
        """GPUs of all nodes."""
        return sum(node.gpus * node.count for node in self.nodes)


@dataclass(frozen=True)
class Pools:
    """How many actors each stage has and what each of them and each task reserves.

    Args:
        scoring_actors: that hold the backbone, at most.
        scoring_cpus: logical CPUs of each.
        scoring_gpus: GPUs of each, 0 on the CPU.
        scoring_threads: of torch in each; ``None`` leaves torch's default (with a GPU).
        fetch_actors: that fetch and decode, at most.
        fetch_cpus: logical CPUs of each.
        task_cpus: logical CPUs of a reading or rendering task.
        tasks: rendering tasks at once, at most.
        batch: images in one pass of the network.
        least_scoring: scoring actors without which nothing goes on; ``None``: all of them, a fixed pool.
        least_fetch: the same of the fetching ones.
    """

    scoring_actors: int
    scoring_cpus: float
    scoring_gpus: float
    scoring_threads: int | None
    fetch_actors: int
    fetch_cpus: float
    task_cpus: float
    tasks: int
    batch: int
    least_scoring: int | None = None
    least_fetch: int | None = None

    @property
    def writing_cpus(self) -> float:
        """Logical CPUs of a task that writes: less than of one that draws, since it waits more than it computes.

        Of tasks with equal needs Ray Data makes one, which here would draw the pictures of a whole shard one after the
        other on one core, once all its rows are there: at the end of a small job, when every other core is idle.
        """
        return self.task_cpus / 2

    def scoring_options(self, **pool: Any) -> dict[str, Any]:
        """Arguments of `ray.data.Dataset.map_batches` for a stage that runs the network.

        Args:
            pool: further arguments of `ray.data.ActorPoolStrategy`.
        """
        # One actor a GPU is asked for at once: an idle one costs no other stage anything. On CPUs the pool grows with
        # the cluster, since actors that wait for nodes would take the room of tasks on those that are there.
        initial = self.scoring_actors if self.scoring_gpus else None
        return {
            "batch_size": self.batch,
            "compute": _strategy(self.least_scoring, self.scoring_actors, initial, **pool),
            "num_cpus": self.scoring_cpus,
            "num_gpus": self.scoring_gpus,
        }

    def fetch_options(self) -> dict[str, Any]:
        """Arguments of `ray.data.Dataset.map_batches` for the stage that fetches and decodes."""
        return {
            "batch_size": self.batch,
            "compute": _strategy(self.least_fetch, self.fetch_actors, None),
            "num_cpus": self.fetch_cpus,
        }


def _strategy(least: int | None, most: int, initial: int | None, **pool: Any) -> ActorPoolStrategy:
    if least is None or least == most:
        return ActorPoolStrategy(size=most, **pool)
    return ActorPoolStrategy(min_size=least, max_size=most, initial_size=initial, **pool)


def divide(compute: ComputeConfig, cluster: Cluster, images: int | None = None) -> Pools:
    """Divide a cluster among the stages.

    With GPUs: one scoring actor a GPU, and the remaining CPUs, at most eight a GPU, fetch and decode. Without:
    scoring takes most of the CPUs, one actor for every four (on a machine with fewer, for each, if there are enough
    images), and fetching a quarter of them at most. All pools and two tasks find room on the nodes at the same time.
    Where the cluster grows, so do the pools, from one actor each, and only as far as there are images for.

    Args:
        compute: the configuration; what it sets is taken as it is.
        cluster: to divide.
        images: to work on.

    Raises:
        ConfigError: the configuration asks for GPUs and there can be none.
    """
    nodes = [node for node in cluster.nodes if node.cpus > 0]
    per_actor = compute.scoring_gpus
    if per_actor is None:
        per_actor = 1 if compute.device == "cuda" or (compute.device == "auto" and cluster.gpus > 0) else 0
    if per_actor and not any(node.gpus >= per_actor for node in nodes):
        key = f"scoring_gpus={per_actor:g}" if compute.scoring_gpus else f"device={compute.device}"
        raise ConfigError(
            f"compute.{key}: no node of the cluster has as many GPUs ({cluster.gpus:g} in all); use compute.device=cpu "
            "and compute.scoring_gpus=null, or say how far the cluster grows with compute.max_gpus"
        )
    scoring = PoolSize.parse(compute.scoring_actors) if compute.scoring_actors else None
    fetching = PoolSize.parse(compute.fetch_actors) if compute.fetch_actors else None
    on_gpu = bool(per_actor) and compute.device != "cpu"
    batch = compute.batch_size or (_GPU_BATCH if on_gpu else _CPU_BATCH)
    # Scoring actors that the images keep busy; nodes that are up are used, however little the work.
    useful = _busy(images, batch * _BATCHES_PER_ACTOR) if cluster.grows else None
    if per_actor:
        divided = _beside_gpus(nodes, per_actor, scoring, fetching, useful)
    elif sum(node.count for node in nodes) == 1:
        divided = _on_one_node(cluster.cpus, scoring, fetching, _busy(images, batch * _BATCHES_PER_CORE))
    else:
        divided = _on_cpus(nodes, scoring, fetching, useful)
    threads = None if on_gpu else max(1, int(divided.scoring_cpus if per_actor else divided.threads))
    return Pools(
        scoring_actors=divided.scoring,
        scoring_cpus=divided.scoring_cpus,
        scoring_gpus=per_actor,
        scoring_threads=threads,
        fetch_actors=divided.fetching,
        fetch_cpus=divided.fetch_cpus,
        task_cpus=divided.task_cpus,
        # Small shares of a CPU let in more of them than there are CPUs when scoring is over, each in a process that
        # has yet to import everything.
        tasks=max(_TASKS_AT_ONCE, int(cluster.cpus)),
        batch=batch,
        least_scoring=_least(scoring, divided.scoring, cluster.grows),
        least_fetch=_least(fetching, divided.fetching, cluster.grows),
    )


def _busy(images: int | None, each: int) -> int | None:
    return None if images is None else max(1, -(-images // each))


def _least(given: PoolSize | None, most: int, grows: bool) -> int | None:
    least = given.least if given else (1 if grows else most)
    return None if least >= most else least


@dataclass(frozen=True)
class _Division:
    scoring: int
    scoring_cpus: float
    fetching: int
    fetch_cpus: float
    task_cpus: float
    threads: float


def _beside_gpus(
    nodes: Sequence[Nodes], per_actor: float, scoring: PoolSize | None, fetching: PoolSize | None, useful: int | None
) -> _Division:
    """Units of one size, at most a CPU: one for each scoring actor, fetching actor and task."""
    places = sum(int(node.gpus / per_actor) * node.count for node in nodes)
    most = scoring.most if scoring else min(places, useful or places)
    cpus = sum(node.cpus * node.count for node in nodes)
    wanted = fetching.most if fetching else min(_FETCHING_PER_GPU * most, max(1, int(cpus)))
    for share in (share for share in _SHARES if share <= max(cpus / _FULL_SHARE_CPUS, _SHARES[-1])):
        # No unit straddles two nodes, and none stands where another actor of a GPU may have to.
        slots = sum(int(node.cpus / share + 1e-9) * node.count for node in nodes)
        crowded = any(int(node.gpus / per_actor) * share > node.cpus for node in nodes)
        room = slots - max(most, places) - _TASKS_AT_ONCE
        if not crowded and room >= (fetching.most if fetching else 1):
            return _Division(most, share, min(wanted, room), share, share, share)
    # More actors configured than a cluster so small has room for: they share what there is.
    share = min(_SHARES[-1], cpus / (most + wanted + _TASKS_AT_ONCE) / 2)
    return _Division(most, share, wanted if fetching else 1, share, share, share)


def _on_cpus(
    nodes: Sequence[Nodes], scoring: PoolSize | None, fetching: PoolSize | None, useful: int | None
) -> _Division:
    total = sum(node.cpus * node.count for node in nodes)
    fetch = _fetch_actors(total, fetching)
    # Blocks of a few CPUs that do not straddle nodes: one for each scoring actor, and some that the small units of
    # fetching and tasks share.
    smallest = max(1, int(min(node.cpus for node in nodes)))
    for enough in (total / 2, 1):
        for threads in (4, 2, 1):
            blocks = sum(int(node.cpus // threads) * node.count for node in nodes) if threads <= smallest else 0
            for share in _SHARES:
                left = blocks - math.ceil((fetch + _TASKS_AT_ONCE) * share / threads)
                if left * threads < enough or left < (scoring.most if scoring else 1):
                    continue
                most = scoring.most if scoring else min(left, useful or left)
                if not fetching and useful:
                    fetch = min(fetch, max(1, most * threads // 2))
                return _Division(most, threads, fetch, share, share, threads)
    share = total / ((scoring.most if scoring else 1) + fetch + _TASKS_AT_ONCE) / 2
    return _Division(scoring.most if scoring else 1, share, fetch, share, share, 1)


def _fetch_actors(cpus: float, fetching: PoolSize | None) -> int:
    return fetching.most if fetching else max(1, int(cpus // _CPU_SCORING_THREADS))


def _on_one_node(cpus: float, scoring: PoolSize | None, fetching: PoolSize | None, busy: int | None) -> _Division:
    fetch = _fetch_actors(cpus, fetching)
    if scoring:
        actors = scoring.most
    elif cpus < _CPU_SCORING_THREADS:
        # One thread each: two that share every operation wait at its end for the one that the driver, fetching or
        # Ray interrupted (tests/benchmarks/LOG.md).
        actors = max(1, min(int(cpus), busy or int(cpus)))
    else:
        actors = int(cpus // _CPU_SCORING_THREADS)
    share = min(1.0, cpus / _FULL_SHARE_CPUS)
    rest = cpus - _TASKS_AT_ONCE * share
    fetch_cpus = min(share, rest / 2 / fetch)
    return _Division(actors, (rest - fetch * fetch_cpus) / actors, fetch, fetch_cpus, share, cpus // actors)


def this_cluster(compute: ComputeConfig) -> Cluster:
    """Return what the cluster that this process has joined can grow to, or what is up if it does not grow.

    How far it grows is taken from the configuration, else from the labels of its head.

    Raises:
        ConfigError: no workers are up, and nothing says how many there can be.
    """
    alive = [node for node in ray.nodes() if node["Alive"]]
    labels: dict[str, str] = {}
    for node in alive:
        labels |= {name: value for name, value in (node.get("Labels") or {}).items() if name.startswith("ais.")}
    up = tuple(Nodes(node["Resources"].get("CPU", 0), node["Resources"].get("GPU", 0)) for node in alive)
    return reachable(compute, Cluster(up), labels)


def check_workers(workers: int | None, compute: ComputeConfig) -> None:
    """Refuse workers that the cluster can never hold, for which Ray Train would wait without a word.

    Args:
        workers: of Ray Train, each with a GPU or else a CPU of its own; ``None`` for as many as there are GPUs.
        compute: the configuration.

    Raises:
        ConfigError: it cannot hold them.
    """
    cluster = this_cluster(compute)
    gpus = int(cluster.gpus)
    if compute.device == "cuda" and not gpus:
        raise ConfigError("compute.device: cuda, and the cluster has no GPU; start it with some, or set cpu")
    use_gpu = compute.device == "cuda" or (compute.device == "auto" and gpus > 0)
    room = gpus if use_gpu else int(sum(int(nodes.cpus) * nodes.count for nodes in cluster.nodes))
    if workers is not None and workers > room:
        kind = "GPU" if use_gpu else "CPU"
        raise ConfigError(
            f"fit.workers: {workers} need a {kind} each, and the cluster has, or can grow to, {room}; set at most "
            "that, or null"
        )


def reachable(compute: ComputeConfig, up: Cluster, labels: dict[str, str]) -> Cluster:
    """Return what a cluster can grow to, where something says so, or what is up.

    Args:
        compute: the configuration.
        up: the nodes that are there.
        labels: of the head.

    Raises:
        ConfigError: there are no workers, and nothing says how many there can be.
    """
    cpus = compute.max_cpus or _count(labels, MAX_CPUS_LABEL)
    gpus = compute.max_gpus if compute.max_gpus is not None else _count(labels, MAX_GPUS_LABEL)
    if cpus is None and gpus is None:
        if up.cpus > 0:
            return up
        raise ConfigError(
            "compute.max_cpus: no worker of the cluster is up, and nothing says how many there can be; give "
            f"compute.max_cpus and compute.max_gpus, or start the head with --labels={MAX_CPUS_LABEL}=64,"
            f"{MAX_GPUS_LABEL}=8"
        )
    gpus = int(up.gpus) if gpus is None else gpus
    cpus = max(int(up.cpus), gpus) if cpus is None else cpus
    if labels.keys() & {MAX_CPUS_LABEL, MAX_GPUS_LABEL}:
        # Nodes come and go, and one that died counts as up until Ray notices: nothing may need all that seem to be up.
        if (cpus, gpus) == (up.cpus, up.gpus):
            return Cluster(up.nodes, grows=True)
    elif cpus <= up.cpus and gpus <= up.gpus:
        return up
    # The sizes of nodes to come are not known: nothing reserves more than a CPU, and every GPU comes with one.
    each = max(1, int(compute.scoring_gpus or 1))
    nodes = (Nodes(1, each, gpus // each), Nodes(1, 0, max(0, cpus - gpus // each)))
    return Cluster(tuple(node for node in nodes if node.count), grows=True)


def _count(labels: dict[str, str], name: str) -> int | None:
    if name not in labels:
        return None
    try:
        return int(labels[name])
    except ValueError:
        raise ConfigError(f"the label {name} of the cluster's head is {labels[name]!r}, expected a number") from None


def cluster_pools(compute: ComputeConfig, images: int | None = None) -> Pools:
    """Divide the cluster that this process has joined.

    Args:
        compute: the configuration.
        images: to work on; a cluster that grows is not grown further than they need.
    """
    return divide(compute, this_cluster(compute), images)

"""A run over S3 while machines die and requests fail, beside an undisturbed local one of the same images.

Real parts: the command line, Ray on several nodes of one machine, HTTP, signal 9. What is faked: AWS, by moto, and bugs
in decoders, by `tests/hostile`.
"""

from __future__ import annotations

import io
import json
import os
import random
import re
import shutil
import tarfile
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cluster.local import LocalCluster, NodeType, processes_of
from cluster.local_nodes import HEAD_ID, NODE_ID_VARIABLE
from tests.chaos.collection import Item, collect, put, put_locally
from tests.kills import FETCHING, PATIENCE_S, ROOT, SCORING, Job, actors
from tests.s3.proxy import Faults, FaultyProxy
from tests.s3.server import S3Server
from tests.zoo import HOSTILE_PATH

DRIVER, SCORER, FETCHER, NODE = "driver", "scoring actor", "fetching actor", "node"
_DECODE_S = 1.0
_VICTIM_S = 60.0  # in which a start has its actors
_NODE_ID = f"{NODE_ID_VARIABLE}=".encode()
# Measured: equal to the last bit. Batches of a continued run hold other images, so other kernels may round otherwise;
# the heads multiply that by 200.
SCORE_TOLERANCE, HEATMAP_TOLERANCE = 1e-3, 1e-4


@dataclass(frozen=True)
class Plan:
    """What happens; everything is drawn from the seed.

    Args:
        images: of the collection.
        kills: of each kind.
        faults: of S3 requests.
        seed: of images, kills and faults.
        shard_rows: images in one shard.
        overrides: of the configuration.
        least_kills: that have to come to pass; the run may end before the last ones of the plan.
        latency_s: of every answer of S3. With it a fast machine does not finish before the killing has begun.
    """

    images: int
    kills: dict[str, int]
    faults: Faults = Faults.each(0.01)  # noqa: RUF009 - frozen
    seed: int = 0
    shard_rows: int = 50
    overrides: tuple[str, ...] = ()
    least_kills: int = 10
    latency_s: float = 0.1

    def schedule(self) -> list[tuple[float, str, float]]:
        """Each kill: at which share of the work, what, and how many seconds later; in order.

        What is not there at that moment, because its stage is over or not yet begun, changes places with the next kind
        that is.
        """
        rng = random.Random(self.seed)
        kinds = [kind for kind, count in self.kills.items() for _ in range(count)]
        rng.shuffle(kinds)
        shares = sorted(rng.uniform(0, 0.7) for _ in kinds)
        return [(share, kind, rng.uniform(0, 3)) for share, kind in zip(shares, kinds, strict=True)]


@dataclass
class Outcome:
    """What became of it.

    Args:
        listed: images.
        least_kills: that have to come to pass.
        scored: of them.
        errors: the others by stage and reason.
        lost: listed images in neither results nor errors.
        twice: images that are there more than once.
        wrong: images whose row is not what it should be: another reason, or an error instead of a score.
        score_error: largest difference from the undisturbed run.
        heatmap_error: the same of heatmaps.
        ways: in which images are bad.
        orphans: pictures without a row, rows without their picture, unfinished files, and locks of killed starts.
        kills: done, by kind.
        codes: exit codes of all starts; -9 is a kill.
        faults: of S3 requests, by kind, and ``requests``.
        verified: exit code of ``verify=true``.
        wall_s: from the first start to the end of the last.
        said: by the last start and the verification.
    """

    listed: int
    least_kills: int
    scored: int = 0
    errors: dict[str, int] = field(default_factory=dict)
    lost: int = 0
    twice: int = 0
    wrong: list[str] = field(default_factory=list)
    score_error: float = np.inf
    heatmap_error: float = np.inf
    orphans: list[str] = field(default_factory=list)
    ways: int = 0
    kills: Counter[str] = field(default_factory=Counter)
    codes: list[int] = field(default_factory=list)
    faults: dict[str, int] = field(default_factory=dict)
    verified: int = -1
    wall_s: float = 0.0
    said: str = ""

    @property
    def survived(self) -> bool:
        """Enough was killed, and there was no harm."""
        return self.unharmed and self.kills.total() >= self.least_kills

    @property
    def unharmed(self) -> bool:
        """Nothing lost, nothing twice, and everything as in the undisturbed run."""
        return (
            self.codes[-1:] == [0]
            and self.lost == self.twice == self.verified == 0
            and not self.wrong
            and not self.orphans
            and self.score_error <= SCORE_TOLERANCE
            and self.heatmap_error <= HEATMAP_TOLERANCE
        )

    def table(self) -> str:
        """All of it, for people; rows of a Markdown table."""
        faults = {kind: count for kind, count in sorted(self.faults.items()) if kind != "requests"}
        requests = self.faults.get("requests", 0)
        rows = [
            ("images", f"{self.listed:,}"),
            ("scored", f"{self.scored:,}"),
            ("errors", f"{sum(self.errors.values()):,} of {self.ways} kinds of bad files"),
            *((f"· {reason}", f"{count:,}") for reason, count in sorted(self.errors.items())),
            ("killed with signal 9", f"{self.kills.total()}"),
            *((f"· {kind}", f"{count}") for kind, count in self.kills.items()),
            ("starts of the same command", f"{len(self.codes)} (exit codes {', '.join(map(str, self.codes))})"),
            ("S3 requests", f"{requests:,}"),
            ("· made to fail", f"{sum(faults.values()):,} ({sum(faults.values()) / max(1, requests):.1%})"),
            *((f"· · {kind}", f"{count:,}") for kind, count in faults.items()),
            ("lost", f"{self.lost}"),
            ("twice", f"{self.twice}"),
            ("with another reason than expected", f"{len(self.wrong)}"),
            ("orphaned files and pictures", f"{len(self.orphans)}"),
            ("largest difference of a score from the undisturbed run", f"{self.score_error:.2g}"),
            ("· of a heatmap's cell", f"{self.heatmap_error:.2g}"),
            ("verify=true", f"exit code {self.verified}"),
            ("wall time", f"{self.wall_s / 60:.1f} min"),
            ("verdict", "survived" if self.survived else "NOT SURVIVED"),
        ]
        return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])


def run_chaos(plan: Plan, head: Path) -> Outcome:
    """Let a run live through a plan, and compare it with an undisturbed one."""
    items = collect(plan.images, plan.seed)
    with _parts(plan) as (folder, s3, proxy, cluster):
        bucket = s3.create_bucket("chaos")
        listing = put(items, s3, f"{bucket}/images")
        for file in head.iterdir():
            s3.put(f"{bucket}/head/{file.name}", file.read_bytes())
        common = [f"shard_rows={plan.shard_rows}", "compute.batch_size=8", "png.max_side=32", "run_id=run"]
        environment = {**_environment(s3), **cluster.variables}
        command = [
            *("jobs/heatmaps.py", f"images={listing}", f"head={bucket}/head", f"output={bucket}/out", *common),
            *(f"storage.endpoint_url={proxy.endpoint_url}", "max_error_share=0.2", f"limits.max_bytes={2**20}"),
            *(f"limits.seconds={_DECODE_S}", *plan.overrides),
        ]
        outcome = Outcome(plan.images, plan.least_kills, ways=len({item.kind for item in items if item.expect}))
        undisturbed = ["jobs/heatmaps.py", f"images={put_locally(items, folder / 'images')}", f"head={head}", *common]
        reference = Job([*undisturbed, f"output={folder / 'out'}"], environment)
        try:
            assert reference.finish() == 0, reference.said()
        finally:
            reference.end()
        started = time.monotonic()
        _live_through(plan, command, environment, s3, f"{bucket}/out/runs/run", cluster, outcome)
        outcome.wall_s = time.monotonic() - started
        outcome.faults = proxy.counts()
        verification = Job([*command, "verify=true"], environment)
        try:
            outcome.verified = verification.finish()
            outcome.said += verification.said()
        finally:
            verification.end()
        _compare(items, s3, bucket, folder / "out" / "runs" / "run" / "results", outcome)
    return outcome


@contextmanager
def _parts(plan: Plan) -> Iterator[tuple[Path, S3Server, FaultyProxy, LocalCluster]]:
    folder = Path(tempfile.mkdtemp(prefix="chaos-", dir="/tmp"))  # sockets below it: the path has to be short
    try:
        with ExitStack() as stack:
            s3 = stack.enter_context(S3Server())
            proxy = stack.enter_context(FaultyProxy(s3.endpoint_url, plan.faults, plan.seed, plan.latency_s))
            nodes = (NodeType("cpu", 1, 0, 2),)
            local = LocalCluster(folder / "c", nodes, idle_s=600, dashboard=False, environment=_environment(s3))
            yield folder, s3, proxy, stack.enter_context(local)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _environment(s3: S3Server) -> dict[str, str]:
    """Leads to the S3 server, and makes deadly images do as they say."""
    return {**s3.environment(), "PYTHONPATH": os.pathsep.join((str(ROOT), HOSTILE_PATH))}


def _live_through(
    plan: Plan,
    command: list[str],
    environment: dict[str, str],
    s3: S3Server,
    run: str,
    cluster: LocalCluster,
    outcome: Outcome,
) -> None:
    expected = plan.images / plan.shard_rows
    job = Job(command, environment)
    try:
        schedule = plan.schedule()
        pending = [kind for _, kind, _ in schedule]
        for share, _, seconds in schedule:
            end = time.monotonic() + PATIENCE_S
            while job.code is None and len(s3.keys(f"{run}/results")) < share * expected and time.monotonic() < end:
                time.sleep(0.2)
            time.sleep(seconds)
            job = _again(job, command, environment, outcome)
            if job.code == 0:
                return
            if kind := _kill_one(pending, cluster, job):
                if kind in pending:
                    pending.remove(kind)
                outcome.kills[kind] += 1
            job = _again(job, command, environment, outcome)
        for _ in range(5):
            job.finish()
            if job.code == 0:
                return
            job = _again(job, command, environment, outcome)
    finally:
        if job.code is not None:
            outcome.codes.append(job.code)
        outcome.said += job.said()
        job.end()


def _again(job: Job, command: list[str], environment: dict[str, str], outcome: Outcome) -> Job:
    """The job, started again if it ended without being complete."""
    if job.code in (None, 0):
        return job
    outcome.codes.append(job.code)
    job.end()
    return Job(command, environment)


def _kill_one(pending: list[str], cluster: LocalCluster, job: Job) -> str | None:
    """Kill the next kind as soon as there is one; what is not there for a while, its stage being over, comes later."""
    end = time.monotonic() + _VICTIM_S
    while job.code is None:
        late = time.monotonic() > end
        for kind in pending if late else pending[:1]:
            if _kill(kind, cluster, job):
                return kind
        if late and _kill(DRIVER, cluster, job):  # the next start has all stages again
            return DRIVER
        time.sleep(0.2)
    return None


def _kill(kind: str, cluster: LocalCluster, job: Job) -> bool:
    """Kill the driver, or something of the cluster; return whether there was one."""
    if kind == DRIVER:
        job.kill()
        return True
    if kind == NODE:
        nodes = _worker_nodes(cluster)
        if nodes:
            cluster.kill_node(nodes[0])
        return bool(nodes)
    found = actors(SCORING if kind == SCORER else FETCHING, processes_of(cluster.folder))
    if found:
        found[0].kill()
    return bool(found)


def _worker_nodes(cluster: LocalCluster) -> list[str]:
    """Ids of the nodes that are up, besides the head."""
    found = set()
    for pid in processes_of(cluster.folder):
        try:
            variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        except OSError:
            continue
        found |= {value.removeprefix(_NODE_ID).decode() for value in variables if value.startswith(_NODE_ID)}
    return sorted(found - {HEAD_ID})


def _compare(items: list[Item], s3: S3Server, bucket: str, undisturbed: Path, outcome: Outcome) -> None:
    """Read everything past the proxy and hold it against what should be there."""
    run = f"{bucket}/out/runs/run"
    files = {key.rpartition("/")[2]: s3.get(f"{bucket}/{key}") for key in s3.keys(run)}
    parquet = {kind: _tables(s3, bucket, f"{run}/{kind}/") for kind in ("results", "errors")}
    results, errors = parquet["results"], parquet["errors"]
    times = Counter[int]([*results["image_id"].to_pylist(), *errors["image_id"].to_pylist()])
    outcome.scored = results.num_rows
    outcome.lost = sum(times[image] == 0 for image in range(len(items)))
    outcome.twice = sum(count > 1 for count in times.values()) + sum(image >= len(items) for image in times)
    reasons = {row["image_id"]: f"{row['stage']}: {row['reason']}" for row in errors.drop_columns("error").to_pylist()}
    outcome.errors = dict(Counter(reasons.values()))
    found = [reasons.get(image, "") for image in range(len(items))]
    outcome.wrong = [
        f"{item.name}: {reason or 'scored'}, expected {item.expect or 'a score'}"
        for item, reason in zip(items, found, strict=True)
        if reason != item.expect
    ]
    outcome.orphans = _orphans(results, files)
    kept = _by_name(results, f"{bucket}/images/")
    quiet = _by_name(pq.read_table(undisturbed), f"{undisturbed.parents[3] / 'images'}/")
    if kept.keys() == quiet.keys():
        outcome.score_error = max(abs(kept[name][0] - quiet[name][0]) for name in kept)
        outcome.heatmap_error = max(float(np.abs(kept[name][1] - quiet[name][1]).max()) for name in kept)


def _tables(s3: S3Server, bucket: str, prefix: str) -> pa.Table:
    return pa.concat_tables([pq.read_table(io.BytesIO(s3.get(f"{bucket}/{key}"))) for key in s3.keys(prefix)])


def _orphans(results: pa.Table, files: dict[str, bytes]) -> list[str]:
    pictures = set()
    for name, data in files.items():
        if name.endswith(".tar"):
            with tarfile.open(fileobj=io.BytesIO(data)) as archive:
                pictures |= {(int(member.removesuffix(".png")), name) for member in archive.getnames()}
    wanted = set(zip(results["image_id"].to_pylist(), results["png"].to_pylist(), strict=True))
    unfinished = [name for name in files if name.endswith(".partial") or name.startswith("probe-")]
    # The lock that the last start gave back stays in an object store, and says so; none of a killed one does.
    locks = {name: json.loads(data) for name, data in files.items() if re.fullmatch(r"[0-9]{6,}\.json", name)}
    held = [name for name, record in locks.items() if not record.get("released")]
    return [*map(str, pictures ^ wanted), *unfinished, *held, *sorted(locks)[:-1]]


def _by_name(results: pa.Table, prefix: str) -> dict[str, tuple[float, Any]]:
    heatmaps = np.concatenate([chunk.to_numpy_ndarray() for chunk in results["heatmap"].chunks])
    names = [uri.removeprefix(prefix) for uri in results["uri"].to_pylist()]
    return dict(zip(names, zip(results["score"].to_pylist(), heatmaps, strict=True), strict=True))

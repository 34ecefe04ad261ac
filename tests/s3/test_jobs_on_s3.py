"""The jobs with everything on S3, through a proxy that makes requests fail; real Ray workers, real HTTP.

What is faked is AWS, by moto (`tests.s3.server`), the network's faults, by `tests.s3.proxy`, and bugs in decoders, by
`tests/hostile`. The backbone is a tiny one with random weights.
"""

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import ray
from PIL import Image

from jobs.heatmaps import main as heatmaps
from tests.s3.proxy import Faults, FaultyProxy
from tests.s3.server import SECRET_KEY, S3Server
from tests.zoo import deadly

pytestmark = [
    pytest.mark.usefixtures("local_ray"),
    # Ray's own context copies its deprecated settings.
    pytest.mark.filterwarnings("ignore:.*deprecated:DeprecationWarning:ray"),
]
ROOT = Path(__file__).parents[2]
GOOD = 80
NAMES = [
    "plain",
    "with space",
    "ünïcode 画像",
    "hash#1",
    "question?",
    "percent%20",
    "plus+",
    "a&b=c",
    "<script>",
    "'q\"",
]


def picture(number: int, suffix: str = "PNG") -> bytes:
    levels = np.random.default_rng(number).integers(0, 256, (5, 5, 3), np.uint8)
    data = io.BytesIO()
    Image.fromarray(levels).resize((40 + number % 30, 60), Image.Resampling.NEAREST).save(data, suffix)
    return data.getvalue()


def rows(s3: S3Server, address: str) -> list[dict[str, Any]]:
    bucket = "s3://" + address.removeprefix("s3://").partition("/")[0]
    found = []
    for key in s3.keys(address):
        found += pq.read_table(io.BytesIO(s3.get(f"{bucket}/{key}"))).to_pylist()
    return found


@pytest.fixture
def head_on_s3(head: Path, bucket: str, s3: S3Server) -> str:
    for file in head.iterdir():
        s3.put(f"{bucket}/heads/first/{file.name}", file.read_bytes())
    return f"{bucket}/heads/first"


def test_heatmaps_with_one_request_in_a_hundred_failing(
    bucket: str, head_on_s3: str, s3: S3Server, faulty_proxy: Callable[..., FaultyProxy]
) -> None:
    for number in range(GOOD):
        name = f"{NAMES[number]}.png" if number < len(NAMES) else f"{number:03d}.png"
        s3.put(f"{bucket}/photos/{number % 3}/{name}", picture(number))
        if number == 5:
            s3.put(f"{bucket}/photos/9/{name}", picture(number))  # two images of one name
    s3.put(f"{bucket}/photos/empty.png", b"")
    s3.put(f"{bucket}/photos/text.jpg", b"not an image")
    s3.put(f"{bucket}/photos/notes.txt", b"left out")
    for way in ("segfault", "spin"):
        s3.put(f"{bucket}/photos/deadly/{way}.ppm", deadly(way))
    # Ten times the 1% that is promised, so that every kind happens in a small run.
    proxy = faulty_proxy(Faults.each(0.1), seed=1)
    arguments = [
        f"images={bucket}/photos",
        f"output={bucket}/out",
        "run_id=one",
        f"head={head_on_s3}",
        f"storage.endpoint_url={proxy.endpoint_url}",
        "compute.batch_size=16",
        "shard_rows=32",
        "limits.seconds=2",
    ]
    assert heatmaps(arguments) == 0
    injected = proxy.counts()
    assert {"slow_down", "reset", "lost", "truncated", "slow"} <= injected.keys()
    results, errors = rows(s3, f"{bucket}/out/runs/one/results"), rows(s3, f"{bucket}/out/runs/one/errors")
    assert sorted(row["image_id"] for row in results + errors) == list(range(GOOD + 5))
    assert {row["uri"].removeprefix(bucket): row["reason"] for row in errors} == {
        "/photos/empty.png": "empty file",
        "/photos/text.jpg": "not an image",
        "/photos/deadly/segfault.ppm": "crashed",
        "/photos/deadly/spin.ppm": "too slow",
    }
    assert {row["uri"] for row in results} >= {f"{bucket}/photos/{n % 3}/{name}.png" for n, name in enumerate(NAMES)}
    assert len({row["uri"] for row in results}) == GOOD + 1
    summary = json.loads(s3.get(f"{bucket}/out/runs/one/summary.json"))
    assert (summary["scored"], summary["failed"]) == (GOOD + 1, len(errors))
    assert json.loads(s3.get(f"{bucket}/out/runs/one/run.json"))["ignored"] == {".txt": 1}
    # The same images through an undisturbed connection give the same bytes.
    arguments[2], arguments[4] = "run_id=two", f"storage.endpoint_url={s3.endpoint_url}"
    assert heatmaps(arguments) == 0
    undisturbed = {row["uri"]: row for row in rows(s3, f"{bucket}/out/runs/two/results")}
    for row in results:
        other = undisturbed[row["uri"]]
        assert row["score"] == pytest.approx(other["score"], abs=1e-3)
        assert row["etag"] == other["etag"]
    # Nothing secret was written, and a finished run does nothing.
    for key in s3.keys(f"{bucket}/out"):
        assert SECRET_KEY.encode() not in s3.get(f"{bucket}/{key}")
    before = s3.keys(bucket)
    assert heatmaps(arguments) == 0
    assert s3.keys(bucket) == before


def test_workers_elsewhere_get_the_drivers_way_to_s3_and_no_log_shows_it(bucket: str, s3: S3Server) -> None:
    """The cluster stands for one on other machines: its workers know no endpoint, and look for AWS."""
    s3.put(f"{bucket}/object", b"content")
    script = f"""
import ray
from ais.pipeline.cluster import start_ray
from ais.storage import Storage
start_ray()
@ray.remote
def read():
    return Storage().open("{bucket}/object").read_bytes()
@ray.remote
class Reader:
    def read(self):
        return Storage().open("{bucket}/object").read_bytes()
print(ray.get([read.remote(), Reader.remote().read.remote()]))
"""
    environment = os.environ | s3.environment() | {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        cwd=ROOT,
    )
    assert done.stdout.strip().endswith("[b'content', b'content']"), done.stderr
    logs = [path for path in Path(os.environ["RAY_TMPDIR"]).rglob("*") if path.is_file()]
    assert len(logs) > 10
    assert not [path for path in logs if SECRET_KEY.encode() in path.read_bytes()]

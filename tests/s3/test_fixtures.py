"""The S3 server and the faulty proxy are what they say: real processes, real faults, as many as were counted."""

import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import botocore.exceptions
import botocore.session
import pytest
from botocore.config import Config

from tests.s3.proxy import Faults, FaultyProxy
from tests.s3.server import ACCESS_KEY, SECRET_KEY, S3Server

BODY = bytes(range(256)) * 400


def plain_client(endpoint_url: str):  # type: ignore[no-untyped-def]
    """A client that tries nothing again."""
    session = botocore.session.Session()
    session.set_credentials(ACCESS_KEY, SECRET_KEY)
    config = Config(retries={"total_max_attempts": 1}, connect_timeout=20, read_timeout=20)
    return session.create_client("s3", region_name="us-east-1", endpoint_url=endpoint_url, config=config)


def test_objects_pass_the_proxy_unchanged(bucket: str, s3: S3Server, faulty_proxy: Callable[..., FaultyProxy]) -> None:
    proxy = faulty_proxy()
    client = plain_client(proxy.endpoint_url)
    name = bucket.removeprefix("s3://")
    for key in ("plain.png", "with space.png", "ünïcode 画像.png", "hash#1?&=+%20%.png", "a//b.png"):
        client.put_object(Bucket=name, Key=key, Body=BODY)
        assert s3.get(f"{bucket}/{key}") == BODY
        assert client.get_object(Bucket=name, Key=key)["Body"].read() == BODY
        assert client.head_object(Bucket=name, Key=key)["ContentLength"] == len(BODY)
    part = client.get_object(Bucket=name, Key="plain.png", Range="bytes=10-19")["Body"].read()
    assert part == BODY[10:20]
    with pytest.raises(botocore.exceptions.ClientError, match="PreconditionFailed"):
        client.put_object(Bucket=name, Key="plain.png", Body=b"other", IfNoneMatch="*")
    assert len(s3.keys(bucket)) == 5
    assert {fault: count for fault, count in proxy.counts().items() if fault != "requests"} == {}


@pytest.mark.parametrize("fault", ["slow_down", "reset", "lost", "truncated", "slow"])
def test_each_fault(fault: str, bucket: str, s3: S3Server, faulty_proxy: Callable[..., FaultyProxy]) -> None:
    proxy = faulty_proxy(Faults(**{fault: 1.0}))
    client = plain_client(proxy.endpoint_url)
    name = bucket.removeprefix("s3://")
    s3.put(f"{bucket}/read", BODY)
    started = time.monotonic()
    if fault == "slow":
        assert client.get_object(Bucket=name, Key="read")["Body"].read() == BODY
        assert time.monotonic() - started > 0.4
    elif fault == "truncated":
        answer = client.get_object(Bucket=name, Key="read")
        assert answer["ContentLength"] == len(BODY)
        with pytest.raises(Exception, match=r"IncompleteRead|Connection broken|incomplete"):
            answer["Body"].read()
    else:
        with pytest.raises((botocore.exceptions.ClientError, botocore.exceptions.ConnectionClosedError)) as refused:
            client.put_object(Bucket=name, Key="written", Body=BODY)
        assert ("SlowDown" in str(refused.value)) == (fault == "slow_down")
        assert ("written" in s3.keys(bucket)) == (fault == "lost")
    assert proxy.counts() == {"requests": 1, fault: 1}
    proxy.set(Faults())
    assert client.get_object(Bucket=name, Key="read")["Body"].read() == BODY


def test_the_schedule_is_seeded_and_has_its_rates() -> None:
    faults = Faults.each(0.1)
    drawn = [faults.choose(3, f"GET /bucket/{number}", 0) for number in range(20_000)]
    assert drawn == [faults.choose(3, f"GET /bucket/{number}", 0) for number in range(20_000)]
    assert drawn != [faults.choose(4, f"GET /bucket/{number}", 0) for number in range(20_000)]
    counts = Counter(drawn)
    assert len(counts) == 6
    # Six standard deviations of 20,000 draws of 0.02.
    assert all(abs(count / 20_000 - 0.02) < 0.006 for fault, count in counts.items() if fault)
    again = {faults.choose(3, "GET /bucket/1", times) for times in range(200)}
    assert "" in again
    assert len(again) > 3


def test_a_server_ends_with_whoever_started_it() -> None:
    script = """
import os, signal
from tests.s3.proxy import FaultyProxy
from tests.s3.server import S3Server
server = S3Server()
proxy = FaultyProxy(server.endpoint_url)
print(server.pid, proxy.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    root = Path(__file__).parents[2]
    killed = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True, check=False)
    pids = [int(word) for word in killed.stdout.split()]
    assert len(pids) == 2
    end = time.monotonic() + 60
    while any(os.path.exists(f"/proc/{pid}") for pid in pids):
        assert time.monotonic() < end, "still there"
        time.sleep(0.05)

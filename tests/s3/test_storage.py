"""Addresses on S3 and on the web through connections that fail: what is tried again, what is not, and what arrives.

What is faked is AWS, by moto (`tests.s3.server`), and the network's faults, by `tests.s3.proxy`. The clients are real.
"""

import hashlib
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

import ais.storage
from ais.embeddings import EmbeddingCache
from ais.errors import ImageError, StorageError
from ais.images import Limits
from ais.listing import list_images
from ais.pipeline.fetch import read_image
from ais.report.scores import read_scores
from ais.shards import write_table
from ais.storage import Storage, fetch, is_passing
from tests.s3.proxy import Faults, FaultyProxy
from tests.s3.server import SECRET_KEY, S3Server

Proxies = Callable[..., FaultyProxy]
BODY = bytes(range(256)) * 400
ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ais.storage, "_FIRST_WAIT_S", 0.01)


def through(proxy: FaultyProxy, **options: object) -> Storage:
    return Storage(endpoint_url=proxy.endpoint_url, **options)  # type: ignore[arg-type]


def test_every_passing_fault_is_tried_again(bucket: str, s3: S3Server, faulty_proxy: Proxies) -> None:
    proxy = faulty_proxy(Faults.each(0.5), seed=5)
    storage = through(proxy)
    for number in range(15):
        place = storage.open(f"{bucket}/{number:02d}.png")
        place.write_bytes(BODY[number:])
        assert s3.get(place.address) == BODY[number:]
        assert place.read_bytes() == BODY[number:]
        assert read_image(place.address, None, Limits(max_bytes=len(BODY)), storage) == BODY[number:]
        assert len(place.read_bytes(limit=100)) == 101
        assert place.exists()
    listed = list(list_images(bucket, storage))
    assert [image.size for image in listed] == [len(BODY) - number for number in range(15)]
    for place in storage.open(bucket).files("0*.png"):
        place.remove()
    assert len(s3.keys(bucket)) == 5
    counts = proxy.counts()
    assert counts.keys() == {"requests", "slow_down", "reset", "lost", "truncated", "slow"}
    assert sum(counts.values()) - counts["requests"] > 25


def test_an_image_is_one_request_and_an_empty_object_is_empty(bucket: str, s3: S3Server, faulty_proxy: Proxies) -> None:
    proxy = faulty_proxy()
    storage = through(proxy)
    s3.put(f"{bucket}/full.png", BODY)
    s3.put(f"{bucket}/empty.png", b"")
    assert read_image(f"{bucket}/full.png", None, Limits(), storage) == BODY
    assert proxy.counts() == {"requests": 1}
    with pytest.raises(ImageError, match="too many bytes: 102,400 bytes"):
        read_image(f"{bucket}/full.png", len(BODY), Limits(max_bytes=1000), storage)
    assert proxy.counts() == {"requests": 1}
    assert read_image(f"{bucket}/empty.png", None, Limits(), storage) == b""
    assert storage.open(f"{bucket}/empty.png").read_bytes() == b""


def test_what_is_missing_or_forbidden_is_asked_once(bucket: str, s3: S3Server, faulty_proxy: Proxies) -> None:
    proxy = faulty_proxy()
    storage = through(proxy)
    with pytest.raises(ImageError) as missing:
        read_image(f"{bucket}/missing.png", None, Limits(), storage)
    assert (missing.value.stage, missing.value.reason) == ("fetch", "not found")
    assert proxy.counts()["requests"] == 1
    with pytest.raises(ImageError, match="not found"):
        read_image("s3://no-such-bucket-here/a.png", None, Limits(), storage)
    proxy.set(Faults(forbidden=1))
    s3.put(f"{bucket}/closed.png", BODY)
    before = proxy.counts()["requests"]
    with pytest.raises(ImageError) as denied:
        read_image(f"{bucket}/closed.png", None, Limits(), storage)
    assert (denied.value.stage, denied.value.reason) == ("fetch", "permission denied")
    with pytest.raises(StorageError, match="cannot be written: PermissionError: Access Denied"):
        storage.open(f"{bucket}/new.png").write_bytes(BODY)
    assert proxy.counts()["requests"] - before == 2
    with pytest.raises(StorageError, match=r"Access Denied|Forbidden"):
        list(list_images(bucket, storage))


def test_a_server_that_never_answers_well_is_given_up_with_its_reason(bucket: str, faulty_proxy: Proxies) -> None:
    proxy = faulty_proxy(Faults(reset=1))
    with pytest.raises(ImageError) as given_up:
        read_image(f"{bucket}/a.png", None, Limits(), through(proxy))
    assert given_up.value.reason == "unreadable"
    proxy.stop()
    with pytest.raises(StorageError, match="cannot be written: EndpointConnectionError: Could not connect to"):
        through(proxy).open(f"{bucket}/a").write_bytes(b"x")


def test_weights_are_fetched_once_by_processes_that_start_together(
    s3: S3Server, faulty_proxy: Proxies, tmp_path: Path
) -> None:
    bucket = s3.create_bucket("weights-for-many")  # the schedule of faults depends on the name
    weights = os.urandom(3 * 2**20)
    digest = hashlib.sha256(weights).hexdigest()
    s3.put(f"{bucket}/weights.pth", weights)
    proxy = faulty_proxy(Faults(truncated=0.4, slow=0.2, slow_down=0.1), seed=11)
    script = f"""
from ais.storage import Storage, fetch
path, digest = fetch("{bucket}/weights.pth", "{digest}", Storage(endpoint_url="{proxy.endpoint_url}"))
print(digest, path.stat().st_size)
"""
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path)}
    together = [
        subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    assert {process.communicate(timeout=300)[0] for process in together} == {f"{digest} {len(weights)}\n"}
    counts = proxy.counts()
    assert counts["truncated"] > 0
    # One of them asked, for the file and for its size; had each of them asked, there would be eight whole answers.
    assert counts["requests"] - counts["truncated"] - counts.get("slow_down", 0) == 2
    [kept] = (tmp_path / "ais" / "weights").glob("*.pth")
    assert kept.read_bytes() == weights


def test_truncated_weights_are_never_kept(bucket: str, s3: S3Server, faulty_proxy: Proxies, tmp_path: Path) -> None:
    s3.put(f"{bucket}/weights.pth", BODY)
    proxy = faulty_proxy(Faults(truncated=1))
    with pytest.raises(StorageError, match="cannot be fetched"):
        fetch(f"{bucket}/weights.pth", None, through(proxy), tmp_path)
    assert not list(tmp_path.glob("weights/*.pth*partial"))
    assert not list(tmp_path.glob("weights/*.pth"))
    proxy.set(Faults())
    path, _ = fetch(f"{bucket}/weights.pth", None, through(proxy), tmp_path)
    assert path.read_bytes() == BODY
    # The same address on another server is another file.
    other, _ = fetch(f"{bucket}/weights.pth", None, Storage(endpoint_url=s3.endpoint_url), tmp_path)
    assert other != path


def test_addresses_of_the_web_are_read(s3: S3Server, faulty_proxy: Proxies, tmp_path: Path) -> None:
    bucket = s3.create_bucket("of-the-web")
    proxy = faulty_proxy(Faults(truncated=0.15, reset=0.15, slow_down=0.15), seed=7)
    name = bucket.removeprefix("s3://")
    for number in range(8):
        s3.client.put_object(Bucket=name, Key=f"a b{number}.png", Body=BODY[number:], ACL="public-read")
        address = f"{proxy.endpoint_url}/{name}/a%20b{number}.png"
        assert read_image(address, None, Limits(), Storage()) == BODY[number:]
    assert proxy.counts().keys() == {"requests", "truncated", "reset", "slow_down"}
    proxy.set(Faults())
    with pytest.raises(ImageError, match="not found"):
        read_image(f"{proxy.endpoint_url}/{name}/missing.png", None, Limits(), Storage())
    proxy.set(Faults(forbidden=1))
    with pytest.raises(ImageError, match="permission denied"):
        read_image(f"{proxy.endpoint_url}/{name}/a%20b1.png", None, Limits(), Storage())
    proxy.set(Faults())
    path, _ = fetch(f"{proxy.endpoint_url}/{name}/a%20b0.png", None, Storage(), tmp_path)
    assert path.read_bytes() == BODY


def test_the_pool_is_as_large_as_the_threads_and_nothing_secret_is_logged(
    bucket: str, s3: S3Server, faulty_proxy: Proxies, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    proxy = faulty_proxy(Faults(slow=1))
    storage = through(proxy, max_connections=1).for_threads(24)
    addresses = [f"{bucket}/{number}.png" for number in range(24)]
    for address in addresses:
        s3.put(address, BODY)
    with ThreadPoolExecutor(24) as threads:
        assert set(threads.map(lambda address: storage.open(address).read_bytes(), addresses)) == {BODY}
    assert "pool is full" not in caplog.text
    assert SECRET_KEY not in caplog.text + repr(storage) + repr(storage.open(bucket))
    assert storage.open(bucket).filesystem.storage_options["config_kwargs"]["max_pool_connections"] == 24


@pytest.mark.parametrize(
    ("error", "passing"),
    [
        (TimeoutError("slow"), True),
        (ConnectionResetError(), True),
        (OSError(16, "busy: SlowDown"), True),
        (OSError(5, "InternalError"), True),
        (FileNotFoundError(), False),
        (PermissionError(), False),
        (OSError(28, "no space left"), False),
        (OSError(22, "invalid"), False),
        (ValueError("our mistake"), False),
        (MemoryError(), True),
        (KeyboardInterrupt(), False),
    ],
)
def test_kinds(error: BaseException, passing: bool) -> None:
    assert is_passing(error) == passing


def test_signed_or_not_and_paid_by_whom(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Moto checks neither, so a server that keeps the headers stands for S3."""
    seen: list[dict[str, str]] = []

    class Keep(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            seen.append({name.lower(): value for name, value in self.headers.items()})
            self.send_response(200)
            self.send_header("ETag", '"1"')
            self.send_header("Content-Length", str(len(BODY)))
            self.end_headers()
            self.wfile.write(BODY)

        def log_message(self, *_: object) -> None:
            pass

    for name, value in s3.environment().items():
        monkeypatch.setenv(name, value)
    with ThreadingHTTPServer(("127.0.0.1", 0), Keep) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        endpoint = f"http://127.0.0.1:{server.server_port}"
        for options in ({}, {"anonymous": True}, {"requester_pays": True}):
            storage = Storage(endpoint_url=endpoint, **options)
            assert read_image("s3://photos/a.png", None, Limits(), storage) == BODY
            assert storage.open("s3://photos/a.png").read_bytes() == BODY
        server.shutdown()
    signed, anonymous, paying = seen[:2], seen[2:4], seen[4:]
    assert all("authorization" in headers and "x-amz-request-payer" not in headers for headers in signed)
    assert all("authorization" not in headers for headers in anonymous)
    assert all(headers["x-amz-request-payer"] == "requester" for headers in paying)
    assert len(paying) == 2


def test_a_server_that_goes_away_between_two_files_is_named(tmp_path: Path) -> None:
    """What was listed cannot be read any more; botocore's errors are no `OSError`."""
    with S3Server() as server:
        bucket = server.create_bucket("leaves")
        storage = Storage(endpoint_url=server.endpoint_url)
        cache = EmbeddingCache(f"{bucket}/cache", "fingerprint", storage)
        for name in ("a", "b"):
            cache.write(name, [name], ["1"], np.zeros((1, 4), np.float32))
        write_table(storage.open(f"{bucket}/part.parquet"), pa.table({"image_id": [1]}))
        shards, parts = storage.open(bucket).files(), cache._parts()
        next(parts)
        server.stop()
        with pytest.raises(StorageError, match=r"cache/fingerprint/part-b\.parquet' cannot be read: .*access to it"):
            next(parts)
        with pytest.raises(StorageError, match=r"s3://leaves/part\.parquet' cannot be read: .*access to it"):
            read_scores(shards, tmp_path)

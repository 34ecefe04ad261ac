"""The same promises on a server of other authors: rclone's, which checks signatures and ignores conditional writes.

Real Ray workers, real HTTP; nothing is faked. The backbone is a tiny one with random weights.
"""

import io
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

import ais.lease
from ais.errors import ChangedError, ImageError, LeaseLostError, StorageError
from ais.images import Limits
from ais.lease import Lease, hold
from ais.listing import list_images
from ais.pipeline.fetch import read_image
from ais.storage import Storage
from jobs.heatmaps import main as heatmaps
from tests.contention import contend
from tests.s3.proxy import Faults, FaultyProxy
from tests.s3.rclone import RcloneServer
from tests.s3.server import SECRET_KEY
from tests.s3.test_jobs_on_s3 import NAMES, picture, rows

# Ray's own context copies its deprecated settings.
pytestmark = pytest.mark.filterwarnings("ignore:.*deprecated:DeprecationWarning:ray")


@pytest.fixture(scope="module")
def rclone() -> Iterator[RcloneServer]:
    with RcloneServer() as server:
        yield server


@pytest.mark.usefixtures("local_ray")
def test_a_run_with_everything_on_it_while_requests_fail(rclone: RcloneServer, head: Path) -> None:
    bucket = rclone.create_bucket("everything")
    for file in head.iterdir():
        rclone.put(f"{bucket}/heads/first/{file.name}", file.read_bytes())
    for number in range(40):
        name = NAMES[number] if number < len(NAMES) else f"{number:03d}"
        rclone.put(f"{bucket}/photos/{number % 3}/{name}.png", picture(number))
    rclone.put(f"{bucket}/photos/text.jpg", b"not an image")
    arguments = [
        f"images={bucket}/photos",
        f"output={bucket}/out",
        "run_id=one",
        f"head={bucket}/heads/first",
        "compute.batch_size=8",
        "shard_rows=16",
    ]
    with FaultyProxy(rclone.endpoint_url, Faults.each(0.05), seed=3) as proxy:
        assert heatmaps([*arguments, f"storage.endpoint_url={proxy.endpoint_url}"]) == 0
        assert sum(count for fault, count in proxy.counts().items() if fault != "requests") > 0
    arguments.append(f"storage.endpoint_url={rclone.endpoint_url}")
    results, errors = (rows(rclone, f"{bucket}/out/runs/one/{kind}") for kind in ("results", "errors"))
    assert sorted(row["image_id"] for row in results + errors) == list(range(41))
    assert [(row["uri"], row["reason"]) for row in errors] == [(f"{bucket}/photos/text.jpg", "not an image")]
    assert {row["uri"] for row in results} >= {f"{bucket}/photos/{n % 3}/{name}.png" for n, name in enumerate(NAMES)}
    assert json.loads(rclone.get(f"{bucket}/out/runs/one/summary.json"))["scored"] == 40
    assert heatmaps([*arguments, "verify=true"]) == 0
    before = rclone.keys(bucket)
    assert not [key for key in before if SECRET_KEY.encode() in rclone.get(f"{bucket}/{key}")]
    assert heatmaps(arguments) == 0
    assert rclone.keys(bucket) == before, "a finished run does nothing"


def test_keys_that_are_wrong_are_said_at_once(head: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "another")
    with RcloneServer() as server:
        bucket = server.create_bucket("locked")
        server.put(f"{bucket}/photos/a.png", picture(1))
        arguments = [f"images={bucket}/photos", f"output={bucket}/out", f"head={head}"]
        with pytest.raises(StorageError, match=f"'{bucket}/.*signature .* does not match") as refused:
            heatmaps([*arguments, f"storage.endpoint_url={server.endpoint_url}"])
        assert "another" not in str(refused.value).replace("another address", "")
        assert server.keys(bucket) == ["photos/a.png"]


def test_a_folder_of_more_than_a_page(rclone: RcloneServer) -> None:
    bucket = rclone.create_bucket("many")
    names = [f"photos/{number:04d} ü#?%.png" for number in range(1100)]
    for name in names:
        rclone.put(f"{bucket}/{name}", b"x")
    found = list(list_images(f"{bucket}/photos", Storage(endpoint_url=rclone.endpoint_url)))
    assert [image.uri for image in found] == [f"{bucket}/{name}" for name in names]
    assert {image.size for image in found} == {1}
    assert all(image.etag for image in found)


def test_an_object_that_changed_since_it_was_listed(rclone: RcloneServer) -> None:
    bucket = rclone.create_bucket("changed")
    address, storage = f"{bucket}/photos/a.png", Storage(endpoint_url=rclone.endpoint_url)
    rclone.put(address, b"0123456789")
    (listed,) = list_images(f"{bucket}/photos", storage)
    assert read_image(address, listed.size, Limits(), storage, etag=listed.etag) == b"0123456789"
    rclone.put(address, b"abcdefghij")
    with pytest.raises(ChangedError, match="its etag is no longer"):
        storage.open(address).read_bytes(etag=listed.etag)
    with pytest.raises(ImageError, match="changed since it was listed"):
        read_image(address, listed.size, Limits(), storage, etag=listed.etag)


def test_the_lock_where_conditions_are_ignored(rclone: RcloneServer, monkeypatch: pytest.MonkeyPatch) -> None:
    bucket = rclone.create_bucket("locks")
    for _ in range(2):
        rclone.client.put_object(Bucket="locks", Key="unconditional", Body=io.BytesIO(b""), IfNoneMatch="*")
    monkeypatch.setattr(ais.lease, "_machine", lambda: None)  # as if each holder were on a machine of its own
    folder = Storage(endpoint_url=rclone.endpoint_url).open(f"{bucket}/run")
    got = contend(folder, 5, 120, 60, at_last=Lease.check)
    assert len(got) == 1, "and it still had it when the others had given up"
    monkeypatch.setattr(ais.lease.Lease, "_keep", lambda _: None)  # a paused process does not renew
    with (
        hold(folder, lease_s=1) as paused,
        hold(folder, wait=True, lease_s=120),
        pytest.raises(LeaseLostError, match="taken over"),
    ):
        paused.check()

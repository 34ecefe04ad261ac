"""A run on S3: what changed since it was listed, what killed uploads leave, and reading it back while requests fail.

Moto's server, real requests; nothing is faked but AWS itself, and the network's faults.
"""

from collections.abc import Callable

import pytest

from ais.errors import ChangedError, ImageError
from ais.images import Limits
from ais.pipeline.fetch import read_image
from ais.runs import ListedImage, Run
from ais.storage import Storage
from ais.verification import repair, verify
from tests.s3.proxy import Faults, FaultyProxy
from tests.s3.server import S3Server
from tests.unit.test_verification import LISTED, write_errors, write_shard


def test_an_object_that_changed_since_it_was_listed_is_not_read(bucket: str, s3: S3Server) -> None:
    storage = Storage(endpoint_url=s3.endpoint_url)
    address, name = f"{bucket}/a photo.png", bucket.removeprefix("s3://")
    for data in (b"0123456789", b""):
        s3.put(address, data)
        etag = s3.client.head_object(Bucket=name, Key="a photo.png")["ETag"].strip('"')
        for limit in (None, 4, 100):
            read = storage.open(address).read_bytes(limit, etag=etag)
            assert read == (data if limit is None else data[: limit + 1])
        assert read_image(address, len(data), Limits(), storage, etag=etag) == data
        s3.put(address, data[::-1] + b"!")
        with pytest.raises(ChangedError, match=f"its etag is no longer {etag}"):
            storage.open(address).read_bytes(etag=etag)
        with pytest.raises(ImageError, match="changed since it was listed: its etag is no longer") as refused:
            read_image(address, None, Limits(), storage, etag=etag)
        assert (refused.value.stage, refused.value.reason) == ("fetch", "changed since it was listed")
        with pytest.raises(ImageError, match=rf"changed since.*: it had {len(data)} bytes, and has {len(data) + 1}"):
            read_image(address, len(data), Limits(), storage)
    with pytest.raises(ImageError, match="not found"):
        read_image(f"{bucket}/missing.png", None, Limits(), storage, etag="0")


def test_uploads_that_were_never_completed_are_ended(bucket: str, s3: S3Server) -> None:
    run = Run.at(f"{bucket}/out", "first", Storage(endpoint_url=s3.endpoint_url))
    name = bucket.removeprefix("s3://")
    for key in ("out/runs/first/png/part-0.tar", "out/runs/first/results/part-0.parquet", "out/runs/firstly/png/a.tar"):
        upload = s3.client.create_multipart_upload(Bucket=name, Key=key)["UploadId"]
        s3.client.upload_part(Bucket=name, Key=key, UploadId=upload, PartNumber=1, Body=b"half")
    run.recover(1)
    left = s3.client.list_multipart_uploads(Bucket=name)["Uploads"]
    assert [upload["Key"] for upload in left] == ["out/runs/firstly/png/a.tar"]


def test_a_run_is_read_back_while_requests_fail(s3: S3Server, faulty_proxy: Callable[..., FaultyProxy]) -> None:
    bucket = s3.create_bucket("read-back")  # the schedule of faults hangs on the addresses, not on what ran before
    proxy = faulty_proxy(Faults.each(0.15), seed=2)
    run = Run.at(f"{bucket}/out", "first", Storage(endpoint_url=proxy.endpoint_url))
    run.set_out([ListedImage(f"/i/{n}.png", size=n) for n in range(LISTED)], "images: /i\n", {})
    for first in range(0, 8, 2):
        write_shard(run, f"part-a-{first:06d}", [first, first + 1], pictured=[first])
    write_errors(run, "part-a-000009", [8, 9, 10, 11])
    assert run.recover(LISTED).all()
    run.finish({"images": LISTED, "scored": 8, "failed": 4, "errors": {"decode: truncated": 4}})
    assert verify(run).whole
    key = "out/runs/first/png/part-a-000002-0.tar"
    whole = s3.get(f"{bucket}/{key}")
    s3.put(f"{bucket}/{key}", whole[:600] + bytes([whole[600] ^ 1]) + whole[601:])
    found = verify(run)
    assert [key.rpartition("/")[2] in str(damage) for damage in found.damages] == [True]
    assert repair(run, found) == 2
    assert run.complete() is None
    assert (~run.recover(LISTED)).nonzero()[0].tolist() == [2, 3]
    assert {"slow_down", "reset", "lost", "truncated", "slow"} <= proxy.counts().keys()

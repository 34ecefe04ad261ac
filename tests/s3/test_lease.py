"""The lock on S3: moto's server, one run of it behind the faulty proxy. Nothing is faked but AWS itself."""

from collections.abc import Callable

import pytest

import ais.lease
from ais.errors import LeaseLostError, LockedError, StorageError
from ais.lease import Lease, hold
from ais.storage import Storage
from tests.contention import contend
from tests.s3.proxy import Faults, FaultyProxy
from tests.s3.server import S3Server


def test_of_many_that_come_together_one_gets_it_whatever_requests_fail(
    bucket: str, s3: S3Server, faulty_proxy: Callable[..., FaultyProxy]
) -> None:
    proxy = faulty_proxy(Faults.each(0.1), seed=1)
    folder = Storage(endpoint_url=proxy.endpoint_url).open(f"{bucket}/out/runs/first")

    def meanwhile() -> None:
        assert s3.keys(f"{bucket}/out/runs/first/lock/0") == ["out/runs/first/lock/000001.json"]

    def still_held(lease: Lease) -> None:
        lease.renew()
        lease.check()

    got = contend(folder, 6, 120, 120, meanwhile, still_held)
    assert len(got) == 1
    assert sum(count for fault, count in proxy.counts().items() if fault != "requests") > 0


def test_a_lease_that_ran_out_is_taken_over_and_its_holder_finds_out(
    bucket: str, s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Storage(endpoint_url=s3.endpoint_url).open(f"{bucket}/run")
    monkeypatch.setattr(ais.lease, "_machine", lambda: None)  # as if each holder were on a machine of its own
    monkeypatch.setattr(ais.lease.Lease, "_keep", lambda _: None)  # a paused process does not renew
    with hold(folder, lease_s=1) as paused:
        with pytest.raises(LockedError), hold(folder):
            pass
        with hold(folder, wait=True, lease_s=120) as lease:
            with pytest.raises(LeaseLostError, match="taken over by process"):
                paused.check()
            with pytest.raises(LeaseLostError):
                paused.renew()
            lease.check()
        assert s3.keys(bucket) == ["run/lock/000002.json"]  # given back, and it stays to say so
        # A renewal that the store was slow to take brings the paused holder's file back, and no lock with it.
        ours = paused.fence.place / "000001.json"
        ours.filesystem.pipe_file(ours.path, ais.lease._encode(paused.holder))
        with pytest.raises(LeaseLostError):
            paused.renew()
        with hold(folder, lease_s=120) as next_one:  # at once
            assert next_one.fence.generation == 3
            assert s3.keys(bucket) == ["run/lock/000003.json"]


def test_a_store_that_ignores_conditions_is_found_out(
    bucket: str, s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Storage(endpoint_url=s3.endpoint_url).open(f"{bucket}/run")
    write, pauses = folder.filesystem.pipe_file, []
    monkeypatch.setattr(folder.filesystem, "pipe_file", lambda path, data, **_: write(path, data))
    monkeypatch.setattr(ais.lease.time, "sleep", pauses.append)
    monkeypatch.setattr(ais.lease.Lease, "_keep", lambda _: None)
    with hold(folder) as lease:
        assert pauses == [ais.lease._SETTLE_S]
        ais.lease._create(folder / "lock", "000001.json", {**lease.holder, "token": "of a later writer"})
        with pytest.raises(LeaseLostError):
            lease.check()


def test_no_bucket_and_no_server(s3: S3Server) -> None:
    with (
        pytest.raises(StorageError, match=r"'s3://nowhere/run/lock/000001\.json' cannot be written.*bucket"),
        hold(Storage(endpoint_url=s3.endpoint_url).open("s3://nowhere/run")),
    ):
        pass

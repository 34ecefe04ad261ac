"""What all tests share: an S3 server of their own, and no way to anybody's real one."""

import itertools
from collections.abc import Callable, Iterator

import pytest

from tests.s3.proxy import Faults, FaultyProxy
from tests.s3.server import S3Server, credentials

_numbers = itertools.count()


@pytest.fixture(scope="session", autouse=True)
def aws_credentials() -> Iterator[None]:
    """The tests' own keys instead of whatever this machine has; set before any Ray starts, whose workers inherit."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"):
            patch.delenv(name, raising=False)
        for name, value in credentials().items():
            patch.setenv(name, value)
        yield


@pytest.fixture(scope="session")
def s3() -> Iterator[S3Server]:
    """Moto in its own process."""
    with S3Server() as server:
        yield server


@pytest.fixture
def bucket(s3: S3Server) -> str:
    """Address of a new, empty bucket."""
    return s3.create_bucket(f"bucket-{next(_numbers)}")


@pytest.fixture
def faulty_proxy(s3: S3Server) -> Iterator[Callable[..., FaultyProxy]]:
    """Start a proxy before the S3 server: ``faulty_proxy(Faults(reset=0.1), seed=3)``."""
    started: list[FaultyProxy] = []

    def start(faults: Faults = Faults(), seed: int = 0) -> FaultyProxy:  # noqa: B008 - frozen
        started.append(FaultyProxy(s3.endpoint_url, faults, seed))
        return started[-1]

    yield start
    for proxy in started:
        proxy.stop()

"""An S3 server for tests: moto, in a process of its own, so that Ray's workers and started jobs reach it too.

    with S3Server() as s3, FaultyProxy(s3.endpoint_url) as proxy:
        s3.create_bucket("photos")
        subprocess.run([...], env={**os.environ, **s3.environment(proxy.endpoint_url)})

What it fakes: AWS. Signatures are not checked and everything is kept in memory; conditional writes (``If-None-Match``,
``If-Match``) are honoured; keys with a newline are not (404). A server ends with whoever started it, even by SIGKILL:
it watches its standard input.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any, Self

import botocore.session

ACCESS_KEY, SECRET_KEY = "AKIATESTTESTTESTTEST", "secret-of-the-tests/never-to-be-seen"


class Server:
    """A process that prints its port when it is ready and ends when its standard input does.

    Args:
        module: that is run.
        arguments: for it.
    """

    def __init__(self, module: str, *arguments: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))),
        )
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line.strip().isdigit(), f"{module} did not start: {line!r}"
        self.endpoint_url = f"http://127.0.0.1:{int(line)}"

    @property
    def pid(self) -> int:
        """Of its process."""
        return self._process.pid

    def stop(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


class S3Server(Server):
    """An S3 server, empty: moto's, or another's.

    Args:
        module: that serves it.
    """

    def __init__(self, module: str = "tests.s3.server") -> None:
        super().__init__(module)
        self.client = client(self.endpoint_url)

    def create_bucket(self, name: str) -> str:
        """Make a bucket; return its address."""
        self.client.create_bucket(Bucket=name)
        return f"s3://{name}"

    def put(self, address: str, data: bytes) -> None:
        """Write an object, past every proxy."""
        bucket, _, key = address.removeprefix("s3://").partition("/")
        self.client.put_object(Bucket=bucket, Key=key, Body=data)

    def get(self, address: str) -> bytes:
        """Read an object, past every proxy."""
        bucket, _, key = address.removeprefix("s3://").partition("/")
        body: bytes = self.client.get_object(Bucket=bucket, Key=key)["Body"].read()
        return body

    def keys(self, address: str) -> list[str]:
        """Every key below an address, sorted."""
        bucket, _, prefix = address.removeprefix("s3://").partition("/")
        return sorted(_keys(self.client, bucket, prefix))

    def environment(self, endpoint_url: str | None = None) -> dict[str, str]:
        """Variables under which AWS clients find this server, or the proxy before it, and nothing else."""
        return {**credentials(), "AWS_ENDPOINT_URL": endpoint_url or self.endpoint_url}


def credentials() -> dict[str, str]:
    """Variables that hold the tests' own keys and keep clients from any others of this machine."""
    return {
        "AWS_ACCESS_KEY_ID": ACCESS_KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        "AWS_EC2_METADATA_DISABLED": "true",
    }


def client(endpoint_url: str) -> Any:
    """A plain client, for setting up and for looking."""
    session = botocore.session.Session()
    session.set_credentials(ACCESS_KEY, SECRET_KEY)
    return session.create_client("s3", region_name="us-east-1", endpoint_url=endpoint_url)


def _keys(s3: Any, bucket: str, prefix: str) -> Iterator[str]:
    for page in s3.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix):
        for entry in page.get("Contents", ()):
            yield entry["Key"]


def end_with_standard_input() -> None:
    """End this process when its standard input ends: whoever started it is gone then."""
    sys.stdin.buffer.read()
    os._exit(0)


def main() -> None:
    """Serve until standard input ends."""
    import logging

    from moto.moto_server.threaded_moto_server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    print(server.get_host_and_port()[1], flush=True)
    threading.Thread(target=end_with_standard_input).start()


if __name__ == "__main__":
    main()

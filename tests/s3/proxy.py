"""A proxy before an S3 server that makes requests fail, as networks and object stores do.

In a process of its own, ended with whoever started it. Which request fails how is decided by a seeded schedule: by the
seed, method, path, query and range, and by how many times that same request was seen. So the schedule does not depend
on the order in which parallel requests arrive, and a request that is tried again gets a new decision.

Faults, each with a rate of its own:

``slow_down``   503 with S3's ``SlowDown`` document; the server never sees the request.
``reset``       the connection is reset; the server never sees the request.
``lost``        the server does what was asked, and the connection is reset instead of answering.
``truncated``   half of the body follows a header that promises all of it, then the connection ends (only bodies over
                1 byte; on other answers nothing happens).
``slow``        the body comes in ten parts, `SLOW_S` seconds in all.
``forbidden``   403 with S3's ``AccessDenied`` document; the server never sees the request.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import logging
import socket
import struct
import sys
import threading
import urllib.request
from collections import Counter
from dataclasses import asdict, dataclass

import aiohttp
from aiohttp import web
from multidict import CIMultiDict
from yarl import URL

from tests.s3.server import Server, end_with_standard_input

SLOW_S = 0.5
_SLOW_PARTS = 10
_CONTROL = "/_proxy"  # no bucket can have this name
_SLOW_DOWN = b"""<?xml version="1.0" encoding="UTF-8"?>
<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message><RequestId>0</RequestId></Error>"""
_DENIED = b"""<?xml version="1.0" encoding="UTF-8"?>
<Error><Code>AccessDenied</Code><Message>Access Denied</Message><RequestId>0</RequestId></Error>"""
# Of one connection, and not of the message.
_HOP_BY_HOP = {
    "connection",
    "keep-alive",
    "transfer-encoding",
    "te",
    "trailer",
    "upgrade",
    "proxy-authorization",
    "expect",
}


@dataclass(frozen=True)
class Faults:
    """Share of the requests that get each fault; their sum is at most 1."""

    slow_down: float = 0.0
    reset: float = 0.0
    lost: float = 0.0
    truncated: float = 0.0
    slow: float = 0.0
    forbidden: float = 0.0

    @classmethod
    def each(cls, rate: float) -> Faults:
        """The same rate for every fault that passes, so that together they are ``rate``."""
        return cls(*[rate / 5] * 5)

    def choose(self, seed: int, request: str, times: int) -> str:
        """Return the fault of a request that was seen ``times`` times before, or ``""``."""
        digest = hashlib.sha256(f"{seed} {times} {request}".encode()).digest()
        drawn = int.from_bytes(digest[:8], "big") / 2**64
        for name, rate in asdict(self).items():
            if drawn < rate:
                return str(name)
            drawn -= rate
        return ""


class FaultyProxy(Server):
    """The proxy as a process.

    Args:
        upstream: endpoint of the server behind it.
        faults: to begin with.
        seed: of the schedule.
        latency_s: before every answer, as of a store far away.
    """

    def __init__(self, upstream: str, faults: Faults = Faults(), seed: int = 0, latency_s: float = 0.0) -> None:
        super().__init__("tests.s3.proxy", upstream, json.dumps(asdict(faults)), str(seed), str(latency_s))

    def set(self, faults: Faults) -> None:
        """Change the rates from now on; counts and schedule go on."""
        self._control("PUT", json.dumps(asdict(faults)).encode())

    def counts(self) -> dict[str, int]:
        """How many requests there were (``requests``), and how many of each fault were really injected."""
        counts: dict[str, int] = json.loads(self._control("GET"))
        return counts

    def requests(self) -> dict[str, int]:
        """How many times each request (method and path without query) was seen."""
        seen: dict[str, int] = json.loads(self._control("GET", path="/requests"))
        return seen

    def _control(self, method: str, data: bytes | None = None, path: str = "") -> bytes:
        request = urllib.request.Request(f"{self.endpoint_url}{_CONTROL}{path}", data, method=method)
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=30) as answer:
            body: bytes = answer.read()
        return body


class _Proxy:
    def __init__(self, upstream: str, faults: Faults, seed: int, latency_s: float) -> None:
        self._upstream = upstream
        self._faults = faults
        self._seed = seed
        self._latency_s = latency_s
        self._counts: Counter[str] = Counter()
        self._times: Counter[str] = Counter()
        self._requests: Counter[str] = Counter()

    async def start(self) -> int:
        self._session = aiohttp.ClientSession(auto_decompress=False, connector=aiohttp.TCPConnector(limit=64))
        server = web.Server(self._answer)
        # Asked for as it comes: a path is signed and escaped as it stands.
        listening = await asyncio.get_running_loop().create_server(server, "127.0.0.1", 0, backlog=512)
        port: int = listening.sockets[0].getsockname()[1]
        return port

    async def _answer(self, request: web.BaseRequest) -> web.StreamResponse:
        if request.raw_path.startswith(_CONTROL):
            return await self._configure(request)
        name = f"{request.method} {request.raw_path} {request.headers.get('Range', '')}"
        fault = self._faults.choose(self._seed, name, self._times[name])
        self._times[name] += 1
        self._requests[f"{request.method} {request.raw_path.partition('?')[0]}"] += 1
        self._counts["requests"] += 1
        await asyncio.sleep(self._latency_s)
        if request.headers.get("Expect", "").lower() == "100-continue" and request.transport is not None:
            request.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")  # the client waits for this
        body = await request.read()
        if fault == "slow_down":
            self._counts[fault] += 1
            return web.Response(status=503, body=_SLOW_DOWN, content_type="application/xml")
        if fault == "forbidden":
            self._counts[fault] += 1
            return web.Response(status=403, body=_DENIED, content_type="application/xml")
        if fault == "reset":
            self._counts[fault] += 1
            return _reset(request)
        headers = CIMultiDict((key, value) for key, value in request.headers.items() if key.lower() not in _HOP_BY_HOP)
        async with self._session.request(
            request.method,
            URL(self._upstream + request.raw_path, encoded=True),
            headers=headers,
            data=body,
            skip_auto_headers=("User-Agent", "Content-Type", "Accept", "Accept-Encoding"),
            allow_redirects=False,
        ) as found:
            content = await found.read()
            if fault == "lost":
                self._counts[fault] += 1
                return _reset(request)
            kept = CIMultiDict((key, value) for key, value in found.headers.items() if key.lower() not in _HOP_BY_HOP)
        if request.method != "HEAD" and found.status not in (204, 304):
            kept["Content-Length"] = str(len(content))
        answer = web.StreamResponse(status=found.status, reason=found.reason, headers=kept)
        if fault == "truncated" and len(content) > 1 and request.method == "GET":
            self._counts[fault] += 1
            await answer.prepare(request)
            await answer.write(content[: len(content) // 2])
            assert request.transport is not None
            request.transport.close()
            return answer
        if fault == "slow" and content:
            self._counts[fault] += 1
            await answer.prepare(request)
            size = -(-len(content) // _SLOW_PARTS)
            for start in range(0, len(content), size):
                await asyncio.sleep(SLOW_S / _SLOW_PARTS)
                await answer.write(content[start : start + size])
            return answer
        await answer.prepare(request)
        if request.method != "HEAD":
            await answer.write(content)
        return answer

    async def _configure(self, request: web.BaseRequest) -> web.Response:
        if request.method == "PUT":
            self._faults = Faults(**await request.json())
        return web.json_response(self._requests if request.raw_path.endswith("/requests") else self._counts)


def _reset(request: web.BaseRequest) -> web.Response:
    transport = request.transport
    assert transport is not None
    sock: socket.socket = transport.get_extra_info("socket")
    # A close that lingers for 0 seconds is a reset.
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    transport.abort()
    return web.Response(status=500)


async def serve(upstream: str, faults: Faults, seed: int, latency_s: float) -> None:
    """Print the port and serve for ever."""
    print(await _Proxy(upstream, faults, seed, latency_s).start(), flush=True)
    await asyncio.Event().wait()


def main() -> None:
    """Serve until standard input ends."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("upstream")
    parser.add_argument("faults", help="rates, as JSON")
    parser.add_argument("seed", type=int)
    parser.add_argument("latency_s", type=float)
    arguments = parser.parse_args()
    threading.Thread(target=end_with_standard_input, daemon=True).start()
    logging.getLogger("aiohttp.server").setLevel(logging.CRITICAL)  # a client that is killed is no error here
    faults = Faults(**json.loads(arguments.faults))
    asyncio.run(serve(arguments.upstream, faults, arguments.seed, arguments.latency_s))


if __name__ == "__main__":
    sys.exit(main())

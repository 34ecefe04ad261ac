"""A proxy that waits before every answer, as an object store far away does; a process of its own."""

from __future__ import annotations

import asyncio
import sys
import threading

import aiohttp
from aiohttp import web

from tests.s3.server import Server, end_with_standard_input

_NOT_KEPT = ("content-length", "transfer-encoding", "connection")


class SlowProxy(Server):
    """The proxy.

    Args:
        upstream: endpoint of the server behind it.
        latency_s: that it adds to each request.
    """

    def __init__(self, upstream: str, latency_s: float) -> None:
        super().__init__("tests.benchmarks.slow_proxy", upstream, str(latency_s))


async def _serve(upstream: str, latency_s: float) -> None:
    session = aiohttp.ClientSession(auto_decompress=False, connector=aiohttp.TCPConnector(limit=0))

    async def answer(request: web.BaseRequest) -> web.Response:
        await asyncio.sleep(latency_s)
        body = await request.read()
        async with session.request(
            request.method, f"{upstream}{request.raw_path}", headers=request.headers, data=body
        ) as found:
            kept = {name: value for name, value in found.headers.items() if name.lower() not in _NOT_KEPT}
            return web.Response(status=found.status, headers=kept, body=await found.read())

    listening = await asyncio.get_running_loop().create_server(web.Server(answer), "127.0.0.1", 0, backlog=512)
    print(listening.sockets[0].getsockname()[1], flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    threading.Thread(target=end_with_standard_input, daemon=True).start()
    asyncio.run(_serve(sys.argv[1], float(sys.argv[2])))

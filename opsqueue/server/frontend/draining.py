"""How a front-end stops: no new connections, an answer for every request that was accepted, then nothing left open."""

from __future__ import annotations

import asyncio
from typing import Protocol

from opsqueue.server.frontend.accepting import Acceptor
from opsqueue.server.frontend.app import FrontendApp
from opsqueue.server.frontend.http_server import HttpServer
from opsqueue.server.frontend.waits import Waits
from opsqueue.server.frontend.writer_client import WriterClient

#: Seconds for requests in flight to be answered by the writer; after that they are answered 503.
FINISH_S = 0.25
#: Seconds in which a request that was on its way on an open connection may still arrive.
ARRIVE_S = 0.03
#: Seconds for the last answers and close frames to be written.
FLUSH_S = 0.1


class DrainableHub(Protocol):
    """What is needed of the consumers' hub."""

    async def drain(self) -> None: ...


async def drain(
    acceptor: Acceptor, app: FrontendApp, server: HttpServer, writer: WriterClient, hub: DrainableHub, waits: Waits
) -> None:
    """Takes at most about 0.45 s, and a few hundredths of a second when nothing is under way."""
    acceptor.stop()
    app.begin_draining()
    leaving = asyncio.ensure_future(waits.drain(FINISH_S))
    consumers = asyncio.ensure_future(hub.drain())
    await asyncio.sleep(ARRIVE_S)
    await app.wait_until_idle(FINISH_S)
    await leaving
    writer.close("the server is stopping; try again")
    await app.wait_until_idle(FLUSH_S)
    server.pre_shutdown()
    await asyncio.wait((consumers, asyncio.ensure_future(server.shutdown(FLUSH_S))), timeout=FLUSH_S)

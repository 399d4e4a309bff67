"""A front-end's HTTP side in this process, on a real socket, with a writer that does what a test says.

The writer is scripted because its faults (silence, restart, full disk) are what is tested; everything else is real.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from aiohttp import web

from opsqueue._speedups.board import Board, SlotState
from opsqueue.server import requests
from opsqueue.server.context import frontend_slot
from opsqueue.server.frontend import errors
from opsqueue.server.frontend.accepting import Acceptor
from opsqueue.server.frontend.app import FrontendApp
from opsqueue.server.frontend.body import BodyReader
from opsqueue.server.frontend.done import DoneEndpoints
from opsqueue.server.frontend.draining import drain
from opsqueue.server.frontend.http_server import HttpConnection, HttpServer
from opsqueue.server.frontend.inserts import InsertLimits
from opsqueue.server.frontend.lookups import Lookups
from opsqueue.server.frontend.plain import PlainEndpoints
from opsqueue.server.frontend.producers import ProducerEndpoints
from opsqueue.server.frontend.routing import Endpoint
from opsqueue.server.frontend.waits import Waits
from opsqueue.server.frontend.writer_client import WriterClient

SLOT = frontend_slot(0)
VERSION = "v9.8.7"

LIMITS = InsertLimits(
    max_metadata_size=1000,
    max_strategic_keys=3,
    max_strategic_key_size=10,
    max_prefix_size=20,
    max_direct_content_size=2000,
    memory_limit=1_000_000,
)
MAX_BODY = 100_000
BODY_TIMEOUT_S = 0.3
MAX_WAITS = 3
MAX_WAIT_S = 60.0


@dataclass
class ScriptedWriter:
    """Takes the pump's place. `answer` gives the reply to a request, or None for silence."""

    client: WriterClient = field(default_factory=WriterClient)
    answer: Callable[[requests.Request], requests.Reply | None] = lambda request: None
    asked: list[requests.Request] = field(default_factory=list)
    unanswered: list[int] = field(default_factory=list)
    arrived: asyncio.Condition = field(default_factory=asyncio.Condition)
    telling: set[asyncio.Task[None]] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.client.attach(self)

    def send_request(self, request_id: int, payload: bytes) -> bool:
        request = requests.decode_request(payload)
        self.asked.append(request)
        loop = asyncio.get_running_loop()
        telling = loop.create_task(self._tell())
        self.telling.add(telling)
        telling.add_done_callback(self.telling.discard)
        reply = self.answer(request)
        if reply is not None:
            loop.call_soon(self.client.on_reply, request_id, requests.encode(reply))
        else:
            self.unanswered.append(request_id)
        return True

    def give(self, reply: requests.Reply) -> None:
        """Answer the oldest request that was met with silence."""
        self.client.on_reply(self.unanswered.pop(0), requests.encode(reply))

    def room(self) -> asyncio.Future[None]:
        raise AssertionError("this ring is never full")

    async def _tell(self) -> None:
        async with self.arrived:
            self.arrived.notify_all()

    async def wait_for_requests(self, count: int) -> None:
        async with self.arrived, asyncio.timeout(5):
            await self.arrived.wait_for(lambda: len(self.asked) >= count)


class NoConsumers:
    """A hub without consumers."""

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        raise errors.malformed("no consumers here")

    async def drain(self) -> None:
        return


@dataclass
class Frontend:
    """What a test touches."""

    port: int
    board: Board
    writer: ScriptedWriter
    app: FrontendApp
    server: HttpServer
    acceptor: Acceptor
    hub: NoConsumers
    waits: Waits

    async def drain(self) -> None:
        await drain(self.acceptor, self.app, self.server, self.writer.client, self.hub, self.waits)


async def _explode(request: web.BaseRequest) -> web.StreamResponse:
    raise ZeroDivisionError("a secret of the server")


@asynccontextmanager
async def scripted_frontend(database_path: str) -> AsyncIterator[Frontend]:
    """A serving front-end; `database_path` is a real database's."""
    loop = asyncio.get_running_loop()
    listener = socket.create_server(("127.0.0.1", 0))
    board = Board(3)
    board.start(SLOT, SlotState.SERVING)
    writer, hub, bodies = (
        ScriptedWriter(),
        NoConsumers(),
        BodyReader(MAX_BODY, timeout_s=BODY_TIMEOUT_S, in_memory=2 * MAX_BODY),
    )
    lookups = Lookups(database_path)
    waits = Waits(writer.client, board, SLOT, MAX_WAITS, MAX_WAIT_S)
    producers = ProducerEndpoints(writer.client, lookups, bodies, waits, LIMITS, 100)
    done = DoneEndpoints(writer.client, lookups, waits)
    plain = PlainEndpoints(writer.client, board, VERSION)
    endpoints = (*producers.endpoints(), *done.endpoints(), *plain.endpoints(), Endpoint("GET", "/explode", _explode))
    app = FrontendApp(board, SLOT, bodies, endpoints, hub.handle)

    def connection_ended(connection: HttpConnection) -> None:
        acceptor.connection_ended()
        waits.connection_ended(connection)

    server = HttpServer(app.handle, connection_ended)
    acceptor = Acceptor(loop, listener, board, SLOT, SLOT, server)
    acceptor.start()
    port: int = listener.getsockname()[1]
    try:
        yield Frontend(port, board, writer, app, server, acceptor, hub, waits)
    finally:
        acceptor.stop()
        await server.shutdown(0.05)
        lookups.close()
        listener.close()

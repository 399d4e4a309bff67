"""A front-end process: forked by the supervisor, serves until told to drain. Puts the parts together, nothing else."""

from __future__ import annotations

import asyncio
import contextlib
import socket

import uvloop

from opsqueue._speedups.board import SlotState
from opsqueue.protocol.version import own_version
from opsqueue.server.context import Control, ServerContext, frontend_slot
from opsqueue.server.frontend.accepting import Acceptor
from opsqueue.server.frontend.app import FrontendApp
from opsqueue.server.frontend.body import BodyReader
from opsqueue.server.frontend.consumers import Consumers, ConsumerSettings
from opsqueue.server.frontend.descriptions import describer
from opsqueue.server.frontend.done import DoneEndpoints
from opsqueue.server.frontend.draining import drain
from opsqueue.server.frontend.http_server import HttpConnection, HttpServer
from opsqueue.server.frontend.inserts import InsertLimits
from opsqueue.server.frontend.listing import ListEndpoints
from opsqueue.server.frontend.lookups import Lookups
from opsqueue.server.frontend.plain import PlainEndpoints
from opsqueue.server.frontend.producers import ProducerEndpoints
from opsqueue.server.frontend.retries import RetryEndpoints
from opsqueue.server.frontend.waits import Waits
from opsqueue.server.frontend.writer_client import WriterClient
from opsqueue.server.logs import logger
from opsqueue.server.settings import Settings

log = logger("frontend")

#: The exit code when the ring from the writer could not be trusted.
EXIT_DAMAGED_RING = 1

#: The progress word is moved this often (seconds); the supervisor's limit is 5, the other front-ends' is 1.
PROGRESS_S = 0.2


def run(context: ServerContext, control: Control, index: int) -> int:
    """Serve as front-end `index` until the control channel says drain or ends; the exit code."""
    context.board.start(frontend_slot(index), SlotState.STARTING)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_serve(context, control, index))


async def _serve(context: ServerContext, control: Control, index: int) -> int:
    loop = asyncio.get_running_loop()
    settings, board, slot = context.settings, context.board, frontend_slot(index)
    version = own_version()
    stop = _Stop(loop, control)
    moving = loop.create_task(_keep_moving(context, slot))

    lookups = Lookups(context.database_path)
    bodies = BodyReader(settings.max_body_size)
    writer = WriterClient()
    consumers = Consumers(
        loop,
        context.channels[index],
        board,
        slot,
        _consumer_settings(settings, version),
        describe=describer(lookups.point.description),
        direct_input=lookups.point.direct_input,
        on_reply=writer.on_reply,
        on_writer_restart=writer.on_writer_restart,
        on_broken=stop.broken,
    )
    limits = InsertLimits.of(settings)
    waits = Waits(writer, board, slot, settings.max_parked_waits, settings.max_wait)
    producers = ProducerEndpoints(writer, lookups, bodies, waits, limits, settings.max_submissions_returned)
    done = DoneEndpoints(writer, lookups, waits)
    plain = PlainEndpoints(writer, board, version)
    listing = ListEndpoints(writer, lookups)
    retries = RetryEndpoints(writer, lookups, limits)
    parts = (producers, listing, retries, done, plain)
    endpoints = [endpoint for part in parts for endpoint in part.endpoints()]
    app = FrontendApp(board, slot, bodies, endpoints, consumers.handle)

    def connection_ended(connection: HttpConnection) -> None:
        acceptor.connection_ended()
        waits.connection_ended(connection)

    server = HttpServer(app.handle, connection_ended)
    acceptor = Acceptor(loop, context.listener, board, slot, frontend_slot(0), server)

    writer.attach(consumers.pump)
    consumers.start()
    acceptor.start()
    board.set_state(slot, SlotState.SERVING)
    stop.tell(b"R")
    log.info("front-end serves", index=index)
    exit_code = await stop.wait()

    board.set_state(slot, SlotState.DRAINING)
    await drain(acceptor, app, server, writer, consumers, waits)
    consumers.stop()
    moving.cancel()
    lookups.close()
    log.info("front-end has drained", index=index)
    return exit_code


def _consumer_settings(settings: Settings, version: str) -> ConsumerSettings:
    return ConsumerSettings(
        heartbeat_interval=settings.heartbeat_interval,
        max_missable_heartbeats=settings.max_missable_heartbeats,
        reservation_expiration=settings.reservation_expiration,
        max_failure_size=settings.max_failure_size,
        version=version,
    )


class _Stop:
    """Why and when this process ends: the supervisor says so or is gone (exit code 0), or the ring is damaged (1)."""

    def __init__(self, loop: asyncio.AbstractEventLoop, control: Control) -> None:
        self._loop = loop
        self._channel = control.channel
        self._exit_code: asyncio.Future[int] = loop.create_future()
        self._channel.setblocking(False)
        loop.add_reader(self._channel.fileno(), self._on_readable)

    async def wait(self) -> int:
        return await self._exit_code

    def tell(self, word: bytes) -> None:
        """Send the supervisor a word; one that is gone is noticed by reading."""
        with contextlib.suppress(OSError):
            self._channel.send(word, socket.MSG_NOSIGNAL)

    def broken(self, reason: str) -> None:
        """What comes from the writer makes no sense: a new process starts with a new view of the ring."""
        log.error("the ring from the writer is damaged; this front-end ends", reason=reason)
        self._end(EXIT_DAMAGED_RING)

    def _on_readable(self) -> None:
        try:
            orders = self._channel.recv(64)
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            log.warning("the supervisor's channel failed", reason=str(error))
            orders = b""
        if not orders or b"D" in orders:
            self._end(0)

    def _end(self, exit_code: int) -> None:
        self._loop.remove_reader(self._channel.fileno())
        if not self._exit_code.done():
            self._exit_code.set_result(exit_code)


async def _keep_moving(context: ServerContext, slot: int) -> None:
    while True:
        context.board.progress(slot)
        await asyncio.sleep(PROGRESS_S)

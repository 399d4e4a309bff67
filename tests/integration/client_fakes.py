"""A server in this process that can be told to misbehave: for what a healthy server never does to its clients."""

from __future__ import annotations

import asyncio
import json
import ssl
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import cbor2
import pytest
from aiohttp import WSMsgType, web

from opsqueue.consumer import ConsumerClient
from opsqueue.protocol import consumer as wire
from opsqueue.protocol.packed import Report

Handler = Callable[[web.Request], Awaitable[web.StreamResponse | None]]


def init(features: tuple[str, ...] | None = wire.FEATURES, heartbeat_s: float = 10.0) -> bytes:
    """An Init frame; `features` None is a server without extensions."""
    return wire.encode_server(wire.Init(3, int(heartbeat_s * 1e9), "v9.9.9", "conn", features))


@dataclass
class Holder:
    """What one consumer waits for, as (nonce, max), and what it holds."""

    parked: list[tuple[int, int]] = field(default_factory=list)
    held: set[tuple[int, int]] = field(default_factory=set)


@dataclass
class FakeServer:
    """Keeps submissions in a dict, hands out their chunks in order, and records everything that it was sent."""

    port: int = 0
    features: tuple[str, ...] | None = wire.FEATURES
    version_headers: dict[str, str] = field(default_factory=dict)
    #: Called first with each request; gives an answer to send instead, or None.
    intercept: Handler | None = None
    #: Called with the WebSocket instead of the queue.
    talk: Callable[[web.WebSocketResponse], Awaitable[None]] | None = None
    requests: list[tuple[str, str, dict[str, str], bytes]] = field(default_factory=list)
    messages: list[wire.ClientContents] = field(default_factory=list)
    handshakes: list[dict[str, str]] = field(default_factory=list)
    closes: list[int | None] = field(default_factory=list)
    changed: threading.Condition = field(default_factory=threading.Condition)
    submissions: dict[int, dict[str, Any]] = field(default_factory=dict)
    available: list[tuple[int, int]] = field(default_factory=list)
    sockets: dict[web.WebSocketResponse, Holder] = field(default_factory=dict)

    def wait_for(self, reached: Callable[[], bool], timeout: float = 10.0) -> None:
        """Waits until something that was recorded makes `reached` true."""
        with self.changed:
            assert self.changed.wait_for(reached, timeout), f"never happened; messages: {self.messages}"

    def sent(self, kind: type[wire.ClientContents]) -> list[Any]:
        """The messages of that type, in order."""
        return [message for message in self.messages if isinstance(message, kind)]

    def add(self, chunks: list[bytes | None], prefix: str | None = None) -> int:
        """A submission, inserted without a producer."""
        number = len(self.submissions) + 1
        self.submissions[number] = {
            "prefix": prefix, "contents": chunks, "done": {}, "failed": None, "cancelled": False, "carrier": "{}"
        }  # fmt: skip
        self.available += [(number, index) for index in range(len(chunks))]
        return number

    async def _http(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        with self.changed:
            self.requests.append((request.method, request.path, dict(request.headers), body))
            self.changed.notify_all()
        if self.intercept is not None:
            answer = await self.intercept(request)
            if answer is not None:
                return answer
        return await self._route(request, body)

    async def _route(self, request: web.Request, body: bytes) -> web.StreamResponse:
        path = request.path.removeprefix("/prefix").removeprefix("/producer")
        if path == "/version":
            return web.Response(text="v9.9.9", headers=self.version_headers)
        if path == "/submissions":
            return self._insert(json.loads(body))
        tail = path.removeprefix("/submissions/")
        if tail == "count":
            return web.json_response(len(self.submissions))
        if tail.startswith("lookup_id_by_prefix/"):
            wanted = tail.removeprefix("lookup_id_by_prefix/")
            found = [number for number, known in self.submissions.items() if known["prefix"] == wanted]
            return web.json_response(found[-1] if found else None)
        if tail.endswith("/output"):
            number, _, index, _ = tail.split("/")
            return web.Response(body=self.submissions[int(number)]["done"][int(index)])
        return web.json_response(self.status(int(tail)))

    def _insert(self, body: dict[str, Any]) -> web.Response:
        contents = body["chunk_contents"]
        if "Direct" in contents:
            number = self.add([bytes(content or []) for content in contents["Direct"]["contents"]])
        else:
            stored = contents["SeeObjectStorage"]
            number = self.add([None] * stored["count"], stored["prefix"])
        asyncio.get_running_loop().create_task(self._hand_out())
        return web.json_response(number)

    def status(self, number: int) -> Any:
        """The submission's status as JSON."""
        known = self.submissions.get(number)
        if known is None:
            return None
        total, done = len(known["contents"]), len(known["done"])
        common = {
            "id": number, "prefix": known["prefix"], "chunks_total": total, "chunks_done": done, "chunk_size": 1,
            "metadata": None, "strategic_metadata": {}, "otel_trace_carrier": known["carrier"],
        }  # fmt: skip
        now = "2026-01-02T03:04:05.123456789Z"
        if known["cancelled"]:
            return {"Cancelled": {**common, "cancelled_at": now}}
        if known["failed"] is not None:
            index, text = known["failed"]
            chunk = {
                "submission_id": number, "chunk_index": index, "input_content": None, "failure": text, "failed_at": now
            }  # fmt: skip
            return {"Failed": [{**common, "failed_at": now, "failed_chunk_id": index}, chunk]}
        if done == total:
            return {"Completed": {**common, "completed_at": now}}
        return {"InProgress": common}

    async def _consumer(self, request: web.Request) -> web.StreamResponse:
        with self.changed:
            self.handshakes.append(dict(request.headers))
            self.changed.notify_all()
        if self.intercept is not None:
            answer = await self.intercept(request)
            if answer is not None:
                return answer
        socket = web.WebSocketResponse(compress=False, max_msg_size=wire.MAX_MESSAGE_BYTES)
        await socket.prepare(request)
        if self.talk is not None:
            await self.talk(socket)
            return socket
        await socket.send_bytes(init(self.features))
        holder = self.sockets[socket] = Holder()
        try:
            async for message in socket:
                if message.type == WSMsgType.BINARY:
                    await self._received(holder, wire.decode_client(message.data))
        finally:
            del self.sockets[socket]
            self.available = sorted(holder.held) + self.available
            with self.changed:
                self.closes.append(socket.close_code)
                self.changed.notify_all()
            await self._hand_out()
        return socket

    async def _received(self, holder: Holder, message: wire.ClientMessage) -> None:
        contents = message.contents
        if isinstance(contents, wire.WantToReserveChunks):
            holder.parked.append((message.nonce, contents.max))
        elif isinstance(contents, wire.ReportChunks):
            for report in contents.reports:
                self._reported(holder, report)
        elif not isinstance(contents, wire.WorkingOn | wire.ExtendReservation):
            self._ended(holder, contents)
        with self.changed:
            self.messages.append(contents)
            self.changed.notify_all()
        await self._hand_out()

    def _ended(self, holder: Holder, contents: Any) -> None:
        key = (contents.id.submission_id, contents.id.chunk_index)
        holder.held.discard(key)
        if isinstance(contents, wire.CompleteChunk):
            self.submissions[key[0]]["done"][key[1]] = contents.output_content
        elif isinstance(contents, wire.FailChunk):
            self.submissions[key[0]]["failed"] = (key[1], contents.failure)
        else:
            self.available.insert(0, key)

    def _reported(self, holder: Holder, report: Report) -> None:
        for place, index in enumerate(report.chunks):
            chunk = wire.ChunkId(report.submission_id, index)
            if isinstance(report.outcome, str):
                self._ended(holder, wire.FailChunk(chunk, report.outcome))
            else:
                output = None if report.outcome is None else report.outcome[place]
                self._ended(holder, wire.CompleteChunk(chunk, output))

    async def _hand_out(self) -> None:
        for socket, holder in list(self.sockets.items()):
            while holder.parked and self.available:
                nonce, maximum = holder.parked.pop(0)
                taken, self.available = self.available[:maximum], self.available[maximum:]
                holder.held.update(taken)
                chunks = [self._chunk(*key) for key in taken]
                await socket.send_bytes(wire.encode_server(wire.ChunksReserved(nonce, chunks)))

    def _chunk(self, number: int, index: int) -> tuple[wire.Chunk, wire.Submission]:
        known = self.submissions[number]
        total = len(known["contents"])
        submission = wire.Submission(number, known["prefix"], total, 0, 1, b"meta", {}, known["carrier"])
        return wire.Chunk(number, index, known["contents"][index], 0), submission

    def application(self) -> web.Application:
        """The routes."""
        application = web.Application(client_max_size=2**30)
        application.router.add_get("/consumer", self._consumer)
        application.router.add_get("/prefix/consumer", self._consumer)
        application.router.add_route("*", "/{tail:.*}", self._http)
        return application


@dataclass
class Running:
    """A FakeServer that listens; `drop` ends its consumers' connections without a close frame."""

    server: FakeServer
    loop: asyncio.AbstractEventLoop

    def drop(self) -> None:
        """Ends all consumers' connections."""

        def cut() -> None:
            for socket in list(self.server.sockets):
                transport = socket._req.transport if socket._req is not None else None
                if transport is not None:
                    transport.abort()

        self.loop.call_soon_threadsafe(cut)

    def hand_out(self) -> None:
        """Hands out chunks that a test has added."""
        asyncio.run_coroutine_threadsafe(self.server._hand_out(), self.loop).result(10)


@contextmanager
def running(server: FakeServer, tls: ssl.SSLContext | None = None) -> Iterator[Running]:
    """Serves on a port of its own, which is then in `server.port`; the same again when it is set already."""
    loop = asyncio.new_event_loop()
    ready = threading.Event()
    stop = asyncio.Event()

    async def serve() -> None:
        runner = web.AppRunner(server.application(), handler_cancellation=True, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", server.port, ssl_context=tls)
        await site.start()
        server.port = runner.addresses[0][1]
        ready.set()
        await stop.wait()
        for socket in list(server.sockets):
            transport = socket._req.transport if socket._req is not None else None
            if transport is not None:
                transport.abort()
        await runner.cleanup()

    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),), daemon=True)
    thread.start()
    assert ready.wait(10)
    try:
        yield Running(server, loop)
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(10)
        loop.close()


class Stop(BaseException):
    """Ends a loop in a test."""


def direct(*operations: Any) -> list[bytes | None]:
    """Chunks whose operations travel with them, one of each argument."""
    return [cbor2.dumps(list(ops)) for ops in operations]


def stop_after(count: int, callback: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """`callback`, which ends its loop instead of being called once more than `count` times."""
    calls = iter(range(count))

    def wrapped(argument: Any) -> Any:
        if next(calls, None) is None:
            raise Stop
        return callback(argument)

    return wrapped


def run_loop(consumer: ConsumerClient, callback: Callable[[Any], Any], count: int, **arguments: Any) -> None:
    """The loop over operations, for `count` of them."""
    with pytest.raises(Stop):
        consumer.run_each_op(stop_after(count, callback), **arguments)

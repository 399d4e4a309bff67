"""A stand-in for the writer, which answers when a test says so, and a front-end of consumers only around it."""

from __future__ import annotations

import asyncio
import os
import struct
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from aiohttp import web

from opsqueue._speedups.board import Board
from opsqueue._speedups.ring import Channel, Endpoint
from opsqueue.protocol.consumer import Submission
from opsqueue.server.frontend.answers import error_answer
from opsqueue.server.frontend.consumers import Consumers, ConsumerSettings
from opsqueue.server.frontend.descriptions import around_chunks_done
from opsqueue.server.frontend.errors import HttpError
from opsqueue.server.reader import Description

OPEN, CLOSE, RESERVE, COMPLETE, FAIL, WORKING_ON, RELEASE = 1, 2, 3, 4, 5, 6, 7
REPORT, CREDIT = 11, 12
REQUEST, RESERVED, REFUSED, DROPPED, REPLY, WITHDRAWN = 32, 64, 65, 66, 67, 68
CREDIT_OPEN, CREDIT_ADD, CREDIT_WITHDRAW = 1, 2, 3
RUN_HAS_OUTPUT, RUN_FAILED = 1, 2
ON_CREDIT = 1
CHUNK_HAS_OUTPUT, CHUNK_IS_DIRECT = 1, 2
CLEAN, LOST = 0, 1
SLOT = 2


@dataclass(frozen=True)
class Run:
    """Consecutive chunks of a report."""

    submission: int
    first: int
    count: int
    flags: int = 0
    tail: bytes = b""


@dataclass(frozen=True)
class Record:
    """A record that the front-end sent; fields that its kind has not are 0."""

    kind: int
    connection: int
    nonce: int = 0
    max: int = 0
    submission: int = 0
    chunk: int = 0
    argument: int = 0
    flags: int = 0
    tail: bytes = b""
    runs: tuple[Run, ...] = ()


def parse_record(kind: int, payload: bytes) -> Record:
    """As docs/records.md has it."""
    if kind in (OPEN, CLOSE):
        connection, argument, _ = struct.unpack("<QII", payload)
        return Record(kind, connection, argument=argument)
    if kind == RESERVE:
        connection, nonce, maximum, size = struct.unpack_from("<QQII", payload)
        assert len(payload) == 24 + size
        return Record(kind, connection, nonce=nonce, max=maximum, tail=payload[24:])
    if kind == CREDIT:
        connection, nonce, action, chunks, size, _ = struct.unpack_from("<QQIIII", payload)
        assert len(payload) == 32 + size
        return Record(kind, connection, nonce=nonce, argument=action, max=chunks, tail=payload[32:])
    if kind == REPORT:
        connection, count, chunks = struct.unpack_from("<QII", payload)
        tails = payload[16 + 32 * count :]
        runs = []
        for submission, first, length, flags, at, size in struct.iter_unpack("<QQIIII", payload[16 : 16 + 32 * count]):
            assert at + size <= len(tails)
            runs.append(Run(submission, first, length, flags, tails[at : at + size]))
        assert chunks == sum(run.count for run in runs)
        return Record(kind, connection, max=chunks, runs=tuple(runs))
    if kind == REQUEST:
        return Record(kind, 0, nonce=struct.unpack_from("<Q", payload)[0], tail=payload[8:])
    connection, submission, chunk, argument, flags, size = struct.unpack_from("<QQQQII", payload)
    assert len(payload) == 40 + size
    return Record(
        kind, connection, submission=submission, chunk=chunk, argument=argument, flags=flags, tail=payload[40:]
    )


def reserved(connection: int, nonce: int, *chunks: tuple[int, int, int, int, int], flags: int = 0) -> bytes:
    """Payload of a RESERVED record; a chunk is (submission, chunk, chunks_done, retries, flags)."""
    return struct.pack("<QQII", connection, nonce, len(chunks), flags) + b"".join(
        struct.pack("<QQQII", *chunk) for chunk in chunks
    )


def refused(connection: int, nonce: int, reason: bytes, flags: int = 0) -> bytes:
    return struct.pack("<QQII", connection, nonce, len(reason), flags) + reason


def withdrawn(connection: int, nonce: int, left: int) -> bytes:
    return struct.pack("<QQII", connection, nonce, left, 0)


def dropped(connection: int, submission: int, chunk: int, reason: int) -> bytes:
    return struct.pack("<QQQII", connection, submission, chunk, reason, 0)


class StandinWriter:
    """The writer's end of a channel, driven by a test."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self.endpoint: Endpoint = channel.writer_end()
        self._records: deque[Record] = deque()
        self._arrived = asyncio.Event()
        self._reads = True
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(channel.writer_wake, self._wake)
        self._loop.call_soon(self.turn)

    def _wake(self) -> None:
        os.eventfd_read(self._channel.writer_wake)
        self.turn()

    def turn(self) -> None:
        """Read what is there."""
        self.endpoint.poll()
        while self._reads:
            while (got := self.endpoint.get()) is not None:
                self._records.append(parse_record(*got))
                self._arrived.set()
            self.endpoint.release()
            if self.endpoint.prepare_to_sleep():
                break

    def pause(self) -> None:
        """Leave the ring to fill."""
        self._reads = False

    def resume(self) -> None:
        self._reads = True
        self.turn()

    async def next(self, kind: int | None = None) -> Record:
        """The next record; it must be of `kind`."""
        async with asyncio.timeout(10):
            while not self._records:
                self._arrived.clear()
                await self._arrived.wait()
        record = self._records.popleft()
        assert kind is None or record.kind == kind, record
        return record

    @property
    def unread(self) -> list[Record]:
        return list(self._records)

    def send(self, kind: int, payload: bytes) -> None:
        """Answer at once."""
        assert self.endpoint.send(kind, payload)
        self.endpoint.publish()

    def close(self) -> None:
        self._loop.remove_reader(self._channel.writer_wake)


def a_submission(submission: int, **changes: object) -> Submission:
    fields: dict[str, object] = {
        "id": submission,
        "prefix": f"prefix-{submission}",
        "chunks_total": 3,
        "chunks_done": 0,
        "chunk_size": 2,
        "metadata": b"\x00\xffmeta",
        "strategic_metadata": {"company": 7, "priority": -3},
        "otel_trace_carrier": '{"traceparent":"00-9f-01"}',
    }
    return Submission(**(fields | changes))  # type: ignore[arg-type]


def description_of(submission: Submission) -> tuple[bytes, bytes]:
    return around_chunks_done(
        submission.id,
        Description(
            submission.prefix,
            submission.chunks_total,
            submission.chunk_size,
            submission.metadata,
            submission.strategic_metadata,
            submission.otel_trace_carrier,
            direct=submission.prefix is None,
        ),
    )


@dataclass
class Rig:
    """A front-end with consumers only, and the stand-in for its writer."""

    port: int
    channel: Channel
    board: Board
    consumers: Consumers
    submissions: dict[int, Submission]
    inputs: dict[tuple[int, int], bytes]
    replies: list[tuple[int, bytes]]
    restarts: list[None]
    broken: list[str]
    writer: StandinWriter = field(init=False)

    @property
    def url(self) -> str:
        return f"ws://127.0.0.1:{self.port}/consumer"

    def count(self, counter: int) -> int:
        return self.board.get(SLOT, counter)

    async def until(self, true: Callable[[], bool]) -> None:
        """Let the loop run until `true`; for what has no event of its own."""
        async with asyncio.timeout(10):
            while not true():
                await asyncio.sleep(0)  # because others need a turn


@asynccontextmanager
async def rig(
    *,
    heartbeat_interval: float = 10.0,
    max_missable: int = 3,
    capacity: int = 1 << 20,
    failure: int = 64 * 1024,
    begin_writer: bool = True,
) -> AsyncIterator[Rig]:
    """Serve consumers on a free port; with `begin_writer` False the test makes the writer when it wants one."""
    loop = asyncio.get_running_loop()
    channel = Channel(capacity)
    board = Board(SLOT + 1)
    submissions: dict[int, Submission] = {}
    inputs: dict[tuple[int, int], bytes] = {}
    replies: list[tuple[int, bytes]] = []
    restarts: list[None] = []
    broken: list[str] = []
    consumers = Consumers(
        loop,
        channel,
        board,
        SLOT,
        ConsumerSettings(heartbeat_interval, max_missable, 600.0, failure, "v0.1.0"),
        lambda submission: description_of(submissions[submission]) if submission in submissions else None,
        lambda submission, chunk: inputs.get((submission, chunk)),
        lambda request, payload: replies.append((request, payload)),
        lambda: restarts.append(None),
        broken.append,
    )

    async def handle(request: web.BaseRequest) -> web.StreamResponse:
        try:
            return await consumers.handle(request)
        except HttpError as error:
            return error_answer(error).to_aiohttp()

    http = web.Server(handle, access_log=None)
    server = await loop.create_server(http, "127.0.0.1", 0)
    consumers.start()
    served = Rig(
        server.sockets[0].getsockname()[1],
        channel,
        board,
        consumers,
        submissions,
        inputs,
        replies,
        restarts,
        broken,
    )
    if begin_writer:
        served.writer = StandinWriter(channel)
    try:
        yield served
    finally:
        server.close()
        await consumers.drain()
        await http.shutdown(1.0)
        consumers.stop()
        served.writer.close()
        channel.close()

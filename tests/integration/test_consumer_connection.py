"""Consumers' connections over real sockets: handshake, replies, back-pressure, heartbeats, ends; a scripted writer."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from typing import Any

import pytest
import uvloop
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidStatus

from opsqueue._speedups.counters import Counter
from opsqueue.protocol.consumer import (
    ChunkDropped,
    ChunkId,
    ChunkReservationExpired,
    ClientContents,
    ClientMessage,
    CompleteChunk,
    FailChunk,
    Init,
    ReservationRefused,
    WantToReserveChunks,
    decode_server,
    encode_client,
)
from opsqueue.protocol.strategy import Oldest, PreferDistinct, Random
from tests.integration.standin_writer import (
    CHUNK_IS_DIRECT,
    CLEAN,
    CLOSE,
    COMPLETE,
    DROPPED,
    FAIL,
    LOST,
    OPEN,
    REFUSED,
    RELEASE,
    REPLY,
    REQUEST,
    RESERVE,
    RESERVED,
    Rig,
    StandinWriter,
    a_submission,
    dropped,
    refused,
    reserved,
    rig,
)
from tests.unit.consumer_feed import frame

HEARTBEAT = b"\xf0\x9f\x92\x93"


@pytest.fixture(params=["uvloop", "asyncio"])
def event_loop_policy(request: pytest.FixtureRequest) -> asyncio.AbstractEventLoopPolicy:
    return uvloop.EventLoopPolicy() if request.param == "uvloop" else asyncio.DefaultEventLoopPolicy()


def consumer(served: Rig, features: str | None = None, **options: Any) -> connect:
    headers = {} if features is None else {"Opsqueue-Features": features}
    return connect(
        served.url, compression=None, ping_interval=None, max_size=None, additional_headers=headers, **options
    )


async def say(websocket: ClientConnection, nonce: int, contents: ClientContents) -> None:
    await websocket.send(encode_client(ClientMessage(nonce, contents)))


async def hear(websocket: ClientConnection) -> Any:
    async with asyncio.timeout(10):
        return decode_server(await websocket.recv())  # type: ignore[arg-type]


async def ended(websocket: ClientConnection) -> tuple[int, str]:
    async with asyncio.timeout(10):
        await websocket.wait_closed()
    assert websocket.protocol.close_rcvd is not None
    return websocket.protocol.close_rcvd.code, websocket.protocol.close_rcvd.reason


async def raw(served: Rig, more: bytes = b"", headers: str = "") -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A handshake by hand, with `more` in the same segment; the reader stands after the answer's head."""
    reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
    writer.write(
        (
            "GET /consumer HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            f"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n{headers}\r\n"
        ).encode()
        + more
    )
    head = await reader.readuntil(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 101 ")
    assert b"Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=" in head
    return reader, writer


async def next_frame(reader: asyncio.StreamReader) -> tuple[int, bool, bytes]:
    """(opcode, fin, payload) of the server's next frame."""
    first, size = await reader.readexactly(2)
    if size == 126:
        (size,) = struct.unpack(">H", await reader.readexactly(2))
    elif size == 127:
        (size,) = struct.unpack(">Q", await reader.readexactly(8))
    return first & 15, first >> 7 == 1, await reader.readexactly(size)


async def opened(served: Rig, websocket: ClientConnection) -> int:
    """The number of the connection that was just made; its Init is read."""
    assert isinstance(await hear(websocket), Init)
    return (await served.writer.next(OPEN)).connection


# --- handshake ---


async def test_init_comes_first_then_a_heartbeat_and_no_features_unless_asked() -> None:
    async with rig(heartbeat_interval=1.5) as served:
        reader, writer = await raw(served)
        opcode, fin, payload = await next_frame(reader)
        assert (opcode, fin) == (2, True)
        init = decode_server(payload)
        assert isinstance(init, Init)
        assert (init.max_missable_heartbeats, init.heartbeat_interval_ns) == (3, 1_500_000_000)
        assert init.version_info == "v0.1.0"
        assert init.conn_id[14] == "7"
        assert init.features is None
        assert init.reservation_expiration_ns is None
        assert await next_frame(reader) == (9, True, HEARTBEAT)
        assert (await served.writer.next(OPEN)).argument == 0
        writer.close()


async def test_features_are_those_that_both_know() -> None:
    async with rig() as served, consumer(served, "extend, from-the-future,DROPPED , clean-close") as websocket:
        init = await hear(websocket)
        assert init.features == ("clean-close", "dropped", "extend")
        assert init.reservation_expiration_ns == 600 * 10**9
        assert (await served.writer.next(OPEN)).argument == 1 | 4 | 16


async def test_a_peer_that_asks_for_no_known_feature_gets_an_empty_list() -> None:
    async with rig() as served, consumer(served, "") as websocket:
        assert (await hear(websocket)).features == ()


@pytest.mark.parametrize(
    ("request_head", "status"),
    [
        ("GET /consumer HTTP/1.1\r\nHost: x\r\n\r\n", 400),
        ("GET /consumer HTTP/1.1\r\nHost: x\r\nUpgrade: h2c\r\nConnection: Upgrade\r\n\r\n", 400),
        (
            "GET /consumer HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            "Sec-WebSocket-Version: 8\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n",
            426,
        ),
        (
            "GET /consumer HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: short\r\n\r\n",
            400,
        ),
        (
            "GET /consumer HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            "Sec-WebSocket-Version: 13\r\n\r\n",
            400,
        ),
    ],
)
async def test_what_is_no_handshake_gets_a_text_and_no_connection(request_head: str, status: int) -> None:
    async with rig() as served:
        reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
        writer.write(request_head.encode())
        head = await reader.readuntil(b"\r\n\r\n")
        assert int(head.split()[1]) == status
        assert b"text/plain" in head
        assert served.count(Counter.CONSUMERS_OPENED) == 0
        writer.close()


async def test_frames_that_come_with_the_handshake_are_not_lost() -> None:
    async with rig() as served:
        message = frame(encode_client(ClientMessage(3, WantToReserveChunks(1, Oldest()))))
        _, writer = await raw(served, message + message[:9])
        assert (await served.writer.next(OPEN)).argument == 0
        assert (await served.writer.next(RESERVE)).nonce == 3
        writer.write(message[9:])
        assert (await served.writer.next(RESERVE)).nonce == 3
        writer.close()


# --- requests and replies ---


async def test_a_request_is_answered_with_its_nonce_and_whole_submissions() -> None:
    async with rig() as served, consumer(served) as websocket:
        connection = await opened(served, websocket)
        served.submissions[9] = a_submission(9, strategic_metadata={"company": 1})
        served.submissions[10] = a_submission(10, metadata=None)
        await say(websocket, 2**64 - 1, WantToReserveChunks(5000, PreferDistinct("company", Random())))
        record = await served.writer.next(RESERVE)
        assert (record.nonce, record.max, record.tail) == (2**64 - 1, 4096, b"P\x07\x00companyR")
        chunks = ((9, 0, 1, 0, 0), (10, 2**62, 2, 7, 0), (9, 2, 2, 0, 0))
        served.writer.send(RESERVED, reserved(connection, 2**64 - 1, *chunks))
        reply = await hear(websocket)
        assert reply.nonce == 2**64 - 1
        assert [(c.submission_id, c.chunk_index, s.chunks_done, c.retries, 0) for c, s in reply.chunks] == list(chunks)
        assert all(
            s
            == a_submission(
                s.id, chunks_done=s.chunks_done, metadata=s.metadata, strategic_metadata=s.strategic_metadata
            )
            for _, s in reply.chunks
        )
        await served.until(lambda: sum(served.count(250 + i) for i in range(25)) == 1)


async def test_an_answer_for_an_unknown_nonce_is_not_sent_and_its_chunks_go_back() -> None:
    async with rig() as served, consumer(served) as websocket:
        connection = await opened(served, websocket)
        served.submissions[9] = a_submission(9)
        served.writer.send(RESERVED, reserved(connection, 4, (9, 1, 0, 0, 0), (9, 2, 0, 0, 0)))
        back = [await served.writer.next(RELEASE) for _ in range(2)]
        assert {(record.submission, record.chunk) for record in back} == {(9, 1), (9, 2)}
        await say(websocket, 5, WantToReserveChunks(0, Oldest()))
        assert (await hear(websocket)).nonce == 5


async def test_direct_inputs_are_in_the_reply_and_what_exceeds_8_mib_goes_back() -> None:
    async with rig() as served, consumer(served) as websocket:
        connection = await opened(served, websocket)
        served.submissions[9] = a_submission(9, prefix=None)
        served.inputs.update({(9, 0): b"", (9, 1): b"x" * 3_000_000, (9, 2): b"y" * 5_000_000, (9, 3): b"z"})
        served.inputs[9, 4] = b"w" * (8 * 1024 * 1024)
        await say(websocket, 1, WantToReserveChunks(4, Oldest()))
        await served.writer.next(RESERVE)
        served.writer.send(RESERVED, reserved(connection, 1, *((9, i, 0, 0, CHUNK_IS_DIRECT) for i in (0, 1, 2, 4, 3))))
        reply = await hear(websocket)
        assert [(c.chunk_index, len(c.input_content)) for c, _ in reply.chunks] == [(0, 0), (1, 3000000), (2, 5000000)]
        back = [await served.writer.next(RELEASE) for _ in range(2)]
        assert {record.chunk for record in back} == {3, 4}
        await say(websocket, 2, WantToReserveChunks(4, Oldest()))
        await served.writer.next(RESERVE)
        served.writer.send(RESERVED, reserved(connection, 2, (9, 4, 0, 0, CHUNK_IS_DIRECT)))
        reply = await hear(websocket)
        assert [c.input_content for c, _ in reply.chunks] == [served.inputs[9, 4]]


async def test_a_reply_above_8_mib_is_sent_in_frames_of_at_most_8_mib() -> None:
    async with rig() as served:
        reader, writer = await raw(served)
        connection = (await served.writer.next(OPEN)).connection
        served.submissions[9] = a_submission(9, prefix=None)
        served.inputs[9, 4] = b"w" * (8 * 1024 * 1024)
        writer.write(frame(encode_client(ClientMessage(2, WantToReserveChunks(1, Oldest())))))
        await served.writer.next(RESERVE)
        served.writer.send(RESERVED, reserved(connection, 2, (9, 4, 0, 0, CHUNK_IS_DIRECT)))
        await next_frame(reader)
        await next_frame(reader)
        first = await next_frame(reader)
        rest = await next_frame(reader)
        assert (first[0], first[1], len(first[2])) == (2, False, 8 * 1024 * 1024)
        assert rest[:2] == (0, True)
        reply: Any = decode_server(first[2] + rest[2])
        assert reply.chunks[0][0].input_content == served.inputs[9, 4]
        writer.close()


async def test_chunks_that_cannot_be_described_go_back_and_the_request_is_repeated() -> None:
    async with rig() as served, consumer(served) as websocket:
        connection = await opened(served, websocket)
        served.submissions[9] = a_submission(9)
        await say(websocket, 1, WantToReserveChunks(2, PreferDistinct("a", Oldest())))
        asked = await served.writer.next(RESERVE)
        served.writer.send(RESERVED, reserved(connection, 1, (8, 1, 0, 0, 0)))
        back = await served.writer.next(RELEASE)
        assert (back.submission, back.chunk) == (8, 1)
        assert await served.writer.next(RESERVE) == asked
        served.writer.send(RESERVED, reserved(connection, 1, (8, 1, 0, 0, 0), (9, 1, 0, 0, 0)))
        assert [chunk.submission_id for chunk, _ in (await hear(websocket)).chunks] == [9]
        back = await served.writer.next(RELEASE)
        assert (back.submission, back.chunk) == (8, 1)


async def test_a_refusal_of_the_writer_is_told_or_closes_with_1008() -> None:
    async with rig() as served:
        async with consumer(served, "refusal") as websocket:
            connection = await opened(served, websocket)
            await say(websocket, 7, WantToReserveChunks(1, Oldest()))
            await served.writer.next(RESERVE)
            served.writer.send(REFUSED, refused(connection, 7, "too many keys: é".encode()))
            assert await hear(websocket) == ReservationRefused(7, "too many keys: é")
        await served.writer.next(CLOSE)
        async with consumer(served) as websocket:
            connection = await opened(served, websocket)
            await say(websocket, 7, WantToReserveChunks(1, Oldest()))
            await served.writer.next(RESERVE)
            served.writer.send(REFUSED, refused(connection, 7, b"too many keys"))
            assert await ended(websocket) == (1008, "too many keys")


async def test_lost_reservations_are_told_in_the_form_that_the_peer_knows() -> None:
    async with rig() as served:
        async with consumer(served) as websocket:
            connection = await opened(served, websocket)
            for reason in (1, 2, 3, 4):
                served.writer.send(DROPPED, dropped(connection, 9, reason, reason))
            assert await hear(websocket) == ChunkReservationExpired(ChunkId(9, 4))
        async with consumer(served, "dropped") as websocket:
            await served.writer.next(CLOSE)
            connection = await opened(served, websocket)
            for reason in (1, 2, 3, 4):
                served.writer.send(DROPPED, dropped(connection, 9, 2**40, reason))
            told = [await hear(websocket) for _ in range(4)]
            assert told == [
                ChunkDropped(ChunkId(9, 2**40), reason) for reason in ("cancelled", "failed", "completed", "expired")
            ]


async def test_records_for_a_connection_that_is_gone_reach_no_other() -> None:
    async with rig() as served:
        async with consumer(served) as websocket:
            first = await opened(served, websocket)
            await say(websocket, 1, WantToReserveChunks(1, Oldest()))
            await served.writer.next(RESERVE)
        await served.writer.next(CLOSE)
        async with consumer(served) as websocket:
            second = await opened(served, websocket)
            assert first & 0xFFFFFFFF == second & 0xFFFFFFFF
            assert first != second
            served.submissions[9] = a_submission(9)
            await say(websocket, 1, WantToReserveChunks(1, Oldest()))
            await served.writer.next(RESERVE)
            served.writer.send(RESERVED, reserved(first, 1, (9, 0, 0, 0, 0)))
            served.writer.send(RESERVED, reserved(second, 1, (9, 1, 0, 0, 0)))
            assert (await hear(websocket)).chunks[0][0].chunk_index == 1
        assert (await served.writer.next(CLOSE)).connection == second


# --- back-pressure ---


async def test_a_full_ring_stops_the_reading_and_nothing_is_lost_or_reordered() -> None:
    async with rig(capacity=1 << 16) as served, consumer(served) as websocket, consumer(served) as other:
        await opened(served, websocket)
        await opened(served, other)
        served.writer.pause()
        total = 30_000

        async def complete(websocket: ClientConnection) -> None:
            for chunk in range(total):
                await say(websocket, chunk, CompleteChunk(ChunkId(9, chunk), None))

        sending = [asyncio.ensure_future(complete(one)) for one in (websocket, other)]
        hub = served.consumers.hub
        await served.until(lambda: hub.blocked_connections == 2)
        served.writer.resume()
        seen: dict[int, int] = {}
        for _ in range(2 * total):
            record = await served.writer.next(COMPLETE)
            assert record.chunk == seen.get(record.connection, 0)
            seen[record.connection] = record.chunk + 1
        assert list(seen.values()) == [total, total]
        await asyncio.gather(*sending)


@pytest.mark.parametrize("abrupt", [False, True])
async def test_messages_of_a_connection_that_ended_while_the_ring_was_full_still_count(abrupt: bool) -> None:
    async with rig(capacity=1 << 16) as served:
        _, writer = await raw(served)
        connection = (await served.writer.next(OPEN)).connection
        served.writer.pause()
        messages = [encode_client(ClientMessage(n, CompleteChunk(ChunkId(9, n), None))) for n in range(3000)]
        writer.write(b"".join(frame(message) for message in messages))
        await served.until(lambda: served.consumers.hub.blocked_connections == 1)
        if abrupt:  # what had been received counts, and only the whole messages of it
            served.consumers.hub.connections[0].end_transport()
            await served.until(lambda: served.consumers.hub.open_transports == 0)
        else:
            writer.write_eof()
        served.writer.resume()
        chunks = []
        while (record := await served.writer.next()).kind == COMPLETE:
            chunks.append(record.chunk)
        assert chunks == list(range(len(chunks)))
        assert len(chunks) > 1100 if abrupt else len(chunks) == 3000
        assert (record.kind, record.connection, record.argument) == (CLOSE, connection, LOST)
        assert served.consumers.hub.connected == 0
        writer.close()


async def test_large_outputs_go_through_a_small_ring_in_order_with_everything_else() -> None:
    async with rig(capacity=1 << 16) as served:
        async with contextlib.AsyncExitStack() as stack:
            websockets = [await stack.enter_async_context(consumer(served)) for _ in range(3)]
            for websocket in websockets:
                await opened(served, websocket)
            outputs = [bytes([index]) * 3_000_000 for index in range(3)]

            async def work(index: int) -> None:
                await say(websockets[index], 0, FailChunk(ChunkId(index, 0), "before"))
                await say(websockets[index], 1, CompleteChunk(ChunkId(index, 1), outputs[index]))
                await say(websockets[index], 2, FailChunk(ChunkId(index, 2), "after"))

            working = asyncio.gather(*(work(index) for index in range(3)))
            seen: dict[int, list[int]] = {0: [], 1: [], 2: []}
            for _ in range(9):
                record = await served.writer.next()
                assert record.kind in (FAIL, COMPLETE)
                seen[record.submission].append(record.chunk)
                if record.kind == COMPLETE:
                    assert record.tail == outputs[record.submission]
            assert list(seen.values()) == [[0, 1, 2]] * 3
            await working
        ends = [await served.writer.next(CLOSE) for _ in range(3)]
        assert {end.argument for end in ends} == {CLEAN}


async def test_a_peer_that_does_not_read_is_neither_read_nor_served_until_it_does() -> None:
    async with rig() as served:
        reader, writer = await raw(served)
        connection = (await served.writer.next(OPEN)).connection
        served.submissions[9] = a_submission(9, metadata=b"m" * 100_000)
        total = 600
        for nonce in range(total):
            writer.write(frame(encode_client(ClientMessage(nonce, WantToReserveChunks(1, Oldest())))))
        for nonce in range(total):
            assert (await served.writer.next(RESERVE)).nonce == nonce
        for nonce in range(total):
            served.writer.send(RESERVED, reserved(connection, nonce, (9, nonce, 0, 0, 0)))
            await asyncio.sleep(0)  # because others need a turn
        sent = served.count(Counter.BYTES_SENT)
        assert sent < total * 100_000 // 2
        await next_frame(reader)
        await next_frame(reader)
        for nonce in range(total):
            reply: Any = decode_server((await next_frame(reader))[2])
            assert reply.nonce == nonce
        writer.close()


# --- heartbeats and ends ---


async def test_a_silent_peer_gets_a_ping_each_tick_and_is_closed_after_the_missed_ones() -> None:
    async with rig(heartbeat_interval=0.05, max_missable=2) as served:
        reader, writer = await raw(served)
        await next_frame(reader)
        frames: list[tuple[int, bool, bytes]] = []
        async with asyncio.timeout(10):
            while not frames or frames[-1][0] != 8:
                frames.append(await next_frame(reader))
        assert [one[0] for one in frames] == [9] * 4 + [8]
        assert struct.unpack(">H", frames[-1][2][:2]) == (1008,)
        assert b"heartbeat" in frames[-1][2]
        await served.writer.next(OPEN)
        assert (await served.writer.next(CLOSE)).argument == CLEAN
        assert served.count(Counter.CONSUMERS_REJECTED) == 1
        assert await reader.read() == b""
        writer.close()


async def test_a_peer_that_answers_pings_stays_and_hears_one_each_tick() -> None:
    async with rig(heartbeat_interval=0.03, max_missable=0) as served:
        reader, writer = await raw(served)
        await next_frame(reader)
        async with asyncio.timeout(10):
            for _ in range(15):
                opcode, _, payload = await next_frame(reader)
                assert (opcode, payload) == (9, HEARTBEAT)
                writer.write(frame(payload, 10))
        writer.close()


async def test_an_end_without_a_close_frame_is_lost_with_one_it_is_clean() -> None:
    async with rig() as served:
        async with consumer(served) as websocket:
            await opened(served, websocket)
        assert (await served.writer.next(CLOSE)).argument == CLEAN
        _, writer = await raw(served)
        await served.writer.next(OPEN)
        writer.close()
        assert (await served.writer.next(CLOSE)).argument == LOST
        assert served.count(Counter.CONSUMERS_LOST) == 1
        assert served.count(Counter.CONSUMERS_OPENED) == 2
        await served.until(lambda: served.count(Counter.CONSUMERS_CONNECTED) == 0)


async def test_a_reset_connection_is_lost_too() -> None:
    async with rig() as served:
        _, writer = await raw(served)
        await served.writer.next(OPEN)
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.transport.abort()
        assert (await served.writer.next(CLOSE)).argument == LOST


async def test_draining_closes_every_consumer_with_1001_and_never_waits_for_them() -> None:
    async with rig() as served:
        reader, writer = await raw(served)
        async with consumer(served) as websocket:
            await hear(websocket)
            begun = asyncio.get_running_loop().time()
            await served.consumers.drain()
            assert asyncio.get_running_loop().time() - begun < 0.5
            assert await ended(websocket) == (1001, "the server is stopping")
        frames = await reader.read()
        assert frames.endswith(b"\x03\xe9the server is stopping")
        writer.close()
        with pytest.raises(InvalidStatus) as refusal:
            await connect(served.url)
        assert refusal.value.response.status_code == 503


async def test_a_new_writer_closes_every_consumer_with_1012_and_serves_those_that_come_back() -> None:
    async with rig() as served:
        async with consumer(served) as websocket, consumer(served) as other:
            await opened(served, websocket)
            await opened(served, other)
            await say(websocket, 1, WantToReserveChunks(1, Oldest()))
            await served.writer.next(RESERVE)
            served.writer.close()
            served.writer = StandinWriter(served.channel)
            for one in (websocket, other):
                assert (await ended(one))[0] == 1012
        assert len(served.restarts) == 1
        async with consumer(served) as websocket:
            connection = await opened(served, websocket)
            served.submissions[9] = a_submission(9)
            await say(websocket, 1, WantToReserveChunks(1, Oldest()))
            await served.writer.next(RESERVE)
            served.writer.send(RESERVED, reserved(connection, 1, (9, 1, 0, 0, 0)))
            assert (await hear(websocket)).nonce == 1


async def test_garbage_from_one_consumer_leaves_the_others_alone() -> None:
    async with rig() as served, consumer(served) as websocket:
        connection = await opened(served, websocket)
        served.submissions[9] = a_submission(9)
        for nonce in range(20):
            reader, writer = await raw(served, b"\xff" * 50)
            async with asyncio.timeout(10):
                assert (await reader.read())[-60:].find(b"\x03\xea") > 0
            writer.close()
            assert (await served.writer.next(OPEN)).connection != connection
            assert (await served.writer.next(CLOSE)).argument == CLEAN
            await say(websocket, nonce, WantToReserveChunks(1, Oldest()))
            await served.writer.next(RESERVE)
            served.writer.send(RESERVED, reserved(connection, nonce, (9, 1, 0, 0, 0)))
            assert (await hear(websocket)).nonce == nonce


async def test_a_text_frame_is_answered_with_1003() -> None:
    async with rig() as served, consumer(served) as websocket:
        await hear(websocket)
        await websocket.send("hello")
        assert (await ended(websocket))[0] == 1003
        with pytest.raises(ConnectionClosed):
            await websocket.recv()


async def test_a_damaged_record_from_the_writer_ends_this_front_end_only() -> None:
    async with rig() as served, consumer(served) as websocket:
        connection = await opened(served, websocket)
        served.writer.send(RESERVED, struct.pack("<QQII", connection, 1, 500, 0))
        await served.until(lambda: len(served.broken) == 1)
        assert "52" in served.broken[0] or "24" in served.broken[0]


# --- cold requests beside the hot ones ---


async def test_requests_of_any_size_reach_the_writer_and_replies_come_back() -> None:
    async with rig(capacity=1 << 16) as served:
        pump = served.consumers.pump
        await served.until(lambda: pump.endpoint.connected)
        payloads = {number: bytes([number]) * size for number, size in enumerate((1, 100, 16_000, 40_000, 2_000_000))}
        for number, payload in payloads.items():
            while not pump.send_request(number, payload):
                await pump.room()
        got = {}
        for _ in payloads:
            record = await served.writer.next(REQUEST)
            got[record.nonce] = record.tail
        assert got == payloads
        served.writer.send(REPLY, struct.pack("<Q", 2**63) + b"done")
        await served.until(lambda: bool(served.replies))
        assert served.replies == [(2**63, b"done")]


async def test_who_found_the_ring_full_is_told_when_there_is_room() -> None:
    async with rig(capacity=1 << 16) as served:
        pump = served.consumers.pump
        await served.until(lambda: pump.endpoint.connected)
        served.writer.pause()
        sent = 0
        while pump.send_request(sent, b"x" * 5000):
            sent += 1
        room = pump.room()
        assert not room.done()
        served.writer.resume()
        async with asyncio.timeout(10):
            await room
        assert pump.send_request(sent, b"x" * 5000)
        for number in range(sent + 1):
            assert (await served.writer.next(REQUEST)).nonce == number


# --- together ---


async def test_no_heartbeat_is_missed_while_back_pressure_keeps_us_from_reading() -> None:
    async with rig(heartbeat_interval=0.02, max_missable=1, capacity=1 << 16) as served:
        reader, writer = await raw(served)
        await served.writer.next(OPEN)
        served.writer.pause()
        messages = [encode_client(ClientMessage(n, CompleteChunk(ChunkId(9, n), None))) for n in range(3000)]
        writer.write(b"".join(frame(message) for message in messages))
        await served.until(lambda: served.consumers.hub.blocked_connections == 1)
        await next_frame(reader)
        for _ in range(10):
            assert await next_frame(reader) == (9, True, HEARTBEAT)
        served.writer.resume()
        for chunk in range(3000):
            assert (await served.writer.next(COMPLETE)).chunk == chunk
        writer.close()


async def test_a_writer_that_is_replaced_amid_a_large_output_gets_later_ones_whole() -> None:
    async with rig(capacity=1 << 16) as served:
        async with consumer(served) as websocket:
            await opened(served, websocket)
            served.writer.pause()
            sending = asyncio.ensure_future(say(websocket, 1, CompleteChunk(ChunkId(9, 1), b"x" * 1_000_000)))
            await served.until(lambda: served.consumers.hub.blocked_connections == 1)
            assert served.consumers.pump.send_request(1, b"q" * 1_000_000)
            served.writer.close()
            served.writer = StandinWriter(served.channel)
            assert (await ended(websocket))[0] == 1012
            with contextlib.suppress(ConnectionClosed):  # it may have been on its way when the connection ended
                await sending
        async with consumer(served) as websocket:
            await opened(served, websocket)
            await say(websocket, 2, CompleteChunk(ChunkId(9, 2), b"y" * 1_000_000))
            assert (await served.writer.next(COMPLETE)).tail == b"y" * 1_000_000
            assert served.consumers.pump.send_request(2, b"r" * 1_000_000)
            assert (await served.writer.next(REQUEST)).tail == b"r" * 1_000_000
        assert served.broken == []
        assert len(served.restarts) == 1


async def test_consumers_that_come_before_the_writer_is_up_wait_for_it() -> None:
    async with rig(begin_writer=False) as served, consumer(served) as websocket:
        assert isinstance(await hear(websocket), Init)
        await say(websocket, 1, WantToReserveChunks(1, Oldest()))
        assert not served.consumers.pump.send_request(1, b"ping")
        room = served.consumers.pump.room()
        served.writer = StandinWriter(served.channel)
        connection = (await served.writer.next(OPEN)).connection
        assert (await served.writer.next(RESERVE)).connection == connection
        async with asyncio.timeout(10):
            await room
        assert served.restarts == []


async def test_hundreds_of_consumers_are_served_side_by_side() -> None:
    async with rig(heartbeat_interval=0.2, max_missable=1) as served, contextlib.AsyncExitStack() as stack:
        served.submissions[9] = a_submission(9)
        websockets = [await stack.enter_async_context(consumer(served)) for _ in range(200)]
        assert served.count(Counter.CONSUMERS_CONNECTED) == 200
        for nonce in range(3):
            for websocket in websockets:
                await say(websocket, nonce, WantToReserveChunks(1, Oldest()))
            asked = 0
            while asked < len(websockets):
                record = await served.writer.next()
                if record.kind == RESERVE:
                    asked += 1
                    served.writer.send(RESERVED, reserved(record.connection, record.nonce, (9, asked, 0, 0, 0)))
            got = set()
            for websocket in websockets:
                reply = await hear(websocket)
                if isinstance(reply, Init):
                    reply = await hear(websocket)
                assert reply.nonce == nonce
                got.add(reply.chunks[0][0].chunk_index)
            assert got == set(range(1, 201))


async def test_a_peer_with_nagles_algorithm_does_not_wait_for_our_delayed_acks() -> None:
    async with rig() as served:
        reader, writer = await raw(served)
        writer.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 0)
        connection = (await served.writer.next(OPEN)).connection
        served.submissions[9] = a_submission(9)
        await next_frame(reader)
        await next_frame(reader)
        rounds = 50
        begun = asyncio.get_running_loop().time()
        for nonce in range(rounds):
            writer.write(frame(encode_client(ClientMessage(nonce, CompleteChunk(ChunkId(9, nonce), None)))))
            await asyncio.sleep(0)  # because others need a turn
            writer.write(frame(encode_client(ClientMessage(nonce, WantToReserveChunks(1, Oldest())))))
            await served.writer.next(COMPLETE)
            await served.writer.next(RESERVE)
            served.writer.send(RESERVED, reserved(connection, nonce, (9, nonce, 0, 0, 0)))
            await next_frame(reader)
        # A delayed ACK takes 40 ms; most rounds would wait for one.
        assert asyncio.get_running_loop().time() - begun < rounds * 0.02
        writer.close()

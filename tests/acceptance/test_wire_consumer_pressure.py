"""WIRE section 4 over raw sockets: peers that do not read, floods, a writer that stands still, huge outputs."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import cbor2
import pytest

from tests.acceptance.conftest import Serve, Wire
from tests.conftest import ServerFactory
from tests.support.raw_consumer import HEARTBEAT, EndedError, RawConsumer, chunk_id, frame
from tests.support.raw_producer import RawProducer
from tests.support.server import wait_until

MIB = 1024 * 1024
#: Every chunk of a reply carries its whole submission: with such metadata a request of 60 bytes is answered with 1 MiB.
LARGE = [0] * MIB
ONE = {"WantToReserveChunks": {"max": 1, "strategy": "Oldest"}}


def resident(pid: int) -> int:
    """Bytes of memory that a process has of its own (shared ones, such as rings, are left out)."""
    fields = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return int(fields["RssAnon"].split()[0]) * 1024


@contextlib.contextmanager
def standing_still(pid: int) -> Iterator[None]:
    """A process that is stopped for a moment: well under the 5 seconds after which it counts as hung."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def fill(consumer: RawConsumer, data: bytes, limit: int) -> int:
    """Send `data` over and over until the server takes no more, or `limit` bytes; how many bytes it took."""
    consumer.socket.setblocking(False)
    sent = 0
    rest = data
    with contextlib.suppress(BlockingIOError):
        while sent < limit:
            count = consumer.socket.send(rest)
            sent += count
            rest = rest[count:] or data
    consumer.socket.settimeout(20)
    return sent


def test_a_consumer_that_does_not_read_costs_little_memory_and_gets_everything_later(serve: Serve) -> None:
    wire = serve(heartbeat_interval="100ms", max_missable_heartbeats=1)
    wire.producer.insert(100_000, metadata=LARGE)
    [frontend] = wire.server.pids()["frontend"]
    other = wire.consumer()
    other.reserve()
    before = resident(frontend)
    stuck = wire.consumer(receive_buffer=65536)
    # In one write: once its answers pile up, no more is read of it.
    stuck.say(*[ONE] * 150)
    wire.producer.wait_for_metric("opsqueue_chunks_reserved", 151)
    for _ in range(20):
        other.ping()
        other.reserve()
    # The kernel's buffers take some megabytes of the 150.
    assert resident(frontend) - before < 32 * MIB
    # Twenty ticks without a word from it: it was not read either, so none of them counts as missed.
    for nonce in range(150):
        assert len(stuck.chunks(nonce)) == 1
        stuck.answers.clear()
    stuck.settle()


def test_what_a_consumer_holds_that_does_not_read_expires(serve: Serve) -> None:
    wire = serve(reservation_expiration="400ms")
    wire.producer.insert(40, metadata=LARGE)
    stuck, other = wire.consumer(receive_buffer=65536), wire.consumer()
    stuck.say(*[ONE] * 40)
    wire.producer.wait_for_metric("opsqueue_chunks_reserved", 40)
    got: set[int] = set()
    while len(got) < 40:
        ids = other.reserve_ids(1)
        other.complete(*ids)
        got |= {chunk for _, chunk in ids}
    for nonce in range(40):
        stuck.chunks(nonce)
    for _ in range(40):
        assert list(stuck.notice()) == ["ChunkReservationExpired"]


def test_a_consumer_that_does_not_read_and_ends_frees_what_it_holds(wire: Wire) -> None:
    wire.producer.insert(50, metadata=LARGE)
    stuck, other = wire.consumer(receive_buffer=65536), wire.consumer()
    stuck.say(*[ONE] * 50)
    wire.producer.wait_for_metric("opsqueue_chunks_reserved", 50)
    nonce = other.ask(1)
    wire.producer.wait_for_parked(1)
    stuck.reset()
    assert len(other.chunks(nonce)) == 1
    wire.producer.wait_for_metric("opsqueue_chunks_reserved", 1)


def test_a_flood_of_requests_waits_in_the_sender_and_others_go_on(serve: Serve) -> None:
    # The end of a connection that is not read at the moment is noticed at its next heartbeats.
    wire = serve(heartbeat_interval="100ms", max_missable_heartbeats=1)
    [frontend] = wire.server.pids()["frontend"]
    flooding, other = wire.consumer(), wire.consumer()
    before = resident(frontend)
    flood = b"".join(flooding.message(ONE) for _ in range(1000))
    sent = fill(flooding, flood, 64 * MIB)
    assert sent < 64 * MIB
    assert wire.producer.metric("opsqueue_requests_parked") <= 1024
    assert resident(frontend) - before < 16 * MIB
    submission = wire.producer.insert(2)
    # Its first requests came first; they take what there is.
    wire.producer.wait_for_metric("opsqueue_chunks_reserved", 2)
    flooding.drop()
    assert other.reserve_ids(2) == [(submission, 0), (submission, 1)]


@pytest.mark.parametrize("end", ["drop", "reset"])
def test_the_end_of_a_connection_with_thousands_of_waiting_requests_is_noticed_at_once(wire: Wire, end: str) -> None:
    wire.producer.insert(1)
    flooding, other = wire.consumer(), wire.consumer()
    [held] = flooding.reserve_ids()
    flooding.say(*[ONE] * 3000)
    wire.producer.wait_for_parked(1024)
    nonce = other.ask()
    begun = time.monotonic()
    if end == "drop":
        flooding.drop()
    else:
        flooding.reset()
    assert [reserved.id for reserved in other.chunks(nonce)] == [held]
    # The next heartbeat, which would show it too, is ten seconds away.
    assert time.monotonic() - begun < 5


def test_a_writer_that_stands_still_holds_up_the_senders_and_nothing_is_lost(server_factory: ServerFactory) -> None:
    server = server_factory(heartbeat_interval="100ms", max_missable_heartbeats=1)
    [frontend], [writer] = server.pids()["frontend"], server.pids()["writer"]
    total = 400_000
    with RawProducer(server.port) as producer:
        submission = producer.insert(total)
    contents = [
        {"CompleteChunk": {"id": chunk_id((submission, chunk)), "output_content": None}} for chunk in range(total)
    ]
    flood = memoryview(b"".join(frame(cbor2.dumps({"nonce": 0, "contents": each})) for each in contents))
    with (
        RawProducer(server.port) as producer,
        RawConsumer(server.port) as flooding,
        RawConsumer(server.port) as quiet,
    ):
        before = resident(frontend)
        with standing_still(writer):
            flooding.socket.setblocking(False)
            sent = 0
            stuck_since = time.monotonic()
            while time.monotonic() - stuck_since < 0.5:
                try:
                    sent += flooding.socket.send(flood[sent:])
                    stuck_since = time.monotonic()
                except BlockingIOError:
                    # A heartbeat's time: the front-end goes on with what it can do by itself.
                    assert quiet.ping() == HEARTBEAT
            assert sent < len(flood)
            assert resident(frontend) - before < 16 * MIB
            for _ in range(5):
                assert quiet.ping() == HEARTBEAT
        flooding.socket.settimeout(20)
        flooding.socket.sendall(flood[sent:])
        flooding.settle()
        quiet.settle()
        wait_until(lambda: producer.state(submission) == "Completed", "every completion has arrived")
        assert producer.metric("opsqueue_chunks_completed_total") == total
        assert producer.metric("opsqueue_completions_ignored_total") == 0


def test_outputs_larger_than_a_ring_from_several_consumers_arrive_whole(wire: Wire) -> None:
    submission = wire.producer.insert_direct([b"in"] * 4)
    consumers = [wire.consumer() for _ in range(4)]
    outputs = [bytes([65 + index]) * (6 * MIB + index) for index in range(4)]
    messages = []
    for consumer, output in zip(consumers, outputs, strict=True):
        [held] = consumer.reserve_ids()
        messages.append(
            memoryview(consumer.message({"CompleteChunk": {"id": chunk_id(held), "output_content": output}}))
        )
    # All at the same time, piece by piece.
    while any(messages):
        for index, consumer in enumerate(consumers):
            piece, messages[index] = messages[index][: MIB // 2], messages[index][MIB // 2 :]
            consumer.socket.sendall(piece)
    for consumer in consumers:
        consumer.settle()
    wire.producer.wait_for_state(submission, "Completed")
    for index, output in enumerate(outputs):
        assert wire.producer.output(submission, index) == (200, output)


def test_an_output_of_nearly_64_mib_is_stored(wire: Wire) -> None:
    submission = wire.producer.insert_direct([b"in"])
    consumer = wire.consumer()
    [held] = consumer.reserve_ids()
    output = bytes(MIB) * 63
    message = consumer.message({"CompleteChunk": {"id": chunk_id(held), "output_content": output}})
    # Frames are at most 16 MiB, and this one's head has 14 bytes.
    payload = message[14:]
    parts = [payload[at : at + 16 * MIB] for at in range(0, len(payload), 16 * MIB)]
    consumer.send_fragments(parts)
    consumer.settle()
    wire.producer.wait_for_state(submission, "Completed")
    assert wire.producer.output(submission, 0) == (200, output)


def test_an_output_cut_off_by_the_end_of_its_connection_frees_the_chunk(wire: Wire) -> None:
    submission = wire.producer.insert_direct([b"in"])
    cut, other = wire.consumer(), wire.consumer()
    [held] = cut.reserve_ids()
    message = cut.message({"CompleteChunk": {"id": chunk_id(held), "output_content": bytes(8 * MIB)}})
    cut.send(message[: 5 * MIB])
    nonce = other.ask()
    wire.producer.wait_for_parked(1)
    cut.drop()
    [reserved] = other.chunks(nonce)
    assert reserved.id == held
    assert wire.producer.chunks_done(submission) == 0


@pytest.mark.parametrize("role", ["writer", "frontend"])
def test_connections_end_when_their_process_hangs_and_is_replaced(server_factory: ServerFactory, role: str) -> None:
    server = server_factory(frontends=1)
    with RawProducer(server.port) as producer:
        submission = producer.insert(1)
    with RawConsumer(server.port) as consumer:
        [held] = consumer.reserve_ids()
        [pid] = server.pids()[role]
        os.kill(pid, signal.SIGSTOP)
        server.wait_for_replacement(role, pid)
        with contextlib.suppress(EndedError, ConnectionResetError):
            while True:
                consumer.receive()
    with RawConsumer(server.port) as consumer:
        assert consumer.reserve_ids() == [held] == [(submission, 0)]


def test_many_connections_that_never_say_a_word_keep_nobody_from_working(wire: Wire) -> None:
    silent = [socket.create_connection(("127.0.0.1", wire.server.port)) for _ in range(200)]
    try:
        submission = wire.producer.insert(1)
        assert wire.consumer().reserve_ids() == [(submission, 0)]
    finally:
        for connection in silent:
            connection.close()

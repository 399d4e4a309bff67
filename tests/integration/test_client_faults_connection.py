"""The consumer's client and its connection: refused, cut, silent, garbled, not there; it reconnects or says why not."""

from __future__ import annotations

import logging
import os
import signal
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from opsqueue.consumer import Chunk, ConsumerClient, SubmissionId
from opsqueue.exceptions import (
    IncorrectUsageError,
    InternalConsumerClientError,
    InternalProducerClientError,
    UnexpectedOpsqueueConsumerServerResponseError,
)
from opsqueue.opsqueue_internal import ChunkIndex
from opsqueue.producer import ProducerClient
from opsqueue.protocol import consumer as wire
from tests.integration.client_fakes import FakeServer, Running, direct, init, run_loop, running

URL = "memory://"
FIRST_FRAMES: dict[str, Any] = {
    "garbage": b"\xff\xff",
    "an answer": wire.encode_server(wire.ChunksReserved(0, [])),
    "text": "hello",
}


@pytest.fixture
def fake() -> Iterator[Running]:
    with running(FakeServer()) as started:
        yield started


@pytest.fixture
def consumer(fake: Running) -> ConsumerClient:
    return ConsumerClient(f"localhost:{fake.server.port}", URL)


def test_a_lost_connection_is_made_again_and_a_lost_completion_sent_again(
    fake: Running, consumer: ConsumerClient, caplog: pytest.LogCaptureFixture
) -> None:
    fake.server.add(direct([1], [2], [3]))

    def drop_during_second(op: int) -> int:
        if op == 2 and not fake.server.closes:
            fake.drop()
            fake.server.wait_for(lambda: bool(fake.server.closes))
        return op

    with caplog.at_level(logging.WARNING, "opsqueue"):
        run_loop(consumer, drop_during_second, 3)
    assert len(fake.server.handshakes) == 2
    assert set(fake.server.submissions[1]["done"]) >= {0, 1}
    assert "lost" in caplog.text


def test_a_report_after_the_connection_was_lost_raises_and_the_next_call_reconnects(
    fake: Running, consumer: ConsumerClient
) -> None:
    fake.server.add([b"a"])
    (chunk,) = consumer.reserve_chunks()
    connection = consumer.inner.connect()
    fake.drop()
    assert connection._ended.wait(10)
    with pytest.raises(InternalConsumerClientError, match="lost"):
        consumer.complete_chunk(chunk.submission_id, None, chunk.chunk_index, b"x")
    assert len(consumer.reserve_chunks()) == 1


def _close_frame_arrives(connection: Any) -> None:
    """As when the receiving thread has read the server's close frame and has not dealt with it yet."""
    with connection._lock:
        connection._protocol.receive_data(b"\x88\x02\x03\xe9")


def test_a_loop_that_reports_while_the_server_closes_reconnects_and_goes_on(
    fake: Running, consumer: ConsumerClient
) -> None:
    fake.server.add(direct([1], [2], [3]))

    def close_at_the_first(op: int) -> int:
        if op == 1 and len(fake.server.handshakes) == 1:
            _close_frame_arrives(consumer.inner.connect())
        return op

    run_loop(consumer, close_at_the_first, 2)
    assert len(fake.server.handshakes) == 2


def test_a_report_while_the_server_closes_raises_and_the_next_call_reconnects(
    fake: Running, consumer: ConsumerClient
) -> None:
    fake.server.add([b"a", b"b"])
    (chunk,) = consumer.reserve_chunks()
    _close_frame_arrives(consumer.inner.connect())
    with pytest.raises(InternalConsumerClientError, match="closed"):
        consumer.complete_chunk(chunk.submission_id, None, chunk.chunk_index, b"x")
    assert len(consumer.reserve_chunks()) == 1


def test_a_server_that_is_not_there_yet_is_waited_for(caplog: pytest.LogCaptureFixture) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    consumer = ConsumerClient(f"127.0.0.1:{port}", URL)
    server = FakeServer(port=port)
    server.add([b"late"])
    warned = threading.Event()

    class Noticing(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            warned.set()

    handler = Noticing(level=logging.WARNING)
    logging.getLogger("opsqueue.consumer").addHandler(handler)
    found: list[Chunk] = []
    waiting = threading.Thread(target=lambda: found.extend(consumer.reserve_chunks()), daemon=True)
    try:
        waiting.start()
        assert warned.wait(10)
    finally:
        logging.getLogger("opsqueue.consumer").removeHandler(handler)
    with running(server):
        waiting.join(10)
    assert [chunk.input_content for chunk in found] == [b"late"]
    warnings = [record.getMessage() for record in caplog.records if "cannot connect" in record.getMessage()]
    assert len(warnings) == 1
    assert f"ws://127.0.0.1:{port}/consumer" in warnings[0]
    assert "refused" in warnings[0]


@pytest.mark.parametrize("status", [502, 503, 504])
def test_a_handshake_that_may_succeed_later_is_tried_again(
    fake: Running, consumer: ConsumerClient, status: int
) -> None:
    async def intercept(_request: web.Request) -> web.Response | None:
        return web.Response(status=status) if len(fake.server.handshakes) < 3 else None

    fake.server.intercept = intercept
    fake.server.add([b"a"])
    assert len(consumer.reserve_chunks()) == 1
    assert len(fake.server.handshakes) == 3


@pytest.mark.parametrize("status", [200, 400, 401, 404, 500])
def test_a_handshake_that_is_refused_is_an_error_at_once(fake: Running, consumer: ConsumerClient, status: int) -> None:
    async def intercept(_request: web.Request) -> web.Response | None:
        return web.Response(status=status, text="go away")

    fake.server.intercept = intercept
    for call in (consumer.reserve_chunks, lambda: consumer.run_each_op(lambda op: op)):
        with pytest.raises(InternalConsumerClientError, match=f"{status} go away"):
            call()


@pytest.mark.parametrize("first", FIRST_FRAMES.values(), ids=FIRST_FRAMES)
def test_a_first_frame_that_is_not_init_is_an_error_at_once(
    fake: Running, consumer: ConsumerClient, first: bytes | str
) -> None:
    async def talk(ws: web.WebSocketResponse) -> None:
        await (ws.send_str(first) if isinstance(first, str) else ws.send_bytes(first))
        await ws.receive()

    fake.server.talk = talk
    with pytest.raises(InternalConsumerClientError, match="no Init first"):
        consumer.reserve_chunks()


def test_a_server_that_does_not_speak_http_is_an_error_at_once() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(4096)
                connection.sendall(b"220 mail.example ESMTP\r\n\r\n")

        threading.Thread(target=serve, daemon=True).start()
        consumer = ConsumerClient(f"127.0.0.1:{listener.getsockname()[1]}", URL)
        with pytest.raises(InternalConsumerClientError, match="WebSocket"):
            consumer.reserve_chunks()


def test_garbage_later_is_an_error_that_says_so(fake: Running, consumer: ConsumerClient) -> None:
    async def talk(ws: web.WebSocketResponse) -> None:
        await ws.send_bytes(init())
        await ws.receive()
        await ws.send_bytes(b"\xa1\x61x\x00")
        await ws.receive()

    fake.server.talk = talk
    with pytest.raises(UnexpectedOpsqueueConsumerServerResponseError, match="Init, Sync and Async"):
        consumer.reserve_chunks()


def test_a_refused_request_is_the_callers_mistake(fake: Running, consumer: ConsumerClient) -> None:
    async def talk(ws: web.WebSocketResponse) -> None:
        await ws.send_bytes(init())
        message = wire.decode_client((await ws.receive()).data)
        await ws.send_bytes(wire.encode_server(wire.ReservationRefused(message.nonce, "too deep")))
        await ws.receive()

    fake.server.talk = talk
    with pytest.raises(IncorrectUsageError, match="too deep"):
        consumer.reserve_chunks()


def test_a_policy_close_of_a_server_without_refusals_is_an_error_with_the_reason(
    fake: Running, consumer: ConsumerClient
) -> None:
    async def talk(ws: web.WebSocketResponse) -> None:
        await ws.send_bytes(init(features=None))
        await ws.receive()
        await ws.close(code=1008, message=b"no such strategy")

    fake.server.talk = talk
    with pytest.raises(InternalConsumerClientError, match="no such strategy"):
        consumer.reserve_chunks()


def test_a_server_that_falls_silent_is_left(fake: Running, consumer: ConsumerClient) -> None:
    silent = [True]

    async def talk(ws: web.WebSocketResponse) -> None:
        await ws.send_bytes(init(heartbeat_s=0.01))
        if silent:
            silent.clear()
            await ws.receive()
            await ws.receive()
            return
        message = wire.decode_client((await ws.receive()).data)
        chunk = (wire.Chunk(1, 0, b"x", 0), wire.Submission(1, None, 1, 0, 1, None, {}, "{}"))
        await ws.send_bytes(wire.encode_server(wire.ChunksReserved(message.nonce, [chunk])))
        await ws.receive()

    fake.server.talk = talk
    assert len(consumer.reserve_chunks()) == 1
    assert len(fake.server.handshakes) == 2


#: A key and a certificate that signs itself, for localhost.
TLS = Path(__file__).parent / "client_tls.pem"


def test_tls_is_spoken_where_the_certificate_is_trusted_and_refused_elsewhere(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(TLS)
    with running(FakeServer(), context) as fake:
        url = f"https://localhost:{fake.server.port}/prefix"
        with pytest.raises(InternalConsumerClientError, match="not trusted"):
            ConsumerClient(url, URL).reserve_chunks()
        with pytest.raises(InternalProducerClientError, match="not secure"):
            ProducerClient(url, tmp_path.as_uri()).count_submissions()
        monkeypatch.setenv("SSL_CERT_FILE", str(TLS))
        ProducerClient(url, tmp_path.as_uri()).inner.insert_submission_direct([b"secret"])
        (chunk,) = ConsumerClient(url, URL).reserve_chunks()
        assert chunk.input_content == b"secret"


def test_ctrl_c_ends_a_loop_that_finds_no_server(caplog: pytest.LogCaptureFixture) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        consumer = ConsumerClient(f"127.0.0.1:{unused.getsockname()[1]}", URL)
        fired: list[float] = []

        class Firing(logging.Handler):
            def emit(self, record: logging.LogRecord) -> None:
                fired.append(time.monotonic())
                os.kill(os.getpid(), signal.SIGINT)

        handler = Firing(level=logging.WARNING)
        logging.getLogger("opsqueue.consumer").addHandler(handler)
        try:
            consumer.run_each_op(lambda op: op)
        finally:
            logging.getLogger("opsqueue.consumer").removeHandler(handler)
        assert time.monotonic() - fired[0] < 1


def test_a_report_after_a_refusal_reports_the_reason_once_and_the_next_call_reconnects(
    fake: Running, consumer: ConsumerClient
) -> None:
    refusing = [True]

    async def talk(ws: web.WebSocketResponse) -> None:
        await ws.send_bytes(init(features=None))
        if refusing:
            refusing.clear()
            await ws.close(code=1008, message=b"not you")
        async for _ in ws:  # its first message may be a heartbeat, and what follows must have somebody to read it
            pass

    fake.server.talk = talk
    connection = consumer.inner.connect()
    assert connection._ended.wait(10)
    with pytest.raises(InternalConsumerClientError, match="not you"):
        consumer.fail_chunk(SubmissionId(1), None, ChunkIndex(0), "x")
    consumer.fail_chunk(SubmissionId(1), None, ChunkIndex(0), "x")
    assert len(fake.server.handshakes) == 2

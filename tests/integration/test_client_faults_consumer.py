"""The consumer's client against servers, stores and callbacks that fail: it reports, reconnects, gives back."""

from __future__ import annotations

import logging
import os
import pickle
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cbor2
import pytest
from aiohttp import web
from opentelemetry import baggage

from opsqueue.consumer import Chunk, ConsumerClient, Strategy, SubmissionId
from opsqueue.exceptions import (
    ChunkRetrievalError,
    ChunkStorageError,
    IncorrectUsageError,
)
from opsqueue.opsqueue_internal import ChunkIndex
from opsqueue.protocol import consumer as wire
from tests.integration.client_fakes import FakeServer, Running, Stop, direct, init, run_loop, running

URL = "memory://"


@pytest.fixture
def fake() -> Iterator[Running]:
    with running(FakeServer()) as started:
        yield started


@pytest.fixture
def consumer(fake: Running) -> ConsumerClient:
    return ConsumerClient(f"localhost:{fake.server.port}", URL)


@pytest.mark.parametrize("features", [wire.FEATURES, None], ids=["ours", "reference"])
@pytest.mark.parametrize("prefetch", [0, 1])
def test_operations_run_and_their_results_are_reported(features: Any, prefetch: int) -> None:
    with running(FakeServer(features=features)) as fake:
        number = fake.server.add([*direct([1], [2], [3]), cbor2.dumps([0])])
        consumer = ConsumerClient(f"localhost:{fake.server.port}", URL)
        run_loop(consumer, lambda op: op + 1, 3, prefetch=prefetch, strategy=Strategy.Oldest())
        fake.server.wait_for(lambda: bool(fake.server.closes))
        done = fake.server.submissions[number]["done"]
        assert {index: cbor2.loads(content) for index, content in done.items()} == {0: [2], 1: [3], 2: [4]}
        assert fake.server.available == [(number, 3)]
        assert fake.server.submissions[number]["failed"] is None
        extensions = (wire.WorkingOn, wire.ReleaseChunk)
        assert bool([message for message in fake.server.messages if isinstance(message, extensions)]) == bool(features)


def test_a_handshake_lists_the_extensions_and_the_end_has_a_close_frame(
    fake: Running, consumer: ConsumerClient
) -> None:
    fake.server.add(direct([1]))
    run_loop(consumer, lambda op: op, 0)
    fake.server.wait_for(lambda: bool(fake.server.closes))
    assert fake.server.handshakes[0]["Opsqueue-Features"].split(", ") == list(wire.FEATURES)
    assert fake.server.closes == [1000]
    working_on = fake.server.sent(wire.WorkingOn)
    assert [message.id for message in working_on] == [wire.ChunkId(1, 0)]


def test_a_chunk_in_hand_is_released_when_the_loop_ends(fake: Running, consumer: ConsumerClient) -> None:
    number = fake.server.add(direct([1]))
    run_loop(consumer, lambda op: op, 0)
    fake.server.wait_for(lambda: bool(fake.server.sent(wire.ReleaseChunk)))
    assert fake.server.sent(wire.FailChunk) == []
    assert fake.server.available == [(number, 0)]


def test_a_keyboard_interrupt_ends_the_loop_without_an_exception(fake: Running, consumer: ConsumerClient) -> None:
    fake.server.add(direct([1]))

    def interrupt(_op: int) -> None:
        raise KeyboardInterrupt

    consumer.run_each_op(interrupt)
    fake.server.wait_for(lambda: bool(fake.server.sent(wire.ReleaseChunk)))


def test_ctrl_c_ends_a_loop_that_waits_for_work(fake: Running, consumer: ConsumerClient) -> None:
    fired: list[float] = []

    def fire() -> None:
        fake.server.wait_for(lambda: bool(fake.server.sent(wire.WantToReserveChunks)))
        fired.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=fire).start()
    consumer.run_each_op(lambda op: op)
    assert time.monotonic() - fired[0] < 1
    fake.server.wait_for(lambda: bool(fake.server.closes))
    assert fake.server.closes == [1000]


class _Custom(Exception):
    pass


class _Unprintable(Exception):
    def __str__(self) -> str:
        raise ValueError("no text")


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (ValueError("wrong"), "ValueError: wrong"),
        (_Custom("mine"), "_Custom: mine"),
        (SystemError("deep"), "SystemError: deep"),
        (TimeoutError("late"), "TimeoutError: late"),
        (_Unprintable(), "_Unprintable: (its message cannot be shown"),
        (ValueError("lone \ud800 surrogate"), "surrogate"),
    ],
)
def test_an_exception_fails_its_chunk_and_the_loop_goes_on(
    fake: Running, consumer: ConsumerClient, caplog: pytest.LogCaptureFixture, error: Exception, says: str
) -> None:
    fake.server.add(direct([1], [2], [3]))

    def fail_first(op: int) -> int:
        if op == 1:
            raise error
        return op

    with caplog.at_level(logging.WARNING, "opsqueue"):
        run_loop(consumer, fail_first, 2)
    failures = fake.server.sent(wire.FailChunk)
    assert [message.id for message in failures] == [wire.ChunkId(1, 0)]
    assert "Traceback" in failures[0].failure
    assert says in failures[0].failure
    assert [message.id.chunk_index for message in fake.server.sent(wire.CompleteChunk)] == [1]
    assert says in caplog.text


def test_what_a_raw_callback_returns_must_be_bytes(fake: Running, consumer: ConsumerClient) -> None:
    fake.server.add([b"a", b"b", b"c"])
    answers = iter(["text", bytearray(b"fine")])

    def callback(_chunk: Chunk) -> Any:
        answer = next(answers, None)
        if answer is None:
            raise Stop
        return answer

    with pytest.raises(Stop):
        consumer.run_each_chunk_raw(callback)
    assert "TypeError" in fake.server.sent(wire.FailChunk)[0].failure
    assert fake.server.sent(wire.CompleteChunk)[0].output_content == b"fine"


def test_a_huge_failure_text_is_shortened_in_its_middle(fake: Running, consumer: ConsumerClient) -> None:
    fake.server.add(direct([1], [2]))

    def fail(op: int) -> None:
        raise ValueError("ü" * 1_000_000 + "end")

    run_loop(consumer, fail, 1)
    text = fake.server.sent(wire.FailChunk)[0].failure
    assert len(text.encode()) <= 64 * 1024
    assert text.startswith("Traceback")
    assert text.endswith("end")


def test_a_result_beyond_one_frame_arrives_whole(fake: Running, consumer: ConsumerClient) -> None:
    fake.server.add([b"a", b"b"])
    large = os.urandom(wire.MAX_FRAME_BYTES * 2 + 5)
    calls = iter([large])

    def callback(_chunk: Chunk) -> bytes:
        answer = next(calls, None)
        if answer is None:
            raise Stop
        return answer

    with pytest.raises(Stop):
        consumer.run_each_chunk_raw(callback)
    assert fake.server.sent(wire.CompleteChunk)[0].output_content == large


@pytest.mark.parametrize("callback", [None, 5, "text"])
def test_a_callback_that_cannot_be_called_is_refused_at_once(consumer: ConsumerClient, callback: Any) -> None:
    for run in (consumer.run_each_op, consumer.run_each_chunk, consumer.run_each_chunk_raw):
        with pytest.raises(TypeError):
            run(callback)


@pytest.mark.parametrize("strategy", [None, Strategy.Oldest, "Oldest"])
def test_a_strategy_that_is_none_is_refused_at_once(consumer: ConsumerClient, strategy: Any) -> None:
    with pytest.raises(TypeError):
        consumer.run_each_op(lambda op: op, strategy=strategy)


@pytest.mark.parametrize("maximum", [0, -1])
def test_reserving_less_than_one_chunk_is_refused(consumer: ConsumerClient, maximum: int) -> None:
    with pytest.raises(IncorrectUsageError):
        consumer.reserve_chunks(maximum, Strategy.Oldest())


def test_chunks_can_be_reserved_and_reported_by_hand(fake: Running, consumer: ConsumerClient) -> None:
    fake.server.add([b"a", b"b", b"c"])
    chunks = consumer.reserve_chunks(5)
    assert [(chunk.input_content, chunk.submission_prefix) for chunk in chunks] == [
        (b"a", None),
        (b"b", None),
        (b"c", None),
    ]
    assert chunks[0].submission_metadata == b"meta"
    consumer.complete_chunk(chunks[0].submission_id, None, chunks[0].chunk_index, b"out")
    consumer.fail_chunk(chunks[1].submission_id, None, chunks[1].chunk_index, "no")
    fake.server.wait_for(lambda: bool(fake.server.sent(wire.FailChunk)))
    assert fake.server.submissions[1]["done"] == {0: b"out"}
    consumer.inner.close()
    fake.server.wait_for(lambda: bool(fake.server.closes))
    assert fake.server.available == [(1, 2)]


def test_a_client_that_is_forgotten_closes_properly(fake: Running) -> None:
    consumer = ConsumerClient(f"localhost:{fake.server.port}", URL)
    fake.server.add([b"a"])
    consumer.reserve_chunks()
    del consumer
    fake.server.wait_for(lambda: bool(fake.server.closes))
    assert fake.server.closes == [1000]


def test_a_failed_download_fails_the_chunk_with_the_reason(fake: Running, tmp_path: Path) -> None:
    consumer = ConsumerClient(f"localhost:{fake.server.port}", tmp_path.as_uri())
    fake.server.add([None, None], "there")
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "1-in.bin").write_bytes(cbor2.dumps([1]))
    run_loop(consumer, lambda op: op, 0)
    failed = fake.server.sent(wire.FailChunk)
    assert [message.id.chunk_index for message in failed] == [0]
    assert "0-in.bin" in failed[0].failure


def test_a_failed_upload_fails_the_chunk_with_the_reason(fake: Running, tmp_path: Path) -> None:
    consumer = ConsumerClient(f"localhost:{fake.server.port}", tmp_path.as_uri())
    fake.server.add([None, None], "p")
    (tmp_path / "p").mkdir()
    for index in range(2):
        (tmp_path / "p" / f"{index}-in.bin").write_bytes(cbor2.dumps([index]))
    (tmp_path / "p" / "0-out.bin").mkdir()
    run_loop(consumer, lambda op: op, 1)
    failed = fake.server.sent(wire.FailChunk)
    assert [message.id.chunk_index for message in failed] == [0]
    assert "0-out.bin" in failed[0].failure


def test_by_hand_a_failed_store_is_an_exception(fake: Running, tmp_path: Path) -> None:
    consumer = ConsumerClient(f"localhost:{fake.server.port}", tmp_path.as_uri())
    fake.server.add([None], "p")
    with pytest.raises(ChunkRetrievalError, match=r"0-in\.bin"):
        consumer.reserve_chunks()
    fake.server.wait_for(lambda: bool(fake.server.sent(wire.FailChunk)))
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ChunkStorageError, match=r"0-out\.bin"):
        consumer.complete_chunk(SubmissionId(1), "file", ChunkIndex(0), b"x")


def test_a_reference_server_is_told_of_an_expiry(fake: Running) -> None:
    heard: list[wire.ClientMessage] = []
    done = threading.Event()

    async def talk(ws: web.WebSocketResponse) -> None:
        await ws.send_bytes(init(features=None))
        await ws.receive()
        await ws.send_bytes(wire.encode_server(wire.ChunkReservationExpired(wire.ChunkId(3, 4))))
        heard.append(wire.decode_client((await ws.receive()).data))
        done.set()
        await ws.receive()

    fake.server.talk = talk
    consumer = ConsumerClient(f"localhost:{fake.server.port}", URL)
    threading.Thread(target=consumer.reserve_chunks, daemon=True).start()
    assert done.wait(10)
    assert heard[0].contents == wire.FailChunk(wire.ChunkId(3, 4), "Reservation expired")


def test_an_interrupted_wait_gives_back_what_comes_too_late(fake: Running, consumer: ConsumerClient) -> None:
    class Interrupted(Exception):
        pass

    def handler(_number: int, _frame: object) -> None:
        raise Interrupted

    before = signal.signal(signal.SIGUSR1, handler)

    def fire() -> None:
        fake.server.wait_for(lambda: bool(fake.server.sent(wire.WantToReserveChunks)))
        os.kill(os.getpid(), signal.SIGUSR1)

    try:
        threading.Thread(target=fire).start()
        with pytest.raises(Interrupted):
            consumer.reserve_chunks()
    finally:
        signal.signal(signal.SIGUSR1, before)
    number = fake.server.add([b"a"])
    fake.hand_out()
    fake.server.wait_for(lambda: bool(fake.server.sent(wire.ReleaseChunk)))
    assert fake.server.sent(wire.ReleaseChunk)[0].id == wire.ChunkId(number, 0)


def test_one_client_serves_several_threads(fake: Running, consumer: ConsumerClient) -> None:
    fake.server.add([b"%d" % number for number in range(200)])
    seen: list[bytes] = []

    def work() -> None:
        for _ in range(50):
            (chunk,) = consumer.reserve_chunks()
            seen.append(chunk.input_content)
            consumer.complete_chunk(chunk.submission_id, None, chunk.chunk_index, chunk.input_content)

    threads = [threading.Thread(target=work, daemon=True) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    fake.server.wait_for(lambda: len(fake.server.submissions[1]["done"]) == 200)
    assert len(set(seen)) == len(seen) == 200
    assert len(fake.server.handshakes) == 1


def test_a_forked_child_makes_a_connection_of_its_own(fake: Running, consumer: ConsumerClient) -> None:
    fake.server.add([b"a"])
    consumer.reserve_chunks()
    fake.server.add([b"b"])
    child = os.fork()
    if child == 0:
        status = 1
        try:
            (chunk,) = consumer.reserve_chunks()
            consumer.complete_chunk(chunk.submission_id, None, chunk.chunk_index, b"child")
            consumer.inner.close()
            status = 0
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0
    fake.server.wait_for(lambda: fake.server.submissions[2]["done"] == {0: b"child"})
    assert len(fake.server.handshakes) == 2
    assert fake.server.submissions[1]["done"] == {}


def test_pickle_is_a_format_like_any_other(fake: Running, consumer: ConsumerClient) -> None:
    fake.server.add([pickle.dumps((1, 2)), pickle.dumps((3,))])
    run_loop(consumer, lambda op: {op}, 2, serialization_format=pickle)
    assert pickle.loads(fake.server.submissions[1]["done"][0]) == [{1}, {2}]


def test_the_span_of_a_chunk_is_a_child_of_its_submissions_context(
    fake: Running, consumer: ConsumerClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
    from opentelemetry.trace import SpanKind

    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr("opentelemetry.trace.get_tracer_provider", lambda: provider)
    number = fake.server.add(direct([1], [2]))
    fake.server.submissions[number]["carrier"] = (
        '{"traceparent":"00-' + "1" * 32 + "-" + "2" * 16 + '-01","baggage":"customer=acme"}'
    )
    inside: list[object] = []

    def callback(ops: Any, _chunk: Chunk) -> Any:
        if inside:
            raise Stop
        inside.append(baggage.get_baggage("customer"))
        return ops

    with pytest.raises(Stop):
        consumer.run_each_chunk(callback)
    span, *_ = (span for span in exporter.get_finished_spans() if span.name == "run_chunk")
    assert span.kind == SpanKind.CONSUMER
    assert span.context is not None
    assert span.parent is not None
    assert f"{span.context.trace_id:032x}" == "1" * 32
    assert f"{span.parent.span_id:016x}" == "2" * 16
    said = {"customer": "acme", "submission_id": number, "chunk_index": 0}
    assert said.items() <= dict(span.attributes or {}).items()
    assert inside == ["acme"]

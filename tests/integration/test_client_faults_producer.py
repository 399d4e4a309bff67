"""The producer's client against servers and stores that fail: it tries again, never twice inserts, and says why."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

import opsqueue.client.exchange as client_exchange
from opsqueue.exceptions import (
    ChunkRetrievalError,
    ChunksStorageError,
    InternalProducerClientError,
    SubmissionCancelledError,
    SubmissionFailedError,
    SubmissionNotCompletedYetError,
    SubmissionNotFoundError,
)
from opsqueue.producer import ChunkSizeIsZeroError, ProducerClient, SubmissionId, SubmissionStatus
from tests.integration.client_fakes import FakeServer, Running, running


@pytest.fixture
def fake() -> Iterator[Running]:
    with running(FakeServer()) as started:
        yield started


@pytest.fixture
def producer(fake: Running, tmp_path: Path) -> ProducerClient:
    return ProducerClient(f"localhost:{fake.server.port}", tmp_path.as_uri())


def _inserts(fake: Running) -> int:
    return sum((method, path) == ("POST", "/producer/submissions") for method, path, _, _ in fake.server.requests)


@pytest.mark.parametrize("status", [500, 502, 503, 504])
def test_an_answer_that_may_pass_is_tried_again(fake: Running, producer: ProducerClient, status: int) -> None:
    async def intercept(_request: web.Request) -> web.Response | None:
        return web.Response(status=status) if len(fake.server.requests) < 4 else None

    fake.server.intercept = intercept
    assert producer.count_submissions() == 0
    assert len(fake.server.requests) == 4


def test_a_reset_is_tried_again(fake: Running, producer: ProducerClient) -> None:
    left = [1, 1]

    async def intercept(request: web.Request) -> web.Response | None:
        if left:
            left.pop()
            assert request.transport is not None
            request.transport.abort()
            return web.Response()
        return None

    fake.server.intercept = intercept
    assert producer.server_version() == "v9.9.9"


def test_other_statuses_are_reported_at_once_with_the_servers_words(fake: Running, producer: ProducerClient) -> None:
    async def intercept(_request: web.Request) -> web.Response | None:
        return web.Response(status=413, text="too large for this server")

    fake.server.intercept = intercept
    with pytest.raises(InternalProducerClientError, match="413: too large for this server"):
        producer.insert_submission([1], chunk_size=1)
    assert len(fake.server.requests) == 1


def test_garbage_is_an_error_that_says_so(fake: Running, producer: ProducerClient) -> None:
    async def intercept(_request: web.Request) -> web.Response | None:
        return web.Response(text="<html>")

    fake.server.intercept = intercept
    with pytest.raises(InternalProducerClientError, match="not JSON"):
        producer.count_submissions()


def test_a_server_that_stays_away_is_given_up_with_the_cause(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(client_exchange, "MAX_TRIES", 3)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        producer = ProducerClient(f"127.0.0.1:{unused.getsockname()[1]}", tmp_path.as_uri())
        with pytest.raises(InternalProducerClientError, match=r"after 3 tries.*refused") as caught:
            producer.count_submissions()
    assert caught.value.__cause__ is not None


def test_an_insert_whose_answer_was_lost_is_found_by_its_prefix(fake: Running, producer: ProducerClient) -> None:
    lost = [True]

    async def intercept(request: web.Request) -> web.Response | None:
        if request.path == "/producer/submissions" and lost:
            lost.clear()
            fake.server._insert(await request.json())
            assert request.transport is not None
            request.transport.abort()
            return web.Response()
        return None

    fake.server.intercept = intercept
    submission_id = producer.insert_submission([1, 2, 3], chunk_size=1)
    assert submission_id == SubmissionId(1)
    assert len(fake.server.submissions) == 1
    assert _inserts(fake) == 1


def test_a_direct_insert_is_repeated_only_where_its_key_is_known(fake: Running, producer: ProducerClient) -> None:
    async def intercept(request: web.Request) -> web.Response | None:
        return web.Response(status=500) if _inserts(fake) == 1 and request.method == "POST" else None

    fake.server.intercept = intercept
    with pytest.raises(InternalProducerClientError, match="may have been made or not"):
        producer.inner.insert_submission_direct([b"a"])
    assert _inserts(fake) == 1

    fake.server.requests.clear()
    fake.server.version_headers = {"Opsqueue-Features": "other, idempotency-key"}
    producer.inner.insert_submission_direct([b"a"])
    keys = [headers["Idempotency-Key"] for method, _, headers, _ in fake.server.requests if method == "POST"]
    assert len(keys) == 2
    assert keys[0] == keys[1]


def test_a_direct_insert_that_was_not_heard_is_repeated(fake: Running, producer: ProducerClient) -> None:
    async def intercept(_request: web.Request) -> web.Response | None:
        return web.Response(status=503) if _inserts(fake) == 1 else None

    fake.server.intercept = intercept
    assert producer.inner.insert_submission_direct([b"a"]) == SubmissionId(1)


def test_a_cancellation_whose_answer_was_lost_is_one(fake: Running, producer: ProducerClient) -> None:
    number = fake.server.add([None], "p")

    async def intercept(request: web.Request) -> web.Response | None:
        if "cancel" not in request.path:
            return None
        if not fake.server.submissions[number]["cancelled"]:
            fake.server.submissions[number]["cancelled"] = True
            assert request.transport is not None
            request.transport.abort()
            return web.Response()
        return web.json_response(fake.server.status(number), status=409)

    fake.server.intercept = intercept
    producer.cancel_submission(SubmissionId(number))


def test_a_path_prefix_and_a_trailing_slash_are_kept_out_of_the_way(fake: Running, tmp_path: Path) -> None:
    producer = ProducerClient(f"http://localhost:{fake.server.port}/prefix/", tmp_path.as_uri())
    assert producer.server_version() == "v9.9.9"
    assert fake.server.requests[0][1] == "/prefix/producer/version"


class Boom(Exception):
    pass


def test_what_the_operations_raise_reaches_the_caller_and_nothing_is_inserted(
    fake: Running, producer: ProducerClient
) -> None:
    def failing(error: BaseException) -> Iterator[int]:
        yield from range(100)
        raise error

    class Unwritable:
        def dumps(self, obj: Any) -> bytes:
            raise Boom

        def loads(self, data: bytes) -> Any:
            raise Boom

    for error in (Boom(), KeyboardInterrupt(), SystemExit(3)):
        with pytest.raises(type(error)) as caught:
            producer.insert_submission(failing(error), chunk_size=3)
        assert caught.value is error
    with pytest.raises(Boom):
        producer.insert_submission([1], chunk_size=1, serialization_format=Unwritable())
    with pytest.raises(TypeError, match="a chunk must be bytes, not 'text'"):
        producer.insert_submission_chunks(["text"])  # type: ignore[list-item]
    with pytest.raises(TypeError, match="chunk_size must be an int, not '3'"):
        producer.insert_submission_chunks([b"a"], chunk_size="3")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"chunk_size must be an int, not 3\.0"):
        producer.insert_submission([1], chunk_size=3.0)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="metadata must be bytes, not 'text'"):
        producer.insert_submission([1], chunk_size=1, metadata="text")  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        producer.insert_submission([1], chunk_size=1, strategic_metadata={"a": "b"})  # type: ignore[dict-item]
    with pytest.raises(OverflowError):
        producer.insert_submission([1], chunk_size=1, strategic_metadata={"a": 2**63})
    assert _inserts(fake) == 0


def test_a_chunk_size_of_zero_is_refused_before_the_operations_are_touched(producer: ProducerClient) -> None:
    touched: list[int] = []
    operations = (touched.append(number) for number in range(3))
    for size in (0, -1):
        with pytest.raises(ChunkSizeIsZeroError):
            producer.insert_submission(operations, chunk_size=size)
    assert touched == []


def test_any_bytes_like_chunk_is_stored(fake: Running, producer: ProducerClient, tmp_path: Path) -> None:
    producer.insert_submission_chunks([b"a", bytearray(b"b"), memoryview(b"c")])  # type: ignore[list-item]
    stored = sorted(tmp_path.glob("*/*-in.bin"))
    assert [path.read_bytes() for path in stored] == [b"a", b"b", b"c"]


def test_a_store_that_refuses_fails_the_insert_with_the_cause(fake: Running, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    producer = ProducerClient(f"localhost:{fake.server.port}", (tmp_path / "file").as_uri())
    with pytest.raises(ChunksStorageError, match="cannot write") as caught:
        producer.insert_submission(range(1000), chunk_size=1)
    assert caught.value.__cause__ is not None
    assert _inserts(fake) == 0


def _completed(fake: Running, tmp_path: Path, missing: int | None = None) -> SubmissionId:
    number = fake.server.add([None] * 5, "done")
    fake.server.submissions[number]["done"] = dict.fromkeys(range(5))
    (tmp_path / "done").mkdir()
    for index in range(5):
        if index != missing:
            (tmp_path / "done" / f"{index}-out.bin").write_bytes(b"%d" % index)
    return SubmissionId(number)


def test_results_come_in_order_and_the_end_stays_the_end(
    fake: Running, producer: ProducerClient, tmp_path: Path
) -> None:
    results = producer.blocking_stream_completed_submission_chunks(_completed(fake, tmp_path))
    assert list(results) == [b"0", b"1", b"2", b"3", b"4"]
    for _ in range(2):
        with pytest.raises(StopIteration):
            next(results)


def test_results_outlive_their_client(fake: Running, tmp_path: Path) -> None:
    submission_id = _completed(fake, tmp_path)
    results = ProducerClient(
        f"localhost:{fake.server.port}", tmp_path.as_uri()
    ).blocking_stream_completed_submission_chunks(submission_id)
    assert list(results) == [b"0", b"1", b"2", b"3", b"4"]


def test_a_missing_result_is_raised_at_its_place(fake: Running, producer: ProducerClient, tmp_path: Path) -> None:
    results = producer.try_stream_completed_submission_chunks(_completed(fake, tmp_path, missing=2))
    assert [next(results), next(results)] == [b"0", b"1"]
    with pytest.raises(ChunkRetrievalError, match="chunk 2 of submission 1"):
        next(results)
    with pytest.raises(StopIteration):
        next(results)


async def test_a_missing_result_is_raised_at_its_place_when_async(
    fake: Running, producer: ProducerClient, tmp_path: Path
) -> None:
    results = await producer.async_stream_completed_submission_chunks(_completed(fake, tmp_path, missing=1))
    assert await anext(results) == b"0"
    with pytest.raises(ChunkRetrievalError):
        await anext(results)
    with pytest.raises(StopAsyncIteration):
        await anext(results)


def test_every_end_of_a_submission_has_its_exception(fake: Running, producer: ProducerClient) -> None:
    waits = [producer.blocking_stream_completed_submission_chunks, producer.blocking_stream_completed_submission]
    failed = SubmissionId(fake.server.add([None], "f"))
    fake.server.submissions[failed.id]["failed"] = (0, "because")
    cancelled = SubmissionId(fake.server.add([None], "c"))
    fake.server.submissions[cancelled.id]["cancelled"] = True
    for wait in waits:
        with pytest.raises(SubmissionNotFoundError) as unknown:
            wait(SubmissionId(99))
        assert unknown.value.submission_id == 99
        with pytest.raises(SubmissionFailedError, match="because"):
            wait(failed)
        with pytest.raises(SubmissionCancelledError):
            wait(cancelled)
    for submission_id in (SubmissionId(99), cancelled):
        with pytest.raises(SubmissionNotCompletedYetError) as pending:
            producer.try_stream_completed_submission(submission_id)
        assert pending.value.args[1] == submission_id
    with pytest.raises(SubmissionFailedError):
        producer.try_stream_completed_submission(failed)
    with pytest.raises(SubmissionNotFoundError):
        producer.is_completed(SubmissionId(99))
    assert not producer.is_completed(failed)


def test_a_wait_ends_at_its_timeout(fake: Running, producer: ProducerClient) -> None:
    submission_id = SubmissionId(fake.server.add([None], "p"))
    with pytest.raises(TimeoutError):
        producer.blocking_stream_completed_submission(submission_id, timeout=0.2)


def test_a_wait_ends_at_its_timeout_when_nobody_answers(tmp_path: Path) -> None:
    with socket.socket() as silent, socket.socket() as unused:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        unused.bind(("127.0.0.1", 0))
        for listener in (silent, unused):
            producer = ProducerClient(f"127.0.0.1:{listener.getsockname()[1]}", tmp_path.as_uri())
            begun = time.monotonic()
            with pytest.raises(TimeoutError):
                producer.blocking_stream_completed_submission(SubmissionId(1), timeout=0.3)
            assert time.monotonic() - begun < 5


async def test_waiting_leaves_the_event_loop_free(fake: Running, producer: ProducerClient) -> None:
    number = fake.server.add([None], None)
    waiting = asyncio.create_task(producer.async_stream_completed_submission_chunks(SubmissionId(number)))
    longest, last = 0.0, time.monotonic()
    for _ in range(100):
        await asyncio.sleep(0.002)  # paces what measures the loop's freedom
        longest, last = max(longest, time.monotonic() - last), time.monotonic()
    assert not waiting.done()
    assert longest < 0.5
    fake.server.submissions[number]["done"] = {0: b"out"}
    assert [chunk async for chunk in await waiting] == [b"out"]


async def test_async_operations_are_taken_on_the_loops_thread(fake: Running, producer: ProducerClient) -> None:
    threads: set[int] = set()

    def operations() -> Iterator[int]:
        for number in range(100):
            threads.add(threading.get_ident())
            yield number

    running_submission = asyncio.create_task(producer.async_run_submission(operations(), chunk_size=10))
    await asyncio.to_thread(fake.server.wait_for, lambda: _inserts(fake) == 1)
    running_submission.cancel()
    assert threads == {threading.get_ident()}


class Interrupted(Exception):
    pass


def test_a_signal_ends_a_wait_within_a_second(fake: Running, producer: ProducerClient) -> None:
    submission_id = SubmissionId(fake.server.add([None], "p"))

    def handler(_number: int, _frame: object) -> None:
        raise Interrupted

    before = signal.signal(signal.SIGUSR1, handler)
    polled = len(fake.server.requests)
    fired: list[float] = []

    def fire() -> None:
        fake.server.wait_for(lambda: len(fake.server.requests) > polled + 3)
        fired.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGUSR1)

    try:
        threading.Thread(target=fire).start()
        with pytest.raises(Interrupted):
            producer.blocking_stream_completed_submission(submission_id)
        assert time.monotonic() - fired[0] < 1
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_statuses_keep_what_the_server_said(fake: Running, producer: ProducerClient) -> None:
    number = fake.server.add([None, None], "p")
    status = producer.get_submission_status(SubmissionId(number))
    assert isinstance(status, SubmissionStatus.InProgress)
    assert (status.submission.chunks_total, status.submission.prefix) == (2, "p")
    assert producer.get_submission_status(SubmissionId(99)) is None
    fake.server.submissions[number]["failed"] = (1, "no")
    status = producer.get_submission_status(SubmissionId(number))
    assert isinstance(status, SubmissionStatus.Failed)
    assert status.submission.failed_chunk_id == status.chunk.chunk_index.id == 1
    assert status.chunk.failed_at.isoformat() == "2026-01-02T03:04:05.123457+00:00"


def test_the_current_trace_context_travels_in_the_headers(fake: Running, producer: ProducerClient) -> None:
    carrier = {
        "traceparent": "00-" + "1" * 32 + "-" + "2" * 16 + "-01",
        "baggage": "a=b",
        "other": "x",
        "tracestate": "a\nb",
    }
    producer.inner.insert_submission_chunks(iter([b"a"]), otel_trace_carrier=carrier)
    headers = next(headers for method, _, headers, _ in fake.server.requests if method == "POST")
    assert headers["traceparent"] == carrier["traceparent"]
    assert headers["baggage"] == "a=b"
    assert not {"other", "tracestate"} & set(headers)

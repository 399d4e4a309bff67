"""The client library waits with the server's waits, in a handful of requests, and polls a server that has none."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from aiohttp import web

import opsqueue.client.waiting as client_waiting
from opsqueue.exceptions import InternalProducerClientError, SubmissionCancelledError, SubmissionNotFoundError
from opsqueue.producer import AsyncProducerClient, ProducerClient, SubmissionId
from tests.conftest import ServerFactory
from tests.integration.client_fakes import FakeServer, Running, running
from tests.support.raw_consumer import RawConsumer
from tests.support.raw_producer import RawProducer
from tests.support.server import Server

PARKED = "opsqueue_waits_parked"
REQUESTS = "opsqueue_http_requests_total"
#: Longer than the longest answer to a poll, so that only a wait takes it.
RUN_S = 5.0


@pytest.fixture
def fake() -> Iterator[Running]:
    with running(FakeServer()) as started:
        yield started


def _finish_later(server: Server, seconds: float, seen: threading.Event) -> threading.Thread:
    """Completes everything `seconds` after a wait has parked."""

    def work() -> None:
        with RawProducer(server.port) as watcher, RawConsumer(server.port) as consumer:
            chunks = consumer.reserve_ids(10)
            watcher.wait_for_metric(PARKED, 1)
            seen.wait(seconds)
            for submission, chunk in chunks:
                consumer.complete((submission, chunk), output=b"out")
            consumer.settle()

    thread = threading.Thread(target=work)
    thread.start()
    return thread


class CountingServer:
    """Between a client and a server: notes each request's line. A real proxy, so that the client cannot know."""

    def __init__(self, port: int) -> None:
        self._port = port
        self.lines: list[str] = []

    async def pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, note: bool) -> None:
        while data := await reader.read(65536):
            if note:
                self.lines += [line for line in data.decode("latin1").split("\r\n") if line.endswith(" HTTP/1.1")]
            writer.write(data)
            await writer.drain()
        writer.close()

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        to_server = await asyncio.open_connection("127.0.0.1", self._port)
        await asyncio.gather(self.pump(reader, to_server[1], True), self.pump(to_server[0], writer, False))


async def _through(server: Server) -> tuple[CountingServer, asyncio.Server, int]:
    counting = CountingServer(server.port)
    listening = await asyncio.start_server(counting.handle, "127.0.0.1", 0)
    return counting, listening, listening.sockets[0].getsockname()[1]


async def test_a_run_of_five_seconds_makes_a_handful_of_requests(server: Server, store_url: str) -> None:
    counting, listening, port = await _through(server)
    producer = ProducerClient(f"127.0.0.1:{port}", store_url)
    submission_id = await asyncio.to_thread(producer.inner.insert_submission_direct, [b"a", b"b"])
    worker = _finish_later(server, RUN_S, threading.Event())
    results = await asyncio.to_thread(lambda: list(producer.blocking_stream_completed_submission_chunks(submission_id)))
    worker.join()
    assert results == [b"out", b"out"]
    statuses = [line for line in counting.lines if f"/submissions/{submission_id.id}?wait=" in line]
    assert 1 <= len(statuses) <= 3, counting.lines
    assert len(counting.lines) <= 8, counting.lines
    listening.close()


async def test_the_async_client_waits_the_same_way(server: Server, store_url: str) -> None:
    counting, listening, port = await _through(server)
    producer = ProducerClient(f"127.0.0.1:{port}", store_url)
    submission_id = await asyncio.to_thread(producer.inner.insert_submission_direct, [b"a"])
    worker = _finish_later(server, RUN_S, threading.Event())
    stream = await producer.async_stream_completed_submission_chunks(submission_id)
    assert [chunk async for chunk in stream] == [b"out"]
    worker.join()
    assert len(counting.lines) <= 6, counting.lines
    listening.close()


async def test_more_coroutines_than_threads_for_waits_all_get_their_results(server: Server, store_url: str) -> None:
    producer = ProducerClient(server.address, store_url)
    insert = producer.inner.insert_submission_direct
    submissions = await asyncio.gather(*(asyncio.to_thread(insert, [b"a"]) for _ in range(100)))
    waiting = [asyncio.create_task(producer.async_stream_completed_submission_chunks(each)) for each in submissions]

    def work() -> None:
        with RawProducer(server.port) as watcher, RawConsumer(server.port) as consumer:
            watcher.wait_for_metric(PARKED, 64)
            for chunk in consumer.reserve_ids(100):
                consumer.complete(chunk, output=b"out")
            consumer.settle()

    await asyncio.to_thread(work)
    for each in waiting:
        assert [chunk async for chunk in await each] == [b"out"]


def test_a_cancelled_submission_ends_the_wait(server: Server, store_url: str) -> None:
    producer = ProducerClient(server.address, store_url)
    submission_id = producer.inner.insert_submission_direct([b"a"])

    def cancel() -> None:
        with RawProducer(server.port) as raw:
            raw.wait_for_metric(PARKED, 1)
            raw.cancel(submission_id.id)

    thread = threading.Thread(target=cancel)
    thread.start()
    with pytest.raises(SubmissionCancelledError):
        producer.blocking_stream_completed_submission_chunks(submission_id)
    thread.join()


def test_a_timeout_ends_a_wait(server: Server, store_url: str) -> None:
    producer = ProducerClient(server.address, store_url)
    submission_id = producer.inner.insert_submission_direct([b"a"])
    with pytest.raises(TimeoutError, match=r"did not end within 0\.5 s"):
        producer.blocking_stream_completed_submission_chunks(submission_id, timeout=0.5)


def test_a_wait_outlasts_a_killed_writer_and_a_restart(server_factory: ServerFactory, store_url: str) -> None:
    server = server_factory()
    producer = ProducerClient(server.address, store_url)
    submission_id = producer.inner.insert_submission_direct([b"a"])
    got: list[bytes] = []
    thread = threading.Thread(
        target=lambda: got.extend(producer.blocking_stream_completed_submission_chunks(submission_id))
    )
    thread.start()
    with RawProducer(server.port) as watcher:
        watcher.wait_for_metric(PARKED, 1)
        server.wait_for_replacement("writer", server.kill_child("writer"))
        watcher.wait_for_metric(PARKED, 1)
    server.restart()
    with RawProducer(server.port) as watcher, RawConsumer(server.port) as consumer:
        watcher.wait_for_metric(PARKED, 1)
        for chunk in consumer.reserve_ids():
            consumer.complete(chunk, output=b"out")
        consumer.settle()
        thread.join(20)
    assert got == [b"out"]


def test_where_too_many_wait_the_client_polls(server_factory: ServerFactory, store_url: str) -> None:
    server = server_factory(max_parked_waits=0)
    producer = ProducerClient(server.address, store_url)
    submission_id = producer.inner.insert_submission_direct([b"a"])
    with RawConsumer(server.port) as consumer:
        for chunk in consumer.reserve_ids():
            timer = threading.Timer(0.3, consumer.complete, (chunk,), {"output": b"out"})  # after the first refusal
            timer.start()
        assert list(producer.blocking_stream_completed_submission_chunks(submission_id, timeout=30)) == [b"out"]
        timer.join()


def _status_requests(fake: Running) -> int:
    return sum(path.startswith("/producer/submissions/1") for _, path, _, _ in fake.server.requests)


def test_a_server_that_ignores_waits_is_polled_with_growing_pauses(fake: Running, tmp_path: Path) -> None:
    """Ten pauses of 10 ms doubling take 10 s: a busy loop would make thousands of requests in the same time."""
    producer = ProducerClient(f"127.0.0.1:{fake.server.port}", tmp_path.as_uri())
    fake.server.add([None], "p")
    with pytest.raises(TimeoutError):
        producer.blocking_stream_completed_submission_chunks(SubmissionId(1), timeout=3)
    assert 5 <= _status_requests(fake) <= 11


def test_a_server_that_offers_waits_and_answers_early_is_not_asked_in_a_busy_loop(
    fake: Running, tmp_path: Path
) -> None:
    async def early(request: web.Request) -> web.Response:
        number = int(request.path.rpartition("/")[2])
        return web.json_response(fake.server.status(number), headers={client_waiting.WAIT_HEADER: "30000"})

    fake.server.intercept = early
    producer = ProducerClient(f"127.0.0.1:{fake.server.port}", tmp_path.as_uri())
    fake.server.add([None], "p")
    with pytest.raises(TimeoutError):
        producer.blocking_stream_completed_submission_chunks(SubmissionId(1), timeout=3)
    assert 5 <= _status_requests(fake) <= 11


def test_done_chunks_follows_a_submission_to_its_end(server: Server, store_url: str) -> None:
    producer = ProducerClient(server.address, store_url)
    with RawProducer(server.port) as raw, RawConsumer(server.port) as consumer:
        submission = raw.insert(10_000)
        done = producer.done_chunks(SubmissionId(submission))
        assert not done.refresh()
        assert (done.chunks_done, done.chunks_total, done.is_done(5000), done.ended) == (0, 10_000, False, False)
        assert not done.refresh(wait=0.3)
        consumer.complete((submission, 5000), (submission, 9999))
        while done.chunks_done < 2:
            assert done.refresh(wait=20)
        assert [chunk for chunk in range(-1, 10_001) if done.is_done(chunk)] == [5000, 9999]
        consumer.complete(*((submission, chunk) for chunk in range(10_000)))
        while not done.ended:
            assert done.refresh(wait=20)
        assert done.state == "Completed"
        assert all(done.is_done(chunk) for chunk in range(10_000))


def test_done_chunks_says_what_is_wrong(server: Server, fake: Running, store_url: str) -> None:
    with pytest.raises(SubmissionNotFoundError):
        ProducerClient(server.address, store_url).done_chunks(SubmissionId(5)).refresh()

    async def unknown(_request: web.Request) -> web.Response:
        return web.Response(status=404)

    fake.server.intercept = unknown
    with pytest.raises(InternalProducerClientError, match="404"):
        ProducerClient(f"127.0.0.1:{fake.server.port}", store_url).done_chunks(SubmissionId(5)).refresh(wait=1)


async def test_done_chunks_of_the_async_client_follows_a_submission_to_its_end(server: Server, store_url: str) -> None:
    async with AsyncProducerClient(server.address, store_url) as producer:
        with RawProducer(server.port) as raw, RawConsumer(server.port) as consumer:
            submission = raw.insert(10_000)
            done = producer.done_chunks(SubmissionId(submission))
            assert not await done.refresh()
            assert (done.chunks_done, done.chunks_total, done.ended) == (0, 10_000, False)
            consumer.complete((submission, 5000))
            while not done.chunks_done:
                assert await done.refresh(wait=20)
            assert [chunk for chunk in range(10_000) if done.is_done(chunk)] == [5000]
        with pytest.raises(SubmissionNotFoundError):
            await producer.done_chunks(SubmissionId(5_000)).refresh()

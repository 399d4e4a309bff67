"""The client library against a real server: from operations to results, and every way in which a submission can end."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import pickle
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from typing import Any

import pytest

from opsqueue.common import json_as_bytes
from opsqueue.consumer import ConsumerClient, Strategy
from opsqueue.exceptions import SubmissionCancelledError
from opsqueue.producer import (
    ProducerClient,
    SubmissionCompleted,
    SubmissionFailed,
    SubmissionFailedError,
    SubmissionId,
    SubmissionNotCancellable,
    SubmissionNotCancellableError,
    SubmissionNotFoundError,
    SubmissionStatus,
)
from tests.conftest import ServerFactory
from tests.support.server import Server

STRATEGIES = {
    "oldest": Strategy.Oldest(),
    "newest": Strategy.Newest(),
    "random": Strategy.Random(),
    "prefer distinct": Strategy.PreferDistinct(meta_key="customer", underlying=Strategy.Oldest()),
    "nested": Strategy.PreferDistinct(
        meta_key="customer", underlying=Strategy.PreferDistinct(meta_key="kind", underlying=Strategy.Random())
    ),
}

_spawn = multiprocessing.get_context("fork")


def increment(number: int) -> int:
    return number + 1


def divide_by_zero(number: int) -> float:
    return number / 0


def _consume(address: str, store_url: str, callback: Callable[[Any], Any], arguments: dict[str, Any]) -> None:
    ConsumerClient(address, store_url).run_each_op(callback, **arguments)


@contextmanager
def consumers(
    server: Server, store_url: str, callback: Callable[[Any], Any] = increment, count: int = 2, **arguments: Any
) -> Iterator[list[BaseProcess]]:
    """Consumer processes that run while the block does."""
    address = f"127.0.0.1:{server.port}"
    running = [
        _spawn.Process(target=_consume, args=(address, store_url, callback, arguments), daemon=True)
        for _ in range(count)
    ]
    for process in running:
        process.start()
    try:
        yield list(running)
    finally:
        for process in running:
            process.kill()
            process.join()


@pytest.fixture
def producer(server: Server, store_url: str) -> ProducerClient:
    return ProducerClient(f"127.0.0.1:{server.port}", store_url)


@pytest.mark.parametrize("strategy", STRATEGIES.values(), ids=STRATEGIES)
@pytest.mark.parametrize("prefetch", [0, 1])
def test_results_come_back_in_order(
    server: Server, producer: ProducerClient, store_url: str, strategy: Strategy, prefetch: int
) -> None:
    with consumers(server, store_url, strategy=strategy, prefetch=prefetch):
        results = producer.run_submission(range(500), chunk_size=7, strategic_metadata={"customer": 1, "kind": 2})
        assert list(results) == list(range(1, 501))


@pytest.mark.parametrize("count", [0, 1, 10_000])
def test_any_number_of_operations_comes_back(
    server: Server, producer: ProducerClient, store_url: str, count: int
) -> None:
    with consumers(server, store_url):
        assert list(producer.run_submission(range(count), chunk_size=100)) == list(range(1, count + 1))
    assert producer.count_submissions() == 0


@pytest.mark.parametrize("serialization_format", [json_as_bytes, pickle])
def test_other_formats_come_back(
    server: Server, producer: ProducerClient, store_url: str, serialization_format: Any
) -> None:
    with consumers(server, store_url, serialization_format=serialization_format):
        results = producer.run_submission(range(20), chunk_size=3, serialization_format=serialization_format)
        assert list(results) == list(range(1, 21))


async def test_several_async_submissions_come_back(server: Server, producer: ProducerClient, store_url: str) -> None:
    async def total(count: int) -> int:
        results = await producer.async_run_submission(range(count), chunk_size=10)
        return sum([result async for result in results])

    with consumers(server, store_url):
        totals = await asyncio.gather(*(total(count) for count in range(1, 8)))
    assert totals == [sum(range(1, count + 1)) for count in range(1, 8)]


def test_direct_chunks_need_no_store(server: Server, producer: ProducerClient) -> None:
    consumer = ConsumerClient(f"127.0.0.1:{server.port}", "memory://")
    submission_id = producer.inner.insert_submission_direct([b"a", b"b", b""], b"meta", {"customer": 3})
    for _ in range(3):
        (chunk,) = consumer.reserve_chunks(1, Strategy.Oldest())
        assert chunk.submission_prefix is None
        assert chunk.submission_metadata == b"meta"
        consumer.complete_chunk(chunk.submission_id, None, chunk.chunk_index, chunk.input_content.upper())
    results = producer.blocking_stream_completed_submission_chunks(submission_id, timeout=10)
    assert list(results) == [b"A", b"B", b""]


def test_an_operation_that_keeps_failing_fails_its_submission(
    server: Server, producer: ProducerClient, store_url: str
) -> None:
    with consumers(server, store_url, divide_by_zero), pytest.raises(SubmissionFailedError) as caught:
        producer.run_submission(range(10), chunk_size=5, metadata=b"kept", strategic_metadata={"a": -3})
    assert caught.value.failure.endswith("ZeroDivisionError: division by zero")
    assert isinstance(caught.value.submission, SubmissionFailed)
    assert (caught.value.submission.metadata, caught.value.submission.strategic_metadata) == (b"kept", {"a": -3})
    status = producer.get_submission_status(caught.value.submission.id)
    assert isinstance(status, SubmissionStatus.Failed)
    assert status.chunk == caught.value.chunk


def test_a_cancelled_submission_says_so_everywhere(server: Server, producer: ProducerClient) -> None:
    submission_id = producer.insert_submission(range(10), chunk_size=5, strategic_metadata={"a": 1})
    assert producer.count_submissions() == 1
    assert producer.lookup_submission_ids_by_strategic_metadata({"a": 1}) == [submission_id]
    producer.cancel_submission(submission_id)
    assert producer.count_submissions() == 0
    with pytest.raises(SubmissionCancelledError):
        producer.blocking_stream_completed_submission(submission_id)
    with pytest.raises(SubmissionNotCancellableError) as caught:
        producer.cancel_submission(submission_id)
    assert isinstance(caught.value.submission, SubmissionNotCancellable.Cancelled)
    assert caught.value.chunk is None
    with pytest.raises(SubmissionNotFoundError):
        producer.cancel_submission(SubmissionId(1))


def test_a_completed_submission_keeps_what_was_said_of_it(
    server: Server, producer: ProducerClient, store_url: str
) -> None:
    submission_id = producer.insert_submission((1, 2, 3), chunk_size=2, metadata=b"m", strategic_metadata={"a": 7})
    status = producer.get_submission_status(submission_id)
    assert isinstance(status, SubmissionStatus.InProgress)
    prefix = status.submission.prefix
    assert prefix is not None
    assert producer.lookup_submission_id_by_prefix(prefix) == submission_id
    assert not producer.is_completed(submission_id)
    with consumers(server, store_url):
        assert list(producer.blocking_stream_completed_submission(submission_id, timeout=10)) == [2, 3, 4]
    status = producer.get_submission_status(submission_id)
    assert isinstance(status, SubmissionStatus.Completed)
    assert isinstance(status.submission, SubmissionCompleted)
    assert (status.submission.metadata, status.submission.strategic_metadata) == (b"m", {"a": 7})
    assert (status.submission.chunks_total, status.submission.chunk_size) == (2, 2)
    assert producer.is_completed(submission_id)
    assert list(producer.try_stream_completed_submission(submission_id)) == [2, 3, 4]


def test_chunks_of_a_killed_consumer_are_worked_on_by_others(
    server: Server, producer: ProducerClient, store_url: str
) -> None:
    submission_id = producer.insert_submission(range(200), chunk_size=1)
    with consumers(server, store_url, count=3) as processes:
        processes[0].kill()
        results = producer.blocking_stream_completed_submission(submission_id, timeout=30)
        assert list(results) == list(range(1, 201))


def test_an_interrupted_loop_gives_its_chunk_to_another_without_a_retry(
    server: Server, producer: ProducerClient, store_url: str
) -> None:
    submission_id = producer.insert_submission([1], chunk_size=1)

    def interrupt(_op: int) -> None:
        raise KeyboardInterrupt

    consumer = ConsumerClient(f"127.0.0.1:{server.port}", store_url)
    for _ in range(15):
        consumer.run_each_op(interrupt)
    other = ConsumerClient(f"127.0.0.1:{server.port}", store_url)
    (chunk,) = other.reserve_chunks(3, Strategy.Oldest())
    assert (chunk.submission_id, chunk.retries) == (submission_id, 0)


def _kill_one(role: str) -> Callable[[Server], object]:
    return lambda server: os.kill(server.pids()[role][0], signal.SIGKILL)


#: Enough that the work lasts for seconds: on a busy machine the disaster must still come before its end.
OPERATIONS = 6_000

DISASTERS: dict[str, Callable[[Server], object]] = {
    "restarted": lambda server: server.restart(),
    "killed and started": lambda server: server.restart(kill=True),
    "its writer killed": _kill_one("writer"),
    "a front-end killed": _kill_one("frontend"),
}


@pytest.mark.parametrize("disaster", DISASTERS.values(), ids=DISASTERS)
def test_whatever_happens_to_the_server_in_the_middle_all_results_come_back(
    server_factory: ServerFactory, store_url: str, disaster: Callable[[Server], object]
) -> None:
    server = server_factory(frontends=2)
    producer = ProducerClient(f"127.0.0.1:{server.port}", store_url)
    submission_id = producer.insert_submission(range(OPERATIONS), chunk_size=2)
    with consumers(server, store_url):
        _wait_for_progress(producer, submission_id)
        disaster(server)
        results = producer.blocking_stream_completed_submission(submission_id, timeout=60)
        assert list(results) == list(range(1, OPERATIONS + 1))
    assert producer.insert_submission([1], chunk_size=1) > submission_id


def _wait_for_progress(producer: ProducerClient, submission_id: SubmissionId) -> None:
    deadline = time.monotonic() + 20
    while True:
        status = producer.get_submission_status(submission_id)
        assert isinstance(status, SubmissionStatus.InProgress)
        if status.submission.chunks_done > 10:
            return
        assert time.monotonic() < deadline


def test_a_chunk_held_too_long_is_worked_on_by_another_and_late_reports_do_no_harm(
    server_factory: ServerFactory, store_url: str
) -> None:
    server = server_factory(reservation_expiration="300ms")
    producer = ProducerClient(f"127.0.0.1:{server.port}", store_url)
    submission_id = producer.insert_submission_chunks([b"a"])
    slow = ConsumerClient(f"127.0.0.1:{server.port}", store_url)
    (held,) = slow.reserve_chunks()
    other = ConsumerClient(f"127.0.0.1:{server.port}", store_url)
    (chunk,) = other.reserve_chunks()
    assert (chunk.chunk_index, chunk.retries) == (held.chunk_index, 1)
    slow.fail_chunk(held.submission_id, held.submission_prefix, held.chunk_index, "too late")
    other.complete_chunk(chunk.submission_id, chunk.submission_prefix, chunk.chunk_index, b"done")
    slow.complete_chunk(held.submission_id, held.submission_prefix, held.chunk_index, b"done")
    assert list(producer.blocking_stream_completed_submission_chunks(submission_id, timeout=10)) == [b"done"]


def test_reserving_gives_what_is_there_and_never_more(server: Server, producer: ProducerClient, store_url: str) -> None:
    producer.insert_submission(range(5), chunk_size=1)
    consumer = ConsumerClient(f"127.0.0.1:{server.port}", store_url)
    assert len(consumer.reserve_chunks(2)) == 2
    assert len(consumer.reserve_chunks(max=100, strategy=Strategy.Random())) == 3


def test_the_version_is_the_servers(producer: ProducerClient) -> None:
    assert producer.server_version().startswith("v")

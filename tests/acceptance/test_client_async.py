"""The clients for coroutines: the same promises, on one event loop, under asyncio and uvloop."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import uvloop

from opsqueue.consumer import AsyncConsumerClient, ConsumerClient, RetryLater, Strategy, chunk_context
from opsqueue.exceptions import (
    ChunkRetrievalError,
    IncorrectUsageError,
    InternalConsumerClientError,
    SubmissionCancelledError,
    SubmissionFailedError,
    SubmissionNotFoundError,
)
from opsqueue.producer import AsyncProducerClient, SubmissionId, SubmissionStatus
from tests.conftest import ServerFactory
from tests.support.server import Server

LOOPS = {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}


def run(loop: str, main: Callable[[], Awaitable[None]]) -> None:
    with asyncio.Runner(loop_factory=LOOPS[loop]) as runner:
        runner.run(asyncio.wait_for(main(), 60))


@asynccontextmanager
async def consuming(
    server: Server, store_url: str, callback: Callable[[Any], Awaitable[Any]], **arguments: Any
) -> AsyncIterator[AsyncConsumerClient]:
    async with AsyncConsumerClient(server.address, store_url) as client:
        loop = asyncio.create_task(client.run_each_op(callback, **arguments))
        try:
            yield client
        finally:
            client.stop()
            await loop


async def increment(number: int) -> int:
    await asyncio.sleep(0)
    return number + 1


@pytest.mark.parametrize("loop", LOOPS)
def test_results_come_back_in_order(server: Server, store_url: str, loop: str) -> None:
    async def main() -> None:
        async with (
            AsyncProducerClient(server.address, store_url) as producer,
            consuming(server, store_url, increment, strategy=Strategy.Oldest()),
        ):
            results = await producer.run_submission(range(1_000), chunk_size=7)
            assert [result async for result in results] == list(range(1, 1_001))
            assert await producer.count_submissions() == 0

    run(loop, main)


@pytest.mark.parametrize("loop", LOOPS)
def test_no_thread_is_started_for_a_call(server: Server, loop: str) -> None:
    async def main() -> None:
        before = set(threading.enumerate())
        async with (
            AsyncProducerClient(server.address, "memory://async") as producer,
            consuming(server, "memory://async", increment, concurrency=4),
        ):
            runs = [producer.run_submission(range(20), chunk_size=3) for _ in range(10)]
            for results in await asyncio.gather(*runs):
                assert [result async for result in results] == list(range(1, 21))
            assert set(threading.enumerate()) <= before

    run(loop, main)


async def test_operations_may_come_from_an_async_iterable(server: Server, store_url: str) -> None:
    async def operations() -> AsyncIterator[int]:
        for number in range(25):
            await asyncio.sleep(0)
            yield number

    async with AsyncProducerClient(server.address, store_url) as producer, consuming(server, store_url, increment):
        results = await producer.run_submission(operations(), chunk_size=4)
        assert [result async for result in results] == list(range(1, 26))


async def test_as_many_chunks_are_in_hand_as_the_concurrency_says(server: Server, store_url: str) -> None:
    running, most = 0, 0

    async def work(number: int) -> int:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.05)  # what the operation does
        running -= 1
        return number

    async with (
        AsyncProducerClient(server.address, store_url) as producer,
        consuming(server, store_url, work, concurrency=5),
    ):
        results = await producer.run_submission(range(30), chunk_size=1)
        assert [result async for result in results] == list(range(30))
    assert most == 5


async def test_a_failing_callback_fails_its_submission_and_the_loop_goes_on(
    server_factory: ServerFactory, store_url: str
) -> None:
    server = server_factory(max_chunk_retries=2)

    async def divide(number: int) -> float:
        return 1 / number

    async with AsyncProducerClient(server.address, store_url) as producer, consuming(server, store_url, divide):
        with pytest.raises(SubmissionFailedError, match="ZeroDivisionError: division by zero"):
            await producer.run_submission([0], chunk_size=1)
        results = await producer.run_submission([2, 4], chunk_size=1)
        assert [result async for result in results] == [0.5, 0.25]


async def test_retry_later_and_the_context_work_in_coroutines(server: Server, store_url: str) -> None:
    tries = 0

    async def later(number: int) -> int:
        nonlocal tries
        tries += 1
        assert chunk_context().chunk.chunk_index.id == 0
        if tries < 3:
            raise RetryLater(0.05)
        return number

    async with AsyncProducerClient(server.address, store_url) as producer, consuming(server, store_url, later):
        results = await producer.run_submission([9], chunk_size=1)
        assert [result async for result in results] == [9]
    assert tries == 3


async def test_a_cancelled_loop_gives_its_chunks_back_without_a_retry(server: Server, store_url: str) -> None:
    begun = asyncio.Event()

    async def never(_number: int) -> int:
        begun.set()
        await asyncio.Event().wait()
        return 0

    async with AsyncProducerClient(server.address, store_url) as producer:
        submission = await producer.insert_submission([1], chunk_size=1)
        async with AsyncConsumerClient(server.address, store_url) as client:
            loop = asyncio.create_task(client.run_each_op(never))
            await begun.wait()
            loop.cancel()
            with pytest.raises(asyncio.CancelledError):
                await loop
        async with consuming(server, store_url, increment):
            results = await producer.stream_completed_submission(submission)
            assert [result async for result in results] == [2]


async def test_a_restarted_server_costs_nothing(server: Server, store_url: str) -> None:
    async with (
        AsyncProducerClient(server.address, store_url) as producer,
        consuming(server, store_url, increment, strategy=Strategy.Oldest()),
    ):
        submission = await producer.insert_submission(range(2_000), chunk_size=1)
        async for index, _ in producer.stream_submission(submission, ordered=True):
            if index == 200:
                break
        await asyncio.to_thread(server.restart)
        results = await producer.stream_completed_submission(submission)
        assert [result async for result in results] == list(range(1, 2_001))


async def test_a_submission_can_be_followed_waited_for_and_cancelled(server: Server, store_url: str) -> None:
    async with AsyncProducerClient(server.address, store_url) as producer:
        submission = await producer.insert_submission(range(3), chunk_size=1, strategic_metadata={"customer": 5})
        progress = await producer.progress(submission)
        assert (progress.state, progress.done, progress.total, progress.rate) == ("InProgress", 0, 3, None)
        assert await producer.lookup_submission_ids_by_strategic_metadata({"customer": 5}) == [submission]
        assert not await producer.is_completed(submission)
        with pytest.raises(TimeoutError):
            await producer.wait(submission, timeout=0.2)
        await producer.cancel_submission(submission)
        assert isinstance(await producer.wait(submission), SubmissionStatus.Cancelled)
        with pytest.raises(SubmissionCancelledError):
            await producer.stream_completed_submission(submission)
        with pytest.raises(SubmissionNotFoundError):
            await producer.wait(SubmissionId(12345))


async def test_a_missing_result_is_an_error_at_its_place(server: Server, tmp_path: Any, store_url: str) -> None:
    async with AsyncProducerClient(server.address, store_url) as producer, consuming(server, store_url, increment):
        submission = await producer.insert_submission(range(3), chunk_size=1)
        await producer.wait(submission)
        (missing,) = (tmp_path / "store").glob("*/1-out.bin")
        missing.unlink()
        results = await producer.stream_completed_submission(submission)
        assert await anext(results) == 1
        with pytest.raises(ChunkRetrievalError, match="chunk 1 of submission"):
            await anext(results)


async def test_wrong_use_is_said_at_once(server: Server, store_url: str) -> None:
    with pytest.raises(IncorrectUsageError):
        AsyncConsumerClient("ftp://nowhere", store_url)
    async with AsyncConsumerClient(server.address, store_url) as client:
        with pytest.raises(TypeError, match="op_callback must be callable"):
            await client.run_each_op(None)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="concurrency"):
            await client.run_each_op(increment, concurrency=0)
    plain = ConsumerClient(server.address, store_url)
    for loop in (plain.run_each_op, plain.run_each_chunk, plain.run_each_chunk_raw):
        with pytest.raises(TypeError, match="AsyncConsumerClient awaits those"):
            loop(increment)
    async with AsyncConsumerClient(server.address + "/nothing/here", store_url) as client:
        with pytest.raises(InternalConsumerClientError, match="404"):
            await client.run_each_op(increment)


def test_the_producer_is_imported_without_asyncio_and_aiohttp() -> None:
    heavy = "{'asyncio', 'aiohttp', 'opentelemetry', 'obstore', 'websockets'}"
    code = f"import sys, opsqueue.producer; print(sorted({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"

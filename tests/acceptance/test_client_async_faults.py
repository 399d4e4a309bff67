"""The consumer for coroutines when something goes wrong between a chunk's reservation and its report."""

from __future__ import annotations

import asyncio

from opsqueue.consumer import AsyncConsumerClient, chunk_context
from opsqueue.producer import AsyncProducerClient, SubmissionStatus
from tests.conftest import ServerFactory
from tests.support.server import Server, wait_until


async def test_a_cancellation_inside_a_callback_fails_its_chunk_and_the_loop_goes_on(
    server_factory: ServerFactory, store_url: str
) -> None:
    server = server_factory(max_chunk_retries=0)

    async def callback(number: int) -> int:
        if number == 2:
            task = asyncio.create_task(asyncio.sleep(60))
            asyncio.get_running_loop().call_soon(task.cancel)
            await task
        return number

    async with (
        AsyncProducerClient(server.address, store_url) as producer,
        AsyncConsumerClient(server.address, store_url) as consumer,
    ):
        loop = asyncio.create_task(consumer.run_each_op(callback))
        cancelled = await producer.insert_submission([2], chunk_size=1)
        other = await producer.insert_submission([1, 3], chunk_size=1)
        assert isinstance(await producer.wait(cancelled), SubmissionStatus.Failed)
        assert isinstance(await producer.wait(other), SubmissionStatus.Completed)
        assert not loop.done()
        consumer.stop()
        await loop


async def test_a_result_that_was_stored_when_the_server_restarted_is_reported_before_the_loop_ends(
    server: Server, store_url: str
) -> None:
    begun, go_on = asyncio.Event(), asyncio.Event()
    calls: list[int] = []

    async def callback(number: int) -> int:
        calls.append(number)
        begun.set()
        await go_on.wait()
        return number

    async with (
        AsyncProducerClient(server.address, store_url) as producer,
        AsyncConsumerClient(server.address, store_url) as consumer,
    ):
        loop = asyncio.create_task(consumer.run_each_op(callback))
        submission = await producer.insert_submission([7], chunk_size=1)
        await begun.wait()
        await asyncio.to_thread(server.restart)
        consumer.stop()
        go_on.set()
        await loop
        assert isinstance(await producer.get_submission_status(submission), SubmissionStatus.Completed)
    assert calls == [7]


async def test_what_a_callback_returns_after_it_was_told_that_nobody_wants_it_is_no_result(
    server: Server, store_url: str
) -> None:
    begun = asyncio.Event()
    results: list[int | None] = []

    async def callback(number: int) -> int | None:
        begun.set()
        while not chunk_context().cancelled:
            await asyncio.sleep(0)
        results.append(None)
        return None

    async with (
        AsyncProducerClient(server.address, store_url) as producer,
        AsyncConsumerClient(server.address, store_url) as consumer,
    ):
        loop = asyncio.create_task(consumer.run_each_op(callback))
        submission = await producer.insert_submission([7], chunk_size=1)
        await begun.wait()
        await producer.cancel_submission(submission)
        consumer.stop()
        await loop
    assert results == [None]
    await asyncio.to_thread(
        wait_until, lambda: server.metric("opsqueue_chunks_reserved") == 0, "nothing is held any more"
    )
    assert server.metric("opsqueue_completions_ignored_total") == 0

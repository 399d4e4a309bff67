"""The consumer for coroutines when something goes wrong between a chunk's reservation and its report."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest

from opsqueue.client.async_connection import AsyncConnection
from opsqueue.client.async_loop import AsyncChunkLoop
from opsqueue.client.async_store import AsyncStore
from opsqueue.client.session import ConnectionLostError, Reservation
from opsqueue.consumer import AsyncConsumerClient, Chunk, Strategy, chunk_context
from opsqueue.producer import AsyncProducerClient, ProducerClient, SubmissionId, SubmissionStatus
from tests.conftest import ServerFactory
from tests.support.server import Server, wait_until

#: More than the sockets between a client and a server hold.
LARGE = 30 * 1024 * 1024
#: Seconds that a slow path stops for: longer than a client waits for a close frame.
PAUSE_S = 1.5


class Path:
    """What lies between a consumer and its server. To the server, `hold` is awaited after each piece that is read."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._pumps: set[asyncio.Task[None]] = set()
        self.address = ""
        self.connections = 0
        #: Given the connection's number, from 1, and the bytes that it has carried to the server.
        self.hold: Callable[[int, int], Any] = self._pass

    @staticmethod
    async def _pass(_number: int, _carried: int) -> None:
        return

    @asynccontextmanager
    async def open(self) -> AsyncIterator[Path]:
        listener = await asyncio.start_server(self._relay, "127.0.0.1")
        self.address = f"127.0.0.1:{listener.sockets[0].getsockname()[1]}"
        try:
            yield self
        finally:
            listener.close()
            for pump in self._pumps:
                pump.cancel()
            await asyncio.gather(*self._pumps, return_exceptions=True)

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        number = self.connections
        try:
            from_server, to_server = await asyncio.open_connection("127.0.0.1", self._server.port)
        except OSError:
            writer.close()
            return
        for pump in (self._pump(number, reader, to_server, up=True), self._pump(number, from_server, writer, up=False)):
            self._pumps.add(asyncio.create_task(pump))

    async def _pump(self, number: int, source: asyncio.StreamReader, to: asyncio.StreamWriter, *, up: bool) -> None:
        carried = 0
        try:
            while data := await source.read(65536):
                carried += len(data)
                await self.hold(number, carried if up else 0)
                to.write(data)
                await to.drain()
        except ConnectionError:
            pass  # an end like another; the other side learns of it next
        finally:
            to.close()


async def ended(producer: ProducerClient, submission: SubmissionId) -> SubmissionStatus:
    return await asyncio.to_thread(producer.wait, submission, timeout=40)


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


@pytest.mark.parametrize("concurrency", [1, 4])  # 4: the same loop has the chunk again at once
async def test_what_a_callback_returns_after_it_was_told_of_an_expiry_is_no_result(
    server_factory: ServerFactory, store_url: str, monkeypatch: pytest.MonkeyPatch, concurrency: int
) -> None:
    async def never(_self: AsyncChunkLoop) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(AsyncChunkLoop, "_extend", never)  # as with a server that does not offer it
    server = server_factory(reservation_expiration="1 second")
    tries: list[int] = []

    async def square(number: int) -> int | None:
        tries.append(number)
        if len(tries) == 1:
            while not chunk_context().cancelled:
                await asyncio.sleep(0)
            assert chunk_context().reason == "expired"
            return None
        return number * number

    async with (
        AsyncProducerClient(server.address, store_url) as producer,
        AsyncConsumerClient(server.address, store_url) as consumer,
    ):
        loop = asyncio.create_task(consumer.run_each_op(square, concurrency=concurrency))
        results = await producer.run_submission([7], chunk_size=1)
        assert [result async for result in results] == [49]
        consumer.stop()
        await loop
    assert tries == [7, 7]


async def test_a_run_that_fails_after_its_chunk_expired_and_came_again_does_not_fail_the_new_run(
    server_factory: ServerFactory, store_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def never(_self: AsyncChunkLoop) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(AsyncChunkLoop, "_extend", never)  # as with a server that does not offer it
    server = server_factory(reservation_expiration="1 second", max_chunk_retries=2)
    failed = asyncio.Event()
    tries: list[int] = []

    async def square(number: int) -> int:
        tries.append(number)
        if len(tries) == 1:
            while len(tries) == 1:
                await asyncio.sleep(0)
            failed.set()
            raise ValueError("too late")
        await failed.wait()
        return number * number

    async with (
        AsyncProducerClient(server.address, store_url) as producer,
        AsyncConsumerClient(server.address, store_url) as consumer,
    ):
        loop = asyncio.create_task(consumer.run_each_op(square))
        results = await producer.run_submission([7], chunk_size=1)
        assert [result async for result in results] == [49]
        consumer.stop()
        await loop
    assert tries == [7, 7]


async def test_a_direct_result_that_no_message_can_hold_fails_its_submission_and_nothing_else(
    server_factory: ServerFactory, store_url: str
) -> None:
    server = server_factory(max_chunk_retries=0)
    producer = ProducerClient(server.address, store_url)
    large = producer.inner.insert_submission_direct([b"large"])
    small = producer.inner.insert_submission_direct([b"small"])

    async def answer(chunk: Chunk) -> bytes:
        return bytes(70 * 1024 * 1024) if chunk.input_content == b"large" else b"ok"

    async with AsyncConsumerClient(server.address, store_url) as consumer:
        loop = asyncio.create_task(consumer.run_each_chunk_raw(answer))
        failed = await ended(producer, large)
        assert isinstance(failed, SubmissionStatus.Failed)
        assert "the result has 73400320 bytes" in failed.chunk.failure
        assert isinstance(await ended(producer, small), SubmissionStatus.Completed)
        consumer.stop()
        await loop


async def test_a_connection_that_nobody_reads_any_more_is_replaced_and_its_result_sent_again(
    server_factory: ServerFactory, store_url: str
) -> None:
    server = server_factory(heartbeat_interval="300 ms", max_missable_heartbeats=1)
    producer = ProducerClient(server.address, store_url)
    begun, dead = asyncio.Event(), asyncio.Event()

    async def hold(number: int, _carried: int) -> None:
        if number == 1 and dead.is_set():
            await asyncio.Event().wait()

    async def answer(chunk: Chunk) -> bytes:
        if chunk.input_content == b"small":
            return b"ok"
        begun.set()
        await dead.wait()
        return bytes(LARGE)

    async with Path(server).open() as path, AsyncConsumerClient(path.address, store_url) as consumer:
        path.hold = hold
        loop = asyncio.create_task(consumer.run_each_chunk_raw(answer, strategy=Strategy.Oldest(), concurrency=1))
        large = await asyncio.to_thread(producer.inner.insert_submission_direct, [b"large"])
        await begun.wait()
        small = await asyncio.to_thread(producer.inner.insert_submission_direct, [b"small"])
        dead.set()
        assert isinstance(await ended(producer, small), SubmissionStatus.Completed)
        assert isinstance(await ended(producer, large), SubmissionStatus.Completed)
        assert path.connections > 1
        consumer.stop()
        await loop


async def test_a_completion_that_is_lost_a_second_time_is_sent_a_third_time(
    server: Server, store_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    reserve = AsyncConnection.reserve
    begun, go_on = asyncio.Event(), asyncio.Event()
    calls: list[int] = []
    lost: list[int] = []

    def losing(
        self: AsyncConnection, reservation: Reservation, maximum: int, strategy: Any, before: Sequence[Any] = ()
    ) -> None:
        if before and not lost:
            lost.append(len(before))
            raise self._lost("as the completion was sent")
        reserve(self, reservation, maximum, strategy, before)

    async def callback(number: int) -> int:
        calls.append(number)
        begun.set()
        await go_on.wait()
        return number

    monkeypatch.setattr(AsyncConnection, "reserve", losing)
    async with (
        AsyncProducerClient(server.address, store_url) as producer,
        AsyncConsumerClient(server.address, store_url) as consumer,
    ):
        loop = asyncio.create_task(consumer.run_each_op(callback, concurrency=1))
        submission = await producer.insert_submission([7], chunk_size=1)
        await begun.wait()
        await asyncio.to_thread(server.restart)
        go_on.set()
        assert isinstance(await producer.wait(submission, timeout=40), SubmissionStatus.Completed)
        consumer.stop()
        await loop
    assert (lost, calls) == ([1], [7])


async def test_chunks_that_arrive_together_with_a_cancellation_go_back(
    server: Server, store_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    reserved = AsyncConnection._reserved
    loops: list[asyncio.Task[None]] = []
    arrived: list[int] = []

    def cancelling(self: AsyncConnection, nonce: int, chunks: Any) -> None:
        arrived.append(len(chunks))
        reserved(self, nonce, chunks)
        loops[0].cancel()

    async def callback(number: int) -> int:
        return number

    monkeypatch.setattr(AsyncConnection, "_reserved", cancelling)
    async with (
        AsyncProducerClient(server.address, store_url) as producer,
        AsyncConsumerClient(server.address, store_url) as consumer,
    ):
        await producer.insert_submission(range(5), chunk_size=1)
        loops.append(asyncio.create_task(consumer.run_each_op(callback)))
        with pytest.raises(asyncio.CancelledError):
            await loops[0]
        assert arrived == [5]
        await asyncio.to_thread(
            wait_until, lambda: server.metric("opsqueue_chunks_reserved") == 0, "the chunks are with the server again"
        )


async def test_a_large_result_that_is_reported_last_arrives_whole_on_a_slow_path(
    server: Server, store_url: str
) -> None:
    producer = ProducerClient(server.address, store_url)
    begun, go_on = asyncio.Event(), asyncio.Event()
    calls: list[int] = []

    async def hold(number: int, carried: int) -> None:
        if number > 1 and 65536 < carried <= 2 * 65536:
            await asyncio.sleep(PAUSE_S)  # the path's own slowness

    async def answer(_chunk: Chunk) -> bytes:
        calls.append(1)
        begun.set()
        await go_on.wait()
        return bytes(LARGE)

    async with Path(server).open() as path, AsyncConsumerClient(path.address, store_url) as consumer:
        path.hold = hold
        loop = asyncio.create_task(consumer.run_each_chunk_raw(answer))
        submission = await asyncio.to_thread(producer.inner.insert_submission_direct, [b"x"])
        await begun.wait()
        await asyncio.to_thread(server.restart)
        consumer.stop()
        go_on.set()
        await loop
        assert isinstance(await ended(producer, submission), SubmissionStatus.Completed)
    assert calls == [1]


async def test_a_connection_lost_during_a_download_does_not_end_a_stopping_loop_with_an_error(
    server: Server, store_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    get = AsyncStore.get
    fetching, go_on = asyncio.Event(), asyncio.Event()
    calls: list[int] = []

    async def slow(self: AsyncStore, path: str) -> bytes:
        fetching.set()
        await go_on.wait()
        return await get(self, path)

    async def callback(number: int) -> int:
        calls.append(number)
        return number

    async with (
        AsyncProducerClient(server.address, store_url) as producer,
        AsyncConsumerClient(server.address, store_url) as consumer,
    ):
        monkeypatch.setattr(AsyncStore, "get", slow)
        loop = asyncio.create_task(consumer.run_each_op(callback))
        submission = await producer.insert_submission([7], chunk_size=1)
        await fetching.wait()
        connection = await consumer.inner.connect()
        await asyncio.to_thread(server.stop)
        await connection._ended.wait()
        with pytest.raises(ConnectionLostError):
            connection.send([])
        consumer.stop()
        go_on.set()
        await loop
        assert calls == []
        server.settings["port"] = server.port
        await asyncio.to_thread(server.start)
        status = await producer.get_submission_status(submission)
        assert isinstance(status, SubmissionStatus.InProgress)

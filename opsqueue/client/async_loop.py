"""The consumer's loop under asyncio: several chunks at a time, each in a task of its own. Knows no serialization."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Final

from opsqueue.client import convert_chunk, meters, outcomes, spans
from opsqueue.client.async_connection import AsyncConnection
from opsqueue.client.bytes_like import BytesLike, content_of
from opsqueue.client.chunk_context import ChunkContext, Entered
from opsqueue.client.raw_consumer import note_reserved
from opsqueue.client.session import Arrival, ConnectionLostError, Reservation
from opsqueue.client.store import input_path, output_path
from opsqueue.client.store_error import StoreError
from opsqueue.client.values import Chunk, Strategy
from opsqueue.exceptions import OpsqueueInternalError
from opsqueue.protocol import consumer as wire

if TYPE_CHECKING:
    from opsqueue.client.async_raw_consumer import AsyncRawConsumer

logger = logging.getLogger("opsqueue.consumer")

#: Bytes of inputs and results in hand beyond which nothing is reserved.
MAX_BYTES: Final = 64 * 1024 * 1024


#: Seconds for a new connection, when the loop is stopped and results are not reported yet.
_LAST_REPORTS_S: Final = 10.0
#: Inputs are fetched by each chunk's task, not as chunks arrive.
_NOTHING: Future[bytes] = Future()
_NOTHING.set_result(b"")


class AsyncChunkLoop:
    """One loop: at most `concurrency` chunks in hand."""

    def __init__(
        self,
        client: AsyncRawConsumer,
        strategy: Strategy,
        callback: Callable[[Chunk], Awaitable[BytesLike]],
        concurrency: int,
    ) -> None:
        self._client = client
        self._strategy = strategy.to_protocol()
        self._callback = callback
        self._concurrency = concurrency
        self._stopping = asyncio.Event()
        self._tasks: dict[asyncio.Task[None], wire.ChunkId] = {}
        self._sizes: dict[wire.ChunkId, int] = {}
        self._connection: AsyncConnection | None = None
        #: Sent, but no answer has come since that shows that they arrived; numbered in the order of sending.
        self._unconfirmed: deque[tuple[int, wire.CompleteChunk]] = deque()
        self._again: list[wire.CompleteChunk] = []
        self._sent = 0

    def stop(self) -> None:
        """Ends the loop after the chunks in hand."""
        self._stopping.set()

    async def run(self) -> None:
        """Runs until `stop`, cancellation, or an exception that is not the callback's own."""
        extending = asyncio.create_task(self._extend())
        try:
            while not self._stopping.is_set():
                try:
                    await self._step()
                except ConnectionLostError as error:
                    # the connection has said so
                    logger.debug("going on with the next connection: %s", error)
            while self._tasks:
                await self._one_ends()
            await self._send_last_reports()
        finally:
            extending.cancel()
            for task in self._tasks:
                task.cancel()
            if self._tasks:
                await asyncio.wait(self._tasks)
            await self._give_up()

    async def _step(self) -> None:
        """Asks for as many chunks as there is room for, and starts what comes."""
        while self._tasks and (len(self._tasks) >= self._concurrency or sum(self._sizes.values()) > MAX_BYTES):
            await self._one_ends()
        connecting = asyncio.create_task(self._client.connect())
        try:
            if not await self._or_stopped(connecting):
                return
        finally:
            connecting.cancel()
        self._use(connecting.result())
        connection = self._own()
        reservation = Reservation(lambda _chunk, _submission: _NOTHING)
        again = self._take_again()
        sent = self._sent
        asked_at = asyncio.get_running_loop().time()
        connection.reserve(reservation, self._concurrency - len(self._tasks), self._strategy, again)
        arrived = asyncio.ensure_future(asyncio.wrap_future(reservation.arrived))
        begun = False
        try:
            if not await self._or_stopped(arrived):
                return
            while self._unconfirmed and self._unconfirmed[0][0] <= sent:
                self._unconfirmed.popleft()
            note_reserved(asyncio.get_running_loop().time() - asked_at, arrived.result())
            for arrival in arrived.result():
                self._tasks[asyncio.create_task(self._process(connection, arrival))] = arrival.id
            begun = True
        finally:
            if not begun:
                # also when the answer and the cancellation came together
                connection.give_back(reservation)
                arrived.add_done_callback(_looked_at)

    def _take_again(self) -> list[wire.ClientContents]:
        """The completions that may have been lost with a connection, to be sent now; they may be lost again."""
        again, self._again = self._again, []
        for report in again:
            self._sent += 1
            self._unconfirmed.append((self._sent, report))
        return list(again)

    async def _or_stopped(self, wanted: asyncio.Future[AsyncConnection] | asyncio.Future[list[Arrival]]) -> bool:
        """Waits for `wanted`, while chunks that end are taken note of; False when the loop is to stop first."""
        stopping = asyncio.create_task(self._stopping.wait())
        try:
            while not wanted.done() and not stopping.done():
                await asyncio.wait({wanted, stopping, *self._tasks}, return_when=asyncio.FIRST_COMPLETED)
                self._note_ends()
            return wanted.done()
        finally:
            stopping.cancel()

    async def _one_ends(self) -> None:
        await asyncio.wait(self._tasks, return_when=asyncio.FIRST_COMPLETED)
        self._note_ends()

    def _note_ends(self) -> None:
        for task in [task for task in self._tasks if task.done()]:
            del self._tasks[task]
            task.result()

    def _own(self) -> AsyncConnection:
        if self._connection is None:
            raise ConnectionLostError("there is no connection yet")
        return self._connection

    def _use(self, connection: AsyncConnection) -> None:
        if connection is not self._connection:
            self._connection = connection
            self._again.extend(report for _, report in self._unconfirmed)
            self._unconfirmed.clear()

    async def _process(self, connection: AsyncConnection, arrival: Arrival) -> None:
        chunk_id = arrival.id
        try:
            report = await self._worked_on(connection, arrival)
        except ConnectionLostError as error:
            # the server has given the chunk to others; it is no reason for a loop that is stopped to raise
            logger.debug("chunk %d of %d went back: %s", chunk_id.chunk_index, chunk_id.submission_id, error)
            return
        finally:
            self._sizes.pop(chunk_id, None)
        if report is None:
            return
        # otherwise it would count as the failure of whoever has the chunk now
        if isinstance(report, wire.CompleteChunk) or connection.dropped(arrival) is None:
            await self._report(connection, report)

    async def _worked_on(self, connection: AsyncConnection, arrival: Arrival) -> wire.ClientContents | None:
        """What to tell the server; None when it no longer wants to know."""
        chunk_id, prefix = arrival.id, arrival.submission.prefix
        direct = arrival.chunk.input_content is not None or prefix is None
        try:
            content = arrival.chunk.input_content
            if content is None:
                with self._span("download", "receive", arrival):
                    content = await self._client.store.get(input_path(prefix or "", chunk_id.chunk_index))
        except StoreError as error:
            text = (
                f"the input of chunk {chunk_id.chunk_index} of submission {chunk_id.submission_id} "
                f"could not be fetched: {error}"
            )
            return outcomes.failed(chunk_id, text, text)
        self._sizes[chunk_id] = len(content)
        if connection.knows(wire.CLEAN_CLOSE):
            connection.send([wire.WorkingOn(chunk_id)])
        context = ChunkContext(
            convert_chunk.chunk(arrival.chunk, arrival.submission, content),
            lambda: connection.dropped(arrival),
        )
        begun = asyncio.get_running_loop().time()
        try:
            with Entered(context):
                output = content_of(await self._callback(context.chunk), "a result")
        except (Exception, asyncio.CancelledError) as error:
            task = asyncio.current_task()
            if isinstance(error, asyncio.CancelledError) and task is not None and task.cancelling():
                raise  # of the loop; another one came out of something that the callback waited for
            meters.processed(asyncio.get_running_loop().time() - begun, error)
            return None if self._is_unwanted(context) else outcomes.of_exception(connection, chunk_id, error)
        meters.processed(asyncio.get_running_loop().time() - begun, None)
        if self._is_unwanted(context):
            return None
        self._sizes[chunk_id] = len(output)
        if direct:
            return outcomes.direct(chunk_id, output)
        try:
            with self._span("complete", "settle", arrival):
                await self._client.store.put(output_path(prefix or "", chunk_id.chunk_index), output)
        except StoreError as error:
            return outcomes.not_stored(chunk_id, error)
        return wire.CompleteChunk(chunk_id, None)

    @staticmethod
    def _is_unwanted(context: ChunkContext) -> bool:
        """One that was told may have returned anything; one that was not has a result, and the first one counts."""
        return context.told or context.reason in outcomes.UNWANTED

    @staticmethod
    def _span(operation: str, kind: str, arrival: Arrival) -> AbstractContextManager[None]:
        chunk = arrival.chunk
        carrier = arrival.submission.otel_trace_carrier
        return spans.of_submission(operation, kind, carrier, chunk.submission_id, chunk.chunk_index)

    async def _report(self, connection: AsyncConnection, report: wire.ClientContents) -> None:
        if isinstance(report, wire.CompleteChunk):
            # counts whoever sends it, so on the connection of now
            connection = self._own()
            self._sent += 1
            self._unconfirmed.append((self._sent, report))
        try:
            connection.send([report])
            await connection.writable.wait()
        except ConnectionLostError as error:
            logger.debug("a report waits for the next connection: %s", error)

    async def _extend(self) -> None:
        """Starts the reservations' time again, of all chunks in hand, for as long as the loop runs."""
        while True:
            connection = self._connection
            reservation_s = None if connection is None else connection.reservation_s
            await asyncio.sleep(1.0 if reservation_s is None else reservation_s / 3)
            if connection is None or not connection.knows(wire.EXTEND) or not connection.alive or not self._tasks:
                continue
            try:
                connection.send([wire.ExtendReservation(chunk_id) for chunk_id in self._tasks.values()])
            except ConnectionLostError as error:
                logger.debug("%s", error)

    async def _send_last_reports(self) -> None:
        """Results that are stored are reported on, also when the connection was lost meanwhile."""
        connection = self._connection
        if connection is None or (connection.alive and not self._again) or not (self._again or self._unconfirmed):
            return
        reason = "there was no connection in time"
        try:
            async with asyncio.timeout(_LAST_REPORTS_S):
                self._use(await self._client.connect())
                connection = self._own()
                connection.send(self._take_again())
                # closing waits only a moment for what is not written
                await connection.writable.wait()
            if connection.alive:
                return
            reason = "the connection was lost again"
        except TimeoutError:
            pass
        except (ConnectionLostError, OpsqueueInternalError) as error:
            reason = str(error)
        count = len(self._again) + len(self._unconfirmed)
        logger.warning("%d finished chunks could not be reported, they will be done again: %s", count, reason)

    async def _give_up(self) -> None:
        connection = self._connection
        if connection is not None:
            connection.release(self._tasks.values())
            if connection.idle:
                await self._client.close()


def _looked_at(future: asyncio.Future[list[Arrival]]) -> None:
    if not future.cancelled() and future.exception() is not None:
        logger.debug("the last request ended: %s", future.exception())

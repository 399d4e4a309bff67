"""The consumer's client below serialization: reserves and fetches chunks, stores and reports results. Runs no callback.

Keeps one connection, made when it is first needed and made again when it is lost, for as long as that takes.
"""

from __future__ import annotations

import logging
import os
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING

from opsqueue.client import convert_chunk, meters, outcomes, spans
from opsqueue.client.backoff import Backoff
from opsqueue.client.bytes_like import BytesLike, content_of
from opsqueue.client.connection import Connection
from opsqueue.client.convert import carrier
from opsqueue.client.pool import Pool, ready
from opsqueue.client.session import Arrival, ConnectError, ConnectionLostError, Reservation
from opsqueue.client.store import Store, input_path, open_store, output_path
from opsqueue.client.store_error import StoreError
from opsqueue.client.urls import ServerAddress, parse_address
from opsqueue.client.values import Chunk, ChunkIndex, Strategy, SubmissionId
from opsqueue.exceptions import (
    ChunkRetrievalError,
    ChunkStorageError,
    IncorrectUsageError,
    InternalConsumerClientError,
    OpsqueueInternalError,
)
from opsqueue.protocol import consumer as wire
from opsqueue.protocol.fields import U64_MAX

logger = logging.getLogger("opsqueue.consumer")

#: Seconds between two warnings about a server that cannot be reached.
WARN_EVERY_S = 60.0
#: Seconds; a connection that was lost sooner is not followed by the next one at once.
SHORT_LIVED_S = 1.0
#: Inputs and results that one client fetches and stores at a time.
FETCHING = 8
#: Seconds of a pause after which it is asked whether the connection is still wanted.
_LOOK_S = 0.2

if TYPE_CHECKING:
    from opsqueue.client.loop import ChunkLoop


class Stopped(Exception):
    """No connection is wanted any more."""


class _Link:
    """The connection of one client in one process. Holds no client, so that a forgotten client closes it."""

    def __init__(self, address: ServerAddress) -> None:
        self._address = address
        self._pid = os.getpid()
        self._connecting = threading.Lock()
        self._short_lived = Backoff()
        self._opened_at = -SHORT_LIVED_S
        self.current: Connection | None = None

    def of_this_process(self) -> bool:
        """A forked child has to leave its parent's connection alone."""
        return self._pid == os.getpid()

    def connect(self, stopped: Callable[[], bool]) -> Connection:
        """The open connection, made now if need be: retried until `stopped`.

        Raises InternalConsumerClientError and Stopped.
        """
        connection = self.current
        if connection is not None and connection.alive and connection.opened.done():
            return connection
        while not self._connecting.acquire(timeout=_LOOK_S):
            if stopped():
                raise Stopped
        try:
            connection = self.current
            if connection is None or not connection.alive:
                self.current = None
                short_lived = time.monotonic() - self._opened_at < SHORT_LIVED_S
                if connection is not None and connection.lost and short_lived:
                    _pause(self._short_lived.next(), stopped)
                else:
                    self._short_lived = Backoff()
                connection = self._connect(stopped)
                self._opened_at = time.monotonic()
                self.current = connection
            return connection
        finally:
            self._connecting.release()

    def _connect(self, stopped: Callable[[], bool]) -> Connection:
        backoff = Backoff()
        warned_at: float | None = None
        while True:
            connection = Connection(self._address)
            try:
                _opened(connection, stopped)
            except (ConnectError, ConnectionLostError) as error:
                now = time.monotonic()
                if warned_at is None or now - warned_at >= WARN_EVERY_S:
                    warned_at = now
                    logger.warning(
                        "cannot connect to %s, trying again until it works: %s", self._address.consumer, error
                    )
                _pause(backoff.next(), stopped)
            except BaseException:
                connection.close()
                raise
            else:
                if warned_at is not None:
                    logger.info("connected to %s", self._address.consumer)
                return connection

    def drop(self, connection: Connection) -> None:
        """Closes this connection, which has failed; not another that took its place meanwhile."""
        if self.current is connection:
            self.current = None
        connection.close()

    def close(self) -> None:
        """Closes the connection, in the process that made it."""
        connection, self.current = self.current, None
        if connection is not None and self.of_this_process():
            connection.close()


def _opened(connection: Connection, stopped: Callable[[], bool]) -> None:
    while not stopped():
        try:
            connection.opened.result(_LOOK_S)
        except TimeoutError:
            if connection.opened.done():
                raise
        else:
            return
    raise Stopped


def _pause(seconds: float, stopped: Callable[[], bool]) -> None:
    until = time.monotonic() + seconds
    while (left := until - time.monotonic()) > 0:
        if stopped():
            raise Stopped
        time.sleep(min(left, _LOOK_S))


def _never() -> bool:
    return False


class ConsumerClient:
    """Reserves chunks and reports what became of them. Thread-safe."""

    def __init__(
        self, address: str, object_store_url: str, object_store_options: Sequence[tuple[str, str]] = []
    ) -> None:
        self._address = parse_address(address)
        self._store: Store = open_store(object_store_url, object_store_options)
        self._pool = Pool(FETCHING, "opsqueue-consumer")
        self._lock = threading.Lock()
        self._link = self._new_link()
        self._loops: weakref.WeakSet[ChunkLoop] = weakref.WeakSet()
        self._stopped = False
        #: Chunks that the loops have finished, and whose results are stored; and those that have failed here.
        self.done = 0
        self.failed = 0

    def _new_link(self) -> _Link:
        link = _Link(self._address)
        # with the client, or at the interpreter's end: a server counts a connection that just ends as a crash
        weakref.finalize(self, link.close)
        return link

    def _own_link(self) -> _Link:
        with self._lock:
            if not self._link.of_this_process():
                self._link = self._new_link()
            return self._link

    def connect(self, stopped: Callable[[], bool] = _never) -> Connection:
        """The open connection, made now if need be: retried until `stopped`.

        Raises InternalConsumerClientError and Stopped.
        """
        return self._own_link().connect(stopped)

    def close(self) -> None:
        """Closes the connection properly; the next call makes another. What is held goes back to the server."""
        self._own_link().close()

    def new_reservation(self) -> Reservation:
        """A request that can be made on a connection; the inputs of its chunks are fetched as they come."""
        return Reservation(self.fetch)

    def fetch(self, chunk: wire.Chunk, submission: wire.Submission) -> Future[bytes]:
        """A chunk's input, which is on its way."""
        content: Future[bytes] = Future()
        if chunk.input_content is not None:
            content.set_result(chunk.input_content)
        elif submission.prefix is None:
            content.set_exception(StoreError("the server sent neither its content nor a prefix to find it"))
        else:
            path, store = input_path(submission.prefix, chunk.chunk_index), self._store

            def get() -> bytes:
                with spans.of_submission(
                    "download", "receive", submission.otel_trace_carrier, submission.id, chunk.chunk_index
                ):
                    return store.get(path)

            content = ready(get) if store.is_quick(0) else self._pool.submit(get)
        return content

    def reserve_chunks(self, max: int = 1, strategy: Strategy | None = None) -> list[Chunk]:
        """Waits for work; gives 1 to `max` chunks, as many as there are. Raises IncorrectUsageError for `max` < 1.

        A chunk whose input cannot be fetched is failed; ChunkRetrievalError when that leaves none. TypeError for a
        `max` that is no number; InternalConsumerClientError for a server that does not speak the protocol.
        """
        strategy = checked_strategy(Strategy.Newest() if strategy is None else strategy)
        if not isinstance(max, int) or isinstance(max, bool):
            raise TypeError(f"max must be an int, not {max!r}")
        if not 1 <= max <= U64_MAX:
            raise IncorrectUsageError(f"max must be at least 1 and fit into 64 bits, it is {max}")
        while True:
            connection = self.connect()
            reservation = self.new_reservation()
            begun = time.monotonic()
            try:
                connection.reserve(reservation, max, strategy.to_protocol())
                arrivals = reservation.arrived.result()
                note_reserved(time.monotonic() - begun, arrivals)
                return self._chunks(connection, arrivals)
            except ConnectionLostError:
                # the connection has said so; nothing is held, so there is nothing to lose
                continue
            except BaseException:
                connection.give_back(reservation)
                raise

    def _chunks(self, connection: Connection, arrivals: list[Arrival]) -> list[Chunk]:
        chunks: list[Chunk] = []
        failed: ChunkRetrievalError | None = None
        for arrival in arrivals:
            content = fetched(arrival)
            if isinstance(content, StoreError):
                failed = ChunkRetrievalError(str(content))
                failed.__cause__ = content
                connection.send([wire.FailChunk(arrival.id, outcomes.failure_text(str(content)))])
            else:
                chunks.append(convert_chunk.chunk(arrival.chunk, arrival.submission, content))
        if not chunks and failed is not None:
            raise failed
        return chunks

    def store_output(
        self, prefix: str, chunk_id: wire.ChunkId, content: bytes, trace_carrier: str = "{}"
    ) -> Future[None]:
        """Stores a result: at once where that takes no time, else on the pool. The future raises StoreError."""
        path, store = output_path(prefix, chunk_id.chunk_index), self._store

        def put() -> None:
            with spans.of_submission("complete", "settle", trace_carrier, chunk_id.submission_id, chunk_id.chunk_index):
                store.put(path, content)

        return ready(put) if store.is_quick(len(content)) else self._pool.submit(put)

    def complete_chunk(
        self,
        submission_id: SubmissionId,
        submission_prefix: str | None,
        chunk_index: ChunkIndex,
        output_content: BytesLike,
    ) -> None:
        """Stores the result and reports the chunk as done. Raises ChunkStorageError, InternalConsumerClientError."""
        chunk_id = _chunk_id(submission_id, chunk_index)
        content = content_of(output_content, "a result")
        if submission_prefix is None:
            self._report(wire.CompleteChunk(chunk_id, content))
            return
        error = _outcome_error(self.store_output(submission_prefix, chunk_id, content))
        if error is not None:
            raise ChunkStorageError(
                f"the result of chunk {chunk_id.chunk_index} of submission {chunk_id.submission_id} "
                f"could not be stored: {error}"
            ) from error
        self._report(wire.CompleteChunk(chunk_id, None))

    def fail_chunk(
        self, submission_id: SubmissionId, submission_prefix: str | None, chunk_index: ChunkIndex, failure: str
    ) -> None:
        """Reports the chunk as failed. Raises InternalConsumerClientError; TypeError for a failure that is no text."""
        if not isinstance(failure, str):
            raise TypeError(f"failure must be a str, not {failure!r}")
        self._report(wire.FailChunk(_chunk_id(submission_id, chunk_index), outcomes.failure_text(failure)))

    def run_per_chunk(
        self, strategy: Strategy, callback: Callable[[Chunk], BytesLike], prefetch: int | None = None
    ) -> None:
        """Calls `callback` with one chunk after the other, until `stop`; at most `prefetch` chunks are taken ahead."""
        # imported here, since the loop is made of this client
        from opsqueue.client.loop import ChunkLoop

        loop = ChunkLoop(self, strategy, callback, prefetch)
        self._loops.add(loop)
        if not self._stopped:
            loop.run()

    @property
    def is_connected(self) -> bool:
        """Whether there is an open connection now."""
        connection = self._own_link().current
        return connection is not None and connection.alive and connection.opened.done()

    def stop(self) -> None:
        """Ends the loops, each after the chunk in hand, also those to come. A signal handler may call it."""
        self._stopped = True
        for loop in list(self._loops):
            loop.stop()

    def _report(self, report: wire.ClientContents) -> None:
        link = self._own_link()
        connection = link.current
        if connection is None:
            connection = link.connect(_never)
        try:
            connection.send([report])
        except ConnectionLostError as error:
            link.drop(connection)
            raise InternalConsumerClientError(str(error)) from error
        except OpsqueueInternalError:  # what ended the connection: said once, the next call reconnects
            link.drop(connection)
            raise


def _outcome_error(future: Future[None]) -> StoreError | None:
    # by value: an exception of the same type that a signal handler raises must pass
    try:
        future.result()
    except StoreError as error:
        if future.done() and future.exception() is error:
            return error
        raise
    return None


def fetched(arrival: Arrival) -> bytes | StoreError:
    """A chunk's input once it is there, or why it never will be."""
    try:
        return arrival.content.result()
    except StoreError as error:
        return StoreError(
            f"the input of chunk {arrival.chunk.chunk_index} of submission {arrival.chunk.submission_id} "
            f"could not be fetched: {error}"
        )


def note_reserved(seconds: float, arrivals: Sequence[Arrival]) -> None:
    """A span and a count for a reservation that took so long until now."""
    meters.consumed(len(arrivals))
    if spans.is_recorded():
        spans.reserved(seconds, [carrier(arrival.submission.otel_trace_carrier) for arrival in arrivals])


def checked_strategy(strategy: object) -> Strategy:
    """`strategy`, if it is one. Raises TypeError."""
    if not isinstance(strategy, Strategy):
        raise TypeError(f"strategy must be an instance such as Strategy.Random(), not {strategy!r}")
    return strategy


def _chunk_id(submission_id: SubmissionId, chunk_index: ChunkIndex) -> wire.ChunkId:
    if not isinstance(submission_id, SubmissionId):
        raise TypeError(f"submission_id must be a SubmissionId, not {submission_id!r}")
    if not isinstance(chunk_index, ChunkIndex):
        raise TypeError(f"chunk_index must be a ChunkIndex, not {chunk_index!r}")
    return wire.ChunkId(submission_id.id, chunk_index.id)

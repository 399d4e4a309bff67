"""The consumer's loop over chunks: reserve, fetch, call, store, report. Knows no serialization.

Everything that can wait for the network waits on other threads' futures; the callback runs on the calling thread.
A report travels in the same write as the next request. Reports that may have been lost with a connection are sent again
on the next one, completions only: the first completion of a chunk counts, whoever sends it.
"""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable

from opsqueue.client import convert
from opsqueue.client.connection import Arrival, Connection, ConnectionLostError, Reservation
from opsqueue.client.raw_consumer import ConsumerClient, checked_strategy, failure_text, fetched
from opsqueue.client.store import StoreError
from opsqueue.client.values import Chunk, Strategy
from opsqueue.protocol import consumer as wire

logger = logging.getLogger("opsqueue.consumer")


class ChunkLoop:
    """One loop on one thread. With `prefetch` above 0 the next chunk is reserved and fetched during the callback."""

    def __init__(
        self, client: ConsumerClient, strategy: Strategy, callback: Callable[[Chunk], bytes], prefetch: int = 0
    ) -> None:
        self._strategy = checked_strategy(strategy)
        if not callable(callback):
            raise TypeError(f"the callback must be callable, {callback!r} is not")
        if not isinstance(prefetch, int) or prefetch < 0:
            raise TypeError(f"prefetch must be a number of chunks, 0 or more, not {prefetch!r}")
        self._client = client
        self._callback = callback
        self._prefetch = prefetch
        self._connection: Connection | None = None
        self._reservations: list[Reservation] = []
        #: Not sent yet.
        self._reports: list[wire.ClientContents] = []
        #: Sent, but nothing has come since that shows that they arrived.
        self._unconfirmed: list[wire.ClientContents] = []

    def run(self) -> None:
        """Runs until KeyboardInterrupt, which ends it normally, or any other exception that is not the callback's own.

        What is held then goes back to the server without a retry.
        """
        try:
            while True:
                self._step()
        except KeyboardInterrupt:
            logger.info("interrupted; giving back what is held")
        finally:
            self._end()

    def _step(self) -> None:
        try:
            connection, reservation = self._reserved()
            arrivals = reservation.arrived.result()
            self._unconfirmed.clear()
            for arrival in arrivals:
                self._process(connection, arrival)
            self._reservations.remove(reservation)
        except ConnectionLostError:
            # the connection has said so
            self._reservations.clear()
            self._reports = [
                report for report in [*self._unconfirmed, *self._reports] if isinstance(report, wire.CompleteChunk)
            ]
            self._unconfirmed.clear()

    def _reserved(self) -> tuple[Connection, Reservation]:
        """The reservation to wait for: one made ahead, or a new one."""
        connection = self._connection
        if connection is not None and self._reservations:
            self._send(connection)
            return connection, self._reservations[0]
        connection = self._connection = self._client.connect()
        return connection, self._reserve(connection)

    def _reserve(self, connection: Connection, also: wire.ClientContents | None = None) -> Reservation:
        before = self._reports if also is None else [*self._reports, also]
        reservation = self._client.new_reservation()
        self._reservations.append(reservation)
        connection.reserve(reservation, 1, self._strategy.to_protocol(), before)
        self._sent()
        return reservation

    def _send(self, connection: Connection, also: wire.ClientContents | None = None) -> None:
        messages = self._reports if also is None else [*self._reports, also]
        if messages:
            connection.send(messages)
            self._sent()

    def _sent(self) -> None:
        self._unconfirmed.extend(self._reports)
        self._reports.clear()

    def _process(self, connection: Connection, arrival: Arrival) -> None:
        content = fetched(arrival)
        if isinstance(content, StoreError):
            self._failed(arrival, str(content), str(content))
            return
        chunk = convert.chunk(arrival.chunk, arrival.submission, content)
        self._begin(connection, arrival)
        try:
            output = memoryview(self._callback(chunk)).tobytes()
        except Exception as error:
            self._failed(arrival, *_explained(error))
            return
        self._store(arrival, output)

    def _begin(self, connection: Connection, arrival: Arrival) -> None:
        working_on = wire.WorkingOn(arrival.id) if connection.knows(wire.CLEAN_CLOSE) else None
        # what is reserved ahead has to go back without harm at the end
        if self._prefetch and connection.knows(wire.RELEASE):
            self._reserve(connection, working_on)
        else:
            self._send(connection, working_on)

    def _store(self, arrival: Arrival, output: bytes) -> None:
        prefix = arrival.submission.prefix
        if arrival.chunk.input_content is not None or prefix is None:
            self._reports.append(wire.CompleteChunk(arrival.id, output))
            return
        error = self._client.store_output(prefix, arrival.chunk.chunk_index, output)
        if error is None:
            self._reports.append(wire.CompleteChunk(arrival.id, None))
        else:
            text = f"the result could not be stored: {error}"
            self._failed(arrival, text, text)

    def _failed(self, arrival: Arrival, failure: str, summary: str) -> None:
        logger.warning(
            "chunk %d of submission %d failed: %s", arrival.chunk.chunk_index, arrival.chunk.submission_id, summary
        )
        self._reports.append(wire.FailChunk(arrival.id, failure_text(failure)))

    def _end(self) -> None:
        connection = self._connection
        if connection is None:
            return
        try:
            self._send(connection)
        except Exception as error:
            logger.debug("the last reports could not be sent: %s", error)
        for reservation in self._reservations:
            connection.give_back(reservation)
        connection.close_if_idle()


def _explained(error: Exception) -> tuple[str, str]:
    """The traceback, ending with the exception's qualified name and message; and that end alone."""
    try:
        message = str(error)
    except Exception as failed:
        message = f"(its message cannot be shown: {type(failed).__qualname__})"
    summary = f"{type(error).__qualname__}: {message}"
    text = "".join(traceback.format_exception(error)).rstrip()
    return (text if text.endswith(summary) else f"{text}\n{summary}"), summary

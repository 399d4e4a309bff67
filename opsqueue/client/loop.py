"""The consumer's loop over chunks: takes one, calls, hands the result on. Knows no serialization.

Everything that can wait for the network waits on other threads; the callback runs on the calling thread. While it runs,
the next chunks are reserved and fetched and the results of the last ones stored and reported: see in_hand and keeper.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Final

from opsqueue.client import convert_chunk, meters, outcomes
from opsqueue.client.bytes_like import BytesLike, content_of
from opsqueue.client.chunk_context import ChunkContext, Entered
from opsqueue.client.in_hand import InHand
from opsqueue.client.interrupts import Interrupts
from opsqueue.client.keeper import Keeper
from opsqueue.client.raw_consumer import ConsumerClient, Stopped, checked_strategy, fetched
from opsqueue.client.session import Arrival, ConnectionLostError
from opsqueue.client.store_error import StoreError
from opsqueue.client.values import Chunk, Strategy
from opsqueue.exceptions import OpsqueueInternalError
from opsqueue.protocol import consumer as wire

logger = logging.getLogger("opsqueue.consumer")

#: Chunks that are reserved ahead at most, unless the caller says otherwise.
PREFETCH: Final = 32
#: Seconds for results that are being stored when the loop is interrupted.
_LAST_STORES_S: Final = 2.0
#: Seconds for a new connection, when the loop is stopped and results are not reported yet.
_LAST_REPORTS_S: Final = 10.0


class ChunkLoop:
    """One loop on one thread. At most `prefetch` chunks are reserved ahead; 0: strictly one at a time."""

    def __init__(
        self,
        client: ConsumerClient,
        strategy: Strategy,
        callback: Callable[[Chunk], BytesLike],
        prefetch: int | None = None,
    ) -> None:
        if not callable(callback):
            raise TypeError(f"the callback must be callable, {callback!r} is not")
        if prefetch is not None and (not isinstance(prefetch, int) or prefetch < 0):
            raise TypeError(f"prefetch must be a number of chunks, 0 or more, not {prefetch!r}")
        self._client = client
        self._callback = callback
        self._in_hand = InHand(client, checked_strategy(strategy), PREFETCH if prefetch is None else prefetch)
        self._keeper = Keeper(self._in_hand)
        self._interrupts = Interrupts(self._in_hand.wake)
        self._current: wire.ChunkId | None = None
        self._stopping = False

    def stop(self) -> None:
        """Ends the loop after the chunk in hand; what was reserved ahead goes back. A signal handler may call it."""
        self._stopping = True
        self._in_hand.wake()

    def run(self) -> None:
        """Runs until `stop`, or Ctrl-C, which ends it normally, or an exception that is not the callback's.

        What is held then goes back to the server without a retry.
        """
        with self._interrupts:
            try:
                while not self._is_ending():
                    self._step()
            except Stopped:
                logger.info("stopped")
            except KeyboardInterrupt:
                logger.debug("interrupted in the callback or before it")
            finally:
                if self._interrupts:
                    logger.info("interrupted; giving back what is held")
                self._end()

    def _is_ending(self) -> bool:
        return self._stopping or bool(self._interrupts)

    def _step(self) -> None:
        try:
            self._in_hand.use(self._client.connect(self._is_ending))
            arrival = self._in_hand.next(self._is_ending())
            if arrival is not None:
                self._keeper.notice()
                self._process(arrival)
        except ConnectionLostError as error:
            # the connection has said so
            self._current = None
            logger.debug("going on with the next connection: %s", error)

    def _process(self, arrival: Arrival) -> None:
        self._current = arrival.id
        self._interrupts.raised = True
        try:
            content = fetched(arrival)
        finally:
            self._interrupts.raised = False
        if isinstance(content, StoreError):
            self._in_hand.report(outcomes.failed(arrival.id, str(content), str(content)))
            self._current = None
            return
        self._in_hand.sized(len(content))
        chunk = convert_chunk.chunk(arrival.chunk, arrival.submission, content)
        self._in_hand.begin(arrival)
        connection, chunk_id = self._in_hand.connection, arrival.id
        context = ChunkContext(chunk, lambda: connection.dropped(arrival))
        failure: Exception | None = None
        output = b""
        self._interrupts.raised = True
        try:
            with Entered(context):
                output = content_of(self._callback(chunk), "a result")
        except Exception as error:
            failure = error
        finally:
            self._interrupts.raised = False
        meters.processed(self._in_hand.ended(), failure)
        # one that was told may have returned anything; one that was not told has a result, and the first one counts
        told, reason = context.told, context.reason
        if reason in outcomes.UNWANTED or told or (failure is not None and reason is not None):
            logger.info(
                "the result of chunk %d of submission %d is not wanted: %s",
                chunk_id.chunk_index, chunk_id.submission_id, reason,
            )  # fmt: skip
        elif failure is not None:
            self._in_hand.report(outcomes.of_exception(connection, chunk_id, failure))
        else:
            self._in_hand.store(arrival, output, self._interrupts)
        self._current = None

    def _end(self) -> None:
        try:
            self._in_hand.wait_for_stores(None if self._stopping else time.monotonic() + _LAST_STORES_S)
            self._send_last_reports()
        except KeyboardInterrupt:
            logger.info("interrupted again; giving back what is held")
        finally:
            self._keeper.end()
            try:
                self._in_hand.give_up(self._current)
                self._in_hand.connection.close_if_idle()
            except Exception as error:
                logger.debug("the last reports could not be sent: %s", error)

    def _send_last_reports(self) -> None:
        """Results that are stored are reported on, also when the connection was lost meanwhile."""
        deadline = time.monotonic() + (_LAST_REPORTS_S if self._stopping else _LAST_STORES_S)
        reason = "there was no connection in time"
        try:
            self._in_hand.flush()
            if not self._in_hand.unsent():
                return
            self._current = None  # the server has it again
            self._in_hand.use(self._client.connect(lambda: time.monotonic() >= deadline))
            self._in_hand.flush()
        except Stopped:
            pass
        except OpsqueueInternalError as error:
            reason = str(error)
        unsent = self._in_hand.unsent()
        if unsent:
            logger.warning("%d finished chunks could not be reported, they will be done again: %s", unsent, reason)

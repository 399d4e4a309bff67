"""What a loop has in hand: chunks that were reserved ahead, results that are being stored, reports that are to be sent.

The loop's own thread, its keeper, the connection's thread and the threads that fetch and store meet here. Reports that
may have been lost with a connection are sent again on the next one, completions only: the first completion of a chunk
counts, whoever sends it.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from typing import Final

from opsqueue.client import outcomes
from opsqueue.client.connection import Connection
from opsqueue.client.fetches import MAX_BYTES, Fetches
from opsqueue.client.interrupts import Interrupts
from opsqueue.client.pace import Pace
from opsqueue.client.raw_consumer import FETCHING, ConsumerClient, note_reserved
from opsqueue.client.session import Arrival, ConnectionLostError, Reservation
from opsqueue.client.store_error import StoreError
from opsqueue.client.values import Strategy
from opsqueue.protocol import consumer as wire

logger = logging.getLogger("opsqueue.consumer")

#: Bytes of results that wait to be stored; one may always.
_MAX_STORING_BYTES: Final = 64 * 1024 * 1024
#: Chunks that are reserved ahead at most before the size of one is known.
_UNKNOWN_SIZES: Final = 4
#: Results that are being stored at a time.
MAX_STORING: Final = 32
#: Seconds after which a reservation's answer had to wait for work.
_WAITED_S: Final = 0.05


class InHand:
    """The chunks of one loop on one connection after the other."""

    def __init__(self, client: ConsumerClient, strategy: Strategy, prefetch: int) -> None:
        self._client = client
        self._strategy = strategy.to_protocol()
        self._prefetch = prefetch
        self._fetches = Fetches(self._fetch, FETCHING)
        self._lock = threading.Lock()
        #: Held while messages go out, so that what a reservation confirms was sent before it.
        self._sending = threading.Lock()
        #: Wakes the loop's thread; a SimpleQueue may be used by a signal handler.
        self._news: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._waiting = False
        self._connection: Connection | None = None
        self.pace = Pace(0, None)
        self._error: BaseException | None = None
        self._ahead: deque[tuple[float, Arrival]] = deque()
        #: What was asked for, by a number: how many chunks, when, and the last report that was sent before.
        self._asked: dict[int, tuple[Reservation, int, float, int]] = {}
        self._asked_last = 0
        #: Chunks ahead at most on this connection, and the largest input so far in bytes.
        self._limit = 0
        self._largest: int | None = None
        self._reports: list[wire.ClientContents] = []
        #: Sent, but no answer has come since that shows that they arrived; numbered in the order of sending.
        self._unconfirmed: deque[tuple[int, wire.ClientContents]] = deque()
        self._sent = 0
        self._storing: dict[wire.ChunkId, int] = {}
        #: The chunk that the loop has taken, from then until it takes the next.
        self._taken: wire.ChunkId | None = None
        #: The callback's chunk and since when it runs; seconds of time.monotonic().
        self.running: tuple[wire.ChunkId, float] | None = None
        #: Nothing is to be reserved ahead while this callback runs.
        self._enough = False

    def use(self, connection: Connection) -> None:
        """From now on chunks come from `connection`; what the last one held is with the server again."""
        if connection is self._connection:
            return
        with self._lock:
            self._connection = connection
            self._error = None
            gone = self._empty_ahead()
            self._asked.clear()
            again = [*(report for _, report in self._unconfirmed), *self._reports]
            self._reports = [report for report in again if isinstance(report, wire.CompleteChunk)]
            self._unconfirmed.clear()
        self._forget(gone)
        self._limit = self._prefetch if connection.knows(wire.RELEASE) else 0
        self.pace = Pace(0, connection.reservation_s)
        self._set_limit()

    def _empty_ahead(self) -> list[Arrival]:
        """Under the lock."""
        gone = [arrival for _, arrival in self._ahead]
        self._ahead.clear()
        return gone

    def _forget(self, gone: Iterable[Arrival]) -> None:
        """Not under the lock: these go back, or are back."""
        for arrival in gone:
            self._fetches.forget(arrival.content)

    def _set_limit(self) -> None:
        fitting = _UNKNOWN_SIZES if self._largest is None else MAX_BYTES // max(1, self._largest)
        self.pace.limit = min(self._limit, fitting)

    @property
    def connection(self) -> Connection:
        """The one in use."""
        if self._connection is None:
            raise ConnectionLostError("there is no connection yet")
        return self._connection

    def wake(self) -> None:
        """Wakes the loop's thread; a signal handler may call it."""
        self._news.put(None)

    def next(self, stopping: bool) -> Arrival | None:
        """The next chunk to work on, after asking for more; None after a wait, or at once when `stopping`.

        Raises ConnectionLostError, and what a reservation was refused with.
        """
        with self._lock:
            arrival, gone = self._take_ahead()
            self._taken = None if arrival is None else arrival.id
        self._forget(gone)
        if arrival is not None:
            self._fetches.take(arrival.content)
        if stopping and arrival is None:
            return None
        if not stopping:
            self._ask(arrival is not None)
        if arrival is None:
            self._wait_for_news()
        return arrival

    def _take_ahead(self) -> tuple[Arrival | None, list[Arrival]]:
        """Under the lock: the next one, and those before it that nobody wants any more."""
        gone: list[Arrival] = []
        while self._ahead:
            _, arrival = self._ahead.popleft()
            if self.connection.dropped(arrival) is None:
                return arrival, gone
            gone.append(arrival)
        return None, gone

    def _ask(self, has_one: bool) -> None:
        with self._lock:
            ahead = len(self._ahead) + sum(count for _, count, _, _ in self._asked.values())
            # the one that was just taken is still to be worked on
            wanted = self.pace.wanted(ahead + has_one, None)
            if not has_one and not ahead:
                wanted = max(1, wanted)
        if wanted:
            self.reserve(wanted)

    def _wait_for_news(self) -> None:
        with self._lock:
            if self._error is not None:
                raise self._error
            if self._ahead:
                return
            self._waiting = True
        # not under the lock: whoever stores a result must be able to say so; from here on they send it themselves
        self.flush()
        self._news.get()
        with self._lock:
            self._waiting = False

    def _tell(self) -> None:
        """Under the lock: something that the loop's thread may wait for has happened."""
        if self._waiting:
            self._waiting = False
            self._news.put(None)

    def reserve(self, count: int) -> None:
        """Asks for up to `count` chunks, and sends the reports that wait, in one go."""
        connection = self.connection
        reservation = Reservation(self._fetches.fetch)
        with self._sending:
            reports = self._take_reports()
            with self._lock:
                number = self._asked_last = self._asked_last + 1
                self._asked[number] = (reservation, count, time.monotonic(), self._sent)
            try:
                connection.reserve(reservation, count, self._strategy, reports)
            except BaseException:
                with self._lock:
                    self._asked.pop(number, None)
                # it may have been sent before an interruption
                connection.give_back(reservation)
                raise
        # by number: a future that knew its reservation would hold its chunks until the garbage collector comes
        reservation.arrived.add_done_callback(lambda arrived: self._arrived(number, arrived))

    def _fetch(self, chunk: wire.Chunk, submission: wire.Submission) -> Future[bytes]:
        begun = time.monotonic()
        content = self._client.fetch(chunk, submission)
        if not content.done():
            content.add_done_callback(lambda done: self._fetched(begun, done))
        return content

    def _fetched(self, begun: float, content: Future[bytes]) -> None:
        if content.cancelled() or content.exception() is not None:
            return
        with self._lock:
            self.pace.fetched(time.monotonic() - begun)
        self.sized(len(content.result()))

    def sized(self, size: int) -> None:
        """An input of so many bytes came: so many may wait here as fit into the bound."""
        if self._largest is None or size > self._largest:
            with self._lock:
                self._largest = size
                self._set_limit()

    def _arrived(self, number: int, arrived: Future[list[Arrival]]) -> None:
        error = arrived.exception()
        arrivals = [] if error is not None else arrived.result()
        now = time.monotonic()
        with self._lock:
            asked = self._asked.pop(number, None)
            late = arrivals
            if asked is not None and error is not None:
                self._error = error
            elif asked is not None:
                _, _, asked_at, sent = asked
                self.pace.answered(now - asked_at)
                while self._unconfirmed and self._unconfirmed[0][0] <= sent:
                    self._unconfirmed.popleft()
                if now - asked_at > _WAITED_S and self._is_busy(now):
                    # there was no work for anybody: another consumer may be waiting for this
                    self._enough = True
                else:
                    self._ahead.extend((now, arrival) for arrival in arrivals)
                    late = []
            self._tell()
        self._forget(late)
        if asked is None:
            # on a connection before this one, which gives them back
            return
        if late:
            self.connection.release(arrival.id for arrival in late)
        if error is None:
            note_reserved(now - asked[2], arrivals)

    def _is_busy(self, now: float) -> bool:
        """Under the lock: the callback will go on for longer than a chunk should wait for it."""
        if self.running is None:
            return False
        cover_s = self.pace.due_s(0, now - self.running[1])
        return cover_s is not None and cover_s > 0

    def begin(self, arrival: Arrival) -> None:
        """The callback is about to start: says so to the server, with the reports that wait, and starts the clock."""
        connection = self.connection
        also = [wire.WorkingOn(arrival.id)] if connection.knows(wire.CLEAN_CLOSE) else []
        self._send(also)
        with self._lock:
            self._enough = False
            self.running = (arrival.id, time.monotonic())

    def ended(self) -> float:
        """The callback has ended; how many seconds it took."""
        with self._lock:
            running, self.running = self.running, None
            seconds = 0.0 if running is None else time.monotonic() - running[1]
            self.pace.processed(seconds)
        return seconds

    def report(self, report: wire.ClientContents) -> None:
        """About the chunk that the loop has taken: to be sent with what is sent next."""
        with self._lock:
            self._taken = None
            self._note(report)

    def _note(self, report: wire.ClientContents) -> None:
        """Under the lock."""
        self._reports.append(report)
        if isinstance(report, wire.CompleteChunk):
            self._client.done += 1
        elif isinstance(report, wire.FailChunk | wire.FailSubmission):
            self._client.failed += 1

    def store(self, arrival: Arrival, output: bytes, interrupts: Interrupts) -> None:
        """Stores a result, and reports the chunk as done when it is stored, or as failed.

        Waits while too many are being stored, unless interrupted.
        """
        prefix = arrival.submission.prefix
        if arrival.chunk.input_content is not None or prefix is None:
            self.report(outcomes.direct(arrival.id, output))
            return
        chunk_id = arrival.id
        storing = self._client.store_output(prefix, chunk_id, output, arrival.submission.otel_trace_carrier)
        if storing.done():
            self.report(self._outcome(chunk_id, storing))
            return
        with self._lock:
            self._taken = None
            self._storing[chunk_id] = len(output)
        # which holds the input no longer
        storing.add_done_callback(lambda done: self._stored(chunk_id, done))
        limit = MAX_STORING if self.pace.limit else 1
        while True:
            with self._lock:
                enough = len(self._storing) < limit and sum(self._storing.values()) <= _MAX_STORING_BYTES
                self._waiting = not enough
            if enough or interrupts:
                return
            self._news.get()

    def _outcome(self, chunk_id: wire.ChunkId, storing: Future[None]) -> wire.ClientContents:
        error = storing.exception()
        if error is None:
            return wire.CompleteChunk(chunk_id, None)
        return outcomes.not_stored(chunk_id, error if isinstance(error, Exception) else StoreError(repr(error)))

    def _stored(self, chunk_id: wire.ChunkId, storing: Future[None]) -> None:
        report = self._outcome(chunk_id, storing)
        with self._lock:
            self._storing.pop(chunk_id, None)
            self._note(report)
            # between two callbacks, and soon after a short one, the loop's thread sends it with other things
            chunk_s = self.pace.chunk_s
            send = self._waiting or (self.running is not None and (chunk_s is None or chunk_s > 2 * _SOON_S))
            if self._waiting and not self.pace.limit:
                # one at a time: the report goes with the next request
                send = False
            self._tell()
        if send:
            self.flush()

    def wait_for_stores(self, deadline: float | None) -> None:
        """Until every result is stored and reported on, or `deadline` of time.monotonic()."""
        while True:
            with self._lock:
                if not self._storing:
                    return
                self._waiting = True
            try:
                self._news.get(timeout=None if deadline is None else max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                return

    @property
    def idle(self) -> bool:
        """Nothing is here that could be kept waiting."""
        with self._lock:
            return self._taken is None and not self._storing and not self._ahead

    def unsent(self) -> int:
        """How many chunks are done, and the server may not know."""
        with self._lock:
            waiting = sum(isinstance(report, wire.CompleteChunk) for report in self._reports)
            if self._connection is None or not self._connection.alive:
                waiting += sum(isinstance(report, wire.CompleteChunk) for _, report in self._unconfirmed)
            return waiting

    def flush(self) -> None:
        """Sends the reports that wait. A lost connection keeps them for the next one."""
        try:
            self._send(())
        except ConnectionLostError as error:
            logger.debug("reports wait for the next connection: %s", error)

    def _send(self, also: Sequence[wire.ClientContents]) -> None:
        with self._sending:
            reports = self._take_reports()
            if reports or also:
                self.connection.send([*reports, *also])

    def _take_reports(self) -> list[wire.ClientContents]:
        """While sending: they count as sent, and go again should the connection turn out to be lost."""
        with self._lock:
            reports, self._reports = self._reports, []
            for report in reports:
                self._sent += 1
                self._unconfirmed.append((self._sent, report))
        return reports

    def tend(self, now: float) -> float:
        """What has to be done while something is in hand; gives the seconds after which to look again."""
        stale: list[Arrival] = []
        wanted, pause = 0, _LOOK_AGAIN_S
        with self._lock:
            if self._ahead:
                waited = now - self._ahead[0][0]
                if waited > self.pace.longest_wait_s:
                    stale = self._empty_ahead()
                    self._enough = True
                else:
                    pause = min(pause, self.pace.longest_wait_s - waited)
            if self.running is not None and not self._enough:
                running_s = now - self.running[1]
                ahead = len(self._ahead) + sum(count for _, count, _, _ in self._asked.values())
                wanted = self.pace.wanted(ahead, running_s)
                due = self.pace.due_s(ahead, running_s)
                if not wanted and due is not None:
                    pause = min(pause, due)
            reports = bool(self._reports)
        if stale:
            self._forget(stale)
            self.connection.release(arrival.id for arrival in stale)
        if wanted:
            self.reserve(wanted)
        elif reports:
            self.flush()
        return max(pause, _SOON_S)

    def extend(self) -> None:
        """Starts the reservations' time again: of the chunk that was taken, and of what is being stored."""
        with self._lock:
            ids = list(self._storing)
            if self._taken is not None and self._taken not in self._storing:
                ids.append(self._taken)
        self._send([wire.ExtendReservation(chunk_id) for chunk_id in ids])

    def give_up(self, current: wire.ChunkId | None) -> None:
        """Gives everything back that was not reported on."""
        connection = self._connection
        if connection is None:
            return
        with self._lock:
            # taken to be sent by a call that was interrupted before it did
            interrupted = [report for _, report in self._unconfirmed if _ends(report, connection)]
            self._reports[:0] = interrupted
        self.flush()
        with self._lock:
            gone = self._empty_ahead()
            ids = [*(arrival.id for arrival in gone), *self._storing]
            if current is not None:
                ids.append(current)
            asked = [reservation for reservation, _, _, _ in self._asked.values()]
            self._asked.clear()
        self._forget(gone)
        for reservation in asked:
            connection.give_back(reservation)
        connection.release(ids)


def _ends(report: wire.ClientContents, connection: Connection) -> bool:
    """Whether `report` ends a chunk that the server still counts on us for."""
    ending = wire.CompleteChunk | wire.FailChunk | wire.RetryLater | wire.FailSubmission
    return isinstance(report, ending) and connection.holds(report.id)


#: Seconds between two looks at a callback that runs.
_LOOK_AGAIN_S: Final = 0.05
#: Seconds that a report may wait for the callback's end.
_SOON_S: Final = 0.002

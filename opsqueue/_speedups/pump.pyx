# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""The front-end's end of its channel to the writer. See pump.pxd for what is here and what is not."""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy
from posix.unistd cimport read

from collections import deque

from opsqueue._speedups.board cimport Board
from opsqueue._speedups.consumer cimport ConsumerHub
from opsqueue._speedups.counters cimport BAD_RINGS, FRONTEND_WAKEUPS
from opsqueue._speedups.records cimport REC_REPLY, REC_REQUEST, RequestRecord
from opsqueue._speedups.ring cimport PEER_RESTARTED, Endpoint

from opsqueue._speedups.consumer import BadRecordError

cdef enum:
    RECORDS_A_TURN = 4096             # then replies are written and other events get their turn
    LARGE_BYTES = 64 * 1024 * 1024    # of requests that wait to go in parts; beyond, the caller waits
    REQUESTS_A_WAKE_UP = 4             # cold requests of one turn of the event loop


cdef class FrontendPump:
    """Drives `hub` and the cold requests over `endpoint`.

    `on_reply(request, payload)`, `on_writer_restart()` and `on_broken()` must not raise.
    """

    def __cinit__(
        self,
        Endpoint endpoint not None,
        ConsumerHub hub not None,
        Board board not None,
        uint32_t slot,
        loop,
        on_reply,
        on_writer_restart,
        on_broken,
    ):
        self.endpoint = endpoint
        self.hub = hub
        self.board = board
        self.counters = board.counters(slot)
        self.loop = loop
        self.on_reply = on_reply
        self.on_writer_restart = on_writer_restart
        self.on_broken = on_broken
        self.large = deque()
        self.waiting = []

    def start(self) -> None:
        """Watch the channel's eventfd."""
        self.running = True
        self.loop.add_reader(self.endpoint.own_wake, self.wake)
        self.turn()

    def stop(self) -> None:
        """Take nothing more and send nothing more; whoever waits for room waits on, its caller has a limit of its own."""
        if self.running:
            self.running = False
            self.loop.remove_reader(self.endpoint.own_wake)
            self.endpoint.incoming.wake()
        self.waiting = []

    # --- the other side has something for us, or has made room ---

    def wake(self) -> None:
        """The eventfd is readable."""
        cdef uint64_t signals
        read(self.endpoint.own_wake, &signals, 8)
        self.counters[<int>FRONTEND_WAKEUPS] += 1
        self.turn()

    def turn(self) -> None:
        """Drain a bounded number of records, write the replies, let on who waits; then sleep, or come again."""
        cdef bint more
        if not self.running:
            return
        self.endpoint.incoming.wake()
        try:
            more = self.drain()
            self.let_on()
        except BadRecordError as error:
            self.counters[<int>BAD_RINGS] += 1
            self.stop()
            self.on_broken(str(error))
            return
        except Exception as error:
            # Not asking for signals any more, this process would never serve again: it must be replaced.
            self.stop()
            self.on_broken(f"a defect in handling the writer's records: {error!r}")
            return
        if more or not self.prepare_to_sleep():
            self.loop.call_soon(self.turn)

    cdef bint drain(self):
        """True: there may be more."""
        cdef Endpoint endpoint = self.endpoint
        cdef uint32_t kind, size
        cdef uint32_t taken = 0
        cdef uint8_t *payload
        cdef int got = 0
        if endpoint.poll_epochs() & PEER_RESTARTED and self.was_connected:
            self.large.clear()
            self.large_bytes = 0
            self.large_stream = 0
            self.hub.writer_gone()
            self.on_writer_restart()
        self.was_connected = endpoint.connected
        while taken < RECORDS_A_TURN:
            got = endpoint.receive(&kind, &payload, &size)
            if got <= 0:
                break
            taken += 1
            if kind != REC_REPLY:
                self.hub.handle(kind, payload, size)
            elif size < sizeof(RequestRecord):
                got = -1
                break
            else:
                self.on_reply(
                    (<RequestRecord *>payload).request,
                    PyBytes_FromStringAndSize(<char *>payload + sizeof(RequestRecord), size - sizeof(RequestRecord)),
                )
        if got < 0:
            raise BadRecordError("the ring from the writer is damaged")
        # The replies are built: their room is free before the system calls that write them.
        endpoint.done_receiving()
        self.hub.flush_out()
        return taken == RECORDS_A_TURN

    cdef void let_on(self):
        """Room may have been made: parts first, then consumers in their order, then requests."""
        self.send_large()
        if self.hub.blocked:
            self.hub.retry_blocked()
            self.hub.flush_out()
        if self.waiting and self.endpoint.connected and self.endpoint.outgoing.has_room(<uint32_t>self.wanted):
            self.wanted = 0
            waiting = self.waiting
            self.waiting = []
            for future in waiting:
                if not future.done():
                    future.set_result(None)
        self.endpoint.flush()

    cdef bint prepare_to_sleep(self):
        """Ask for signals. False: there is something to do at once."""
        cdef Endpoint endpoint = self.endpoint
        if endpoint.connected:
            if self.hub.await_room():
                return False
            if self.large and endpoint.outgoing.wait_for_room(endpoint.outgoing.largest):
                return False
            if self.waiting and endpoint.outgoing.wait_for_room(<uint32_t>self.wanted):
                return False
        return endpoint.incoming.sleep() and (
            endpoint.incoming.header.producer_epoch == endpoint.incoming.header.consumer_seen
        )

    # --- requests ---

    def send_request(self, uint64_t request, bytes payload not None) -> bool:
        """Send a cold request. False: there is no room, or no writer; wait for `room` and try again."""
        cdef Endpoint endpoint = self.endpoint
        cdef size_t size = sizeof(RequestRecord) + len(payload)
        cdef uint8_t *at
        cdef RequestRecord head
        if not self.running or not endpoint.connected:
            return False
        if size > endpoint.outgoing.largest:
            if self.large_bytes and self.large_bytes + <Py_ssize_t>size > LARGE_BYTES:
                self.wanted = endpoint.outgoing.largest
                return False
            head.request = request
            self.large.append([PyBytes_FromStringAndSize(<char *>&head, sizeof(head)) + payload, 0])
            self.large_bytes += size
            self.send_large()
            endpoint.flush()
            if self.large and endpoint.outgoing.wait_for_room(endpoint.outgoing.largest):
                self.loop.call_soon(self.turn)
            return True
        at = endpoint.outgoing.reserve(REC_REQUEST, <uint32_t>size)
        if at == NULL:
            if size > self.wanted:
                self.wanted = size
            return False
        (<RequestRecord *>at).request = request
        memcpy(at + sizeof(RequestRecord), PyBytes_AS_STRING(payload), len(payload))
        # Whoever else sends in this turn of the event loop shares the wake-up of the writer, up to a number: it should
        # not wait for the last of many.
        self.unflushed += 1
        if self.unflushed == 1:
            self.loop.call_soon(self.flush_requests)
        elif self.unflushed % REQUESTS_A_WAKE_UP == 0:
            endpoint.flush()
        return True

    def flush_requests(self) -> None:
        """Publish the requests of this turn of the event loop."""
        self.unflushed = 0
        if self.running:
            self.endpoint.flush()

    cdef void send_large(self):
        cdef Endpoint endpoint = self.endpoint
        cdef uint32_t offset, sent, total
        cdef bytes record
        while self.large and endpoint.connected:
            record, offset = self.large[0]
            total = <uint32_t>len(record)
            if offset == 0:
                self.large_stream = endpoint.new_stream()
            sent = endpoint.send_part(
                self.large_stream, REC_REQUEST, <uint8_t *>PyBytes_AS_STRING(record), total, offset
            )
            if sent == offset:
                return
            if sent == total:
                self.large.popleft()
                self.large_bytes -= total
            else:
                self.large[0][1] = sent

    def room(self):
        """A future that is done when a request that found no room may find some."""
        future = self.loop.create_future()
        if not self.running:
            return future
        self.waiting.append(future)
        if self.endpoint.connected and self.endpoint.outgoing.wait_for_room(<uint32_t>self.wanted):
            self.loop.call_soon(self.turn)
        return future

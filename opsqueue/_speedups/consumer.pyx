# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""Consumers' connections of one front-end. See consumer.pxd for what is here and what is not."""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport malloc
from libc.string cimport memcmp, memcpy
from posix.time cimport CLOCK_MONOTONIC, clock_gettime, timespec
from posix.unistd cimport write

from collections import deque

from opsqueue._speedups.board cimport Board
from opsqueue._speedups.buffers cimport Bytes, append, discard, ensure, take
from opsqueue._speedups.cbor cimport (
    CBOR_NULL, MAJOR_ARRAY, MAJOR_BYTES, MAJOR_TEXT, cut_utf8, is_utf8, write_head,
)
from opsqueue._speedups.compact cimport CompactPeer, Credit, Packer
from opsqueue._speedups.consumer_messages cimport (
    MESSAGE_ADD_CREDIT, MESSAGE_OPEN_CREDIT, MESSAGE_WITHDRAW_CREDIT, OUTPUT_ARRAY, OUTPUT_BYTES, OUTPUT_NONE,
    STRATEGY_BYTES, Message, copy_array, scan_message,
)
from opsqueue._speedups.counters cimport (
    BYTES_RECEIVED, BYTES_SENT, CONSUMERS_CONNECTED, CONSUMERS_LOST, CONSUMERS_OPENED, CONSUMERS_REJECTED,
    FRAMES_RECEIVED, HISTOGRAM_RESERVE, RESERVATIONS_FAILED, observe,
)
from opsqueue._speedups.descriptions cimport Description, DescriptionCache
from opsqueue._speedups.frames cimport (
    CLOSE_NO_CODE, CLOSE_POLICY, CLOSE_PROTOCOL_ERROR, CLOSE_TOO_BIG, CLOSE_UNDECODABLE, CLOSE_UNSUPPORTED,
    MAX_CONTROL, MAX_HEADER, OP_BINARY, OP_CLOSE, OP_CONTINUATION, OP_PING, OP_PONG, OP_TEXT, FrameHeader,
    may_be_received, read_frame_header, unmask, write_frame_header,
)
from opsqueue._speedups.outstanding cimport (
    Outstanding, Strategy, let_go, request_answered, request_find, request_new, requests_close,
)
from opsqueue._speedups.records cimport (
    CHUNK_HAS_OUTPUT, CHUNK_IS_DIRECT, CLOSE_CLEAN, CLOSE_LOST, DROP_EXPIRED, FEATURE_COMPACT, FEATURE_DROPPED,
    FEATURE_REFUSAL, MAX_REPORTED, REC_CLOSE, REC_COMPLETE, REC_DROPPED, REC_EXTEND, REC_FAIL, REC_FAIL_SUBMISSION,
    REC_OPEN, REC_REFUSED, REC_RELEASE, REC_REPORT, REC_RESERVE, REC_RESERVED, REC_RETRY_LATER, REC_WITHDRAWN,
    REC_WORKING_ON, RESERVED_ON_CREDIT, ChunkRecord, CloseRecord, DroppedRecord, OpenRecord, RefusedRecord, ReportRun,
    ReservedChunk, ReservedRecord, ReserveRecord, WithdrawnRecord,
)
from opsqueue._speedups.replies cimport put, put_chunk_id, put_sync, put_unsigned
from opsqueue._speedups.ring cimport Endpoint, Ring

from opsqueue._speedups.consumer_texts import DROP_TEXTS, FAULTS, NEEDED_FEATURE

cdef extern from "<sys/socket.h>" nogil:
    int setsockopt(int fd, int level, int name, const void *value, unsigned int size)

cdef extern from "<netinet/in.h>" nogil:
    enum: IPPROTO_TCP

cdef extern from "<netinet/tcp.h>" nogil:
    enum:
        TCP_NODELAY
        TCP_QUICKACK

cdef enum:
    MAX_CHUNKS = 4096                       # of one reply
    MAX_PARKED = 1024                       # requests of one connection that wait at the writer
    MAX_ASKED = 65536                       # chunks that those may ask for together: so many it may be given and not read
    MAX_FRAME_IN = 16 * 1024 * 1024
    MAX_MESSAGE_IN = 64 * 1024 * 1024
    MAX_FRAME_OUT = 8 * 1024 * 1024
    MAX_REPLY = 8 * 1024 * 1024             # bytes, once it holds a chunk
    RECEIVE_SIZE = 256 * 1024
    WRITE_AT_ONCE = 256 * 1024              # bytes for one connection that do not wait for the end of the wake-up
    RECORD_ROOM = 64                        # a message's record is at most this much longer than the message
    REPLY_HEADROOM = 64                     # what stands before the chunks
    CHUNK_ROOM = 160                        # of a chunk in a reply, without input and description

#: Bytes of one frame, and of one message, that a consumer may send.
LARGEST_FRAME = MAX_FRAME_IN
LARGEST_MESSAGE = MAX_MESSAGE_IN
#: Requests of one connection that may wait for their answer before its reading pauses.
PARKED_LIMIT = MAX_PARKED
ASKED_LIMIT = MAX_ASKED
#: Seconds until a connection that we have shut is closed even if its peer keeps it open.
LINGER_S = 1.0
#: Seconds until a request is repeated whose chunks could not be described.
REISSUE_S = 0.05
#: Payload of a heartbeat's ping.
HEARTBEAT = b"\xf0\x9f\x92\x93"
#: The kinds that `decode` gives, see ConsumerHub.
RESERVE = REC_RESERVE
COMPLETE = REC_COMPLETE
FAIL = REC_FAIL
WORKING_ON = REC_WORKING_ON
RELEASE = REC_RELEASE
EXTEND = REC_EXTEND
RETRY_LATER = REC_RETRY_LATER
FAIL_SUBMISSION = REC_FAIL_SUBMISSION
REPORT = REC_REPORT
OPEN_CREDIT = MESSAGE_OPEN_CREDIT
ADD_CREDIT = MESSAGE_ADD_CREDIT
WITHDRAW_CREDIT = MESSAGE_WITHDRAW_CREDIT


cdef inline uint64_t monotonic_ns() noexcept nogil:
    cdef timespec now
    clock_gettime(CLOCK_MONOTONIC, &now)
    return <uint64_t>now.tv_sec * 1000000000 + <uint64_t>now.tv_nsec


cdef inline void count(uint64_t *counters, int counter, int64_t amount) noexcept nogil:
    counters[counter] += <uint64_t>amount


class BadRecordError(Exception):
    """A record from the writer makes no sense: its ring cannot be trusted any more."""


cdef class ConsumerConnection:
    """One consumer: the protocol of its transport after the handshake (asyncio.BufferedProtocol's methods)."""

    def __cinit__(self, ConsumerHub hub not None, uint32_t features, on_end):
        self.hub = hub
        self.features = features
        self.on_end = on_end
        self.fd = -1
        if features & FEATURE_COMPACT:
            self.compact = CompactPeer()

    def __dealloc__(self):
        discard(&self.kept)
        discard(&self.message)
        discard(&self.large)
        discard(&self.out)
        requests_close(&self.requests)
        let_go(self.last_strategy)

    def start(self, transport, bytes init not None, bytes received not None) -> None:
        """Begin on a transport whose reading is paused: write `init` as it is, a heartbeat, and take `received`."""
        self.transport = transport
        self.hub.transports.add(self)
        sock = transport.get_extra_info("socket")
        self.fd = sock.fileno() if sock is not None else -1
        cdef int one = 1
        if self.fd >= 0:
            setsockopt(self.fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one))
        self.hub.enter(self)
        append(&self.out, <const uint8_t *>PyBytes_AS_STRING(init), PyBytes_GET_SIZE(init))
        self.ping()
        self.write_out()
        if self.state != OPEN:
            return
        if received:
            append(&self.kept, <const uint8_t *>PyBytes_AS_STRING(received), PyBytes_GET_SIZE(received))
            count(self.hub.counters, BYTES_RECEIVED, <uint64_t>len(received))
        self.advance()
        self.hub.endpoint.flush()
        self.hub.flush_out()

    # --- asyncio's protocol ---

    def connection_made(self, transport) -> None:
        """Never called by a transport that is handed over; `start` is."""

    def get_buffer(self, sizehint):
        return self.hub.receive_view

    def buffer_updated(self, Py_ssize_t size) -> None:
        cdef size_t used
        cdef int one = 1
        cdef ConsumerHub hub = self.hub
        if self.state != OPEN or size <= 0:
            return
        count(hub.counters, BYTES_RECEIVED, <uint64_t>size)
        self.missed = 0
        self.last_was_request = False
        if self.kept.size == 0:
            used = self.consume(hub.receive_buffer, size)
            if self.parsing() and used < <size_t>size:
                append(&self.kept, hub.receive_buffer + used, size - used)
            self.settle()
        else:
            append(&self.kept, hub.receive_buffer, size)
            self.advance()
        hub.endpoint.flush()
        hub.flush_out()
        if self.state == OPEN and self.fd >= 0 and (not self.last_was_request or self.kept.size):
            # Its peer may wait for our ACK before it sends its next request (Nagle's algorithm).
            setsockopt(self.fd, IPPROTO_TCP, TCP_QUICKACK, &one, sizeof(one))

    def eof_received(self):
        return None

    def pause_writing(self) -> None:
        self.writing_paused = True
        if self.state == OPEN:
            self.block = BLOCK_WRITING
            self.settle()

    def resume_writing(self) -> None:
        self.writing_paused = False
        if self.state != OPEN:
            return
        while self.deferred and not self.writing_paused:
            kind, record = self.deferred.pop(0)
            self.hub.handle(kind, <uint8_t *>PyBytes_AS_STRING(<bytes>record), <uint32_t>PyBytes_GET_SIZE(<bytes>record))
            self.write_out()
        if not self.writing_paused and self.state == OPEN:
            self.advance()
        self.hub.endpoint.flush()
        self.hub.flush_out()

    def connection_lost(self, exc) -> None:
        cdef int before = self.state
        self.state = GONE
        self.transport = None
        self.hub.transports.discard(self)
        self.fd = -1
        discard(&self.out)
        self.deferred = None
        try:
            if before == OPEN:
                self.advance()
        except Exception as error:
            self.fail(error)
        self.hub.endpoint.flush()
        on_end = self.on_end
        self.on_end = None
        if on_end is not None:
            on_end(exc)

    cdef void fail(self, error):
        """A defect, or no memory: ends this connection alone."""
        self.leave(CLOSE_CLEAN)
        self.state = SHUT if self.state == OPEN else self.state
        self.hub.loop.call_exception_handler({"message": "a consumer's connection failed", "exception": error})
        if self.transport is not None:
            self.transport.abort()

    # --- reading ---

    cdef bint parsing(self) noexcept:
        return not self.leaving and self.state != SHUT

    cdef size_t consume(self, uint8_t *data, size_t size):
        """Apply the whole frames at `data`; the bytes used. Sets `block` when it stops for another reason than their end."""
        cdef FrameHeader header
        cdef size_t at = 0
        cdef int used
        self.block = BLOCK_NONE
        while self.parsing():
            if self.state == OPEN:
                if self.writing_paused:
                    self.block = BLOCK_WRITING
                    break
            if not self.serve_ring():
                self.block = BLOCK_RING
                break
            if self.state == OPEN and (self.parked >= MAX_PARKED or self.asked >= MAX_ASKED):
                self.block = BLOCK_PARKED
                break
            used = read_frame_header(data + at, size - at, &header)
            if used == 0:
                break
            if used < 0:
                self.shut(CLOSE_PROTOCOL_ERROR, <bytes>FAULTS[used], True)
                break
            if header.opcode == OP_TEXT:
                self.shut(CLOSE_UNSUPPORTED, b"text frames are not accepted; send CBOR in binary frames", True)
                break
            if header.size > MAX_FRAME_IN:
                self.shut(CLOSE_TOO_BIG, b"a frame may have 16 MiB; send larger messages in fragments", True)
                break
            if header.size > size - at - used:
                break
            if not self.take_frame(data + at + used, header.size, header.opcode, header.fin, header.mask):
                self.block = BLOCK_RING
                break
            count(self.hub.counters, FRAMES_RECEIVED, 1)
            at += used + header.size
        return at

    cdef bint take_frame(self, uint8_t *payload, size_t size, uint8_t opcode, bint fin, uint32_t mask):
        """False: there is no room for its record; nothing has happened."""
        cdef size_t total = self.message.size + size
        cdef size_t room
        if opcode >= OP_CLOSE:
            unmask(payload, size, mask)
            self.take_control(payload, size, opcode)
            return True
        if self.fragmented != (opcode == OP_CONTINUATION):
            self.shut(
                CLOSE_PROTOCOL_ERROR,
                b"a message begins inside a fragmented one" if self.fragmented else b"a continuation continues nothing",
                True,
            )
            return True
        if total > MAX_MESSAGE_IN:
            self.shut(CLOSE_TOO_BIG, b"a message may have 64 MiB", True)
            return True
        room = total + RECORD_ROOM
        if self.compact is not None:
            # A byte of a packed report may stand for a run.
            room += sizeof(ReportRun) * min(total, <size_t>MAX_REPORTED)
        if fin and not self.has_room(room):
            return False
        unmask(payload, size, mask)
        if fin and not self.fragmented:
            self.take_message(payload, size)
            return True
        append(&self.message, payload, size)
        self.fragmented = not fin
        if fin:
            self.take_message(self.message.data + self.message.start, self.message.size)
            discard(&self.message)
        return True

    cdef void take_control(self, uint8_t *payload, size_t size, uint8_t opcode):
        cdef uint32_t code
        if opcode == OP_PING:
            self.last_was_request = False
            self.send(OP_PONG, payload, size)
        elif opcode == OP_CLOSE:
            if size == 1:
                self.shut(CLOSE_PROTOCOL_ERROR, b"a close frame has one byte", True)
                return
            code = <uint32_t>payload[0] << 8 | payload[1] if size else CLOSE_NO_CODE
            if size and not may_be_received(code):
                self.shut(CLOSE_PROTOCOL_ERROR, b"a close frame has a code that must not be sent", True)
            elif size > 2 and not is_utf8(payload + 2, size - 2):
                self.shut(CLOSE_UNDECODABLE, b"a close frame's reason is not UTF-8", True)
            else:
                self.send(OP_CLOSE, payload, 2 if size else 0)
                self.write_out()
                self.state = SHUT if self.state == OPEN else self.state
                self.leave(CLOSE_CLEAN)
                self.end_transport()

    cdef void take_message(self, uint8_t *data, size_t size):
        cdef Message m
        if scan_message(data, size, &m):
            self.apply(&m, data + size)
        elif self.compact is not None and self.hub.packer.scan(data, size, self.hub.failure_limit):
            self.apply_report(data)
        else:
            self.take_unusual(data, size, &m)

    cdef void take_unusual(self, const uint8_t *data, size_t size, Message *m):
        """The general decoder's turn: for forms that are rare, and for the words when it is no message at all."""
        try:
            kind, nonce, submission, chunk, argument, content = self.hub.decode(<bytes>data[:size])
        except ValueError as error:
            self.shut(CLOSE_UNDECODABLE, str(error).encode("utf-8", "replace"), True)
            return
        if kind == 0:
            self.refuse(nonce, (<str>content).encode("utf-8", "replace"))
            return
        m.kind = kind
        m.nonce = nonce
        m.submission = submission
        m.chunk = m.credit = chunk
        m.argument = argument
        m.output = OUTPUT_NONE
        m.tail = NULL
        m.tail_size = 0
        if kind == REC_REPORT and self.compact is not None:
            data = <const uint8_t *>PyBytes_AS_STRING(<bytes>content)
            if not self.hub.packer.scan(data, PyBytes_GET_SIZE(<bytes>content), self.hub.failure_limit):
                raise RuntimeError("a report in canonical form was not understood")
            self.apply_report(data)
            return
        if kind == REC_RESERVE or kind == MESSAGE_OPEN_CREDIT:
            m.strategy_size = <uint32_t>len(<bytes>content)
            if m.strategy_size > STRATEGY_BYTES:
                raise ValueError(f"a canonical strategy of {m.strategy_size} bytes")
            memcpy(m.strategy, PyBytes_AS_STRING(<bytes>content), m.strategy_size)
        elif content is not None:
            m.output = OUTPUT_BYTES
            m.tail = <const uint8_t *>PyBytes_AS_STRING(<bytes>content)
            m.tail_size = PyBytes_GET_SIZE(<bytes>content)
        self.apply(m, NULL)

    cdef void apply(self, Message *m, const uint8_t *end):
        """Write the message's record; there is room for it. `end`: of the bytes that an array in it is read from."""
        cdef ChunkRecord *record
        cdef uint8_t *at
        cdef size_t tail = m.tail_size
        if m.kind == REC_RESERVE:
            self.ask(m)
            return
        self.last_was_request = False
        if m.kind >= MESSAGE_OPEN_CREDIT and self.compact is not None:
            self.apply_credit(m)
            return
        if m.kind != REC_COMPLETE and m.kind != REC_FAIL:
            feature, reason = NEEDED_FEATURE[m.kind]
            if not self.features & <uint32_t>feature:
                self.shut(CLOSE_POLICY, reason, True)
                return
        if m.kind == REC_FAIL or m.kind == REC_FAIL_SUBMISSION:
            tail = cut_utf8(m.tail, tail, self.hub.failure_limit)
        at = self.new_record(m.kind, sizeof(ChunkRecord) + tail)
        record = <ChunkRecord *>at
        record.connection = self.number
        record.submission = m.submission
        record.chunk = m.chunk
        record.argument = m.argument if m.kind == REC_RETRY_LATER else 0
        record.flags = CHUNK_HAS_OUTPUT if m.kind == REC_COMPLETE and m.output != OUTPUT_NONE else 0
        record.tail_size = <uint32_t>tail
        if m.output == OUTPUT_ARRAY:
            copy_array(m.tail, end, at + sizeof(ChunkRecord), tail)
        elif tail:
            memcpy(at + sizeof(ChunkRecord), m.tail, tail)

    cdef uint8_t *new_record(self, uint32_t kind, size_t size) except NULL:
        """Where to write a record for which `has_room` said that there is room."""
        cdef uint8_t *at
        if size > self.hub.endpoint.outgoing.largest:
            ensure(&self.large, size)
            self.large.size = size
            self.large_kind = kind
            self.large_at = 0
            self.large_stream = self.hub.endpoint.new_stream()
            self.hub.sending_large = self
            return self.large.data
        at = self.hub.endpoint.outgoing.reserve(kind, <uint32_t>size)
        if at == NULL:
            raise RuntimeError(f"no room in the ring for {size} bytes, which was there")
        return at

    cdef void apply_credit(self, Message *m):
        """What the writer must know of it goes into the ring before the next message."""
        cdef const char *fault = NULL
        if self.state != OPEN:
            return
        self.last_was_request = True
        if m.kind == MESSAGE_OPEN_CREDIT:
            fault = self.compact.open(m.nonce, m.argument, m.strategy, m.strategy_size)
        elif m.kind == MESSAGE_ADD_CREDIT:
            fault = self.compact.add(m.credit, m.argument)
        else:
            self.compact.withdraw(m.credit)
        if fault != NULL:
            self.shut(CLOSE_POLICY, fault, True)

    cdef void apply_report(self, const uint8_t *data):
        """Write the record of the report that was scanned last; there is room for it."""
        cdef Packer packer = self.hub.packer
        cdef uint64_t size = packer.record_size()
        self.last_was_request = False
        if size > MAX_MESSAGE_IN:
            self.shut(CLOSE_TOO_BIG, b"a ReportChunks may have 63 MiB of outputs", True)
        elif packer.report.runs:
            packer.write_record(self.new_record(REC_REPORT, size), self.number, data)

    cdef void ask(self, Message *m):
        cdef Outstanding *request
        cdef Strategy *strategy = self.last_strategy
        cdef uint8_t[64] reply
        cdef uint8_t *end
        if self.state != OPEN:
            return
        self.last_was_request = True
        if m.argument == 0:
            end = put(put_sync(reply, m.nonce), b"\xa1\x6eChunksReserved\xa1\x63Err\x80", 22)
            self.send(OP_BINARY, reply, end - reply)
            count(self.hub.counters, RESERVATIONS_FAILED, 1)
            return
        if strategy == NULL or strategy.size != m.strategy_size or memcmp(
            strategy.canonical, m.strategy, m.strategy_size
        ):
            strategy = <Strategy *>malloc(sizeof(Strategy) + m.strategy_size)
            if strategy == NULL:
                raise MemoryError("no memory for a strategy")
            strategy.references = 1
            strategy.size = m.strategy_size
            memcpy(strategy.canonical, m.strategy, m.strategy_size)
            let_go(self.last_strategy)
            self.last_strategy = strategy
        request = request_new(&self.requests, self.parked)
        if request == NULL:
            raise MemoryError(f"no memory for {self.parked} requests")
        request.nonce = m.nonce
        request.max = <uint32_t>m.argument if m.argument < MAX_CHUNKS else MAX_CHUNKS
        request.since_ns = monotonic_ns()
        request.strategy = strategy
        strategy.references += 1
        self.parked += 1
        self.asked += request.max
        if not self.write_reserve(request):
            raise RuntimeError("no room in the ring for a request, which was there")

    cdef bint has_room(self, size_t size) noexcept:
        """For a message's record (or, if it will go in parts, for the first of them and with no other one under way)."""
        cdef Ring ring = self.hub.endpoint.outgoing
        if size > ring.largest:
            size = ring.largest
            if self.hub.sending_large is not None:
                self.need = ring.largest
                return False
        self.need = <uint32_t>size
        return ring.has_room(self.need)

    # --- the ring ---

    cdef bint serve_ring(self):
        """What must be in the ring before the next message. False: no room, or the writer does not know us yet."""
        cdef Endpoint endpoint = self.hub.endpoint
        cdef uint8_t *at
        cdef uint32_t sent
        cdef Outstanding *request
        cdef bint credits_due = self.compact is not None and self.compact.due
        if self.opened and self.large.size == 0 and self.releases is None and self.reissues is None and not credits_due:
            return True
        if not endpoint.connected:
            return False
        if not self.opened:
            self.need = sizeof(OpenRecord)
            at = endpoint.outgoing.reserve(REC_OPEN, sizeof(OpenRecord))
            if at == NULL:
                return False
            (<OpenRecord *>at).connection = self.number
            (<OpenRecord *>at).features = self.features
            (<OpenRecord *>at)._reserved = 0
            self.opened = True
        while self.large.size:
            self.need = endpoint.outgoing.largest
            sent = endpoint.send_part(
                self.large_stream, self.large_kind, self.large.data, <uint32_t>self.large.size, self.large_at
            )
            if sent == self.large_at:
                return False
            self.large_at = sent
            if sent == self.large.size:
                self.end_large()
        while self.releases:
            self.need = sizeof(ChunkRecord)
            at = endpoint.outgoing.reserve(REC_RELEASE, sizeof(ChunkRecord))
            if at == NULL:
                return False
            submission, chunk = self.releases.pop()
            (<ChunkRecord *>at).connection = self.number
            (<ChunkRecord *>at).submission = submission
            (<ChunkRecord *>at).chunk = chunk
            (<ChunkRecord *>at).argument = 0
            (<ChunkRecord *>at).flags = 0
            (<ChunkRecord *>at).tail_size = 0
        self.releases = None
        while self.reissues:
            request = request_find(&self.requests, self.reissues[0])
            if request != NULL and not self.write_reserve(request):
                return False
            self.reissues.pop(0)
        self.reissues = None
        return not credits_due or self.compact.pass_on(endpoint.outgoing, self.number, &self.need)

    cdef bint write_reserve(self, Outstanding *request) noexcept:
        cdef uint8_t *at
        cdef ReserveRecord *record
        self.need = <uint32_t>sizeof(ReserveRecord) + request.strategy.size
        at = self.hub.endpoint.outgoing.reserve(REC_RESERVE, self.need)
        if at == NULL:
            return False
        record = <ReserveRecord *>at
        record.connection = self.number
        record.nonce = request.nonce
        record.max = request.max
        record.strategy_size = request.strategy.size
        memcpy(at + sizeof(ReserveRecord), request.strategy.canonical, request.strategy.size)
        return True

    cdef void end_large(self):
        discard(&self.large)
        self.large_at = 0
        if self.hub.sending_large is self:
            self.hub.sending_large = None

    cdef void advance(self):
        """Go on with what was received, as far as possible."""
        cdef size_t used
        if self.parsing():
            used = self.consume(self.kept.data + self.kept.start, self.kept.size)
            if self.parsing() and used:
                take(&self.kept, used)
        self.settle()

    cdef void settle(self):
        """After anything that may have changed whether this connection goes on, waits or ends."""
        cdef bint wanted
        if self.state == GONE and not self.leaving and self.block != BLOCK_RING:
            self.leave(CLOSE_LOST)
            return
        if self.leaving and not self.left:
            self.try_leave()
        if (self.block == BLOCK_RING and not self.leaving) or (self.leaving and not self.left):
            self.hub.block(self)
        if self.transport is not None and self.state != GONE:
            # Who waits for answers may wait long: reading on, within bounds, shows at once when he has gone.
            wanted = (
                self.state == SHUT
                or self.block == BLOCK_NONE
                or (self.block == BLOCK_PARKED and self.kept.size < RECEIVE_SIZE)
            )
            if wanted != self.reading:
                self.reading = wanted
                if wanted:
                    self.transport.resume_reading()
                else:
                    self.transport.pause_reading()

    cdef void leave(self, uint32_t cause):
        """No more messages of this connection: tell the writer as soon as the ring takes it."""
        if self.leaving:
            return
        self.leaving = True
        self.cause = cause
        self.block = BLOCK_NONE
        self.hub.remove_beat(self)
        count(self.hub.counters, CONSUMERS_CONNECTED, -1)
        if cause == CLOSE_LOST:
            count(self.hub.counters, CONSUMERS_LOST, 1)
        discard(&self.kept)
        discard(&self.message)
        self.releases = None
        self.reissues = None
        self.deferred = None
        if self.compact is not None:
            self.compact.due = False
        self.settle()

    cdef void try_leave(self):
        cdef uint8_t *at
        if self.opened:
            if not self.serve_ring():
                return
            self.need = sizeof(CloseRecord)
            if not self.hub.endpoint.connected:
                return
            at = self.hub.endpoint.outgoing.reserve(REC_CLOSE, sizeof(CloseRecord))
            if at == NULL:
                return
            (<CloseRecord *>at).connection = self.number
            (<CloseRecord *>at).cause = self.cause
            (<CloseRecord *>at)._reserved = 0
        self.left = True
        self.hub.free_slot(self)

    # --- requests that wait for their answer ---

    cdef void answered(self, Outstanding *request):
        observe(self.hub.counters, HISTOGRAM_RESERVE, monotonic_ns() - request.since_ns)
        self.asked -= request.max
        request_answered(&self.requests, request)
        self.parked -= 1
        if self.block == BLOCK_PARKED and self.parked < MAX_PARKED // 2 and self.asked < MAX_ASKED // 2:
            self.hub.resumable.append(self)

    # --- answers ---

    cdef void reserved(self, ReservedRecord *record, ReservedChunk *chunks):
        """Build the reply; give back what cannot be in it."""
        cdef ConsumerHub hub = self.hub
        cdef Outstanding *request = request_find(&self.requests, record.nonce)
        cdef ReservedChunk *chunk
        cdef Description about
        cdef uint8_t *to
        cdef uint8_t *head
        cdef uint8_t[REPLY_HEADROOM] prefix
        cdef uint32_t i, count = 0
        cdef size_t size, room
        cdef bytes content
        if self.compact is not None:
            self.reserved_packed(record, chunks)
            return
        hub.scratch.size = REPLY_HEADROOM
        for i in range(record.count):
            chunk = &chunks[i]
            content = None
            about = hub.descriptions.get(chunk.submission) if request != NULL else None
            if about is not None and chunk.flags & CHUNK_IS_DIRECT:
                content = hub.direct_input(chunk.submission, chunk.chunk)
                if content is None:
                    about = None
            if about is None:
                self.give_back(chunk)
                continue
            room = CHUNK_ROOM + PyBytes_GET_SIZE(about.before) + PyBytes_GET_SIZE(about.after)
            if content is not None:
                room += PyBytes_GET_SIZE(content)
            if count and hub.scratch.size + room > MAX_REPLY:
                for i in range(i, record.count):
                    self.give_back(&chunks[i])
                break
            ensure(&hub.scratch, room)
            head = hub.scratch.data + hub.scratch.size
            to = put_chunk_id(put(head, b"\x82\xa4", 2), chunk.submission, chunk.chunk)
            to = put(to, b"\x6dinput_content", 14)
            if content is None:
                to[0] = CBOR_NULL
                to += 1
            else:
                to += write_head(to, MAJOR_BYTES, PyBytes_GET_SIZE(content))
                to = put(to, PyBytes_AS_STRING(content), PyBytes_GET_SIZE(content))
            to = put_unsigned(put(to, b"\x67retries", 8), chunk.retries)
            to = put(to, PyBytes_AS_STRING(about.before), PyBytes_GET_SIZE(about.before))
            to = put_unsigned(to, chunk.chunks_done)
            to = put(to, PyBytes_AS_STRING(about.after), PyBytes_GET_SIZE(about.after))
            hub.scratch.size += to - head
            count += 1
        if request == NULL:
            self.advance()
            return
        if count == 0:
            hub.loop.call_later(REISSUE_S, self.reissue, record.nonce)
            self.advance()
            return
        to = put(put_sync(prefix, record.nonce), b"\xa1\x6eChunksReserved\xa1\x62Ok", 20)
        to += write_head(to, MAJOR_ARRAY, count)
        self.send_reply(prefix, to - prefix)
        self.answered(request)
        if self.releases is not None:
            self.advance()

    cdef void send_reply(self, const uint8_t *prefix, size_t size):
        """Send `prefix` and what stands in the scratch behind the room for it."""
        cdef ConsumerHub hub = self.hub
        cdef uint8_t *head = hub.scratch.data + REPLY_HEADROOM - size
        memcpy(head, prefix, size)
        self.send(OP_BINARY, head, hub.scratch.size - REPLY_HEADROOM + size)
        if hub.scratch.capacity > MAX_REPLY // 8:
            discard(&hub.scratch)
            ensure(&hub.scratch, RECEIVE_SIZE)

    cdef void reserved_packed(self, ReservedRecord *record, ReservedChunk *chunks):
        """The same for a peer with the feature compact; of a credit, what cannot be in the reply is granted again."""
        cdef ConsumerHub hub = self.hub
        cdef Outstanding *request = NULL
        cdef Credit *credit = NULL
        cdef uint8_t[REPLY_HEADROOM] prefix
        cdef uint8_t *to
        cdef uint32_t i, groups = 0
        cdef list returned = []
        if record.flags & RESERVED_ON_CREDIT:
            credit = self.compact.find(record.nonce)
        else:
            request = request_find(&self.requests, record.nonce)
        hub.scratch.size = REPLY_HEADROOM
        if credit != NULL or request != NULL:
            groups = hub.packer.pack(
                self.compact, hub.descriptions, hub.direct_input, chunks, record.count, MAX_REPLY, &hub.scratch, returned
            )
        else:
            for i in range(record.count):
                returned.append((chunks[i].submission, chunks[i].chunk))
        if returned:
            self.releases = returned if self.releases is None else self.releases + returned
        if groups:
            to = put(put_sync(prefix, record.nonce), b"\xa1\x6cPackedChunks", 14)
            to += write_head(to, MAJOR_ARRAY, groups)
            self.send_reply(prefix, to - prefix)
        if credit != NULL:
            self.compact.used(credit, record.count, <uint32_t>len(returned), groups == 0)
            if groups == 0:
                hub.loop.call_later(REISSUE_S, self.reissue_credits)
        elif groups:
            self.answered(request)
        elif request != NULL:
            hub.loop.call_later(REISSUE_S, self.reissue, record.nonce)
        if self.releases is not None or self.compact.due:
            self.advance()

    def reissue_credits(self) -> None:
        """As `reissue`, for what was used of a credit."""
        if self.state == OPEN and not self.leaving:
            self.compact.due = True
            self.advance()
            self.hub.endpoint.flush()
            self.hub.flush_out()

    cdef void withdrawn(self, WithdrawnRecord *record):
        cdef uint8_t[REPLY_HEADROOM] reply
        cdef uint8_t *end
        cdef Credit *credit = self.compact.find(record.nonce) if self.compact is not None else NULL
        if credit != NULL:
            end = put(put_sync(reply, record.nonce), b"\xa1\x6fCreditWithdrawn\xa1\x64left", 23)
            end = put_unsigned(end, credit.left + record.left)
            self.compact.remove(credit)
            self.send(OP_BINARY, reply, end - reply)

    cdef void give_back(self, ReservedChunk *chunk):
        if self.releases is None:
            self.releases = []
        self.releases.append((chunk.submission, chunk.chunk))

    def reissue(self, uint64_t nonce) -> None:
        """Ask the writer again for a request that it has answered with chunks that nobody can describe."""
        if self.state != OPEN or self.leaving:
            return
        if self.reissues is None:
            self.reissues = []
        self.reissues.append(nonce)
        self.advance()
        self.hub.endpoint.flush()
        self.hub.flush_out()

    cdef void refused(self, RefusedRecord *record, const uint8_t *reason):
        cdef Outstanding *request = request_find(&self.requests, record.nonce)
        cdef Credit *credit = NULL
        if record.flags & RESERVED_ON_CREDIT:
            credit = self.compact.find(record.nonce)
            if credit == NULL:
                return
            self.compact.remove(credit)
        elif request != NULL:
            self.answered(request)
        else:
            return
        self.refuse(record.nonce, <bytes>reason[:record.size])

    cdef void refuse(self, uint64_t nonce, bytes reason):
        cdef uint8_t[128] head
        cdef uint8_t *to
        cdef bytes reply
        if not self.features & FEATURE_REFUSAL:
            self.shut(CLOSE_POLICY, reason, True)
            return
        to = put(put_sync(head, nonce), b"\xa1\x72ReservationRefused\xa1\x66reason", 28)
        to += write_head(to, MAJOR_TEXT, PyBytes_GET_SIZE(reason))
        reply = PyBytes_FromStringAndSize(<char *>head, to - head) + reason
        self.send(OP_BINARY, <const uint8_t *>PyBytes_AS_STRING(reply), PyBytes_GET_SIZE(reply))

    cdef void dropped(self, DroppedRecord *record):
        """A chunk that this connection held is no longer its own. A peer hears of it once, in the newest form it knows."""
        cdef uint8_t[128] reply
        cdef uint8_t *to
        cdef bytes reason
        if self.features & FEATURE_DROPPED:
            reason = DROP_TEXTS.get(record.reason, b"failed")
            to = put(reply, b"\xa1\x65Async\xa1\x6cChunkDropped\xa3", 22)
            to = put(put_chunk_id(to, record.submission, record.chunk), b"\x66reason", 7)
            to += write_head(to, MAJOR_TEXT, PyBytes_GET_SIZE(reason))
            to = put(to, PyBytes_AS_STRING(reason), PyBytes_GET_SIZE(reason))
        elif record.reason == DROP_EXPIRED:
            to = put(reply, b"\xa1\x65Async\xa1\x77ChunkReservationExpired\xa2", 33)
            to = put_chunk_id(to, record.submission, record.chunk)
        else:
            return
        self.send(OP_BINARY, reply, to - reply)

    # --- writing ---

    cdef void send(self, uint8_t opcode, const uint8_t *payload, size_t size):
        """Add a message to what is written at the end of this wake-up."""
        cdef size_t part
        cdef uint8_t *at
        if self.state != OPEN:
            return
        while True:
            part = size if size < MAX_FRAME_OUT else MAX_FRAME_OUT
            ensure(&self.out, part + MAX_HEADER)
            at = self.out.data + self.out.start + self.out.size
            at += write_frame_header(at, opcode, part == size, part)
            memcpy(at, payload, part)
            self.out.size = at + part - self.out.data - self.out.start
            size -= part
            if size == 0:
                break
            payload += part
            opcode = OP_CONTINUATION
        if not self.touched:
            self.touched = True
            self.hub.touched.append(self)

    cdef void write_out(self):
        cdef bytes data
        if self.out.size and self.transport is not None:
            count(self.hub.counters, BYTES_SENT, self.out.size)
            data = PyBytes_FromStringAndSize(<char *>self.out.data + self.out.start, self.out.size)
            discard(&self.out)
            self.transport.write(data)

    cdef void ping(self):
        self.send(OP_PING, <const uint8_t *>PyBytes_AS_STRING(HEARTBEAT), PyBytes_GET_SIZE(HEARTBEAT))

    cdef void tick(self):
        """One heartbeat. The count of missed ones stands still while we do not read."""
        if not self.reading:
            if not self.writing_paused:
                self.ping()
        elif self.missed > self.hub.max_missable:
            self.shut(CLOSE_POLICY, b"no frame came for %d heartbeats" % self.missed, True)
        else:
            self.missed += 1
            self.ping()

    cdef void shut(self, uint32_t code, bytes reason, bint rejected):
        """Close from our side: a close frame, the end of our stream, and no more reading but to the end of the peer's."""
        cdef uint8_t[MAX_CONTROL] payload
        cdef size_t size
        if self.state != OPEN:
            # Nobody is there to be told; what came after the fault is not applied.
            if not self.leaving:
                self.leave(CLOSE_LOST)
            return
        payload[0] = <uint8_t>(code >> 8)
        payload[1] = <uint8_t>code
        size = cut_utf8(<const uint8_t *>PyBytes_AS_STRING(reason), PyBytes_GET_SIZE(reason), MAX_CONTROL - 2)
        memcpy(payload + 2, PyBytes_AS_STRING(reason), size)
        self.send(OP_CLOSE, payload, size + 2)
        if rejected:
            count(self.hub.counters, CONSUMERS_REJECTED, 1)
        self.write_out()
        self.state = SHUT
        self.leave(CLOSE_CLEAN)
        if self.transport is not None and not self.transport.is_closing():
            # Closing at once would reset the connection if the peer has sent more, and it would not see why.
            self.transport.write_eof()
            self.hub.loop.call_later(LINGER_S, self.end_transport)

    def end_transport(self) -> None:
        """Close the TCP connection once what was written is out; nothing is waited for."""
        if self.transport is not None:
            self.transport.close()


cdef class ConsumerHub:
    """All consumers of one front-end.

    `describe(submission)` gives a submission's CBOR map before and after the value of chunks_done, None when there is
    no such submission; `direct_input(submission, chunk)` an input's bytes or None; `decode(message)` is the general
    decoder: (kind, nonce, submission, chunk, argument, content), kind 0 for a request to refuse with content as its
    reason; ValueError for what is no message.
    """

    def __cinit__(
        self,
        Endpoint endpoint not None,
        Board board not None,
        uint32_t slot,
        loop,
        describe,
        direct_input,
        decode,
        *,
        double heartbeat_interval,
        uint32_t max_missable,
        size_t failure_limit=64 * 1024,
        size_t description_limit=64 * 1024 * 1024,
    ):
        self.endpoint = endpoint
        self.board = board
        self.counters = board.counters(slot)
        self.loop = loop
        self.descriptions = DescriptionCache(describe, description_limit)
        self.direct_input = direct_input
        self.packer = Packer()
        self.decode = decode
        self.heartbeat_interval = heartbeat_interval
        self.max_missable = max_missable
        self.failure_limit = failure_limit
        self.slots = []
        self.generations = []
        self.free_slots = []
        self.touched = []
        self.resumable = []
        self.transports = set()
        self.blocked = deque()
        receive = bytearray(RECEIVE_SIZE)
        self.receive_view = memoryview(receive)
        self.receive_buffer = <uint8_t *><char *>receive
        ensure(&self.scratch, RECEIVE_SIZE)

    def __dealloc__(self):
        discard(&self.scratch)

    # --- connections ---

    def enter(self, ConsumerConnection connection not None) -> None:
        """Give the connection its number, and its first place among the heartbeats."""
        cdef uint64_t slot
        if self.free_slots:
            slot = self.free_slots.pop()
        else:
            slot = len(self.slots)
            self.slots.append(None)
            self.generations.append(0)
        generation = self.generations[slot] % 0xFFFFFF + 1
        self.generations[slot] = generation
        connection.number = <uint64_t>generation << 32 | slot
        self.slots[slot] = connection
        count(self.counters, CONSUMERS_OPENED, 1)
        count(self.counters, CONSUMERS_CONNECTED, 1)
        self.append_beat(connection)

    cdef void free_slot(self, ConsumerConnection connection):
        cdef uint32_t slot = <uint32_t>connection.number
        self.slots[slot] = None
        self.free_slots.append(slot)

    cdef ConsumerConnection by_number(self, uint64_t number):
        cdef uint32_t slot = <uint32_t>number
        cdef ConsumerConnection connection
        if slot >= <size_t>len(self.slots):
            return None
        connection = <ConsumerConnection>self.slots[slot]
        if connection is None or connection.number != number:
            return None
        return connection

    @property
    def connections(self) -> list:
        """Those that have not ended."""
        return [connection for connection in self.slots if connection is not None]

    @property
    def connected(self) -> int:
        """Consumers' connections that are open, or end as soon as the ring takes their end."""
        return len(self.slots) - len(self.free_slots)

    @property
    def open_transports(self) -> int:
        """Connections, also those that we have shut, whose TCP connection has not ended."""
        return len(self.transports)

    @property
    def blocked_connections(self) -> int:
        """Connections that wait for room in the ring."""
        return len(self.blocked)

    def shut_all(self, uint32_t code, bytes reason not None) -> None:
        """Send every consumer a close frame and end its stream."""
        cdef ConsumerConnection connection
        for connection in self.connections:
            if connection.state == OPEN:
                connection.shut(code, reason, False)
        self.endpoint.flush()
        self.flush_out()

    def writer_gone(self) -> None:
        """A new writer has started: it knows no consumer, and nothing of what was sent to its predecessor."""
        cdef ConsumerConnection connection
        for connection in self.connections:
            if connection.large.size:
                connection.end_large()
            connection.opened = False
            if connection.leaving:
                connection.settle()
        self.shut_all(1012, b"the server's writer was replaced; connect again")

    # --- records from the writer ---

    cdef void handle(self, uint32_t kind, uint8_t *payload, uint32_t size):
        """REC_RESERVED, REC_REFUSED, REC_WITHDRAWN and REC_DROPPED; replies that are not large are written by flush_out."""
        cdef ConsumerConnection connection
        cdef ReservedRecord *reserved
        if size < 16:
            raise BadRecordError(f"a record of kind {kind} with {size} bytes")
        connection = self.by_number((<uint64_t *>payload)[0])   # every kind's first field
        if connection is None or connection.state != OPEN:
            return   # the writer frees what it held when it reads REC_CLOSE
        if connection.writing_paused:
            if connection.deferred is None:
                connection.deferred = []
            connection.deferred.append((kind, PyBytes_FromStringAndSize(<char *>payload, size)))
            return
        if kind == REC_RESERVED:
            reserved = <ReservedRecord *>payload
            if size < sizeof(ReservedRecord) or size != sizeof(ReservedRecord) + reserved.count * sizeof(ReservedChunk):
                raise BadRecordError(f"a reservation's record of {size} bytes")
            connection.reserved(reserved, <ReservedChunk *>(payload + sizeof(ReservedRecord)))
        elif kind == REC_REFUSED:
            if size < sizeof(RefusedRecord) or size != sizeof(RefusedRecord) + (<RefusedRecord *>payload).size:
                raise BadRecordError(f"a refusal's record of {size} bytes")
            connection.refused(<RefusedRecord *>payload, payload + sizeof(RefusedRecord))
        elif kind == REC_WITHDRAWN:
            if size != sizeof(WithdrawnRecord):
                raise BadRecordError(f"the end of a credit in {size} bytes")
            connection.withdrawn(<WithdrawnRecord *>payload)
        elif kind == REC_DROPPED:
            if size != sizeof(DroppedRecord):
                raise BadRecordError(f"a notice's record of {size} bytes")
            connection.dropped(<DroppedRecord *>payload)
        else:
            raise BadRecordError(f"a record of the unknown kind {kind}")
        if connection.out.size >= WRITE_AT_ONCE:
            # Its peer may not read: that must show before more of its answers, of up to 8 MiB each, are built.
            connection.write_out()

    cdef void flush_out(self):
        """One write for each connection that has something to say."""
        cdef ConsumerConnection connection
        while self.resumable:
            connection = <ConsumerConnection>self.resumable.pop()
            if connection.block == BLOCK_PARKED:
                connection.advance()
        if self.touched:
            touched = self.touched
            self.touched = []
            for connection in touched:
                connection.touched = False
                try:
                    connection.write_out()
                except Exception as error:
                    connection.fail(error)

    # --- back-pressure ---

    cdef void block(self, ConsumerConnection connection):
        if not connection.queued:
            connection.queued = True
            self.blocked.append(connection)
        cdef uint64_t one = 1
        self.endpoint.flush()
        if not self.retrying and self.await_room():
            write(self.endpoint.own_wake, &one, 8)

    cdef bint await_room(self):
        """Ask for a signal when the first that waits can go on; True: it can now."""
        cdef ConsumerConnection connection
        if not self.blocked or not self.endpoint.connected:
            return False
        connection = self.sending_large if self.sending_large is not None else self.blocked[0]
        return self.endpoint.outgoing.wait_for_room(connection.need)

    cdef void retry_blocked(self):
        """Let those go on that waited for the ring; in their order."""
        cdef ConsumerConnection connection
        cdef Py_ssize_t left = len(self.blocked)
        self.retrying = True
        try:
            while left > 0:
                left -= 1
                connection = <ConsumerConnection>self.blocked.popleft()
                connection.queued = False
                try:
                    connection.advance()
                except Exception as error:
                    connection.fail(error)
        finally:
            self.retrying = False

    # --- heartbeats ---

    cdef void append_beat(self, ConsumerConnection connection):
        connection.deadline = self.loop.time() + self.heartbeat_interval
        connection.earlier = self.last
        connection.later = None
        if self.last is None:
            self.first = connection
        else:
            self.last.later = connection
        self.last = connection
        if self.timer is None:
            self.timer = self.loop.call_at(connection.deadline, self.beat)

    cdef void remove_beat(self, ConsumerConnection connection):
        if connection.earlier is not None:
            connection.earlier.later = connection.later
        elif self.first is connection:
            self.first = connection.later
        else:
            return
        if connection.later is not None:
            connection.later.earlier = connection.earlier
        else:
            self.last = connection.earlier
        connection.earlier = connection.later = None

    def beat(self) -> None:
        """Heartbeats that are due, those of the next moments with them; one timer for all."""
        cdef ConsumerConnection connection
        cdef double until = self.loop.time() + min(0.05, self.heartbeat_interval / 64)
        self.timer = None
        while self.first is not None and self.first.deadline <= until:
            connection = self.first
            self.remove_beat(connection)
            try:
                connection.tick()
            except Exception as error:
                connection.fail(error)
            if connection.state == OPEN:
                self.append_beat(connection)
        self.endpoint.flush()
        self.flush_out()
        if self.timer is None and self.first is not None:
            self.timer = self.loop.call_at(self.first.deadline, self.beat)

    def stop(self) -> None:
        """No more heartbeats; close what is still open."""
        cdef ConsumerConnection connection
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None
        for connection in list(self.transports):
            connection.end_transport()

    # --- for tests and tools ---

    def handle_record(self, uint32_t kind, bytes payload not None) -> None:
        """One record from the writer, and the writes that follow from it."""
        self.handle(kind, <uint8_t *>PyBytes_AS_STRING(payload), <uint32_t>len(payload))
        self.flush_out()
        self.endpoint.flush()

"""Consumers' connections of one front-end: WebSocket frames in, ring records out; ring records in, replies out.

Bytes go from the receive buffer into the ring and from the ring into one write per connection, without a Python object
per message. What is unusual goes through opsqueue.protocol.consumer. Knows nothing of HTTP; decides nothing about chunks.
"""

from libc.stdint cimport uint8_t, uint32_t, uint64_t

from opsqueue._speedups.buffers cimport Bytes
from opsqueue._speedups.compact cimport CompactPeer, Packer
from opsqueue._speedups.consumer_messages cimport Message
from opsqueue._speedups.descriptions cimport DescriptionCache
from opsqueue._speedups.outstanding cimport Outstanding, Requests, Strategy
from opsqueue._speedups.records cimport DroppedRecord, RefusedRecord, ReservedChunk, ReservedRecord, WithdrawnRecord
from opsqueue._speedups.ring cimport Endpoint


cdef enum ConnectionState:
    OPEN = 0
    SHUT = 1                      # a close frame has been sent, nothing is read any more
    GONE = 2                      # the transport has ended


cdef enum Block:                  # why nothing more is parsed now
    BLOCK_NONE = 0
    BLOCK_RING = 1                # the ring to the writer is full, or the writer does not know us yet
    BLOCK_PARKED = 2              # too many requests wait for their answer
    BLOCK_WRITING = 3             # the peer does not read what we write


cdef class ConsumerConnection:
    cdef ConsumerHub hub
    cdef object transport
    cdef object on_end            # called with connection_lost's argument
    cdef int fd
    # identity
    cdef readonly uint64_t number # generation << 32 | slot
    cdef readonly uint32_t features
    # state
    cdef int state
    cdef int block
    cdef uint32_t need            # bytes of room in the ring that it is blocked for
    cdef uint32_t cause           # CloseCause
    cdef bint opened              # REC_OPEN is in the ring
    cdef bint leaving             # REC_CLOSE is due as soon as what was received is in the ring
    cdef bint left                # REC_CLOSE is in the ring, the slot is free
    cdef bint queued              # in hub.blocked
    cdef bint touched             # in hub.touched
    cdef bint reading
    cdef bint writing_paused
    cdef bint last_was_request    # the last message of this receive was a WantToReserveChunks
    # heartbeat, in the hub's list ordered by deadline
    cdef uint32_t missed
    cdef double deadline
    cdef ConsumerConnection earlier
    cdef ConsumerConnection later
    # received, not parsed
    cdef Bytes kept
    cdef Bytes message            # unmasked fragments of an unfinished message
    cdef bint fragmented
    # a record in parts
    cdef Bytes large
    cdef uint32_t large_kind
    cdef uint32_t large_at
    cdef uint64_t large_stream
    # to be written
    cdef Bytes out
    # requests
    cdef Requests requests
    cdef readonly uint32_t parked # unanswered
    cdef uint64_t asked           # chunks that those ask for
    cdef Strategy *last_strategy
    cdef list deferred            # records that came while the peer did not read
    cdef list releases            # (submission, chunk) to give back
    cdef list reissues            # nonces to ask for again
    cdef CompactPeer compact      # None without the feature

    # reading
    cdef size_t consume(self, uint8_t *data, size_t size)
    cdef bint take_frame(self, uint8_t *payload, size_t size, uint8_t opcode, bint fin, uint32_t mask)
    cdef void take_control(self, uint8_t *payload, size_t size, uint8_t opcode)
    cdef void take_message(self, uint8_t *data, size_t size)
    cdef void take_unusual(self, const uint8_t *data, size_t size, Message *m)
    cdef void apply(self, Message *m, const uint8_t *end)
    cdef void apply_credit(self, Message *m)
    cdef void apply_report(self, const uint8_t *data)
    cdef uint8_t *new_record(self, uint32_t kind, size_t size) except NULL
    cdef void ask(self, Message *m)
    cdef bint has_room(self, size_t size) noexcept
    cdef bint parsing(self) noexcept
    # the ring
    cdef bint serve_ring(self)
    cdef bint write_reserve(self, Outstanding *request) noexcept
    cdef void end_large(self)
    cdef void advance(self)
    cdef void settle(self)
    cdef void leave(self, uint32_t cause)
    cdef void try_leave(self)
    # answers
    cdef void answered(self, Outstanding *request)
    cdef void reserved(self, ReservedRecord *record, ReservedChunk *chunks)
    cdef void reserved_packed(self, ReservedRecord *record, ReservedChunk *chunks)
    cdef void withdrawn(self, WithdrawnRecord *record)
    cdef void send_reply(self, const uint8_t *prefix, size_t size)
    cdef void refused(self, RefusedRecord *record, const uint8_t *reason)
    cdef void dropped(self, DroppedRecord *record)
    cdef void refuse(self, uint64_t nonce, bytes reason)
    cdef void give_back(self, ReservedChunk *chunk)
    # writing
    cdef void send(self, uint8_t opcode, const uint8_t *payload, size_t size)
    cdef void fail(self, error)
    cdef void write_out(self)
    cdef void ping(self)
    cdef void tick(self)
    cdef void shut(self, uint32_t code, bytes reason, bint rejected)


cdef class ConsumerHub:
    # settings
    cdef readonly double heartbeat_interval
    cdef readonly uint32_t max_missable
    cdef readonly size_t failure_limit
    # the front-end
    cdef readonly Endpoint endpoint
    cdef uint64_t *counters
    cdef object board             # keeps the counters mapped
    cdef object loop
    cdef object direct_input
    cdef object decode
    # connections
    cdef list slots               # ConsumerConnection or None
    cdef list generations
    cdef list free_slots
    cdef list touched             # have something to write
    cdef list resumable           # were blocked by their own requests
    cdef set transports           # ConsumerConnections whose TCP connection has not ended
    cdef object blocked           # a deque, first come first served
    cdef bint retrying            # the blocked ones are being let on
    cdef ConsumerConnection sending_large
    # heartbeats
    cdef ConsumerConnection first
    cdef ConsumerConnection last
    cdef object timer
    # one buffer for all receives
    cdef object receive_view
    cdef uint8_t *receive_buffer
    # replies
    cdef Bytes scratch
    cdef DescriptionCache descriptions
    cdef Packer packer

    cdef void handle(self, uint32_t kind, uint8_t *payload, uint32_t size)
    cdef void flush_out(self)
    cdef void retry_blocked(self)
    cdef void block(self, ConsumerConnection connection)
    cdef bint await_room(self)
    cdef ConsumerConnection by_number(self, uint64_t number)
    cdef void free_slot(self, ConsumerConnection connection)
    cdef void append_beat(self, ConsumerConnection connection)
    cdef void remove_beat(self, ConsumerConnection connection)

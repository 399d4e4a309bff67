"""Rings: single-producer single-consumer byte rings in shared memory, and the channel that joins two processes.

docs/records.md states the memory layout. A Ring moves records in one direction; an Endpoint is one process's side of a
Channel (two rings): it adds epochs (restarts), wake-ups and fragments.
"""

from libc.stdint cimport uint8_t, uint32_t, uint64_t


cdef struct RingHeader:       # the first page of a ring's memory; each group has cache lines of its own
    # written once, at creation
    uint64_t magic
    uint64_t capacity         # bytes of data, a power of two, a multiple of the page size
    uint64_t _line0[6]
    # written by the producer
    uint64_t tail             # bytes ever published
    uint64_t producer_epoch   # raised by every producer that starts
    uint64_t start            # position from which records are meant for the consumer that started last
    uint64_t _line1[5]
    # written by the consumer
    uint64_t head             # bytes ever released
    uint64_t consumer_seen    # the producer's epoch that the consumer has acknowledged
    uint64_t _line2[6]
    # written by both
    uint32_t consumer_sleeps  # 1: signal the consumer when something is published
    uint32_t producer_waits   # 1: signal the producer when room has been made
    uint64_t _line3[7]


cdef class Ring:              # one direction
    cdef RingHeader *header
    cdef uint8_t *data        # mapped twice in a row, so that no record wraps
    cdef readonly uint64_t capacity
    cdef uint64_t mask
    cdef readonly uint32_t largest  # payload bytes of the largest unfragmented record: a quarter of the ring
    # the producer's private view
    cdef uint64_t write_at    # end of the records written so far, published or not
    cdef uint64_t head_seen   # the consumer's head when it was last read
    # the consumer's private view
    cdef uint64_t read_at     # end of the records read so far, released or not
    cdef uint64_t tail_seen   # the producer's tail when it was last read

    # producer: reserve and fill any number of records, then publish them together
    cdef uint8_t *reserve(self, uint32_t kind, uint32_t size) noexcept nogil   # payload to fill; NULL: full
    cdef bint has_room(self, uint32_t size) noexcept nogil                     # for one record of `size`
    cdef bint publish(self) noexcept nogil                                     # True: the consumer must be signalled
    cdef bint wait_for_room(self, uint32_t size) noexcept nogil                # ask for a signal; True: there is room now
    # consumer: take any number of records, then release them together
    cdef int next(self, uint32_t *kind, uint8_t **payload, uint32_t *size) noexcept nogil  # 1; 0: none; -1: bad ring
    cdef bint release(self) noexcept nogil                                     # True: the producer must be signalled
    cdef bint is_empty(self) noexcept nogil
    cdef bint sleep(self) noexcept nogil                                       # ask for a signal; False: not empty, go on
    cdef void wake(self) noexcept nogil                                        # take that back


cdef class Channel:           # made by the supervisor before it forks
    cdef readonly Ring up     # front-end to writer
    cdef readonly Ring down   # writer to front-end
    cdef readonly int writer_wake    # eventfd that the writer sleeps on
    cdef readonly int frontend_wake  # eventfd that the front-end sleeps on


cdef enum EpochEvents:
    PEER_RESTARTED = 1        # the other side has started again: forget what was asked of it
    CONNECTED = 2             # the other side knows us: records flow


cdef class Endpoint:          # one process's side of a channel
    cdef readonly Channel channel
    cdef readonly Ring incoming
    cdef readonly Ring outgoing
    cdef readonly int own_wake
    cdef readonly int peer_wake
    cdef readonly bint connected
    cdef dict partial         # stream -> (kind, bytearray, bytes received)
    cdef uint64_t partial_bytes
    cdef uint64_t next_stream
    cdef object assembled     # keeps the last reassembled record alive until the next receive

    cdef int poll_epochs(self) noexcept                                        # EpochEvents; call before receiving
    cdef void accept_peer(self) noexcept nogil
    cdef int take_fragment(self, uint32_t *kind, uint8_t **payload, uint32_t *size)
    cdef int receive(self, uint32_t *kind, uint8_t **payload, uint32_t *size)  # as Ring.next; -1: bad ring
    cdef void done_receiving(self) noexcept nogil                              # release, and signal if asked to
    cdef void flush(self) noexcept nogil                                       # publish, and signal if the peer sleeps
    cdef uint64_t new_stream(self) noexcept nogil
    cdef uint32_t send_part(self, uint64_t stream, uint32_t kind, const uint8_t *payload,
                            uint32_t total, uint32_t offset) noexcept nogil    # new offset; unchanged: no room

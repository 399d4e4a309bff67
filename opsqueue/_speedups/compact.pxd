"""Compact messages of consumers' connections: replies packed by submission, credits, reports unpacked into records.

Owns what a connection with the feature `compact` remembers. Writes no socket: the connection that it belongs to does.
"""

from libc.stdint cimport uint8_t, uint32_t, uint64_t

from opsqueue._speedups.buffers cimport Bytes
from opsqueue._speedups.descriptions cimport DescriptionCache
from opsqueue._speedups.packed cimport Report
from opsqueue._speedups.records cimport ReservedChunk
from opsqueue._speedups.ring cimport Ring


cdef enum:
    RECENT = 64                   # descriptions that a peer remembers; docs/protocol.md
    MAX_CREDITS = 16              # of one connection
    MAX_CREDIT = 65536            # chunks of one credit
    WINDOW = 1024                 # chunks of a credit that the writer may use before we say more


cdef struct Credit:
    uint64_t nonce                # its name
    uint8_t *strategy             # canonical; NULL: the writer knows it
    uint32_t strategy_size
    uint32_t left                 # granted and not passed on to the writer
    uint32_t passed_on            # and not used by it
    bint withdrawn                # by the peer
    bint told                     # of that, the writer is


cdef class CompactPeer:           # of one connection
    # submissions whose description was sent last, in the order of sending
    cdef uint64_t[RECENT] recent
    cdef uint32_t recent_count
    cdef uint32_t recent_at       # where the next goes
    # credits
    cdef Credit[MAX_CREDITS] credits
    cdef uint32_t credit_count
    cdef bint due                 # the writer is to be told of some

    cdef bint remembers(self, uint64_t submission) noexcept nogil
    cdef void remember(self, uint64_t submission) noexcept nogil
    cdef Credit *find(self, uint64_t nonce) noexcept nogil
    cdef const char *open(self, uint64_t nonce, uint64_t chunks, const uint8_t *strategy, uint32_t size)
    cdef const char *add(self, uint64_t nonce, uint64_t chunks) noexcept
    cdef bint withdraw(self, uint64_t nonce) noexcept
    cdef void used(self, Credit *credit, uint32_t passed_on, uint32_t given_back, bint later) noexcept
    cdef void remove(self, Credit *credit) noexcept
    cdef bint pass_on(self, Ring ring, uint64_t connection, uint32_t *need) noexcept


cdef class Packer:                # of one front-end: buffers that all its connections use in turn
    cdef Bytes runs               # of the group that is being packed
    cdef Bytes retries
    cdef Bytes inputs
    cdef Report report

    cdef uint32_t pack(self, CompactPeer peer, DescriptionCache descriptions, direct_input, ReservedChunk *chunks,
                       uint32_t count, size_t limit, Bytes *to, list returned) except? 0xFFFFFFFF
    cdef bint scan(self, const uint8_t *data, size_t size, size_t text_limit) noexcept
    cdef uint64_t record_size(self) noexcept
    cdef void write_record(self, uint8_t *at, uint64_t connection, const uint8_t *data) noexcept

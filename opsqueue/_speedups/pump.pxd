"""The front-end's end of its channel: takes what the writer sends, hands it on, sends the cold requests.

One wake-up drains the ring, lets the consumers' replies out, lets on who waited for room. Reads no record but REC_REPLY.
"""

from libc.stdint cimport uint64_t

from opsqueue._speedups.consumer cimport ConsumerHub
from opsqueue._speedups.ring cimport Endpoint


cdef class FrontendPump:
    cdef readonly Endpoint endpoint
    cdef readonly ConsumerHub hub
    cdef object loop
    cdef object on_reply          # (request, payload bytes)
    cdef object on_writer_restart
    cdef object on_broken         # the ring cannot be trusted: this process must end
    cdef uint64_t *counters
    cdef object board             # keeps the counters mapped
    cdef bint running
    cdef int unflushed            # requests that are written and not yet published
    cdef bint was_connected       # something may have been sent to the writer that was there
    # requests that go in parts, one after the other
    cdef object large             # a deque of [bytes of the whole record, offset]
    cdef uint64_t large_stream
    cdef Py_ssize_t large_bytes
    # who waits for room
    cdef list waiting             # futures
    cdef uint64_t wanted          # bytes of the largest request that found none

    cdef bint drain(self)
    cdef void send_large(self)
    cdef void let_on(self)
    cdef bint prepare_to_sleep(self)

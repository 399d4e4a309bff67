"""A connection's reserve requests that are not answered, in the order of their arrival. Inline functions only."""

from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free


cdef struct Strategy:             # shared by the requests that ask for it
    uint32_t references
    uint32_t size
    uint8_t[1] canonical          # `size` of them


cdef struct Outstanding:          # a reserve request that is not answered
    uint64_t nonce
    uint64_t since_ns             # CLOCK_MONOTONIC
    Strategy *strategy            # NULL: answered
    uint32_t max


cdef struct Requests:             # a ring buffer
    Outstanding *at
    uint32_t capacity             # a power of two, or 0
    uint32_t first
    uint32_t used                 # answered ones between unanswered ones too


cdef inline void let_go(Strategy *strategy) noexcept nogil:
    if strategy != NULL:
        strategy.references -= 1
        if strategy.references == 0:
            free(strategy)


cdef inline Outstanding *request_at(Requests *r, uint32_t i) noexcept nogil:
    """The one of place `i` from the first."""
    return &r.at[(r.first + i) & (r.capacity - 1)]


cdef inline void requests_close(Requests *r) noexcept nogil:
    cdef uint32_t i
    for i in range(r.used):
        let_go(request_at(r, i).strategy)
    free(r.at)


cdef inline Outstanding *request_new(Requests *r, uint32_t unanswered) noexcept nogil:
    """Room for another one; NULL: no memory. `unanswered`: how many there are."""
    cdef uint32_t capacity, i, kept = 0
    cdef Outstanding *grown
    if r.used == r.capacity:
        capacity = 4
        while capacity < 2 * unanswered + 2:
            capacity *= 2
        grown = <Outstanding *>calloc(capacity, sizeof(Outstanding))
        if grown == NULL:
            return NULL
        for i in range(r.used):
            if request_at(r, i).strategy != NULL:
                grown[kept] = request_at(r, i)[0]
                kept += 1
        free(r.at)
        r.at = grown
        r.capacity = capacity
        r.first = 0
        r.used = kept
    r.used += 1
    return request_at(r, r.used - 1)


cdef inline Outstanding *request_find(Requests *r, uint64_t nonce) noexcept nogil:
    """NULL: none that is unanswered."""
    cdef uint32_t i
    cdef Outstanding *request
    for i in range(r.used):
        request = request_at(r, i)
        if request.nonce == nonce and request.strategy != NULL:
            return request
    return NULL


cdef inline void request_answered(Requests *r, Outstanding *request) noexcept nogil:
    let_go(request.strategy)
    request.strategy = NULL
    while r.used and r.at[r.first].strategy == NULL:
        r.first = (r.first + 1) & (r.capacity - 1)
        r.used -= 1
    if r.used == 0 and r.capacity > 4:
        free(r.at)
        r.at = NULL
        r.capacity = r.first = 0

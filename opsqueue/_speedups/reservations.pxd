"""Reservations: which chunk is taken, by whom or until when, found by chunk, by holder and by submission.

Owns the records and their lists; decides nothing. Record numbers double as timer numbers of the wheel; 0 is "none".
"""

from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport free, realloc
from libc.string cimport memset

from opsqueue._speedups.bits cimport mixed, must
from opsqueue._speedups.slotmap cimport SlotMap, slotmap_add, slotmap_close, slotmap_open, slotmap_remove


cdef enum:
    RES_HELD = 1              # by a consumer
    RES_DELAYED = 2           # not before a time; nobody's
    RES_DOOMED = 3            # expired at the retry limit; nobody's; fails its submission unless it is completed in time


cdef struct Reservation:
    uint64_t chunk
    uint64_t holder           # RES_HELD only
    uint64_t since_ms         # when it was handed out
    uint64_t working          # when the holder last said that it works on it, as a running number; 0: never
    uint32_t submission       # slot
    uint32_t hash
    uint32_t holder_previous
    uint32_t holder_next      # also links free records
    uint32_t submission_previous
    uint32_t submission_next
    uint8_t state


cdef struct Reservations:
    Reservation *at
    uint32_t capacity
    uint32_t free
    uint32_t used
    SlotMap by_chunk


cdef inline void reservations_open(Reservations *r) noexcept nogil:
    memset(r, 0, sizeof(Reservations))
    slotmap_open(&r.by_chunk)


cdef inline void reservations_close(Reservations *r) noexcept nogil:
    free(r.at)
    slotmap_close(&r.by_chunk)


cdef inline uint32_t reservation_hash(uint32_t submission, uint64_t chunk) noexcept nogil:
    return <uint32_t>(mixed(chunk * <uint64_t>0x9E3779B97F4A7C15 + submission) >> 32)


cdef inline uint32_t reservation_find(Reservations *r, uint32_t submission, uint64_t chunk) noexcept nogil:
    """0: the chunk is not taken."""
    cdef uint32_t hash = reservation_hash(submission, chunk)
    cdef uint32_t at = hash & r.by_chunk.mask
    cdef uint64_t entry
    cdef Reservation *found
    while True:
        entry = r.by_chunk.entries[at]
        if entry == 0:
            return 0
        if <uint32_t>(entry >> 32) == hash:
            found = &r.at[<uint32_t>entry - 1]
            if found.chunk == chunk and found.submission == submission:
                return <uint32_t>entry - 1
        at = (at + 1) & r.by_chunk.mask


cdef inline uint32_t reservation_add(Reservations *r, uint32_t submission, uint64_t chunk,
                                     uint32_t *submission_first) noexcept nogil:
    """A new record for a chunk that has none; state and holder are the caller's to set."""
    cdef uint32_t at, capacity
    cdef Reservation *record
    if r.free == 0:
        capacity = r.capacity * 2 if r.capacity else 64
        r.at = <Reservation *>must(realloc(r.at, <size_t>capacity * sizeof(Reservation)))
        if r.capacity == 0:
            memset(r.at, 0, sizeof(Reservation))
            r.capacity = 1
        for at in range(r.capacity, capacity):
            r.at[at].holder_next = at + 1 if at + 1 < capacity else 0
        r.free = r.capacity
        r.capacity = capacity
    at = r.free
    record = &r.at[at]
    r.free = record.holder_next
    r.used += 1
    record.chunk = chunk
    record.submission = submission
    record.hash = reservation_hash(submission, chunk)
    record.holder = 0
    record.working = 0
    record.holder_previous = record.holder_next = 0
    record.submission_previous = 0
    record.submission_next = submission_first[0]
    if submission_first[0]:
        r.at[submission_first[0]].submission_previous = at
    submission_first[0] = at
    slotmap_add(&r.by_chunk, record.hash, at)
    return at


cdef inline void reservation_remove(Reservations *r, uint32_t at, uint32_t *submission_first) noexcept nogil:
    """It is in no holder's list any more."""
    cdef Reservation *record = &r.at[at]
    slotmap_remove(&r.by_chunk, record.hash, at)
    if record.submission_previous:
        r.at[record.submission_previous].submission_next = record.submission_next
    else:
        submission_first[0] = record.submission_next
    if record.submission_next:
        r.at[record.submission_next].submission_previous = record.submission_previous
    record.state = 0
    record.holder_next = r.free
    r.free = at
    r.used -= 1


cdef inline void reservation_join(Reservations *r, uint32_t at, uint32_t *holder_first) noexcept nogil:
    """Put it into its holder's list."""
    cdef Reservation *record = &r.at[at]
    record.holder_previous = 0
    record.holder_next = holder_first[0]
    if holder_first[0]:
        r.at[holder_first[0]].holder_previous = at
    holder_first[0] = at


cdef inline void reservation_leave(Reservations *r, uint32_t at, uint32_t *holder_first) noexcept nogil:
    cdef Reservation *record = &r.at[at]
    if record.holder_previous:
        r.at[record.holder_previous].holder_next = record.holder_next
    else:
        holder_first[0] = record.holder_next
    if record.holder_next:
        r.at[record.holder_next].holder_previous = record.holder_previous
    record.holder_previous = record.holder_next = 0

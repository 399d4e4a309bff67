"""The log rows' packed entries: appending to a growing buffer, and reading them back (docs/journal.md).

An entry is a tag (low 4 bits the kind; 0x10: same submission as the entry before it in this row), the submission's id as
LEB128 unless it is the same, and the chunk's index as LEB128. Knows no submission.
"""

from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport realloc

from opsqueue._speedups.bits cimport must


cdef enum:
    EVENT_COMPLETION = 1
    EVENT_RETRY = 2           # the chunk's retries go up by one
    EVENT_CRASH = 3
    EVENT_SAME_SUBMISSION = 0x10
    LONGEST_EVENT = 32        # bytes; a bound


cdef struct EventLog:
    uint8_t *at
    size_t size
    size_t capacity
    uint64_t submission       # of the last entry; says nothing while the row is empty


cdef struct Event:            # as read
    uint32_t kind
    uint64_t submission
    uint64_t chunk


cdef inline uint8_t *put_varint(uint8_t *at, uint64_t value) noexcept nogil:
    """LEB128, unsigned; the place behind it."""
    while value >= 0x80:
        at[0] = <uint8_t>(value | 0x80)
        at += 1
        value >>= 7
    at[0] = <uint8_t>value
    return at + 1


cdef inline bint get_varint(const uint8_t **at, const uint8_t *end, uint64_t *value) noexcept nogil:
    """A number below 2**63; False: it does not end in time, or is larger."""
    cdef uint32_t shift = 0
    cdef uint64_t byte
    value[0] = 0
    while at[0] < end and shift < 63:
        byte = at[0][0]
        at[0] += 1
        value[0] |= (byte & 0x7F) << shift
        if byte < 0x80:
            return True
        shift += 7
    return False


cdef inline void event_add(EventLog *log, uint32_t kind, uint64_t submission, uint64_t chunk) noexcept nogil:
    cdef uint8_t *at
    if log.capacity - log.size < LONGEST_EVENT:
        log.capacity = log.capacity * 2 if log.capacity else 4096
        log.at = <uint8_t *>must(realloc(log.at, log.capacity))
    at = log.at + log.size
    if log.size and log.submission == submission:
        at[0] = <uint8_t>(kind | EVENT_SAME_SUBMISSION)
        at += 1
    else:
        at[0] = <uint8_t>kind
        at = put_varint(at + 1, submission)
        log.submission = submission
    log.size = put_varint(at, chunk) - log.at


cdef inline bint event_read(const uint8_t **at, const uint8_t *end, bint first, Event *event) noexcept nogil:
    """The next entry; `event` holds the one before it unless this is the row's first. False: the row is damaged."""
    cdef uint32_t tag = at[0][0]
    at[0] += 1
    event.kind = tag & 15
    if event.kind < EVENT_COMPLETION or event.kind > EVENT_CRASH or tag >> 5:
        return False
    if tag & EVENT_SAME_SUBMISSION:
        if first:
            return False
    elif not get_varint(at, end, &event.submission):
        return False
    return get_varint(at, end, &event.chunk)

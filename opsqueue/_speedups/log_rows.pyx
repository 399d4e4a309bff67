# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, cdivision=True
"""Checks a log row of the journal and says which submissions it is about. Changes nothing, keeps nothing.

The format is written down in docs/journal.md; opsqueue.server.writer.log_rows is its slow, obvious twin.
"""

from libc.stdint cimport uint8_t, uint64_t

cdef enum:
    KIND_MASK = 0x0F
    SAME_SUBMISSION = 0x10
    KNOWN_BITS = 0x1F
    LAST_KIND = 3
    VARINT_BYTES = 9       # 63 bits


cdef inline bint _varint(const uint8_t **at, const uint8_t *end, uint64_t *value) noexcept nogil:
    """One LEB128 number below 2**63; False: it does not end, or is larger."""
    cdef uint64_t result = 0
    cdef uint64_t byte
    cdef int i
    for i in range(VARINT_BYTES):
        if at[0] >= end:
            return False
        byte = at[0][0]
        at[0] += 1
        result |= (byte & 0x7F) << (7 * i)
        if byte < 0x80:
            value[0] = result
            return True
    return False


def mentioned(bytes events not None):
    """The ids of all submissions in a log row. Raises ValueError naming the byte where the row stops to make sense."""
    cdef const uint8_t *begin = events
    cdef const uint8_t *end = begin + len(events)
    cdef const uint8_t *at = begin
    cdef const uint8_t *entry
    cdef uint64_t submission = 0
    cdef uint64_t chunk = 0
    cdef uint8_t tag
    cdef bint known = False
    found = set()
    while at < end:
        entry = at
        tag = at[0]
        at += 1
        if tag & ~<uint8_t>KNOWN_BITS or not 1 <= tag & KIND_MASK <= LAST_KIND:
            raise ValueError(f"byte {entry - begin}: unknown tag {tag:#04x}")
        if tag & SAME_SUBMISSION:
            if not known:
                raise ValueError(f"byte {entry - begin}: there is no previous submission")
        else:
            if not _varint(&at, end, &submission):
                raise ValueError(f"byte {entry - begin}: the submission id is cut off or too large")
            known = True
            found.add(submission)
        if not _varint(&at, end, &chunk):
            raise ValueError(f"byte {entry - begin}: the chunk index is cut off or too large")
    return found

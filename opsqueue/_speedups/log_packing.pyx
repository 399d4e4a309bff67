# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, cdivision=True
"""Log rows as they are stored: the entries of a batch sorted and written as differences, and back.

Completions come in their order and at random over many submissions: as entries they take 13 bytes each, as differences
about 5. The format is in docs/journal.md. Knows no submission and no file; runs without the interpreter's lock.
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from libc.stdint cimport uint8_t, uint64_t
from libc.stdlib cimport free, malloc, qsort, realloc
from libc.string cimport memcpy, memset

from opsqueue._speedups.bits cimport must
from opsqueue._speedups.eventlog cimport (
    EVENT_COMPLETION,
    LONGEST_EVENT,
    Event,
    EventLog,
    event_add,
    event_read,
    get_varint,
    put_varint,
)

from opsqueue._speedups.log_rows import mentioned as mentioned_in_entries

cdef enum:
    PACKED = 0x80             # the first byte of a packed row; an entry's tag is below


cdef struct Completion:
    uint64_t submission
    uint64_t chunk


cdef int compared(const void *one, const void *other) noexcept nogil:
    cdef const Completion *a = <const Completion *>one
    cdef const Completion *b = <const Completion *>other
    if a.submission != b.submission:
        return -1 if a.submission < b.submission else 1
    if a.chunk != b.chunk:
        return -1 if a.chunk < b.chunk else 1
    return 0


def pack(bytes entries not None) -> bytes:
    """The row to store for these entries. Raises ValueError if they are none."""
    cdef const uint8_t *start = <const uint8_t *>PyBytes_AS_STRING(entries)
    cdef size_t given = len(entries)
    cdef const uint8_t *end = start + given
    cdef const uint8_t *read = start
    cdef Completion *completions
    cdef size_t count = 0, at, last
    cdef bint sorted_already = True, sound = True
    cdef Event event = Event(0, 0, 0)
    cdef EventLog others
    cdef uint8_t *out
    cdef uint8_t *to
    cdef uint64_t previous = 0
    cdef size_t size
    if not entries:
        return entries
    memset(&others, 0, sizeof(EventLog))
    with nogil:
        # an entry has at least two bytes
        completions = <Completion *>must(malloc((given // 2 + 1) * sizeof(Completion)))
        while read < end:
            if not event_read(&read, end, read == start, &event):
                sound = False
                break
            if event.kind != EVENT_COMPLETION:
                event_add(&others, event.kind, event.submission, event.chunk)
                continue
            completions[count].submission = event.submission
            completions[count].chunk = event.chunk
            if count and compared(&completions[count - 1], &completions[count]) > 0:
                sorted_already = False
            count += 1
        if not sorted_already:
            qsort(completions, count, sizeof(Completion), compared)
        # a group has a submission and a count, nine bytes each at most
        out = <uint8_t *>must(malloc(16 + others.size + count * (2 * LONGEST_EVENT)))
        out[0] = PACKED
        to = put_varint(out + 1, others.size)
        if others.size:
            memcpy(to, others.at, others.size)
            to += others.size
        at = 0
        while at < count:
            last = at + 1
            while last < count and completions[last].submission == completions[at].submission:
                last += 1
            to = put_varint(to, completions[at].submission - previous)
            previous = completions[at].submission
            to = put_varint(to, last - at - 1)
            to = put_varint(to, completions[at].chunk)
            at += 1
            while at < last:
                to = put_varint(to, completions[at].chunk - completions[at - 1].chunk)
                at += 1
        size = to - out
        free(completions)
        free(others.at)
    try:
        if not sound:
            raise ValueError(f"{given} bytes that are no entries of a log row")
        return PyBytes_FromStringAndSize(<char *>out, size) if size < given else entries
    finally:
        free(out)


def unpack(bytes row not None) -> bytes:
    """The entries of a stored row, the completions sorted and last. Raises ValueError at what makes no sense."""
    cdef const uint8_t *start = <const uint8_t *>PyBytes_AS_STRING(row)
    cdef const uint8_t *end = start + len(row)
    cdef const uint8_t *read = start + 1
    cdef EventLog log
    cdef uint64_t size = 0, submission = 0, step = 0, more = 0, chunk = 0
    cdef bint sound
    if not row or start[0] != PACKED:
        return row
    memset(&log, 0, sizeof(EventLog))
    with nogil:
        sound = get_varint(&read, end, &size) and size <= <uint64_t>(end - read)
        if sound and size:
            log.at = <uint8_t *>must(realloc(NULL, size + LONGEST_EVENT))
            memcpy(log.at, read, size)
            log.size = log.capacity = size
            log.submission = <uint64_t>-1  # the first group names its submission
            log.capacity += LONGEST_EVENT
            read += size
        while sound and read < end:
            sound = get_varint(&read, end, &step) and get_varint(&read, end, &more) and get_varint(&read, end, &chunk)
            submission += step
            if not sound or submission >> 63:
                sound = False
                break
            event_add(&log, EVENT_COMPLETION, submission, chunk)
            while more:
                if not get_varint(&read, end, &step) or (chunk + step) >> 63:
                    sound = False
                    break
                chunk += step
                event_add(&log, EVENT_COMPLETION, submission, chunk)
                more -= 1
    try:
        if not sound:
            raise ValueError(f"byte {read - start}: a packed row is cut off, or a number in it is too large")
        return PyBytes_FromStringAndSize(<char *>log.at, log.size)
    finally:
        free(log.at)


def mentioned(bytes row not None, frozenset among not None) -> set:
    """Which of the submissions `among` are in a stored row. Raises ValueError at what makes no sense."""
    cdef const uint8_t *start = <const uint8_t *>PyBytes_AS_STRING(row)
    cdef const uint8_t *end = start + len(row)
    cdef const uint8_t *read = start + 1
    cdef uint64_t size = 0, submission = 0, step = 0, more = 0
    if not row or start[0] != PACKED:
        return mentioned_in_entries(row) & among
    if not get_varint(&read, end, &size) or size > <uint64_t>(end - read):
        raise ValueError("byte 1: the entries of a packed row are cut off")
    found = mentioned_in_entries((<const char *>read)[:size]) & among if size else set()
    read += size
    while read < end:
        if not get_varint(&read, end, &step) or not get_varint(&read, end, &more) or (submission + step) >> 63:
            raise ValueError(f"byte {read - start}: a packed row is cut off, or a number in it is too large")
        submission += step
        if submission in among:
            found.add(submission)
        more += 1
        while more and read < end:  # a number ends with its first byte below 0x80
            more -= read[0] < 0x80
            read += 1
        if more:
            raise ValueError(f"byte {read - start}: a packed row is cut off")
    return found

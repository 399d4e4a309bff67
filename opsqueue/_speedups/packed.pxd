"""Packed chunk indexes and reports (docs/protocol.md, "Compact messages"), read in place and written. Inline functions only.

`scan_report` is exact about what it accepts: whatever is unusual is left to opsqueue.protocol.packed, which also words
the errors.
"""

from libc.stdint cimport uint8_t, uint32_t, uint64_t

from opsqueue._speedups.cbor cimport (
    CBOR_NULL,
    MAJOR_ARRAY,
    MAJOR_BYTES,
    MAJOR_MAP,
    MAJOR_TEXT,
    MAJOR_UNSIGNED,
    Cursor,
    cut_utf8,
    equals,
    is_utf8,
    read_head,
    read_string,
)
from opsqueue._speedups.records cimport MAX_REPORTED, RUN_FAILED, RUN_HAS_OUTPUT, ReportRun


cdef enum:
    RUN_BYTES = 20                # the longest run: two numbers of 10 bytes


cdef struct Report:               # a scanned ReportChunks
    uint32_t runs
    uint32_t chunks
    uint64_t tails                # bytes, each text counted once
    ReportRun *at                 # room for MAX_REPORTED; tail_at counts from the message's start


cdef inline uint8_t *put_number(uint8_t *at, uint64_t value) noexcept nogil:
    """LEB128, unsigned; the place behind it."""
    while value >= 0x80:
        at[0] = <uint8_t>(value | 0x80)
        at += 1
        value >>= 7
    at[0] = <uint8_t>value
    return at + 1


cdef inline bint get_number(const uint8_t **at, const uint8_t *end, uint64_t *value) noexcept nogil:
    """False: it does not end in time, or does not fit into 64 bits."""
    cdef uint32_t shift = 0
    cdef uint64_t byte
    cdef uint64_t got = 0
    while at[0] < end:
        byte = at[0][0]
        at[0] += 1
        if shift == 63 and byte > 1:
            return False
        got |= (byte & 0x7F) << shift
        if byte < 0x80:
            value[0] = got
            return True
        shift += 7
    return False


cdef inline uint8_t *put_run(uint8_t *at, uint64_t first, uint64_t count) noexcept nogil:
    """`count` chunks from `first`; at most RUN_BYTES."""
    if count == 1:
        return put_number(at, first << 1)
    return put_number(put_number(at, first << 1 | 1), count - 1)


cdef inline bint get_run(const uint8_t **at, const uint8_t *end, uint64_t *first, uint64_t *count) noexcept nogil:
    """False: there is no run; what it names fits into 63 bits."""
    cdef uint64_t number, more
    if not get_number(at, end, &number):
        return False
    first[0] = number >> 1
    count[0] = 1
    if number & 1:
        if not get_number(at, end, &more) or more == 0 or more > (<uint64_t>1 << 63) - 1 - first[0]:
            return False
        count[0] = more + 1
    return True


cdef inline bint scan_outputs(Cursor *c, const uint8_t *data, Report *report, uint32_t begin) noexcept nogil:
    """One byte string for each chunk of the runs from `begin`, which become runs of one chunk each."""
    cdef uint64_t items
    cdef const uint8_t *content
    cdef size_t size
    cdef uint32_t run, chunks = 0, at, left
    cdef ReportRun one
    for run in range(begin, report.runs):
        chunks += report.at[run].count
    if not read_head(c, MAJOR_ARRAY, &items) or items != chunks:
        return False
    # From the end, so that no run is overwritten before it has been spread.
    at = begin + chunks
    run = report.runs
    while run > begin:
        run -= 1
        one = report.at[run]
        left = one.count
        while left:
            left -= 1
            at -= 1
            report.at[at] = one
            report.at[at].first = one.first + left
            report.at[at].count = 1
    report.runs = begin + chunks
    for at in range(begin, report.runs):
        if not read_string(c, MAJOR_BYTES, &content, &size):
            return False
        report.at[at].flags = RUN_HAS_OUTPUT
        report.at[at].tail_at = <uint32_t>(content - data)
        report.at[at].tail_size = <uint32_t>size
        report.tails += size
    return True


cdef inline bint scan_one_report(
    Cursor *c, const uint8_t *data, Report *report, size_t text_limit
) noexcept nogil:
    cdef uint64_t items, submission, first, count
    cdef const uint8_t *at
    cdef const uint8_t *end
    cdef const uint8_t *text
    cdef size_t size
    cdef ReportRun *run
    cdef uint32_t begin = report.runs, i
    if not read_head(c, MAJOR_ARRAY, &items) or items != 3:
        return False
    if not read_head(c, MAJOR_UNSIGNED, &submission) or submission >> 63 or not read_string(c, MAJOR_BYTES, &at, &size):
        return False
    end = at + size
    while at < end:
        if not get_run(&at, end, &first, &count) or count > MAX_REPORTED - report.chunks:
            return False
        run = &report.at[report.runs]
        run.submission = submission
        run.first = first
        run.count = <uint32_t>count
        run.flags = 0
        run.tail_at = 0
        run.tail_size = 0
        report.runs += 1
        report.chunks += run.count
    if c.at >= c.end:
        return False
    if c.at[0] == CBOR_NULL:
        c.at += 1
        return True
    if c.at[0] >> 5 == MAJOR_ARRAY:
        return scan_outputs(c, data, report, begin)
    if not read_string(c, MAJOR_TEXT, &text, &size) or not is_utf8(text, size):
        return False
    size = cut_utf8(text, size, text_limit)
    if report.runs > begin:
        report.tails += size
    for i in range(begin, report.runs):
        report.at[i].flags = RUN_FAILED
        report.at[i].tail_at = <uint32_t>(text - data)
        report.at[i].tail_size = <uint32_t>size
    return True


cdef inline bint scan_report(const uint8_t *data, size_t size, Report *report, size_t text_limit) noexcept nogil:
    """Whether it is a ReportChunks in the usual form; texts are cut to `text_limit` bytes."""
    cdef Cursor c
    cdef const uint8_t *name
    cdef size_t name_size
    cdef uint64_t items, i
    report.runs = report.chunks = 0
    report.tails = 0
    c.at = data
    c.end = data + size
    if not read_head(&c, MAJOR_MAP, &items) or items != 2:
        return False
    if not read_string(&c, MAJOR_TEXT, &name, &name_size) or not equals(name, name_size, "nonce", 5):
        return False
    if not read_head(&c, MAJOR_UNSIGNED, &items):
        return False
    if not read_string(&c, MAJOR_TEXT, &name, &name_size) or not equals(name, name_size, "contents", 8):
        return False
    if not read_head(&c, MAJOR_MAP, &items) or items != 1:
        return False
    if not read_string(&c, MAJOR_TEXT, &name, &name_size) or not equals(name, name_size, "ReportChunks", 12):
        return False
    if not read_head(&c, MAJOR_MAP, &items) or items != 1:
        return False
    if not read_string(&c, MAJOR_TEXT, &name, &name_size) or not equals(name, name_size, "reports", 7):
        return False
    if not read_head(&c, MAJOR_ARRAY, &items) or items > MAX_REPORTED:
        return False
    for i in range(items):
        if not scan_one_report(&c, data, report, text_limit):
            return False
    return c.at == c.end

"""CBOR (RFC 8949), as much as consumers' messages need: items read, skipped, checked and written. Allocates nothing.

Inline functions only: there is no module behind this file.
"""

from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memcmp


cdef enum Major:
    MAJOR_UNSIGNED = 0
    MAJOR_NEGATIVE = 1
    MAJOR_BYTES = 2
    MAJOR_TEXT = 3
    MAJOR_ARRAY = 4
    MAJOR_MAP = 5
    MAJOR_TAG = 6
    MAJOR_SIMPLE = 7


cdef enum:
    CBOR_NULL = 0xF6
    CBOR_BREAK = 0xFF
    INDEFINITE = 31


cdef struct Cursor:
    const uint8_t *at
    const uint8_t *end


cdef inline bint read_head(Cursor *c, int major, uint64_t *value) noexcept nogil:
    """The argument of the next item, which must be of `major` and definite; False otherwise, and when it is cut off."""
    cdef uint8_t first
    cdef int more, i
    cdef uint64_t got
    if c.at >= c.end:
        return False
    first = c.at[0]
    if first >> 5 != major:
        return False
    first &= 31
    if first < 24:
        c.at += 1
        value[0] = first
        return True
    if first > 27:
        return False
    more = 1 << (first - 24)
    if c.end - c.at <= more:
        return False
    got = 0
    for i in range(1, more + 1):
        got = got << 8 | c.at[i]
    c.at += 1 + more
    value[0] = got
    return True


cdef inline bint read_string(Cursor *c, int major, const uint8_t **at, size_t *size) noexcept nogil:
    """A byte or text string of definite length: where its content lies."""
    cdef uint64_t length
    if not read_head(c, major, &length) or length > <uint64_t>(c.end - c.at):
        return False
    at[0] = c.at
    size[0] = length
    c.at += length
    return True


cdef inline bint equals(const uint8_t *at, size_t size, const char *name, size_t name_size) noexcept nogil:
    return size == name_size and memcmp(at, name, size) == 0


cdef inline bint is_utf8(const uint8_t *at, size_t size) noexcept nogil:
    """Well-formed UTF-8 (Unicode table 3-7): no surrogates, no overlong forms."""
    cdef const uint8_t *end = at + size
    cdef uint8_t low, high
    cdef int more
    while at < end:
        if at[0] < 0x80:
            at += 1
            continue
        low = 0x80
        high = 0xBF
        if 0xC2 <= at[0] <= 0xDF:
            more = 1
        elif 0xE0 <= at[0] <= 0xEF:
            more = 2
            if at[0] == 0xE0:
                low = 0xA0
            elif at[0] == 0xED:
                high = 0x9F
        elif 0xF0 <= at[0] <= 0xF4:
            more = 3
            if at[0] == 0xF0:
                low = 0x90
            elif at[0] == 0xF4:
                high = 0x8F
        else:
            return False
        if end - at <= more or not low <= at[1] <= high:
            return False
        if more > 1 and at[2] & 0xC0 != 0x80:
            return False
        if more > 2 and at[3] & 0xC0 != 0x80:
            return False
        at += 1 + more
    return True


cdef inline size_t cut_utf8(const uint8_t *at, size_t size, size_t limit) noexcept nogil:
    """The largest size up to `limit` at which well-formed UTF-8 may be cut."""
    if size <= limit:
        return size
    while limit > 0 and at[limit] & 0xC0 == 0x80:
        limit -= 1
    return limit


cdef inline const char *ill_formed(Cursor *c, int depth) noexcept nogil:
    """Passes over one item of any kind, nested at most `depth` deep; NULL, or what is wrong with it.

    An explicit stack of counts instead of recursion, so that no input can exhaust the C stack.
    """
    cdef uint64_t[64] left          # items still to come at each level
    cdef bint[64] indefinite
    cdef int level = 0
    cdef int major, info, i
    cdef uint64_t value
    if depth > 63:
        depth = 63
    left[0] = 1
    indefinite[0] = False
    while True:
        while not indefinite[level] and left[level] == 0:
            if level == 0:
                return NULL
            level -= 1
        if c.at >= c.end:
            return "it ends in the middle of an item"
        if indefinite[level] and c.at[0] == CBOR_BREAK:
            if left[level] & 1:
                return "a map lacks a value"
            c.at += 1
            indefinite[level] = False
            left[level] = 0
            continue
        major = c.at[0] >> 5
        info = c.at[0] & 31
        value = info
        if info >= 28 and info != INDEFINITE:
            return "an item has a reserved length"
        if 24 <= info <= 27:
            if c.end - c.at <= (1 << (info - 24)):
                return "it ends in the middle of an item"
            value = 0
            for i in range(1, (1 << (info - 24)) + 1):
                value = value << 8 | c.at[i]
            c.at += 1 << (info - 24)
        c.at += 1
        if indefinite[level]:
            left[level] ^= 1 if left[level] < 2 else 0   # 0 and 1 alternate in maps; arrays and tags hold 2
        else:
            left[level] -= 1
        if major == MAJOR_BYTES or major == MAJOR_TEXT:
            if info == INDEFINITE:
                while True:                                  # chunks: definite strings of the same kind
                    if c.at >= c.end:
                        return "it ends in the middle of an item"
                    if c.at[0] == CBOR_BREAK:
                        c.at += 1
                        break
                    if not read_head(c, major, &value) or value > <uint64_t>(c.end - c.at):
                        return "a string of indefinite length is malformed"
                    c.at += value
            elif value > <uint64_t>(c.end - c.at):
                return "it ends in the middle of a string"
            else:
                c.at += value
        elif major == MAJOR_ARRAY or major == MAJOR_MAP or major == MAJOR_TAG:
            if major == MAJOR_TAG and info == INDEFINITE:
                return "an item has a reserved length"
            if level == depth:
                return "it is nested too deep"
            level += 1
            indefinite[level] = info == INDEFINITE
            if indefinite[level]:
                left[level] = 0 if major == MAJOR_MAP else 2
            elif major == MAJOR_TAG:
                left[level] = 1
            else:
                if value > <uint64_t>(c.end - c.at):
                    return "an array or map is longer than the message"
                left[level] = value * 2 if major == MAJOR_MAP else value
        elif info == INDEFINITE:
            return "an item has a reserved length" if major != MAJOR_SIMPLE else "a break stands alone"


cdef inline int write_head(uint8_t *to, int major, uint64_t value) noexcept nogil:
    """The shortest head; bytes written, at most 9."""
    cdef uint8_t kind = <uint8_t>(major << 5)
    cdef int more, i
    if value < 24:
        to[0] = kind | <uint8_t>value
        return 1
    if value < 0x100:
        more = 1
        to[0] = kind | 24
    elif value < 0x10000:
        more = 2
        to[0] = kind | 25
    elif value <= 0xFFFFFFFFU:
        more = 4
        to[0] = kind | 26
    else:
        more = 8
        to[0] = kind | 27
    for i in range(more):
        to[1 + i] = <uint8_t>(value >> (8 * (more - 1 - i)))
    return 1 + more

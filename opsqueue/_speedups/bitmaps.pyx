# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, cdivision=True
"""A block's bitmap in fewer bytes, for the block table: the distances between its rarer bits, in Rice codes.

With a tenth of the chunks done at random, 250 bytes instead of 512; nothing could do with less than 240. docs/journal.md
has the layout. Knows one bitmap, no table.
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset

from opsqueue._speedups.bits cimport lowest_bit, popcount

cdef enum:
    BITS = 4096
    HALF = 2048
    WORDS = 64
    BYTES = 512
    WORTH = 448             # bytes; with a quarter or more of the bits there is little to gain
    HEAD = 3                # the code's parameter, how many codes follow (2 bytes)
    INVERTED = 0x80         # the codes tell the bits that are not set
    MOST_LOW_BITS = 11


cdef struct Codes:
    uint32_t count
    uint16_t gaps[HALF]


cdef uint32_t gather(const uint64_t *words, bint inverted, Codes *codes) noexcept nogil:
    """The distances between the bits, each the number of others in between; gives their sum."""
    cdef uint32_t at, position, following = 0, total = 0
    cdef uint64_t word
    codes.count = 0
    for at in range(WORDS):
        word = ~words[at] if inverted else words[at]
        while word:
            position = at * 64 + lowest_bit(word)
            word &= word - 1
            codes.gaps[codes.count] = <uint16_t>(position - following)
            total += position - following
            codes.count += 1
            following = position + 1
    return total


cdef uint32_t length(const Codes *codes, uint32_t low_bits) noexcept nogil:
    """In bits."""
    cdef uint32_t i, bits = codes.count * (low_bits + 1)
    for i in range(codes.count):
        bits += codes.gaps[i] >> low_bits
    return bits


cdef void write(const Codes *codes, uint32_t low_bits, uint8_t *out) noexcept nogil:
    """Each distance's upper part as so many ones and a zero, then its lower bits; lowest bit first."""
    cdef uint64_t waiting = 0, low
    cdef uint32_t i, ones, count = 0
    for i in range(codes.count):
        ones = codes.gaps[i] >> low_bits
        low = codes.gaps[i] & ((1 << low_bits) - 1)
        while ones >= 32:
            waiting |= <uint64_t>0xFFFFFFFF << count
            ones -= 32
            memcpy(out, &waiting, 4)
            out += 4
            waiting >>= 32
        waiting |= (((<uint64_t>1 << ones) - 1) | low << (ones + 1)) << count
        count += ones + 1 + low_bits
        while count >= 8:
            out[0] = <uint8_t>waiting
            out += 1
            waiting >>= 8
            count -= 8
    if count:
        out[0] = <uint8_t>waiting


def pack(bytes bitmap not None) -> bytes | None:
    """A bitmap of 512 bytes in fewer; None: it is another one, or would not be much shorter."""
    cdef uint64_t words[WORDS]
    cdef Codes codes
    cdef uint8_t out[BYTES + 8]
    cdef uint32_t at, count = 0, total, low_bits, bits
    cdef bint inverted
    if PyBytes_GET_SIZE(bitmap) != BYTES:
        return None
    memcpy(words, PyBytes_AS_STRING(bitmap), BYTES)
    for at in range(WORDS):
        count += popcount(words[at])
    inverted = count > HALF
    total = gather(words, inverted, &codes)
    # the best parameter is about the logarithm of the usual distance; it, or the one below
    low_bits = 0
    while low_bits < MOST_LOW_BITS and codes.count << (low_bits + 1) <= total:
        low_bits += 1
    bits = length(&codes, low_bits)
    if low_bits and length(&codes, low_bits - 1) <= bits:
        low_bits -= 1
        bits = length(&codes, low_bits)
    if HEAD + (bits + 7) // 8 > WORTH:
        return None
    out[0] = low_bits | (INVERTED if inverted else 0)
    out[1] = codes.count & 0xFF
    out[2] = codes.count >> 8
    write(&codes, low_bits, out + HEAD)
    return PyBytes_FromStringAndSize(<char *>out, HEAD + (bits + 7) // 8)


cdef bint read(const uint8_t *packed, uint32_t size, uint64_t *words) noexcept nogil:
    """False: not what `pack` made. 8 bytes behind `packed` can be read and are zero."""
    cdef uint32_t low_bits = packed[0] & 0x7F
    cdef uint32_t left = packed[1] | <uint32_t>packed[2] << 8
    cdef uint32_t at = HEAD * 8, end = size * 8, ones, more, i
    cdef uint64_t window, position = 0
    if low_bits > MOST_LOW_BITS or left > HALF:
        return False
    while left:
        left -= 1
        ones = 0
        memcpy(&window, packed + (at >> 3), 8)
        window >>= at & 7
        while <uint32_t>~window == 0:
            ones += 32
            at += 32
            if at >= end:
                return False
            memcpy(&window, packed + (at >> 3), 8)
            window >>= at & 7
        more = lowest_bit(~window)
        at += more + 1 + low_bits
        if at > end:
            return False
        position += (<uint64_t>(ones + more) << low_bits) + (window >> (more + 1) & ((1 << low_bits) - 1))
        if position >= BITS:
            return False
        words[position >> 6] |= <uint64_t>1 << (position & 63)
        position += 1
    if end - at > 7 or (end > at and packed[at >> 3] >> (at & 7)):
        return False
    if packed[0] & INVERTED:
        for i in range(WORDS):
            words[i] = ~words[i]
    return True


def unpack(bytes packed not None) -> bytes:
    """The bitmap of which `pack` made this. Raises ValueError for anything else."""
    cdef uint64_t words[WORDS]
    cdef uint8_t given[BYTES + 8]
    cdef Py_ssize_t size = PyBytes_GET_SIZE(packed)
    cdef bint sound = False
    if HEAD <= size < BYTES:
        memset(words, 0, BYTES)
        memcpy(given, PyBytes_AS_STRING(packed), size)
        memset(given + size, 0, 8)
        sound = read(given, <uint32_t>size, words)
    if not sound:
        raise ValueError(f"{size} bytes that are no packed bitmap")
    return PyBytes_FromStringAndSize(<char *>words, BYTES)

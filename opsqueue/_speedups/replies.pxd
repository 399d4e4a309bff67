"""The CBOR that every reply to a consumer is made of, in canonical form. Inline functions only; each returns the new end."""

from libc.stdint cimport uint8_t, uint64_t
from libc.string cimport memcpy

from opsqueue._speedups.cbor cimport MAJOR_UNSIGNED, write_head


cdef inline uint8_t *put(uint8_t *to, const char *literal, size_t size) noexcept nogil:
    memcpy(to, literal, size)
    return to + size


cdef inline uint8_t *put_unsigned(uint8_t *to, uint64_t value) noexcept nogil:
    return to + write_head(to, MAJOR_UNSIGNED, value)


cdef inline uint8_t *put_chunk_id(uint8_t *to, uint64_t submission, uint64_t chunk) noexcept nogil:
    """The two fields, without the map's head; at most 46 bytes."""
    to = put_unsigned(put(to, b"\x6dsubmission_id", 14), submission)
    return put_unsigned(put(to, b"\x6bchunk_index", 12), chunk)


cdef inline uint8_t *put_sync(uint8_t *to, uint64_t nonce) noexcept nogil:
    """Up to the value of `contents`; at most 32 bytes."""
    to = put_unsigned(put(to, b"\xa1\x64Sync\xa2\x65nonce", 13), nonce)
    return put(to, b"\x68contents", 9)

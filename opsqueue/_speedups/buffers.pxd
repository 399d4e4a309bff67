"""A growing buffer of bytes that holds memory only while it holds something. Inline functions only."""

from libc.stdint cimport uint8_t
from libc.stdlib cimport free, realloc
from libc.string cimport memcpy, memmove


cdef struct Bytes:
    uint8_t *data
    size_t start
    size_t size                   # bytes from `start`
    size_t capacity


cdef inline int ensure(Bytes *buffer, size_t more) except -1:
    """Room for `more` bytes after the content."""
    cdef uint8_t *grown
    cdef size_t capacity
    if buffer.start and buffer.start + buffer.size + more > buffer.capacity:
        memmove(buffer.data, buffer.data + buffer.start, buffer.size)
        buffer.start = 0
    if buffer.size + more > buffer.capacity - buffer.start:
        capacity = buffer.capacity * 2 if buffer.capacity else 512
        while capacity < buffer.size + more:
            capacity *= 2
        grown = <uint8_t *>realloc(buffer.data, capacity)
        if grown == NULL:
            raise MemoryError(f"no memory for {capacity} bytes of a consumer's connection")
        buffer.data = grown
        buffer.capacity = capacity
    return 0


cdef inline int append(Bytes *buffer, const uint8_t *data, size_t size) except -1:
    ensure(buffer, size)
    memcpy(buffer.data + buffer.start + buffer.size, data, size)
    buffer.size += size
    return 0


cdef inline void take(Bytes *buffer, size_t size) noexcept nogil:
    """Remove bytes from the front."""
    buffer.start += size
    buffer.size -= size
    if buffer.size == 0:
        discard(buffer)


cdef inline void discard(Bytes *buffer) noexcept nogil:
    free(buffer.data)
    buffer.data = NULL
    buffer.start = buffer.size = buffer.capacity = 0

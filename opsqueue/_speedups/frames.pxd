"""WebSocket frames (RFC 6455): headers read and written, payloads unmasked. Knows no connection, buffers nothing.

Inline functions only: there is no module behind this file.
"""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy


cdef enum Opcode:
    OP_CONTINUATION = 0
    OP_TEXT = 1
    OP_BINARY = 2
    OP_CLOSE = 8
    OP_PING = 9
    OP_PONG = 10


cdef enum CloseCode:
    CLOSE_NORMAL = 1000
    CLOSE_GOING_AWAY = 1001
    CLOSE_PROTOCOL_ERROR = 1002
    CLOSE_UNSUPPORTED = 1003
    CLOSE_NO_CODE = 1005          # never sent: stands for a close frame without a code
    CLOSE_UNDECODABLE = 1007
    CLOSE_POLICY = 1008
    CLOSE_TOO_BIG = 1009
    CLOSE_SERVICE_RESTART = 1012


cdef enum FrameFault:             # read_frame_header's refusals
    FAULT_RESERVED_BITS = -1
    FAULT_OPCODE = -2
    FAULT_UNMASKED = -3
    FAULT_CONTROL_FRAGMENTED = -4
    FAULT_CONTROL_SIZE = -5
    FAULT_LENGTH = -6


cdef enum:
    MAX_HEADER = 10               # of a frame that a server sends
    MAX_CONTROL = 125             # payload bytes of a control frame


cdef struct FrameHeader:
    uint64_t size                 # of the payload
    uint32_t mask                 # as it stands in memory
    uint8_t opcode
    bint fin


cdef inline int read_frame_header(const uint8_t *at, size_t available, FrameHeader *header) noexcept nogil:
    """Bytes of a client's frame header; 0: not all of it is there; a FrameFault, as soon as it can be told."""
    cdef uint8_t length
    cdef int used = 2
    cdef int i
    if available < 2:
        return 0
    if at[0] & 0x70:
        return FAULT_RESERVED_BITS
    header.opcode = at[0] & 0x0F
    header.fin = at[0] >> 7
    if header.opcode > OP_PONG or OP_BINARY < header.opcode < OP_CLOSE:
        return FAULT_OPCODE
    if not at[1] & 0x80:
        return FAULT_UNMASKED
    length = at[1] & 0x7F
    if header.opcode >= OP_CLOSE:
        if not header.fin:
            return FAULT_CONTROL_FRAGMENTED
        if length > MAX_CONTROL:
            return FAULT_CONTROL_SIZE
    header.size = length
    if length == 126:
        if available < 4:
            return 0
        header.size = (<uint64_t>at[2] << 8) | at[3]
        if header.size < 126:
            return FAULT_LENGTH
        used = 4
    elif length == 127:
        if available < 10:
            return 0
        header.size = 0
        for i in range(2, 10):
            header.size = header.size << 8 | at[i]
        if header.size < 65536 or header.size >> 63:
            return FAULT_LENGTH
        used = 10
    if available < <size_t>used + 4:
        return 0
    memcpy(&header.mask, at + used, 4)
    return used + 4


cdef inline void unmask(uint8_t *data, size_t size, uint32_t mask) noexcept nogil:
    """Exclusive or with the mask, in place, eight bytes at a time."""
    cdef uint64_t wide = <uint64_t>mask << 32 | mask
    cdef uint64_t word
    cdef size_t at = 0
    cdef const uint8_t *bytes_of_mask = <const uint8_t *>&wide
    while at + 8 <= size:
        memcpy(&word, data + at, 8)
        word ^= wide
        memcpy(data + at, &word, 8)
        at += 8
    while at < size:
        data[at] ^= bytes_of_mask[at & 7]
        at += 1


cdef inline int frame_header_size(uint64_t size) noexcept nogil:
    return 2 if size < 126 else 4 if size < 65536 else 10


cdef inline int write_frame_header(uint8_t *to, uint8_t opcode, bint fin, uint64_t size) noexcept nogil:
    """Bytes written, at most MAX_HEADER: a server's header has no mask."""
    cdef int i
    to[0] = opcode | (0x80 if fin else 0)
    if size < 126:
        to[1] = <uint8_t>size
        return 2
    if size < 65536:
        to[1] = 126
        to[2] = <uint8_t>(size >> 8)
        to[3] = <uint8_t>size
        return 4
    to[1] = 127
    for i in range(8):
        to[2 + i] = <uint8_t>(size >> (56 - 8 * i))
    return 10


cdef inline bint may_be_received(uint32_t code) noexcept nogil:
    """Close codes that a peer may put into a close frame (RFC 6455 section 7.4)."""
    if 3000 <= code < 5000:
        return True
    return 1000 <= code <= 1014 and code != 1004 and code != 1005 and code != 1006

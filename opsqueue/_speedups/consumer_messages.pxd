"""Consumers' messages, read in place: the forms that clients really send, without a Python object.

`scan_message` is exact about what it accepts and judges nothing else: whatever is unusual (unknown fields, indefinite
lengths, tags, a wrong type) is left to opsqueue.protocol.consumer, which also words the errors. Inline functions only.
"""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy

from opsqueue._speedups.cbor cimport (
    CBOR_NULL,
    MAJOR_ARRAY,
    MAJOR_BYTES,
    MAJOR_MAP,
    MAJOR_TEXT,
    MAJOR_UNSIGNED,
    Cursor,
    equals,
    ill_formed,
    is_utf8,
    read_head,
    read_string,
)
from opsqueue._speedups.records cimport (
    REC_COMPLETE,
    REC_EXTEND,
    REC_FAIL,
    REC_FAIL_SUBMISSION,
    REC_RELEASE,
    REC_RESERVE,
    REC_RETRY_LATER,
    REC_WORKING_ON,
)


cdef enum:
    STRATEGY_DEPTH = 8            # as opsqueue.protocol.strategy.MAX_DEPTH
    META_KEY_BYTES = 256          # as opsqueue.protocol.strategy.MAX_META_KEY_BYTES
    STRATEGY_BYTES = 4096         # as opsqueue.protocol.strategy.MAX_CANONICAL_BYTES


cdef enum CreditMessage:      # beside the RecordKinds: messages about credits, which the front-end answers for
    MESSAGE_OPEN_CREDIT = 1001
    MESSAGE_ADD_CREDIT = 1002
    MESSAGE_WITHDRAW_CREDIT = 1003


cdef enum Field:
    FIELD_ID = 1
    FIELD_MAX = 2
    FIELD_STRATEGY = 4
    FIELD_OUTPUT = 8
    FIELD_FAILURE = 16
    FIELD_REASON = 32
    FIELD_DELAY = 64
    FIELD_CREDIT = 128
    FIELD_CHUNKS = 256


cdef enum OutputForm:
    OUTPUT_NONE = 0
    OUTPUT_BYTES = 1
    OUTPUT_ARRAY = 2              # of integers, as the reference's client writes them


cdef struct Message:
    uint32_t kind                 # a RecordKind or a CreditMessage
    uint64_t nonce
    uint64_t submission
    uint64_t chunk
    uint64_t argument             # max, delay_ms, or a credit's chunks
    uint64_t credit
    # text or output: points into the message
    int output
    const uint8_t *tail
    size_t tail_size              # bytes, also of an array's content
    # canonical
    uint32_t strategy_size
    uint8_t[STRATEGY_BYTES] strategy


cdef inline bint read_index(Cursor *c, uint64_t *value) noexcept nogil:
    return read_head(c, MAJOR_UNSIGNED, value) and value[0] >> 63 == 0


cdef inline bint scan_id(Cursor *c, Message *m) noexcept nogil:
    cdef uint64_t fields
    cdef const uint8_t *name
    cdef size_t size
    cdef int i, seen = 0
    if not read_head(c, MAJOR_MAP, &fields) or fields != 2:
        return False
    for i in range(2):
        if not read_string(c, MAJOR_TEXT, &name, &size):
            return False
        if equals(name, size, "submission_id", 13):
            seen |= 1
            if not read_index(c, &m.submission):
                return False
        elif equals(name, size, "chunk_index", 11):
            seen |= 2
            if not read_index(c, &m.chunk):
                return False
        else:
            return False
    return seen == 3


cdef inline bint scan_strategy(Cursor *c, Message *m) noexcept nogil:
    """Writes the canonical bytes (opsqueue.protocol.strategy)."""
    cdef const uint8_t *name
    cdef const uint8_t *meta_key
    cdef const uint8_t *resume = NULL      # end of the outermost map whose `underlying` came first
    cdef const uint8_t *underlying
    cdef size_t size, meta_key_size
    cdef uint64_t fields
    cdef int depth = 0
    cdef uint8_t letter
    m.strategy_size = 0
    while c.at < c.end and c.at[0] >> 5 == MAJOR_MAP:
        if depth == STRATEGY_DEPTH:
            return False
        depth += 1
        if not read_head(c, MAJOR_MAP, &fields) or fields != 1 or not read_string(c, MAJOR_TEXT, &name, &size):
            return False
        if not equals(name, size, "PreferDistinct", 14) or not read_head(c, MAJOR_MAP, &fields) or fields != 2:
            return False
        if not read_string(c, MAJOR_TEXT, &name, &size):
            return False
        underlying = NULL
        if equals(name, size, "underlying", 10):
            underlying = c.at
            if ill_formed(c, 2 * STRATEGY_DEPTH) != NULL or not read_string(c, MAJOR_TEXT, &name, &size):
                return False
        if not equals(name, size, "meta_key", 8) or not read_string(c, MAJOR_TEXT, &meta_key, &meta_key_size):
            return False
        if meta_key_size > META_KEY_BYTES or not is_utf8(meta_key, meta_key_size):
            return False
        m.strategy[m.strategy_size] = c'P'
        m.strategy[m.strategy_size + 1] = <uint8_t>meta_key_size
        m.strategy[m.strategy_size + 2] = <uint8_t>(meta_key_size >> 8)
        memcpy(m.strategy + m.strategy_size + 3, meta_key, meta_key_size)
        m.strategy_size += 3 + <uint32_t>meta_key_size
        if underlying != NULL:
            if resume == NULL:
                resume = c.at
            c.at = underlying
        elif not read_string(c, MAJOR_TEXT, &name, &size) or not equals(name, size, "underlying", 10):
            return False
    if not read_string(c, MAJOR_TEXT, &name, &size):
        return False
    if equals(name, size, "Oldest", 6):
        letter = c'O'
    elif equals(name, size, "Newest", 6):
        letter = c'N'
    elif equals(name, size, "Random", 6):
        letter = c'R'
    else:
        return False
    m.strategy[m.strategy_size] = letter
    m.strategy_size += 1
    if resume != NULL:
        c.at = resume
    return True


cdef inline bint scan_output(Cursor *c, Message *m) noexcept nogil:
    cdef uint64_t count, i, value
    if c.at >= c.end:
        return False
    if c.at[0] == CBOR_NULL:
        c.at += 1
        m.output = OUTPUT_NONE
        return True
    if c.at[0] >> 5 == MAJOR_BYTES:
        m.output = OUTPUT_BYTES
        return read_string(c, MAJOR_BYTES, &m.tail, &m.tail_size)
    if not read_head(c, MAJOR_ARRAY, &count) or count > <uint64_t>(c.end - c.at):
        return False
    m.output = OUTPUT_ARRAY
    m.tail = c.at
    m.tail_size = count
    for i in range(count):
        if not read_head(c, MAJOR_UNSIGNED, &value) or value > 255:
            return False
    return True


cdef inline void copy_array(const uint8_t *items, const uint8_t *end, uint8_t *to, size_t count) noexcept nogil:
    """The bytes that a scanned array of integers stands for."""
    cdef Cursor c
    cdef uint64_t value = 0
    cdef size_t i
    c.at = items
    c.end = end
    for i in range(count):
        read_head(&c, MAJOR_UNSIGNED, &value)
        to[i] = <uint8_t>value


cdef inline uint32_t message_kind(const uint8_t *name, size_t size, int *fields) noexcept nogil:
    if equals(name, size, "WantToReserveChunks", 19):
        fields[0] = FIELD_MAX | FIELD_STRATEGY
        return REC_RESERVE
    if equals(name, size, "CompleteChunk", 13):
        fields[0] = FIELD_ID | FIELD_OUTPUT
        return REC_COMPLETE
    if equals(name, size, "WorkingOn", 9):
        fields[0] = FIELD_ID
        return REC_WORKING_ON
    if equals(name, size, "FailChunk", 9):
        fields[0] = FIELD_ID | FIELD_FAILURE
        return REC_FAIL
    if equals(name, size, "ReleaseChunk", 12):
        fields[0] = FIELD_ID
        return REC_RELEASE
    if equals(name, size, "ExtendReservation", 17):
        fields[0] = FIELD_ID
        return REC_EXTEND
    if equals(name, size, "RetryLater", 10):
        fields[0] = FIELD_ID | FIELD_DELAY
        return REC_RETRY_LATER
    if equals(name, size, "FailSubmission", 14):
        fields[0] = FIELD_ID | FIELD_REASON
        return REC_FAIL_SUBMISSION
    if equals(name, size, "AddCredit", 9):
        fields[0] = FIELD_CREDIT | FIELD_CHUNKS
        return MESSAGE_ADD_CREDIT
    if equals(name, size, "OpenCredit", 10):
        fields[0] = FIELD_CHUNKS | FIELD_STRATEGY
        return MESSAGE_OPEN_CREDIT
    if equals(name, size, "WithdrawCredit", 14):
        fields[0] = FIELD_CREDIT
        return MESSAGE_WITHDRAW_CREDIT
    return 0


cdef inline bint scan_contents(Cursor *c, Message *m) noexcept nogil:
    cdef const uint8_t *name
    cdef size_t size
    cdef uint64_t count, i
    cdef int wanted = 0, seen = 0
    if not read_head(c, MAJOR_MAP, &count) or count != 1 or not read_string(c, MAJOR_TEXT, &name, &size):
        return False
    m.kind = message_kind(name, size, &wanted)
    if m.kind == 0 or not read_head(c, MAJOR_MAP, &count) or count > 2:
        return False
    m.output = OUTPUT_NONE
    m.argument = 0
    m.tail_size = 0
    m.tail = NULL
    for i in range(count):
        if not read_string(c, MAJOR_TEXT, &name, &size):
            return False
        if wanted & FIELD_ID and equals(name, size, "id", 2):
            seen |= FIELD_ID
            if not scan_id(c, m):
                return False
        elif wanted & FIELD_MAX and equals(name, size, "max", 3):
            seen |= FIELD_MAX
            if not read_head(c, MAJOR_UNSIGNED, &m.argument):
                return False
        elif wanted & FIELD_CREDIT and equals(name, size, "credit", 6):
            seen |= FIELD_CREDIT
            if not read_head(c, MAJOR_UNSIGNED, &m.credit):
                return False
        elif wanted & FIELD_CHUNKS and equals(name, size, "chunks", 6):
            seen |= FIELD_CHUNKS
            if not read_head(c, MAJOR_UNSIGNED, &m.argument):
                return False
        elif wanted & FIELD_STRATEGY and equals(name, size, "strategy", 8):
            seen |= FIELD_STRATEGY
            if not scan_strategy(c, m):
                return False
        elif wanted & FIELD_OUTPUT and equals(name, size, "output_content", 14):
            seen |= FIELD_OUTPUT
            if not scan_output(c, m):
                return False
        elif wanted & FIELD_DELAY and equals(name, size, "delay_ms", 8):
            seen |= FIELD_DELAY
            if not read_index(c, &m.argument):
                return False
        elif (wanted & FIELD_FAILURE and equals(name, size, "failure", 7)) or (
            wanted & FIELD_REASON and equals(name, size, "reason", 6)
        ):
            seen |= wanted & (FIELD_FAILURE | FIELD_REASON)
            if not read_string(c, MAJOR_TEXT, &m.tail, &m.tail_size) or not is_utf8(m.tail, m.tail_size):
                return False
        else:
            return False
    return seen == wanted


cdef inline bint scan_message(const uint8_t *data, size_t size, Message *m) noexcept nogil:
    """True: `m` holds the whole message. False: not one of the usual forms, nothing is said about it."""
    cdef Cursor c
    cdef const uint8_t *name
    cdef size_t name_size
    cdef uint64_t fields
    cdef int i, seen = 0
    c.at = data
    c.end = data + size
    if not read_head(&c, MAJOR_MAP, &fields) or fields != 2:
        return False
    for i in range(2):
        if not read_string(&c, MAJOR_TEXT, &name, &name_size):
            return False
        if equals(name, name_size, "nonce", 5):
            seen |= 1
            if not read_head(&c, MAJOR_UNSIGNED, &m.nonce):
                return False
        elif equals(name, name_size, "contents", 8):
            seen |= 2
            if not scan_contents(&c, m):
                return False
        else:
            return False
    return seen == 3 and c.at == c.end

"""Layouts of the fixed binary records that cross the rings; docs/records.md says them in words.

All fields are little-endian and naturally aligned; every struct's size is a multiple of 8. A connection number is
chosen by the front-end: bits 0..31 a dense slot, bits 32..55 the slot's generation; the writer adds the front-end's
index in bits 56..63 and calls the result a holder.
"""

from libc.stdint cimport uint8_t, uint32_t, uint64_t


cdef enum RecordKind:
    # front-end to writer
    REC_OPEN = 1              # OpenRecord
    REC_CLOSE = 2             # CloseRecord
    REC_RESERVE = 3           # ReserveRecord, then the strategy in canonical bytes
    REC_COMPLETE = 4          # ChunkRecord, then the output if flags has CHUNK_HAS_OUTPUT
    REC_FAIL = 5              # ChunkRecord, then the failure's text in UTF-8
    REC_WORKING_ON = 6        # ChunkRecord
    REC_RELEASE = 7           # ChunkRecord
    REC_EXTEND = 8            # ChunkRecord
    REC_RETRY_LATER = 9       # ChunkRecord, argument = delay in ms
    REC_FAIL_SUBMISSION = 10  # ChunkRecord, then the reason in UTF-8
    REC_REPORT = 11           # ReportRecord, then `runs` ReportRun, then what they point to
    REC_CREDIT = 12           # CreditRecord, then the strategy in canonical bytes if action is CREDIT_OPEN
    REC_REQUEST = 32          # RequestRecord, then msgpack (opsqueue.server.requests)
    # both directions
    REC_FRAGMENT = 48         # FragmentRecord, then a part of a larger record
    # writer to front-end
    REC_RESERVED = 64         # ReservedRecord, then `count` ReservedChunk
    REC_REFUSED = 65          # RefusedRecord, then the reason in UTF-8
    REC_DROPPED = 66          # DroppedRecord
    REC_REPLY = 67            # RequestRecord, then msgpack (opsqueue.server.requests)
    REC_WITHDRAWN = 68        # WithdrawnRecord


cdef enum ChunkFlags:
    CHUNK_HAS_OUTPUT = 1      # COMPLETE: output bytes follow
    CHUNK_IS_DIRECT = 2       # ReservedChunk: the input is in the database, not in the object store


cdef enum RunFlags:           # of a ReportRun
    RUN_HAS_OUTPUT = 1        # one chunk, done, with an output
    RUN_FAILED = 2            # the failure's text in UTF-8


cdef enum CreditAction:
    CREDIT_OPEN = 1
    CREDIT_ADD = 2
    CREDIT_WITHDRAW = 3


cdef enum ReservedFlags:
    RESERVED_ON_CREDIT = 1    # the nonce names a credit, not a request


cdef enum:
    MAX_REPORTED = 4096       # chunks of one ReportRecord


cdef enum CloseCause:
    CLOSE_CLEAN = 0           # a close frame came, or we closed
    CLOSE_LOST = 1            # the connection ended without one


cdef enum DropReason:
    DROP_CANCELLED = 1
    DROP_FAILED = 2
    DROP_COMPLETED = 3
    DROP_EXPIRED = 4


cdef enum FeatureBits:        # of a consumer's connection, as agreed in the handshake
    FEATURE_CLEAN_CLOSE = 1
    FEATURE_REFUSAL = 2
    FEATURE_DROPPED = 4
    FEATURE_RELEASE = 8
    FEATURE_EXTEND = 16
    FEATURE_RETRY_LATER = 32
    FEATURE_FAIL_SUBMISSION = 64
    FEATURE_COMPACT = 128


cdef struct RecordHeader:     # before every record in a ring; records start at multiples of 8
    uint32_t size             # of the payload that follows, without padding
    uint32_t kind


cdef struct OpenRecord:
    uint64_t connection
    uint32_t features
    uint32_t _reserved


cdef struct CloseRecord:
    uint64_t connection
    uint32_t cause
    uint32_t _reserved


cdef struct ReserveRecord:
    uint64_t connection
    uint64_t nonce
    uint32_t max
    uint32_t strategy_size    # bytes of canonical strategy that follow


cdef struct ChunkRecord:
    uint64_t connection
    uint64_t submission
    uint64_t chunk
    uint64_t argument
    uint32_t flags
    uint32_t tail_size        # bytes that follow


cdef struct ReportRecord:
    uint64_t connection
    uint32_t runs
    uint32_t chunks           # of all runs together, at most MAX_REPORTED


cdef struct ReportRun:        # consecutive chunks that ended in the same way
    uint64_t submission
    uint64_t first
    uint32_t count
    uint32_t flags
    uint32_t tail_at          # from the end of the last run
    uint32_t tail_size


cdef struct CreditRecord:
    uint64_t connection
    uint64_t nonce            # the credit's name
    uint32_t action
    uint32_t chunks           # CREDIT_OPEN, CREDIT_ADD
    uint32_t strategy_size    # bytes of canonical strategy that follow
    uint32_t _reserved


cdef struct RequestRecord:    # REQUEST and REPLY
    uint64_t request          # chosen by the front-end, echoed by the reply


cdef struct FragmentRecord:
    uint64_t stream           # chosen by the sender; fragments of different streams may interleave
    uint32_t kind             # of the whole record
    uint32_t total            # its size in bytes
    uint32_t offset           # where this part goes; parts of one stream come in order
    uint32_t size             # bytes that follow


cdef struct ReservedRecord:
    uint64_t connection
    uint64_t nonce
    uint32_t count
    uint32_t flags            # ReservedFlags


cdef struct ReservedChunk:
    uint64_t submission
    uint64_t chunk
    uint64_t chunks_done      # of the submission, at this moment
    uint32_t retries
    uint32_t flags


cdef struct RefusedRecord:
    uint64_t connection
    uint64_t nonce
    uint32_t size             # bytes of the reason that follow
    uint32_t flags            # ReservedFlags


cdef struct DroppedRecord:
    uint64_t connection
    uint64_t submission
    uint64_t chunk
    uint32_t reason
    uint32_t _reserved


cdef struct WithdrawnRecord:
    uint64_t connection
    uint64_t nonce
    uint32_t left             # chunks that the writer had not used of it
    uint32_t _reserved

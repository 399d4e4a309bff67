# cython: language_level=3
"""What a consumer's connection says in words, and the features' names: tables by the numbers of records and frames."""

from opsqueue._speedups.consumer_messages cimport MESSAGE_ADD_CREDIT, MESSAGE_OPEN_CREDIT, MESSAGE_WITHDRAW_CREDIT
from opsqueue._speedups.frames cimport (
    FAULT_CONTROL_FRAGMENTED,
    FAULT_CONTROL_SIZE,
    FAULT_LENGTH,
    FAULT_OPCODE,
    FAULT_RESERVED_BITS,
    FAULT_UNMASKED,
)
from opsqueue._speedups.records cimport (
    DROP_CANCELLED,
    DROP_COMPLETED,
    DROP_EXPIRED,
    DROP_FAILED,
    FEATURE_CLEAN_CLOSE,
    FEATURE_COMPACT,
    FEATURE_DROPPED,
    FEATURE_EXTEND,
    FEATURE_FAIL_SUBMISSION,
    FEATURE_REFUSAL,
    FEATURE_RELEASE,
    FEATURE_RETRY_LATER,
    REC_EXTEND,
    REC_FAIL_SUBMISSION,
    REC_RELEASE,
    REC_REPORT,
    REC_RETRY_LATER,
    REC_WORKING_ON,
)

#: Bits of the agreed features, by name.
FEATURE_BITS = {
    "clean-close": FEATURE_CLEAN_CLOSE,
    "refusal": FEATURE_REFUSAL,
    "dropped": FEATURE_DROPPED,
    "release": FEATURE_RELEASE,
    "extend": FEATURE_EXTEND,
    "retry-later": FEATURE_RETRY_LATER,
    "fail-submission": FEATURE_FAIL_SUBMISSION,
    "compact": FEATURE_COMPACT,
    "strategies": 0,  # says what the server knows; nothing is done differently
}

#: What is wrong with a frame, by read_frame_header's refusal.
FAULTS = {
    FAULT_RESERVED_BITS: b"reserved bits are set; no extension was agreed",
    FAULT_OPCODE: b"the frame's opcode is reserved",
    FAULT_UNMASKED: b"the frame is not masked",
    FAULT_CONTROL_FRAGMENTED: b"a control frame is fragmented",
    FAULT_CONTROL_SIZE: b"a control frame has more than 125 bytes",
    FAULT_LENGTH: b"the frame's length is not in its shortest form",
}
#: The feature that a kind of message needs, and the words for a peer that did not agree on it.
NEEDED_FEATURE = {
    REC_WORKING_ON: (FEATURE_CLEAN_CLOSE, b"WorkingOn needs the feature clean-close, which was not agreed"),
    REC_RELEASE: (FEATURE_RELEASE, b"ReleaseChunk needs the feature release, which was not agreed"),
    REC_EXTEND: (FEATURE_EXTEND, b"ExtendReservation needs the feature extend, which was not agreed"),
    REC_RETRY_LATER: (FEATURE_RETRY_LATER, b"RetryLater needs the feature retry-later, which was not agreed"),
    REC_FAIL_SUBMISSION: (
        FEATURE_FAIL_SUBMISSION,
        b"FailSubmission needs the feature fail-submission, which was not agreed",
    ),
    REC_REPORT: (FEATURE_COMPACT, b"ReportChunks needs the feature compact, which was not agreed"),
    MESSAGE_OPEN_CREDIT: (FEATURE_COMPACT, b"OpenCredit needs the feature compact, which was not agreed"),
    MESSAGE_ADD_CREDIT: (FEATURE_COMPACT, b"AddCredit needs the feature compact, which was not agreed"),
    MESSAGE_WITHDRAW_CREDIT: (FEATURE_COMPACT, b"WithdrawCredit needs the feature compact, which was not agreed"),
}
#: Why a chunk is no longer held.
DROP_TEXTS = {
    DROP_CANCELLED: b"cancelled",
    DROP_FAILED: b"failed",
    DROP_COMPLETED: b"completed",
    DROP_EXPIRED: b"expired",
}

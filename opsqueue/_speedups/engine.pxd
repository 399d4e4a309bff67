"""The engine: every submission's bits, every reservation, the order of every strategy. Knows no socket, ring or file.

One thread uses it. Times are milliseconds of a monotonic clock that the caller passes to `advance`; `now_ms` is the last.
"""

from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t

from opsqueue._speedups.records cimport DroppedRecord, ReservedChunk


cdef enum Verdict:            # what became of a message about a chunk
    IGNORED = 0
    COUNTED = 1


cdef class Engine:
    # settings
    cdef readonly uint64_t reservation_ms
    cdef readonly uint32_t max_retries
    cdef readonly uint32_t max_crashes
    # the caller's
    cdef public uint64_t now_ms
    cdef public uint64_t batch                 # number of the batch that gathers now; stamps changes
    cdef uint64_t *counters                    # SLOT_COUNTERS of them (counters.pxd), the board's or its own
    # totals
    cdef readonly uint64_t available           # chunks that could be reserved now
    cdef readonly uint64_t availability_epoch  # raised whenever a chunk becomes available
    # notices to holders, for the caller to send and clear (connection = holder)
    cdef DroppedRecord *notices
    cdef readonly uint32_t notice_count

    # hot path: no Python object per chunk
    cdef int strategy(self, const uint8_t *canonical, uint32_t size) noexcept            # handle; -1: `refusal` says why
    cdef bint strategy_ready(self, int strategy) noexcept                               # False: its index is being built
    cdef uint32_t reserve(self, uint64_t holder, int strategy, uint32_t max, ReservedChunk *out) noexcept
    cdef int complete(self, uint64_t holder, uint64_t submission, uint64_t chunk) noexcept
    cdef int fail(self, uint64_t holder, uint64_t submission, uint64_t chunk,
                  const uint8_t *text, uint32_t size) noexcept
    cdef int release(self, uint64_t holder, uint64_t submission, uint64_t chunk) noexcept
    cdef int extend(self, uint64_t holder, uint64_t submission, uint64_t chunk) noexcept
    cdef int retry_later(self, uint64_t holder, uint64_t submission, uint64_t chunk, uint64_t delay_ms) noexcept
    cdef int fail_submission(self, uint64_t holder, uint64_t submission, uint64_t chunk,
                             const uint8_t *text, uint32_t size) noexcept
    cdef int working_on(self, uint64_t holder, uint64_t submission, uint64_t chunk) noexcept
    cdef void open_holder(self, uint64_t holder, uint32_t features) noexcept
    cdef void close_holder(self, uint64_t holder, bint lost) noexcept
    cdef void close_holders_of(self, uint32_t frontend) noexcept                        # bits 56..63 of a holder
    # journal
    cdef bytes take_events(self)                                                        # packed log row; empties it
    cdef list take_ended(self)                                                          # of EndedTuple, see engine.pyi
    cdef bint has_changes(self) noexcept                                                # events or ended, not yet taken

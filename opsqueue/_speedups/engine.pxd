"""The engine: every submission's bits, every reservation, the order of every strategy. Knows no socket, ring or file.

One thread uses it. Times are milliseconds of a monotonic clock that the caller passes to `advance`; `now_ms` is the last.
"""

from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t

from opsqueue._speedups.dirty cimport Dirty
from opsqueue._speedups.eventlog cimport EventLog
from opsqueue._speedups.orders cimport Orders
from opsqueue._speedups.records cimport DroppedRecord, ReservedChunk
from opsqueue._speedups.reservations cimport Reservation, Reservations
from opsqueue._speedups.slotmap cimport SlotMap
from opsqueue._speedups.submission cimport Submission
from opsqueue._speedups.watching cimport Watching
from opsqueue._speedups.wheel cimport Wheel


cdef enum Verdict:            # what became of a message about a chunk
    IGNORED = 0
    COUNTED = 1


cdef struct Holder:           # a consumer's connection, by its dense slot in its front-end
    uint64_t holder           # 0: closed
    uint32_t features
    uint32_t first_reservation


cdef struct HolderTable:      # of one front-end
    Holder *at
    uint32_t capacity


cdef class Engine:
    # settings
    cdef readonly uint64_t reservation_ms
    cdef readonly uint32_t max_retries
    cdef readonly uint32_t max_crashes
    cdef readonly uint64_t grace_ms            # from an expiry at the retry limit to the submission's failure
    # the caller's
    cdef public uint64_t now_ms
    cdef public uint64_t batch                 # number of the batch that gathers now; stamps changes
    cdef uint64_t *counters                    # SLOT_COUNTERS of them (counters.pxd), the board's or its own
    cdef uint64_t *own_counters
    cdef object board                          # keeps the shared counters mapped
    # notices to holders, for the caller to send and clear (connection = holder)
    cdef DroppedRecord *notices
    cdef public uint32_t notice_count
    cdef uint32_t notice_capacity
    # submissions, by slot
    cdef Submission **submissions              # an odd value: a free slot, (next << 1) | 1
    cdef uint32_t submission_capacity
    cdef uint32_t submissions_end              # slots from here have never been used
    cdef uint32_t free_submission
    cdef readonly uint32_t submission_count
    cdef SlotMap by_id
    cdef readonly uint64_t promised            # bytes: worst case of all unfinished submissions
    # who holds what
    cdef HolderTable holders[256]
    cdef Reservations reservations
    cdef Wheel wheel
    cdef uint64_t workings                     # numbers the WorkingOn messages
    cdef Orders orders
    cdef uint64_t random
    # for the journal
    cdef EventLog log
    cdef list ended
    cdef Dirty dirty                           # blocks changed since their last fold
    cdef Watching watching                     # what producers watch (done_blocks.pyx)
    # sliced jobs, linked by Submission.next_job; 0xFFFFFFFF ends
    cdef uint32_t drop_jobs
    cdef uint32_t free_jobs
    cdef list recovered_ended                  # ids; freed soon unless log rows touch them

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
    # submissions
    cdef Submission *find(self, uint64_t submission) noexcept
    cdef Submission *known(self, uint64_t submission) except NULL
    cdef Submission *enter(self, uint64_t submission, uint64_t chunks_total, int64_t chunk_size, dict metadata,
                           bint direct, int state) except NULL
    cdef void touch(self, Submission *s) noexcept
    cdef void finish(self, Submission *s, int state, uint64_t failed_chunk, object failure) noexcept
    cdef void chunk_finished(self, Submission *s, uint64_t chunk, bint taken) noexcept
    cdef bint drop_reservations(self, Submission *s, uint32_t limit) noexcept
    cdef void free_if_over(self, Submission *s) noexcept
    cdef void leave(self, Submission *s) noexcept
    cdef void free_slot(self, Submission *s) noexcept
    cdef void count_end(self, Submission *s) noexcept
    # holders and reservations
    cdef Holder *find_holder(self, uint64_t holder) noexcept
    cdef void hold(self, Submission *s, uint64_t chunk, Holder *who, ReservedChunk *out) noexcept
    cdef void unhold(self, Submission *s, uint32_t reservation) noexcept
    cdef void release_chunk(self, Submission *s, uint32_t reservation) noexcept
    cdef void in_flight(self, Submission *s, int change) noexcept
    cdef uint32_t held_by(self, uint64_t holder, uint64_t submission, uint64_t chunk, Submission **s) noexcept
    cdef void expired(self, uint32_t reservation) noexcept
    cdef void close_found(self, Holder *who, bint lost) noexcept
    cdef bint add_retry(self, Submission *s, uint64_t chunk) noexcept
    cdef void doom(self, Submission *s, uint64_t chunk) noexcept
    cdef void notice(self, uint64_t holder, Submission *s, uint64_t chunk, uint32_t reason) noexcept
    # journal
    cdef void event(self, uint32_t kind, Submission *s, uint64_t chunk) noexcept
    cdef tuple block_row(self, Submission *s, uint32_t block)
    cdef void replay(self, Submission *s, uint32_t kind, uint64_t chunk) noexcept
    cdef int load_block(self, uint64_t submission, uint64_t place, bytes done, bytes attempts) except -1
    # time
    cpdef bint advance(self, uint64_t now_ms) noexcept
    cdef uint64_t next_timer(self) noexcept
    cpdef bint work(self, uint64_t budget_ns) noexcept
    cdef bint work_until(self, uint64_t until_ns) noexcept

"""Which counter of a board's slot means what; opsqueue.server.metrics gives each its public name and help.

The engine and the front-ends count here with one addition; the metrics page sums the slots.
"""

from libc.stdint cimport int64_t, uint64_t


cdef enum:
    HISTOGRAM_BOUNDS = 24                     # upper bounds 100 us * 2**k, k = 0..23 (the last: 839 s)
    HISTOGRAM_SIZE = HISTOGRAM_BOUNDS + 2     # then the overflow bucket, then the sum in ns


cpdef enum Counter:
    # counters of the writer
    SUBMISSIONS_TOTAL = 0
    SUBMISSIONS_COMPLETED = 1
    SUBMISSIONS_FAILED = 2
    SUBMISSIONS_CANCELLED = 3
    SUBMISSIONS_FORGOTTEN = 4
    CHUNKS_TOTAL = 5
    CHUNKS_COMPLETED = 6
    CHUNKS_FAILED = 7                         # the chunks that made their submission fail
    CHUNKS_RETRIED = 8                        # failures and expiries that count as a retry
    CHUNKS_SKIPPED = 9                        # not done when their submission failed or was cancelled
    CHUNKS_EXPIRED = 10
    CHUNKS_CRASHED = 11
    CHUNKS_RELEASED = 12
    COMPLETIONS_IGNORED = 13                  # second completions, unknown or ended submissions
    FAILURES_IGNORED = 14                     # not from the holder
    RESERVATIONS_SUCCEEDED = 15               # requests answered with chunks
    RESERVATIONS_FAILED = 16                  # requests refused or with max = 0
    COMMITS = 17
    COMMITS_FAILED = 18
    COMMITTED_EVENTS_BYTES = 19
    CHECKPOINTS = 20
    RECORDS_RECEIVED = 21
    RECORDS_SENT = 22
    WRITER_WAKEUPS = 23
    BAD_RINGS = 24
    FSYNCS = 25                               # calls that make the disk keep what was written
    # gauges of the writer
    CHUNKS_BACKLOG = 40                       # not done, of submissions in progress (paused ones too)
    OPERATIONS_BACKLOG = 41                   # CHUNKS_BACKLOG times each submission's chunk_size
    CHUNKS_RESERVED = 42
    SUBMISSIONS_IN_PROGRESS = 43              # paused ones too
    SUBMISSIONS_COMPLETED_KEPT = 44
    REQUESTS_PARKED = 45
    WAL_BYTES = 46
    COMMIT_HEALTHY = 47                       # 1: the last commit succeeded
    MEMORY_PROMISED = 48                      # bytes: worst case of all submissions in memory
    # counters of the front-ends
    HTTP_REQUESTS = 60
    HTTP_ERRORS_4XX = 61
    HTTP_ERRORS_5XX = 62
    CONSUMERS_OPENED = 63
    CONSUMERS_LOST = 64                       # ended without a close frame
    CONSUMERS_REJECTED = 65                   # closed by us: garbage, refusal, missed heartbeats
    FRAMES_RECEIVED = 66
    BYTES_RECEIVED = 67
    BYTES_SENT = 68
    FRONTEND_WAKEUPS = 69
    # gauges of the front-ends
    CONSUMERS_CONNECTED = 80
    WAITS_PARKED = 81                         # producers' requests that wait (?wait=)
    # of the supervisor
    PROCESSES_REPLACED = 90
    # histograms: HISTOGRAM_SIZE counters each
    HISTOGRAM_SUBMISSION_COMPLETE = 100       # insert to completed
    HISTOGRAM_SUBMISSION_FAIL = 130
    HISTOGRAM_SUBMISSION_CANCEL = 160
    HISTOGRAM_CHUNK_COMPLETED = 190           # reserved to completed
    HISTOGRAM_CHUNK_FAILURE = 220             # reserved to failed
    HISTOGRAM_RESERVE = 250                   # a reserve request in the front-end: received to answered
    HISTOGRAM_COMPLETE_MESSAGE = 280          # the writer's time for a CompleteChunk
    HISTOGRAM_FAIL_MESSAGE = 310
    HISTOGRAM_COMMIT = 340                    # a batch's transaction, fdatasync included
    HISTOGRAM_CHECKPOINT = 370


cdef inline void observe(uint64_t *counters, int base, uint64_t ns) noexcept nogil:
    """Add a duration to the histogram at `base`."""
    cdef uint64_t bound = 100000
    cdef int bucket = 0
    while bucket < HISTOGRAM_BOUNDS and ns > bound:
        bound <<= 1
        bucket += 1
    counters[base + bucket] += 1
    counters[base + HISTOGRAM_BOUNDS + 1] += ns

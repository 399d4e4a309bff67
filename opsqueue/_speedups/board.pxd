"""The board: one shared-memory page group with a slot per process (progress, load, counters)."""

from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t


cdef enum:
    SLOT_COUNTERS = 1008      # 64-bit counters of a slot; which index means what: opsqueue.server.metrics


cdef struct Slot:             # 8 KiB; written by its process, read by all
    # liveness
    uint64_t progress_ns      # CLOCK_MONOTONIC when the process last went round its loop
    uint32_t state            # SlotState
    uint32_t pid
    # load
    int64_t connections       # open TCP connections (front-ends)
    uint64_t _reserved[13]
    # counters and gauges
    int64_t counters[SLOT_COUNTERS]


cdef class Board:             # created by the supervisor before it forks; inherited
    cdef Slot *slots
    cdef readonly uint32_t size
    cdef uint64_t *counters(self, uint32_t slot) noexcept nogil
    cdef Slot *_slot(self, uint32_t slot) except NULL

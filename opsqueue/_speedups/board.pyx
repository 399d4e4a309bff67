# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""The board: shared memory with one slot per process. Holds numbers only; knows no metric's name."""

from libc.stdint cimport int64_t, uint32_t, uint64_t
from posix.mman cimport MAP_ANONYMOUS, MAP_FAILED, MAP_SHARED, PROT_READ, PROT_WRITE, mmap, munmap
from posix.time cimport CLOCK_MONOTONIC, clock_gettime, timespec

import enum
import os


class SlotState(enum.IntEnum):
    """What a process says of itself on the board."""

    ABSENT = 0
    STARTING = 1
    SERVING = 2
    DRAINING = 3


cdef inline uint64_t monotonic_ns() noexcept nogil:
    cdef timespec now
    clock_gettime(CLOCK_MONOTONIC, &now)
    return <uint64_t>now.tv_sec * 1000000000 + <uint64_t>now.tv_nsec


cdef class Board:
    """Shared memory with `size` slots; slot 0 is the supervisor's, 1 the writer's, 2 + i front-end i's."""

    def __cinit__(self, uint32_t size):
        self.size = size
        self.slots = <Slot *>mmap(
            NULL, size * sizeof(Slot), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0
        )
        if <void *>self.slots == MAP_FAILED:
            self.slots = NULL
            raise MemoryError(f"no shared memory for a board of {size} slots ({size * sizeof(Slot)} bytes)")

    def __dealloc__(self):
        if self.slots != NULL:
            munmap(self.slots, self.size * sizeof(Slot))

    cdef uint64_t *counters(self, uint32_t slot) noexcept nogil:
        return <uint64_t *>self.slots[slot].counters

    cdef Slot *_slot(self, uint32_t slot) except NULL:
        if slot >= self.size:
            raise IndexError(f"slot {slot} of a board of {self.size}")
        return &self.slots[slot]

    def start(self, uint32_t slot, state: int) -> None:
        """Called in a process when it starts: its pid, its state, a first sign of progress, no connections."""
        cdef Slot *at = self._slot(slot)
        at.pid = os.getpid()
        at.connections = 0
        at.state = state
        at.progress_ns = monotonic_ns()

    def progress(self, uint32_t slot) -> None:
        """Say that the process in `slot` has gone round its loop now."""
        self._slot(slot).progress_ns = monotonic_ns()

    def seconds_since_progress(self, uint32_t slot) -> float:
        """Seconds since the process in `slot` last went round its loop."""
        cdef uint64_t now = monotonic_ns()
        cdef uint64_t then = self._slot(slot).progress_ns
        return (now - then) / 1e9 if now > then else 0.0

    def state(self, uint32_t slot) -> int:
        """The SlotState of the process in `slot`, as a number."""
        return self._slot(slot).state

    def set_state(self, uint32_t slot, state: int) -> None:
        """Set the SlotState of `slot`."""
        self._slot(slot).state = state

    def pid(self, uint32_t slot) -> int:
        """The process id that last started in `slot`."""
        return self._slot(slot).pid

    def connections(self, uint32_t slot) -> int:
        """Open connections of the front-end in `slot`."""
        return self._slot(slot).connections

    def set_connections(self, uint32_t slot, int64_t count) -> None:
        """Set the number of open connections of the front-end in `slot`."""
        self._slot(slot).connections = count

    def add(self, uint32_t slot, uint32_t index, int64_t amount) -> None:
        """Add to a counter of `slot`; only the slot's own process may."""
        if index >= SLOT_COUNTERS:
            raise IndexError(f"counter {index} of {SLOT_COUNTERS}")
        self._slot(slot).counters[index] += amount

    def put(self, uint32_t slot, uint32_t index, int64_t value) -> None:
        """Set a gauge of `slot`."""
        if index >= SLOT_COUNTERS:
            raise IndexError(f"counter {index} of {SLOT_COUNTERS}")
        self._slot(slot).counters[index] = value

    def get(self, uint32_t slot, uint32_t index) -> int:
        """One counter of one slot."""
        if index >= SLOT_COUNTERS:
            raise IndexError(f"counter {index} of {SLOT_COUNTERS}")
        return self._slot(slot).counters[index]

    def total(self, uint32_t index) -> int:
        """One counter summed over all slots."""
        cdef int64_t result = 0
        cdef uint32_t slot
        if index >= SLOT_COUNTERS:
            raise IndexError(f"counter {index} of {SLOT_COUNTERS}")
        for slot in range(self.size):
            result += self.slots[slot].counters[index]
        return result

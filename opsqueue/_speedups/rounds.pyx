# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""The writer's rounds while nothing concerns the journal: take records, let time pass, answer, sleep. Decides nothing.

A round without a cold record makes no Python object; with eight consumers, each of which waits for its answer, there is a
round for every other chunk, and Python's part of it took as long as all the rest.
"""

from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from posix.time cimport CLOCK_MONOTONIC, clock_gettime, timespec
from posix.unistd cimport read

from opsqueue._speedups.board cimport Board, Slot
from opsqueue._speedups.counters cimport WRITER_WAKEUPS
from opsqueue._speedups.dispatch cimport Dispatch
from opsqueue._speedups.engine cimport Engine

cdef extern from "<poll.h>" nogil:
    struct pollfd:
        int fd
        short events
        short revents
    int ppoll(pollfd *files, unsigned long count, const timespec *timeout, const void *mask)
    enum: POLLIN

cdef enum:
    WORK_SLICE_NS = 2_000_000         # that the engine may spend on sliced work (index builds, freeing) in one round
    LONGEST_SLEEP_NS = 1_000_000_000  # so that the progress word moves
    LONGEST_RUN_NS = 200_000          # without a sleep, then Python's part has its turn, and with it the journal's thread

cdef uint64_t NEVER = ~<uint64_t>0


cdef inline uint64_t monotonic_ns() noexcept nogil:
    cdef timespec now
    clock_gettime(CLOCK_MONOTONIC, &now)
    return <uint64_t>now.tv_sec * 1_000_000_000 + <uint64_t>now.tv_nsec


cdef class Rounds:
    """`rings`: the eventfds that front-ends signal, read here. `others`: files whose readiness ends a run, not read here."""

    cdef Engine engine
    cdef Dispatch dispatch
    cdef Board board                  # keeps `slot` mapped
    cdef Slot *slot
    cdef pollfd *files                # the rings' first
    cdef uint32_t ring_count
    cdef uint32_t file_count

    def __cinit__(self, Engine engine not None, Dispatch dispatch not None, Board board not None, uint32_t slot,
                  rings, others):
        cdef uint32_t at = 0
        self.engine = engine
        self.dispatch = dispatch
        self.board = board
        self.slot = board._slot(slot)
        self.ring_count = <uint32_t>len(rings)
        self.file_count = self.ring_count + <uint32_t>len(others)
        self.files = <pollfd *>calloc(max(self.file_count, 1), sizeof(pollfd))
        if self.files == NULL:
            raise MemoryError(f"no memory for {self.file_count} files to wait for")
        for fd in (*rings, *others):
            self.files[at].fd = fd
            self.files[at].events = POLLIN
            at += 1

    def __dealloc__(self):
        free(self.files)

    def run(self, double until, *, bint until_change, bint receiving) -> list:
        """Go round, and sleep when there is nothing to do; the files of `others` that are ready, often none.

        Ends at `until` (seconds of the monotonic clock, or infinity), after a record that Python's part must see, after
        the first change that a batch must carry if `until_change`, when a front-end is bad, and after 200 us without a
        sleep. Not `receiving`: takes no records, sleeps after one round.
        """
        cdef uint64_t until_ns = <uint64_t>(until * 1e9) if until < 1e9 else NEVER
        cdef uint64_t begun = monotonic_ns(), now
        cdef bint more
        while True:
            more = self.round(receiving)
            now = monotonic_ns()
            self.slot.progress_ns = now
            if self.dispatch.asked or self.dispatch.bad_frontends or (until_change and self.engine.has_changes()):
                self.dispatch.asked = False
                return []
            if now >= until_ns:
                return []
            if more or (receiving and not self.dispatch.prepare_to_sleep()):
                if now - begun >= LONGEST_RUN_NS:
                    return []
                continue
            ready = self.sleep(now, until_ns)
            self.dispatch.awake()
            if ready is not None:
                return ready
            begun = monotonic_ns()

    cdef bint round(self, bint receiving) except -1:
        """True: there may be more to do at once."""
        cdef bint more = False
        # Before the records: a reservation's time must not begin when the loop fell asleep. What arrived in time counts
        # before what is due now expires.
        self.engine.now_ms = monotonic_ns() // 1_000_000
        if receiving:
            more = self.dispatch.turn()
        more |= self.engine.advance(monotonic_ns() // 1_000_000)
        more |= self.engine.work(WORK_SLICE_NS)
        self.dispatch.serve()
        return more

    cdef list sleep(self, uint64_t now, uint64_t until_ns):
        """The ready ones of `others`; None: a ring's signal, or a timer of the engine's. Gives the interpreter's lock up."""
        cdef uint64_t timer = self.engine.next_timer()
        cdef uint64_t wake_ns = min(until_ns, now + LONGEST_SLEEP_NS)
        cdef timespec timeout
        cdef uint64_t signalled
        cdef uint32_t at
        cdef int ready
        if timer != NEVER:
            wake_ns = min(wake_ns, timer * 1_000_000)
        wake_ns = wake_ns - now if wake_ns > now else 0
        timeout.tv_sec = wake_ns // 1_000_000_000
        timeout.tv_nsec = wake_ns % 1_000_000_000
        self.slot.counters[<int>WRITER_WAKEUPS] += 1
        with nogil:
            ready = ppoll(self.files, self.file_count, &timeout, NULL)
            if ready > 0:
                for at in range(self.ring_count):
                    if self.files[at].revents:
                        read(self.files[at].fd, &signalled, sizeof(signalled))
        if ready < 0:
            return []  # a signal, whose handler runs in Python's part
        if ready == 0:
            return None
        others = [self.files[at].fd for at in range(self.ring_count, self.file_count) if self.files[at].revents]
        return others or None

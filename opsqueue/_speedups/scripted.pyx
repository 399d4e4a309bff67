# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""The engine's hot methods as Python methods, for tests and measurements. The server does not use it."""

from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc

from opsqueue._speedups.values cimport value_find
from opsqueue._speedups.bits cimport clock_ns, must
from opsqueue._speedups.board cimport SLOT_COUNTERS
from opsqueue._speedups.engine cimport COUNTED, Engine
from opsqueue._speedups.records cimport ReservedChunk


cdef class ScriptedEngine(Engine):
    """An engine that Python code drives, one call per message."""

    def reserve_chunks(self, uint64_t holder, bytes strategy not None, uint32_t max) -> list:
        """[(submission, chunk, chunks_done, retries, flags)], at most `max`. Raises ValueError if it is refused."""
        cdef int handle = self.strategy(<const uint8_t *><const char *>strategy, <uint32_t>len(strategy))
        cdef ReservedChunk *out
        cdef uint32_t count, at
        if handle < 0:
            raise ValueError(self.orders.refusal)
        out = <ReservedChunk *>must(malloc((<size_t>max + 1) * sizeof(ReservedChunk)))
        count = self.reserve(holder, handle, max, out)
        taken = [(out[at].submission, out[at].chunk, out[at].chunks_done, out[at].retries, out[at].flags)
                 for at in range(count)]
        free(out)
        return taken

    def is_ready(self, bytes strategy not None) -> bool:
        """Its index is complete; else building it has begun. Raises ValueError if it is refused."""
        cdef int handle = self.strategy(<const uint8_t *><const char *>strategy, <uint32_t>len(strategy))
        if handle < 0:
            raise ValueError(self.orders.refusal)
        return self.strategy_ready(handle)

    def open_connection(self, uint64_t holder, uint32_t features) -> None:
        """A consumer's connection with FeatureBits."""
        self.open_holder(holder, features)

    def close_connection(self, uint64_t holder, *, bint lost) -> None:
        """It has ended; `lost`: without a close frame."""
        self.close_holder(holder, lost)

    def close_connections_of(self, uint32_t frontend) -> None:
        """The front-end has ended, and all its connections with it."""
        self.close_holders_of(frontend)

    def complete_chunk(self, uint64_t holder, uint64_t submission, uint64_t chunk) -> bool:
        """True: it counted."""
        return self.complete(holder, submission, chunk) == COUNTED

    def fail_chunk(self, uint64_t holder, uint64_t submission, uint64_t chunk, bytes text not None) -> bool:
        """True: it counted."""
        return self.fail(holder, submission, chunk, text, <uint32_t>len(text)) == COUNTED

    def release_held(self, uint64_t holder, uint64_t submission, uint64_t chunk) -> bool:
        """True: the holder held it."""
        return self.release(holder, submission, chunk) == COUNTED

    def extend_held(self, uint64_t holder, uint64_t submission, uint64_t chunk) -> bool:
        """True: the holder held it."""
        return self.extend(holder, submission, chunk) == COUNTED

    def retry_chunk_later(self, uint64_t holder, uint64_t submission, uint64_t chunk, uint64_t delay_ms) -> bool:
        """True: the holder held it."""
        return self.retry_later(holder, submission, chunk, delay_ms) == COUNTED

    def fail_whole_submission(self, uint64_t holder, uint64_t submission, uint64_t chunk, bytes text not None) -> bool:
        """True: the holder held the chunk."""
        return self.fail_submission(holder, submission, chunk, text, <uint32_t>len(text)) == COUNTED

    def works_on(self, uint64_t holder, uint64_t submission, uint64_t chunk) -> bool:
        """True: the holder held it."""
        return self.working_on(holder, submission, chunk) == COUNTED

    def changed(self) -> bool:
        """There are events or ended submissions that have not been taken."""
        return self.has_changes()

    def taken_events(self) -> bytes:
        """What `take_events` gives: the packed log row; empties it."""
        return self.take_events()

    def taken_ended(self) -> list:
        """What `take_ended` gives: (submission, state, chunks_done, failed_chunk, failure); empties it."""
        return self.take_ended()

    def take_notices(self) -> list:
        """[(holder, submission, chunk, DropReason)]; empties it."""
        cdef uint32_t at
        taken = [(self.notices[at].connection, self.notices[at].submission, self.notices[at].chunk,
                  self.notices[at].reason) for at in range(self.notice_count)]
        self.notice_count = 0
        return taken

    def chunks_available(self, uint64_t submission) -> int:
        """Chunks of it that could be reserved now. Raises KeyError if the engine does not hold it."""
        return self.known(submission).indexed

    def in_flight_of(self, str key not None, int64_t value) -> int:
        """Held chunks of all submissions whose metadata has this value of `key`."""
        cdef uint32_t at
        number = self.orders.key_numbers.get(key)
        if number is None:
            return 0
        at = value_find(&self.orders.values, number, value)
        return self.orders.values.at[at].in_flight if at else 0

    def counter(self, uint32_t index) -> int:
        """One counter or gauge, by its Counter number."""
        if index >= SLOT_COUNTERS:
            raise IndexError(f"counter {index} of {SLOT_COUNTERS}")
        return self.counters[index]

    def time_lifecycles(self, uint64_t holder, bytes strategy not None, uint32_t count, uint32_t per_request) -> tuple:
        """Reserve and complete `count` chunks, `per_request` at a time: (ns in reserve, ns in complete, chunks)."""
        cdef int handle = self.strategy(<const uint8_t *><const char *>strategy, <uint32_t>len(strategy))
        cdef ReservedChunk *out
        cdef uint64_t begun, reserving = 0, completing = 0
        cdef uint32_t got, at, done = 0
        if handle < 0:
            raise ValueError(self.orders.refusal)
        out = <ReservedChunk *>must(malloc((<size_t>per_request + 1) * sizeof(ReservedChunk)))
        while done < count:
            begun = clock_ns()
            got = self.reserve(holder, handle, per_request, out)
            reserving += clock_ns() - begun
            if got == 0:
                break
            begun = clock_ns()
            for at in range(got):
                self.complete(holder, out[at].submission, out[at].chunk)
            completing += clock_ns() - begun
            done += got
        free(out)
        return reserving, completing, done

"""The writer's inner loop: drains the rings into the engine, parks requests, writes replies. Decides nothing itself."""

from libc.stdint cimport uint8_t, uint32_t, uint64_t

from opsqueue._speedups.board cimport Board
from opsqueue._speedups.engine cimport Engine
from opsqueue._speedups.records cimport ChunkRecord, CreditRecord, ReportRecord, ReservedChunk, ReserveRecord
from opsqueue._speedups.ring cimport Endpoint


cdef struct Waiter:           # a parked reserve request, or a credit
    uint64_t holder
    uint64_t nonce
    uint64_t arrival          # orders waiters over all front-ends
    uint32_t max              # of a credit: what is left of it
    int strategy
    bint is_credit            # stays until it is withdrawn; not queued while nothing is left of it
    uint32_t previous         # in its line, by arrival; NO_WAITER at the ends
    uint32_t next
    uint32_t holder_previous  # among the holder's own
    uint32_t holder_next


cdef struct Line:             # of one front-end's waiters with one strategy
    uint32_t first            # oldest; NO_WAITER: nobody waits
    uint32_t last
    uint32_t awake            # its place among the awake, from 1; 0: asleep, its first waiter has been told no
    uint32_t general          # its place among the lines that any chunk may concern, from 1; 0: not one of them
    bint waits_for_room       # it is in `waiting_for_room`


cdef struct HolderSlot:       # a connection, by its dense slot in its front-end
    uint64_t holder           # 0: closed
    uint32_t first_waiter


cdef struct Frontend:
    HolderSlot *holders
    uint32_t holder_capacity
    uint32_t incarnation      # raised when the front-end restarts
    bint bad                  # its ring cannot be trusted; ignored until it restarts
    bint full                 # it had no room for a reply: its lines wait in `waiting_for_room`
    bint notices_kept         # the engine keeps notices that found no room; nothing may overtake them


cdef class Dispatch:
    cdef Engine engine
    cdef list endpoints
    cdef Frontend *frontends
    cdef readonly uint32_t frontend_count
    cdef uint32_t first_turn                  # which front-end's ring is drained first in the next turn
    # waiters, in a slab
    cdef Waiter *waiters
    cdef uint32_t waiter_capacity
    cdef uint32_t free_waiter
    cdef readonly uint32_t parked
    cdef uint64_t arrivals
    # lines, by strategy and front-end
    cdef Line *lines
    cdef uint32_t line_count
    cdef uint32_t *awake_lines                # a heap by their first waiter's arrival
    cdef uint32_t awake_count
    cdef uint32_t *general_lines              # those with waiters whose strategy selects no value
    cdef uint32_t general_count
    cdef dict selecting                       # (key, value) to the strategies with waiters that select it
    cdef dict limited                         # (key, limit) to the lines with waiters that the limit may hold back
    cdef list waiting_for_room                # by front-end, the lines that would be awake if it had room
    cdef uint64_t seen_epoch                  # of the engine's orders
    cdef uint32_t chunks_reported             # by the reports of this turn, beside one a record
    cdef uint32_t unpublished                 # chunks in replies that the front-ends cannot see yet
    cdef bint more_waiters                    # the last look at them ended at its bound, and had served some
    # scratch
    cdef ReservedChunk *reserved
    # what the Python loop gets
    cdef object on_request                    # (frontend, incarnation, request, payload bytes)
    cdef object on_output                     # (submission, chunk, output bytes)
    cdef bint asked                           # on_request was called; whoever looks sets it back
    cdef list overflow                        # a deque of (request, payload) a front-end: replies that found no room
    cdef readonly list bad_frontends          # indexes, for the loop to end and clear
    cdef Board board                          # keeps `counters` mapped
    cdef uint64_t *counters

    cpdef bint turn(self) except -1
    cpdef int serve(self) except -1
    cdef bint prepare_to_sleep(self)
    cdef void awake(self)
    cdef void publish(self)
    cdef bint drain(self, uint32_t index, uint32_t limit)
    cdef bint handle(self, uint32_t index, uint32_t kind, uint8_t *payload, uint32_t size)
    cdef void handle_reserve(self, Endpoint endpoint, uint64_t holder, ReserveRecord *record)
    cdef void handle_chunk(self, uint32_t kind, uint64_t holder, ChunkRecord *record)
    cdef bint handle_report(self, uint64_t holder, ReportRecord *record, uint32_t size)
    cdef void handle_credit(self, Endpoint endpoint, uint64_t holder, CreditRecord *record)
    cdef void refuse(self, Endpoint endpoint, uint64_t holder, uint64_t nonce, uint32_t flags)
    cdef uint32_t answer(self, Endpoint endpoint, uint64_t holder, uint64_t nonce, uint32_t max, int strategy,
                         uint32_t flags) noexcept
    cdef bint has_room(self, uint32_t index) noexcept
    cdef HolderSlot *holder_slot(self, uint64_t holder) except NULL
    cdef int park(self, uint64_t holder, uint64_t nonce, uint32_t max, int strategy, bint is_credit) except -1
    cdef void queue(self, uint32_t waiter)
    cdef void unqueue(self, uint32_t waiter)
    cdef uint32_t line_of(self, Waiter *waiter) except 0xFFFFFFFF
    cdef void opened(self, uint32_t line)
    cdef void closed(self, uint32_t line)
    cdef void wake(self, uint32_t line) noexcept
    cdef void sleep(self, uint32_t line) noexcept
    cdef void settle(self, uint32_t place) noexcept
    cdef void wake_strategy(self, int strategy) noexcept
    cdef void wake_concerned(self)
    cdef void unpark(self, uint32_t waiter)
    cdef uint32_t find_credit(self, uint64_t holder, uint64_t nonce) noexcept
    cdef void close(self, uint64_t holder, bint lost)
    cdef void forget_frontend(self, uint32_t index)
    cdef void serve_waiters(self)
    cdef bint send_notices(self) noexcept
    cdef bint send_overflow(self, uint32_t index)

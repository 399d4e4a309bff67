"""Which submission comes next, for every strategy: the plain order, the indexes, and who asked for them. Reserves nothing."""

from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t

from opsqueue._speedups.ranking cimport PickBy, Ranking
from opsqueue._speedups.submission cimport Submission
from opsqueue._speedups.tree cimport Nodes
from opsqueue._speedups.values cimport Values


cdef struct Plan:             # one alternative of a strategy (opsqueue.server.plans)
    uint32_t shape            # which index; NO_SHAPE: the plain order
    uint32_t leaf
    PickBy by                 # `selected` is filled in when it is asked
    uint32_t select_keys[8]
    int64_t select_values[8]


cdef struct Strategy:         # by handle; 0, 1, 2 are Oldest, Newest, Random
    Plan *plans
    uint32_t plan_count
    uint32_t holds            # parked requests that name it
    bint counted              # in `selecting`
    bint starving             # in `Orders.starving`


cdef struct Shape:            # an index that strategies share, or the place of one
    Ranking *ranking          # NULL: it has been dropped, or not been asked for
    uint64_t used_ms          # when a request came for it, or it gave a chunk
    uint32_t plans            # of strategies that are known; without any, and without an index, its number is free


cdef class Orders:
    cdef public uint64_t now_ms                # the engine's
    cdef Submission **submissions              # the engine's, by slot; an odd value: free
    cdef uint32_t submissions_end
    cdef uint32_t submission_count
    cdef readonly uint64_t available           # chunks that could be reserved now
    cdef uint64_t epoch               # raised whenever chunks become available to somebody
    cdef Values values
    # what woke since it was last asked (`take_woken`)
    cdef list woken                            # (key, value) of submissions with more available chunks
    cdef bint all_woken                        # they were too many to list
    cdef list fallen                           # (key, count) from which a value's held chunks have gone down by one
    cdef bint all_fallen                       # they were too many to list
    cdef public uint32_t limits_waited         # lines of parked requests that a limit may hold back
    # the plain order
    cdef Nodes plain
    cdef uint32_t plain_root                   # submissions with available chunks by id, weighted by those
    # names
    cdef dict key_numbers                      # metadata key to number
    cdef list key_records                      # by number: [key, how many groups, shapes and strategies use it]
    cdef list free_keys
    # strategies
    cdef Strategy *strategies
    cdef uint32_t strategy_count
    cdef uint32_t strategy_capacity
    cdef dict handles                          # canonical bytes to handle
    cdef list canonicals                       # by handle; None: free
    cdef list free_handles
    cdef int last_strategy                     # most requests repeat it
    cdef readonly str refusal                  # why `strategy` said -1
    cdef readonly uint32_t selecting           # strategies with SelectOnly in every alternative
    # indexes
    cdef Shape *shapes
    cdef list shape_keys                       # by shape: (mode, key names, first preferred, leaf, leaf key, limit); None: free
    cdef list free_shapes
    cdef dict shape_numbers
    cdef uint32_t shape_capacity
    cdef uint32_t live[64]                     # shapes whose index is kept
    cdef readonly uint32_t ranking_count       # how many those are
    cdef readonly uint32_t building            # of them, not yet complete
    cdef list waking                           # strategies whose index has become complete
    cdef list starving                         # strategies whose index was wanted when as many were in use as may be
    cdef uint64_t starving_until_ms            # when they should be tried again
    cdef uint64_t random

    # hot path: no Python object per chunk
    cdef int strategy(self, const uint8_t *canonical, uint32_t size) noexcept
    cdef bint ready(self, int strategy) noexcept
    cdef Submission *pick(self, int strategy, uint32_t *leaf, bint *whole) noexcept
    cdef void sync(self, Submission *s, uint64_t available) noexcept
    cdef void in_flight(self, Submission *s, int change) noexcept
    cdef void hold(self, int strategy, int change) noexcept
    cdef bint build(self, uint64_t until_ns) noexcept
    # cold
    cdef void enter(self, Submission *s, dict metadata) except *
    cdef void leave(self, Submission *s) noexcept
    cdef uint32_t key_number(self, str key)
    cdef void key_dropped(self, uint32_t key) noexcept
    cdef int new_strategy(self, bytes canonical) except -2
    cdef bint recycle(self)
    cdef void forget(self, int strategy)
    cdef int fill(self, Plan *plan, object wanted) except -1
    cdef int shape_for(self, tuple key) except -1
    cdef Ranking *ranking_for(self, int strategy, uint32_t shape, bint asked)
    cdef void shape_dropped(self, uint32_t shape)
    cdef void drop_ranking(self, uint32_t at) noexcept
    cdef list selections(self, int strategy)
    cdef list limits(self, int strategy)
    cdef bint selects(self, Strategy *asked) noexcept
    cdef bint take_woken(self, list found)
    cdef bint take_fallen(self, list found)
    cdef list take_waking(self)
    cdef void wake_users(self, uint32_t shape) noexcept

"""A hierarchical timer wheel: setting, clearing and firing a timer is O(1). Knows numbers of records, not what they are.

Four levels of 256 buckets, a tick is 4 ms: level 0 reaches 1 s, level 1 4 minutes, level 2 18 hours, level 3 198 days; what
is due later waits in level 3 and goes round again (Varghese, Lauck 1987). A timer never fires early, and at most a tick late.
Timers are numbered like the records they belong to; number 0 is "none".
"""

from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport free, realloc
from libc.string cimport memset

from opsqueue._speedups.bits cimport lowest_bit, must


cdef enum:
    TICK_SHIFT = 2            # a tick is 4 ms
    LEVELS = 4
    BUCKETS = 256             # of a level


cdef struct Timer:
    uint64_t due              # tick
    uint32_t previous
    uint32_t next
    uint32_t bucket           # level * BUCKETS + bucket + 1; 0: not set


cdef struct Wheel:
    uint64_t tick             # all before it has fired
    uint32_t count            # timers that are set
    uint32_t capacity
    Timer *timers
    uint32_t heads[1024]
    uint64_t filled[16]       # a bit per bucket that is not empty


cdef inline void wheel_open(Wheel *wheel) noexcept nogil:
    memset(wheel, 0, sizeof(Wheel))


cdef inline void wheel_close(Wheel *wheel) noexcept nogil:
    free(wheel.timers)
    memset(wheel, 0, sizeof(Wheel))


cdef inline void wheel_hold(Wheel *wheel, uint32_t capacity) noexcept nogil:
    """Make room for timers 0 to capacity - 1."""
    if capacity <= wheel.capacity:
        return
    wheel.timers = <Timer *>must(realloc(wheel.timers, <size_t>capacity * sizeof(Timer)))
    memset(wheel.timers + wheel.capacity, 0, <size_t>(capacity - wheel.capacity) * sizeof(Timer))
    wheel.capacity = capacity


cdef inline void wheel_place(Wheel *wheel, uint32_t timer) noexcept nogil:
    """Link a timer into the bucket for its time."""
    cdef uint64_t due = wheel.timers[timer].due
    cdef uint64_t distance
    cdef uint32_t level = 0
    cdef uint32_t bucket, head
    if due < wheel.tick:
        due = wheel.tick
    distance = due - wheel.tick
    if distance >> 32:
        due = wheel.tick + 0xFFFFFFFFU
        distance = 0xFFFFFFFFU
    while distance >> (8 * (level + 1)):
        level += 1
    bucket = level * BUCKETS + (<uint32_t>(due >> (8 * level)) & 255)
    head = wheel.heads[bucket]
    wheel.timers[timer].bucket = bucket + 1
    wheel.timers[timer].previous = 0
    wheel.timers[timer].next = head
    if head:
        wheel.timers[head].previous = timer
    wheel.heads[bucket] = timer
    wheel.filled[bucket >> 6] |= <uint64_t>1 << (bucket & 63)


cdef inline void wheel_clear(Wheel *wheel, uint32_t timer) noexcept nogil:
    """The timer will not fire; nothing happens if it was not set."""
    cdef Timer *at = &wheel.timers[timer]
    cdef uint32_t bucket
    if at.bucket == 0:
        return
    bucket = at.bucket - 1
    if at.previous:
        wheel.timers[at.previous].next = at.next
    else:
        wheel.heads[bucket] = at.next
        if at.next == 0:
            wheel.filled[bucket >> 6] &= ~(<uint64_t>1 << (bucket & 63))
    if at.next:
        wheel.timers[at.next].previous = at.previous
    at.bucket = 0
    wheel.count -= 1


cdef inline void wheel_set(Wheel *wheel, uint32_t timer, uint64_t due_ms) noexcept nogil:
    """Fire at `due_ms`; replaces an earlier setting."""
    wheel_clear(wheel, timer)
    wheel.timers[timer].due = (due_ms >> TICK_SHIFT) + (1 if due_ms & ((1 << TICK_SHIFT) - 1) else 0)
    wheel_place(wheel, timer)
    wheel.count += 1


cdef inline uint32_t next_filled(Wheel *wheel, uint32_t level, uint32_t after) noexcept nogil:
    """The first bucket of a level behind `after` that is not empty; BUCKETS: none before the level's end."""
    cdef uint32_t bucket = after + 1
    cdef uint64_t word
    while bucket < BUCKETS:
        word = wheel.filled[level * 4 + (bucket >> 6)] >> (bucket & 63)
        if word:
            return bucket + lowest_bit(word)
        bucket = (bucket | 63) + 1
    return BUCKETS


cdef inline void wheel_cascade(Wheel *wheel, uint32_t level) noexcept nogil:
    """The tick enters a bucket of this level: its timers go to lower levels."""
    cdef uint32_t bucket = level * BUCKETS + (<uint32_t>(wheel.tick >> (8 * level)) & 255)
    cdef uint32_t timer = wheel.heads[bucket]
    cdef uint32_t following
    wheel.heads[bucket] = 0
    wheel.filled[bucket >> 6] &= ~(<uint64_t>1 << (bucket & 63))
    while timer:
        following = wheel.timers[timer].next
        wheel_place(wheel, timer)
        timer = following


cdef inline uint32_t wheel_pop(Wheel *wheel, uint64_t now_ms) noexcept nogil:
    """A timer that is due, cleared; 0: none is. Call it until it says 0, or again later."""
    cdef uint64_t target = now_ms >> TICK_SHIFT
    cdef uint64_t onward
    cdef uint32_t timer, bucket
    while True:
        if wheel.count == 0:
            if wheel.tick < target:
                wheel.tick = target
            return 0
        if wheel.tick > target:
            return 0
        timer = wheel.heads[wheel.tick & 255]
        if timer:
            wheel_clear(wheel, timer)
            return timer
        if wheel.tick == target:
            return 0
        bucket = next_filled(wheel, 0, <uint32_t>(wheel.tick & 255))
        onward = (wheel.tick & ~<uint64_t>255) + bucket
        if onward > target:
            wheel.tick = target
            return 0
        wheel.tick = onward
        if (onward & 255) == 0:
            if (onward & 0xFFFF) == 0:
                if (onward & 0xFFFFFF) == 0:
                    wheel_cascade(wheel, 3)
                wheel_cascade(wheel, 2)
            wheel_cascade(wheel, 1)


cdef inline uint64_t wheel_next_ms(Wheel *wheel) noexcept nogil:
    """When to call wheel_pop next, at the latest; all bits set: no timer is set."""
    cdef uint64_t best = ~<uint64_t>0
    cdef uint64_t at, base
    cdef uint32_t level, bucket, current
    if wheel.count == 0:
        return best
    if wheel.heads[wheel.tick & 255]:
        return wheel.tick << TICK_SHIFT
    for level in range(4):
        current = <uint32_t>(wheel.tick >> (8 * level)) & 255
        base = (wheel.tick >> (8 * level)) - current
        bucket = next_filled(wheel, level, current)
        if bucket == BUCKETS:
            # round the corner; the level's first bucket is asked for by itself
            bucket = BUCKETS if wheel.filled[level * 4] & 1 else BUCKETS + next_filled(wheel, level, 0)
            if bucket > BUCKETS + current:
                continue
        at = (base + bucket) << (8 * level)
        if at < best:
            best = at
    return best << TICK_SHIFT

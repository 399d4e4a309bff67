"""Groups of submissions that share a value of a strategic metadata key, and how many of their chunks are in flight.

Counted for every (key, value) of a submission in memory, whether a strategy asks for it yet or not, so that an index that is
built later starts with exact counts. Keys are numbers here; the engine knows their names.
"""

from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport free, realloc
from libc.string cimport memset

from opsqueue._speedups.bits cimport mixed, must
from opsqueue._speedups.slotmap cimport SlotMap, slotmap_add, slotmap_close, slotmap_open, slotmap_remove


cdef struct ValueGroup:
    int64_t value
    uint64_t in_flight        # held chunks of all its submissions
    uint32_t key
    uint32_t references       # submissions; 0: free
    uint32_t hash
    uint32_t next_free


cdef struct Values:           # group 0 is "no such key": its count stays 0
    ValueGroup *at
    uint32_t capacity
    uint32_t free
    uint32_t used
    SlotMap by_value


cdef inline void values_open(Values *v) noexcept nogil:
    memset(v, 0, sizeof(Values))
    v.at = <ValueGroup *>must(realloc(NULL, 16 * sizeof(ValueGroup)))
    memset(v.at, 0, 16 * sizeof(ValueGroup))
    v.capacity = 16
    for at in range(1, 15):
        v.at[at].next_free = <uint32_t>at + 1
    v.free = 1
    slotmap_open(&v.by_value)


cdef inline void values_close(Values *v) noexcept nogil:
    free(v.at)
    slotmap_close(&v.by_value)


cdef inline uint32_t value_take(Values *v, uint32_t key, int64_t value, bint *is_new) noexcept nogil:
    """The group of (key, value), with one more reference."""
    cdef uint32_t hash = <uint32_t>(mixed(<uint64_t>value * <uint64_t>0x9E3779B97F4A7C15 + key) >> 32)
    cdef uint32_t at = hash & v.by_value.mask
    cdef uint32_t group, capacity
    cdef uint64_t entry = v.by_value.entries[at]
    while entry:
        group = <uint32_t>entry - 1
        if <uint32_t>(entry >> 32) == hash and v.at[group].key == key and v.at[group].value == value:
            v.at[group].references += 1
            is_new[0] = False
            return group
        at = (at + 1) & v.by_value.mask
        entry = v.by_value.entries[at]
    if v.free == 0:
        capacity = v.capacity * 2
        v.at = <ValueGroup *>must(realloc(v.at, <size_t>capacity * sizeof(ValueGroup)))
        for group in range(v.capacity, capacity):
            v.at[group].references = 0
            v.at[group].next_free = group + 1 if group + 1 < capacity else 0
        v.free = v.capacity
        v.capacity = capacity
    group = v.free
    v.free = v.at[group].next_free
    v.used += 1
    v.at[group].value = value
    v.at[group].key = key
    v.at[group].in_flight = 0
    v.at[group].references = 1
    v.at[group].hash = hash
    slotmap_add(&v.by_value, hash, group)
    is_new[0] = True
    return group


cdef inline uint32_t value_find(Values *v, uint32_t key, int64_t value) noexcept nogil:
    """The group of (key, value); 0: no submission has it."""
    cdef uint32_t hash = <uint32_t>(mixed(<uint64_t>value * <uint64_t>0x9E3779B97F4A7C15 + key) >> 32)
    cdef uint32_t at = hash & v.by_value.mask
    cdef uint32_t group
    cdef uint64_t entry = v.by_value.entries[at]
    while entry:
        group = <uint32_t>entry - 1
        if <uint32_t>(entry >> 32) == hash and v.at[group].key == key and v.at[group].value == value:
            return group
        at = (at + 1) & v.by_value.mask
        entry = v.by_value.entries[at]
    return 0


cdef inline bint value_drop(Values *v, uint32_t group) noexcept nogil:
    """One reference less; True: the group is gone."""
    v.at[group].references -= 1
    if v.at[group].references:
        return False
    slotmap_remove(&v.by_value, v.at[group].hash, group)
    v.at[group].next_free = v.free
    v.free = group
    v.used -= 1
    return True

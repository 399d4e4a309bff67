"""An open-addressing hash from 32 bits of a hash to a slot number. The caller compares keys; this knows only hashes.

An entry is (hash << 32) | (slot + 1), 0 is empty. As the hash is in the entry, growing and removing read nothing else.
"""

from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memset

from opsqueue._speedups.bits cimport must


cdef struct SlotMap:
    uint64_t *entries
    uint32_t mask             # entries - 1
    uint32_t used


cdef inline void slotmap_open(SlotMap *map) noexcept nogil:
    map.mask = 15
    map.used = 0
    map.entries = <uint64_t *>must(calloc(16, sizeof(uint64_t)))


cdef inline void slotmap_close(SlotMap *map) noexcept nogil:
    free(map.entries)
    memset(map, 0, sizeof(SlotMap))


cdef inline void slotmap_place(SlotMap *map, uint64_t entry) noexcept nogil:
    cdef uint32_t at = <uint32_t>(entry >> 32) & map.mask
    while map.entries[at]:
        at = (at + 1) & map.mask
    map.entries[at] = entry


cdef inline void slotmap_grow(SlotMap *map) noexcept nogil:
    cdef uint64_t *old = map.entries
    cdef uint64_t at
    cdef uint64_t size = <uint64_t>map.mask + 1
    map.entries = <uint64_t *>must(calloc(size * 2, sizeof(uint64_t)))
    map.mask = <uint32_t>(size * 2 - 1)
    for at in range(size):
        if old[at]:
            slotmap_place(map, old[at])
    free(old)


cdef inline void slotmap_add(SlotMap *map, uint32_t hash, uint32_t slot) noexcept nogil:
    """The key may not be there already."""
    if <uint64_t>map.used * 4 >= <uint64_t>map.mask * 3:
        slotmap_grow(map)
    map.used += 1
    slotmap_place(map, (<uint64_t>hash << 32) | (slot + 1))


cdef inline void slotmap_remove(SlotMap *map, uint32_t hash, uint32_t slot) noexcept nogil:
    """The entry is there. Later ones of the run move back, so there are no tombstones."""
    cdef uint64_t entry = (<uint64_t>hash << 32) | (slot + 1)
    cdef uint32_t hole = hash & map.mask
    cdef uint32_t at, home
    while map.entries[hole] != entry:
        hole = (hole + 1) & map.mask
    at = (hole + 1) & map.mask
    while map.entries[at]:
        home = <uint32_t>(map.entries[at] >> 32) & map.mask
        if ((at - home) & map.mask) >= ((at - hole) & map.mask):
            map.entries[hole] = map.entries[at]
            hole = at
        at = (at + 1) & map.mask
    map.entries[hole] = 0
    map.used -= 1

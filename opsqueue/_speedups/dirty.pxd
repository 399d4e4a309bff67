"""Which blocks have changed since they were last folded: two generations, one gathers while the other is being written.

A submission is in a generation's tree (by id) while it has a dirty block there; one with several blocks has a bit for each.
Decides nothing and writes nothing.
"""

from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc
from libc.string cimport memset

from opsqueue._speedups.bits cimport lowest_bit, must, popcount
from opsqueue._speedups.submission cimport Submission
from opsqueue._speedups.tree cimport Nodes, nodes_close, nodes_open, tree_first, tree_insert, tree_remove


cdef struct Dirty:
    Nodes nodes
    uint32_t roots[2]         # submissions by id, payload = slot
    uint64_t blocks[2]        # how many
    uint32_t gathering        # the generation that changes go to; the other is frozen


cdef inline void dirty_open(Dirty *d, uint64_t seed) noexcept nogil:
    memset(d, 0, sizeof(Dirty))
    nodes_open(&d.nodes, seed)


cdef inline void dirty_close(Dirty *d) noexcept nogil:
    nodes_close(&d.nodes)


cdef inline uint32_t dirty_words(Submission *s) noexcept nogil:
    return (s.block_count + 63) >> 6


cdef inline void dirty_mark(Dirty *d, Submission *s, uint32_t block, uint32_t generation) noexcept nogil:
    cdef uint64_t bit = <uint64_t>1 << (block & 63)
    cdef uint64_t *bits
    if s.big != NULL:
        bits = s.big.dirty[generation]
        if bits == NULL:
            bits = s.big.dirty[generation] = <uint64_t *>must(calloc(dirty_words(s), sizeof(uint64_t)))
        if bits[block >> 6] & bit:
            return
        bits[block >> 6] |= bit
        if generation != d.gathering and s.big.fold_word > block >> 6:
            s.big.fold_word = block >> 6
    elif s.dirty_nodes[generation]:
        return
    if s.dirty_nodes[generation] == 0:
        s.dirty_nodes[generation] = tree_insert(&d.nodes, &d.roots[generation], s.id, 0, 1, s.slot)
    d.blocks[generation] += 1


cdef inline void dirty_forget(Dirty *d, Submission *s) noexcept nogil:
    """None of its blocks is dirty any more."""
    cdef uint32_t generation, word
    for generation in range(2):
        if s.dirty_nodes[generation] == 0:
            continue
        tree_remove(&d.nodes, &d.roots[generation], s.dirty_nodes[generation])
        s.dirty_nodes[generation] = 0
        if s.big == NULL:
            d.blocks[generation] -= 1
            continue
        for word in range(dirty_words(s)):
            d.blocks[generation] -= popcount(s.big.dirty[generation][word])
            s.big.dirty[generation][word] = 0


cdef inline uint32_t dirty_first(Dirty *d, uint32_t *slot) noexcept nogil:
    """The node of the first submission with a frozen block, and its slot; 0: there is none."""
    cdef uint32_t frozen = d.gathering ^ 1
    cdef uint32_t node = tree_first(&d.nodes, d.roots[frozen])
    if node == 0:
        return 0
    slot[0] = d.nodes.at[node].payload
    return node


cdef inline uint32_t dirty_take(Dirty *d, Submission *s, uint32_t node) noexcept nogil:
    """Which of the submission's frozen blocks comes first; it is dirty no more. `node` is from dirty_first."""
    cdef uint32_t frozen = d.gathering ^ 1
    cdef uint32_t block = 0
    cdef uint64_t *bits
    d.blocks[frozen] -= 1
    if s.big != NULL:
        bits = s.big.dirty[frozen]
        while bits[s.big.fold_word] == 0:
            s.big.fold_word += 1
        block = (s.big.fold_word << 6) + lowest_bit(bits[s.big.fold_word])
        bits[s.big.fold_word] &= bits[s.big.fold_word] - 1
        while s.big.fold_word < dirty_words(s) and bits[s.big.fold_word] == 0:
            s.big.fold_word += 1
        if s.big.fold_word < dirty_words(s):
            return block
        s.big.fold_word = 0
    tree_remove(&d.nodes, &d.roots[frozen], node)
    s.dirty_nodes[frozen] = 0
    return block

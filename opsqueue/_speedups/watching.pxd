"""What producers watch: when each block of a submission changed, and which watched submissions have changed since asked.

Costs a completion one look at a byte of its submission while nobody watches that submission. Decides nothing.

A change is numbered by the submission's done chunks after it: the n-th completion is change n. So a block's stamp is
the number of its last change, and what changed after N are the blocks whose stamp is above N.
"""

from libc.stdint cimport uint32_t, uint64_t
from libc.stdlib cimport calloc, free, realloc

from opsqueue._speedups.bits cimport must
from opsqueue._speedups.submission cimport BLOCK_SHIFT, Submission


cdef enum:
    WATCH_STAMPS = 1          # the submission's blocks have stamps
    WATCH_NEXT = 2            # somebody waits for its next completion
    GROUP_SHIFT = 6           # blocks of a group, which has a stamp too: the last of its blocks'


cdef struct Watching:
    uint64_t *changed         # ids of submissions whose next completion has come; room for all that are watched
    uint32_t changed_count
    uint32_t capacity
    uint32_t watched          # submissions with WATCH_NEXT


cdef inline void watching_close(Watching *w) noexcept nogil:
    free(w.changed)


cdef inline uint32_t group_count(Submission *s) noexcept nogil:
    return (s.block_count + (1 << GROUP_SHIFT) - 1) >> GROUP_SHIFT


cdef inline void watching_note(Watching *w, Submission *s, uint64_t chunk) noexcept nogil:
    """A chunk has become done; it is counted already."""
    cdef uint32_t block
    if s.watched == 0:
        return
    if s.watched & WATCH_STAMPS:
        block = <uint32_t>(chunk >> BLOCK_SHIFT)
        s.big.stamps[block] = s.chunks_done
        s.big.group_stamps[block >> GROUP_SHIFT] = s.chunks_done
    if s.watched & WATCH_NEXT:
        s.watched &= ~WATCH_NEXT
        w.watched -= 1
        w.changed[w.changed_count] = s.id
        w.changed_count += 1


cdef inline void watching_next(Watching *w, Submission *s) noexcept nogil:
    """Remember the submission when its next chunk is done."""
    if s.watched & WATCH_NEXT:
        return
    if w.changed_count + w.watched == w.capacity:
        w.capacity = w.capacity * 2 if w.capacity else 64
        w.changed = <uint64_t *>must(realloc(w.changed, w.capacity * sizeof(uint64_t)))
    s.watched |= WATCH_NEXT
    w.watched += 1


cdef inline bint stamps_open(Submission *s) noexcept nogil:
    """Stamp the blocks of a submission of several blocks from now on; False: there is no memory."""
    s.big.stamps = <uint64_t *>calloc(s.block_count, sizeof(uint64_t))
    s.big.group_stamps = <uint64_t *>calloc(group_count(s), sizeof(uint64_t))
    if s.big.stamps == NULL or s.big.group_stamps == NULL:
        stamps_close(s)
        return False
    s.big.stamps_base = s.chunks_done
    s.watched |= WATCH_STAMPS
    return True


cdef inline void stamps_close(Submission *s) noexcept nogil:
    free(s.big.stamps)
    free(s.big.group_stamps)
    s.big.stamps = NULL
    s.big.group_stamps = NULL
    s.watched &= ~WATCH_STAMPS

# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""Which blocks of a submission have done chunks, whole or since a change: reads the engine's bits, changes none.

Change numbers are counts of done chunks (watching.pxd). Cold: called when a producer asks, with a bounded number of blocks.
"""

from libc.stdint cimport uint32_t, uint64_t

from opsqueue._speedups.engine cimport Engine
from opsqueue._speedups.submission cimport Block, Submission, block_done, block_place
from opsqueue._speedups.watching cimport (
    GROUP_SHIFT, WATCH_NEXT, WATCH_STAMPS, group_count, stamps_close, stamps_open, watching_next,
)

cdef enum:
    BLOCKS_LOOKED_AT = 1 << 20    # in one call, about a millisecond for untouched ones
    TOUCHED_LOOKED_AT = 1 << 13   # of them, those that are a cache miss each


cdef class DoneBlocks:
    """The engine's done chunks, for those who ask for them. Submissions that the engine does not hold are unknown here."""

    cdef Engine engine

    def __cinit__(self, Engine engine not None):
        self.engine = engine

    def follow(self, uint64_t submission) -> int:
        """Stamp the submission's changes from now on, if that has not begun; bytes that this holds, 0 for one block.

        Raises KeyError if the engine does not hold it, MemoryError when there is no memory.
        """
        cdef Submission *s = self.engine.known(submission)
        if s.big == NULL:
            return 0
        if not s.watched & WATCH_STAMPS and not stamps_open(s):
            raise MemoryError(f"no memory to follow the {s.block_count} blocks of submission {submission}")
        return (s.block_count + group_count(s)) * sizeof(uint64_t)

    def unfollow(self, uint64_t submission) -> None:
        """The reverse; nothing if the submission is not followed or not held."""
        cdef Submission *s = self.engine.find(submission)
        if s != NULL and s.watched & WATCH_STAMPS:
            stamps_close(s)

    def knows(self, uint64_t submission, uint64_t number) -> bool:
        """What changed after change `number` can be told. Raises KeyError if the engine does not hold the submission."""
        cdef Submission *s = self.engine.known(submission)
        if number > s.chunks_done:
            return False
        return s.big == NULL or (s.watched & WATCH_STAMPS and number >= s.big.stamps_base)

    def chunks_total(self, uint64_t submission) -> int:
        """Raises KeyError if the engine does not hold it."""
        return self.engine.known(submission).chunks_total

    def changed(self, uint64_t submission, uint64_t since, bint whole, uint32_t first, uint32_t limit) -> tuple:
        """(next, runs, blocks) from block `first` on: blocks with done chunks if `whole`, else those changed after `since`.

        `runs`: [block, count] of blocks all of whose chunks are done; `blocks`: (block, bitmap) of the others; at most
        `limit` of both together. `next`: where to go on, None at the end. Raises KeyError if the engine does not hold it.
        """
        cdef Submission *s = self.engine.known(submission)
        cdef uint32_t at = first
        cdef uint32_t end = s.block_count
        cdef uint32_t touched = 0
        cdef uint32_t run_first = 0, run_count = 0
        cdef uint32_t size
        cdef Block *block
        cdef list runs = []
        cdef list blocks = []
        if end > at and end - at > BLOCKS_LOOKED_AT:
            end = at + BLOCKS_LOOKED_AT
        while at < end and touched < TOUCHED_LOOKED_AT and <uint32_t>(len(runs) + len(blocks)) < limit:
            if not whole and s.big != NULL:
                if at & ((1 << GROUP_SHIFT) - 1) == 0 and s.big.group_stamps[at >> GROUP_SHIFT] <= since:
                    at += 1 << GROUP_SHIFT
                    continue
                if s.big.stamps[at] <= since:
                    at += 1
                    continue
            elif not whole and s.chunks_done <= since:
                at += 1
                continue
            block = block_place(s, at)[0]
            if block == block_done():
                if run_count and run_first + run_count == at:
                    run_count += 1
                else:
                    if run_count:
                        runs.append((run_first, run_count))
                    run_first = at
                    run_count = 1
            elif block != NULL:
                touched += 1
                if block.done:
                    size = (block.length + 7) >> 3
                    blocks.append((at, (<const char *>block.bits)[:size]))
            at += 1
        if run_count:
            runs.append((run_first, run_count))
        return (None if at >= s.block_count else at), runs, blocks

    def watch(self, uint64_t submission) -> None:
        """Have `take_changed` tell when its next chunk is done. Raises KeyError if the engine does not hold it."""
        watching_next(&self.engine.watching, self.engine.known(submission))

    def unwatch(self, uint64_t submission) -> None:
        """The reverse; nothing if it is not watched or not held."""
        cdef Submission *s = self.engine.find(submission)
        if s != NULL and s.watched & WATCH_NEXT:
            s.watched &= ~WATCH_NEXT
            self.engine.watching.watched -= 1

    def take_changed(self) -> list:
        """The watched submissions that have changed since they were watched; they are watched no more."""
        cdef uint32_t at
        cdef list taken
        if self.engine.watching.changed_count == 0:
            return []
        taken = [self.engine.watching.changed[at] for at in range(self.engine.watching.changed_count)]
        self.engine.watching.changed_count = 0
        return taken

"""One submission's bits: which chunks are done or taken, where the next available one is. Knows no holder and no order.

Chunks come in blocks of 4,096. A block is allocated when its first chunk is touched and freed when its last is done. A
Fenwick tree (Fenwick 1994) over the blocks holds how many chunks are NOT available: all zero for a new submission, so that
zeroed memory that nobody has touched is the right content and an insert costs the same for 1 and for 10**9 chunks.
"""

from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, realloc
from libc.string cimport memcpy, memmove

from opsqueue._speedups.bits cimport highest_bit, lowest_bit, must, popcount, select_bit


cdef enum:
    BLOCK_SHIFT = 12
    BLOCK_CHUNKS = 4096

cdef enum:                    # opsqueue.server.writer.batch.State
    STATE_IN_PROGRESS = 0
    STATE_PAUSED = 1
    STATE_COMPLETED = 2
    STATE_FAILED = 3
    STATE_CANCELLED = 4

cdef enum:                    # which sliced job a submission waits for
    JOB_NONE = 0
    JOB_DROP = 1              # of reservations, after its end
    JOB_FREE = 2


cdef struct Attempt:          # a chunk that has failed, expired or crashed
    uint32_t offset           # in its block
    uint32_t retries
    uint32_t crashes


cdef struct Attempts:         # of a block, by offset
    uint32_t count
    uint32_t capacity
    Attempt at[1]


cdef struct Block:            # allocated for as many chunks as it has
    Attempts *attempts        # NULL: none
    uint32_t length           # chunks
    uint16_t done
    uint16_t unavailable      # done or taken
    uint64_t bits[1]          # words of done, then words of taken


cdef struct Big:              # what only a submission of several blocks needs
    Block **blocks            # NULL: untouched; BLOCK_DONE: all done
    uint64_t *unavailable     # Fenwick tree, from 1
    uint64_t *dirty[2]        # a bit per block, per generation; NULL: never any
    uint32_t fold_word        # where the fold goes on
    uint32_t free_at          # where freeing goes on
    # watching.pxd; NULL: nobody follows
    uint64_t *stamps          # per block, the number of its last change
    uint64_t *group_stamps
    uint64_t stamps_base      # changes up to this one are not stamped


cdef struct Submission:
    uint64_t id
    uint64_t chunks_total
    uint64_t chunks_done
    uint64_t unavailable      # done or taken
    uint64_t indexed          # available, as the indexes know it
    int64_t chunk_size
    uint32_t folding          # its blocks that a batch under way stores
    uint64_t added_ms
    uint64_t changed_batch
    Block *only               # of a submission of one block
    Big *big                  # of one with several
    uint32_t *values          # its (key, value) groups
    uint32_t value_count
    uint32_t block_count
    uint32_t slot
    uint32_t node             # in the tree of submissions with available chunks
    uint32_t first_reservation
    uint32_t held
    uint32_t dirty_nodes[2]
    uint32_t next_job         # slot
    uint8_t job
    uint8_t state
    uint8_t watched           # watching.pxd
    bint direct
    bint cancelling
    bint committed            # its end is in the file
    bint reported             # its end is in the list for the journal


cdef inline Block *block_done() noexcept nogil:
    """Stands for a block all of whose chunks are done."""
    return <Block *>1


cdef inline uint32_t block_words(uint32_t length) noexcept nogil:
    return (length + 63) >> 6


cdef inline uint32_t block_length(Submission *s, uint32_t block) noexcept nogil:
    cdef uint64_t left = s.chunks_total - (<uint64_t>block << BLOCK_SHIFT)
    return BLOCK_CHUNKS if left >= BLOCK_CHUNKS else <uint32_t>left


cdef inline Block **block_place(Submission *s, uint32_t block) noexcept nogil:
    return &s.only if s.big == NULL else &s.big.blocks[block]


cdef inline Block *block_touched(Submission *s, uint32_t block) noexcept nogil:
    """The block, made if this is the first touch; it is not done."""
    cdef Block **place = block_place(s, block)
    cdef uint32_t length
    if place[0] == NULL:
        length = block_length(s, block)
        place[0] = <Block *>must(calloc(1, sizeof(Block) + (2 * block_words(length) - 1) * sizeof(uint64_t)))
        place[0].length = length
    return place[0]


cdef inline void block_free(Block *block) noexcept nogil:
    if block != NULL and block != block_done():
        free(block.attempts)
        free(block)


cdef inline bint submission_open(Submission *s, uint64_t chunks_total) noexcept nogil:
    """Set a zeroed submission's length; False: there is no memory for its tables."""
    s.chunks_total = chunks_total
    s.block_count = <uint32_t>((chunks_total + BLOCK_CHUNKS - 1) >> BLOCK_SHIFT)
    if s.block_count == 1:
        return True
    s.big = <Big *>calloc(1, sizeof(Big))
    if s.big == NULL:
        return False
    s.big.blocks = <Block **>calloc(s.block_count, sizeof(Block *))
    s.big.unavailable = <uint64_t *>calloc(<size_t>s.block_count + 1, sizeof(uint64_t))
    return s.big.blocks != NULL and s.big.unavailable != NULL


cdef inline bint submission_free_blocks(Submission *s, uint32_t limit) noexcept nogil:
    """Free at most `limit` blocks; True: all are free, and the tables too."""
    cdef uint32_t end
    if s.big == NULL:
        block_free(s.only)
        s.only = NULL
        return True
    if s.big.blocks != NULL and s.big.free_at < s.block_count:
        end = s.block_count if s.block_count - s.big.free_at <= limit else s.big.free_at + limit
        while s.big.free_at < end:
            block_free(s.big.blocks[s.big.free_at])
            s.big.free_at += 1
        if end < s.block_count:
            return False
    free(s.big.blocks)
    free(s.big.unavailable)
    free(s.big.dirty[0])
    free(s.big.dirty[1])
    free(s.big.stamps)
    free(s.big.group_stamps)
    free(s.big)
    s.big = NULL
    return True


cdef inline void count_unavailable(Submission *s, uint32_t block, int64_t change) noexcept nogil:
    """Chunks of a block became unavailable, or available when negative."""
    cdef uint64_t at = <uint64_t>block + 1
    s.unavailable += <uint64_t>change
    if s.big != NULL:
        while at <= s.block_count:
            s.big.unavailable[at] += <uint64_t>change
            at += at & (~at + 1)


cdef inline bint chunk_is_done(Submission *s, uint64_t chunk) noexcept nogil:
    cdef Block *block = block_place(s, <uint32_t>(chunk >> BLOCK_SHIFT))[0]
    cdef uint32_t offset = chunk & (BLOCK_CHUNKS - 1)
    if block == NULL:
        return False
    if block == block_done():
        return True
    return (block.bits[offset >> 6] >> (offset & 63)) & 1


cdef inline void take_chunk(Submission *s, uint64_t chunk) noexcept nogil:
    """An available chunk is taken."""
    cdef uint32_t at = <uint32_t>(chunk >> BLOCK_SHIFT)
    cdef uint32_t offset = chunk & (BLOCK_CHUNKS - 1)
    cdef Block *block = block_touched(s, at)
    block.bits[block_words(block.length) + (offset >> 6)] |= <uint64_t>1 << (offset & 63)
    block.unavailable += 1
    count_unavailable(s, at, 1)


cdef inline void give_chunk_back(Submission *s, uint64_t chunk) noexcept nogil:
    """A taken chunk is available."""
    cdef uint32_t at = <uint32_t>(chunk >> BLOCK_SHIFT)
    cdef uint32_t offset = chunk & (BLOCK_CHUNKS - 1)
    cdef Block *block = block_place(s, at)[0]
    block.bits[block_words(block.length) + (offset >> 6)] &= ~(<uint64_t>1 << (offset & 63))
    block.unavailable -= 1
    count_unavailable(s, at, -1)


cdef inline Attempt *attempt_of(Submission *s, uint64_t chunk) noexcept nogil:
    """NULL: the chunk has never failed, expired or crashed, or it is done."""
    cdef Block *block = block_place(s, <uint32_t>(chunk >> BLOCK_SHIFT))[0]
    cdef uint32_t offset = chunk & (BLOCK_CHUNKS - 1)
    cdef uint32_t low = 0, high, middle
    if block == NULL or block == block_done() or block.attempts == NULL:
        return NULL
    high = block.attempts.count
    while low < high:
        middle = (low + high) >> 1
        if block.attempts.at[middle].offset < offset:
            low = middle + 1
        else:
            high = middle
    if low < block.attempts.count and block.attempts.at[low].offset == offset:
        return &block.attempts.at[low]
    return NULL


cdef inline Attempt *attempt_made(Submission *s, uint64_t chunk) noexcept nogil:
    """The same, added if there is none; the chunk is not done."""
    cdef Attempt *found = attempt_of(s, chunk)
    cdef Block *block
    cdef Attempts *attempts
    cdef uint32_t offset = chunk & (BLOCK_CHUNKS - 1)
    cdef uint32_t capacity, at
    if found != NULL:
        return found
    block = block_touched(s, <uint32_t>(chunk >> BLOCK_SHIFT))
    attempts = block.attempts
    if attempts == NULL or attempts.count == attempts.capacity:
        capacity = 2 if attempts == NULL else attempts.capacity * 2
        attempts = <Attempts *>must(realloc(attempts, sizeof(Attempts) + (capacity - 1) * sizeof(Attempt)))
        if block.attempts == NULL:
            attempts.count = 0
        attempts.capacity = capacity
        block.attempts = attempts
    at = attempts.count
    while at and attempts.at[at - 1].offset > offset:
        attempts.at[at] = attempts.at[at - 1]
        at -= 1
    attempts.count += 1
    attempts.at[at].offset = offset
    attempts.at[at].retries = 0
    attempts.at[at].crashes = 0
    return &attempts.at[at]


cdef inline void attempt_forget(Submission *s, uint64_t chunk) noexcept nogil:
    cdef Attempt *found = attempt_of(s, chunk)
    cdef Attempts *attempts
    cdef uint32_t at
    if found == NULL:
        return
    attempts = block_place(s, <uint32_t>(chunk >> BLOCK_SHIFT))[0].attempts
    at = <uint32_t>(found - &attempts.at[0])
    memmove(found, found + 1, (attempts.count - at - 1) * sizeof(Attempt))
    attempts.count -= 1


cdef inline void finish_chunk(Submission *s, uint64_t chunk, bint taken) noexcept nogil:
    """A chunk that is not done is done now; `taken`: it was taken until now."""
    cdef uint32_t at = <uint32_t>(chunk >> BLOCK_SHIFT)
    cdef uint32_t offset = chunk & (BLOCK_CHUNKS - 1)
    cdef Block *block = block_touched(s, at)
    cdef uint64_t bit = <uint64_t>1 << (offset & 63)
    if taken:
        block.bits[block_words(block.length) + (offset >> 6)] &= ~bit
    else:
        block.unavailable += 1
        count_unavailable(s, at, 1)
    if block.attempts != NULL:
        attempt_forget(s, chunk)
    block.bits[offset >> 6] |= bit
    block.done += 1
    s.chunks_done += 1
    if block.done == block.length:
        block_free(block)
        block_place(s, at)[0] = block_done()


cdef inline uint64_t unused_bits(Block *block, uint32_t word) noexcept nogil:
    """Which chunks of a word are available."""
    cdef uint64_t available = ~(block.bits[word] | block.bits[block_words(block.length) + word])
    cdef uint32_t used = block.length - (word << 6)
    if used < 64:
        available &= (<uint64_t>1 << used) - 1
    return available


cdef inline uint64_t available_chunk(Submission *s, uint64_t rank) noexcept nogil:
    """The available chunk with `rank` available ones below it; rank < the number of available ones."""
    cdef uint64_t position = 0
    cdef uint64_t step, available
    cdef uint32_t word, count, words
    cdef uint64_t bits
    cdef Block *block
    if s.big != NULL:
        step = <uint64_t>1 << highest_bit(s.block_count)
        while step:
            if position + step <= s.block_count:
                # the last block may be shorter than this says, but the rank lies before its end
                available = (step << BLOCK_SHIFT) - s.big.unavailable[position + step]
                if available <= rank:
                    position += step
                    rank -= available
            step >>= 1
    block = block_place(s, <uint32_t>position)[0]
    position <<= BLOCK_SHIFT
    if block == NULL:
        return position + rank
    words = block_words(block.length)
    if rank << 1 < block.length - block.unavailable:
        for word in range(words):
            bits = unused_bits(block, word)
            if bits == 0:
                continue
            if rank == 0:
                return position + (word << 6) + lowest_bit(bits)
            count = popcount(bits)
            if rank < count:
                return position + (word << 6) + select_bit(bits, <uint32_t>rank)
            rank -= count
    # from the end: how many are at this rank or above
    rank = block.length - block.unavailable - rank
    word = words
    while word:
        word -= 1
        bits = unused_bits(block, word)
        if bits == 0:
            continue
        if rank == 1:
            return position + (word << 6) + highest_bit(bits)
        count = popcount(bits)
        if rank <= count:
            return position + (word << 6) + select_bit(bits, count - <uint32_t>rank)
        rank -= count
    return position


cdef enum LoadResult:
    LOADED = 0
    LOAD_TWICE = 1
    LOAD_SIZE = 2             # not as many bytes as the block has chunks for
    LOAD_BEYOND = 3           # a chunk behind the submission's end


cdef inline LoadResult block_load(Submission *s, uint32_t at, const uint8_t *done, uint32_t size,
                                  uint32_t *count) noexcept nogil:
    """Set an untouched block's done chunks from a block row; size 0: all are done. `count`: how many they are."""
    cdef Block **place = block_place(s, at)
    cdef uint32_t length = block_length(s, at)
    cdef uint32_t words = block_words(length)
    cdef uint32_t word
    cdef Block *block
    count[0] = 0
    if place[0] != NULL:
        return LOAD_TWICE
    if size and size != (length + 7) >> 3:
        return LOAD_SIZE
    if size and length & 7 and done[size - 1] >> (length & 7):
        return LOAD_BEYOND
    if size:
        block = block_touched(s, at)
        memcpy(block.bits, done, size)
        for word in range(words):
            count[0] += popcount(block.bits[word])
        block.done = block.unavailable = <uint16_t>count[0]
    else:
        count[0] = length
    if count[0] == length:
        block_free(place[0])
        place[0] = block_done()
    s.chunks_done += count[0]
    count_unavailable(s, at, count[0])
    return LOADED

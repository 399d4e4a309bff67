# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""The engine: every submission's bits, every reservation, the order of every strategy. Knows no socket, ring or file.

Hot methods are `cdef`, take numbers and make no Python object per chunk; cold ones are `def`. docs/engine.md says what each
event costs. Nothing here waits, and nothing here takes longer the more chunks a submission has.
"""

from libc.stdint cimport INT64_MAX, INT64_MIN, int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc, realloc
from libc.string cimport memcmp, memset

import os

from opsqueue._speedups.bits cimport clock_ns, mixed, must, prefetch, random_below
from opsqueue._speedups.board cimport SLOT_COUNTERS, Board
from opsqueue._speedups.counters cimport (
    CHUNKS_BACKLOG, CHUNKS_COMPLETED, CHUNKS_CRASHED, CHUNKS_EXPIRED, CHUNKS_FAILED, CHUNKS_RELEASED,
    CHUNKS_RESERVED, CHUNKS_RETRIED, CHUNKS_SKIPPED, CHUNKS_TOTAL, COMPLETIONS_IGNORED, FAILURES_IGNORED,
    HISTOGRAM_CHUNK_COMPLETED, HISTOGRAM_CHUNK_FAILURE, HISTOGRAM_SUBMISSION_CANCEL, HISTOGRAM_SUBMISSION_COMPLETE,
    HISTOGRAM_SUBMISSION_FAIL, MEMORY_PROMISED, OPERATIONS_BACKLOG, SUBMISSIONS_CANCELLED, SUBMISSIONS_COMPLETED,
    SUBMISSIONS_FAILED, SUBMISSIONS_IN_PROGRESS, observe,
)
from opsqueue._speedups.dirty cimport dirty_close, dirty_first, dirty_forget, dirty_mark, dirty_open, dirty_take
from opsqueue._speedups.eventlog cimport (
    EVENT_COMPLETION, EVENT_CRASH, EVENT_RETRY, Event, event_add, event_read, get_varint, put_varint,
)
from opsqueue._speedups.orders cimport Orders
from opsqueue._speedups.ranking cimport LEAF_NEWEST, LEAF_RANDOM
from opsqueue._speedups.records cimport (
    CHUNK_IS_DIRECT, DROP_CANCELLED, DROP_COMPLETED, DROP_EXPIRED, DROP_FAILED, FEATURE_CLEAN_CLOSE,
    FEATURE_DROPPED, DroppedRecord, ReservedChunk,
)
from opsqueue._speedups.reservations cimport (
    RES_DELAYED, RES_DOOMED, RES_HELD, Reservation, reservation_add, reservation_find, reservation_join,
    reservation_leave, reservation_remove, reservations_close, reservations_open,
)
from opsqueue._speedups.slotmap cimport slotmap_add, slotmap_close, slotmap_open, slotmap_remove
from opsqueue._speedups.submission cimport (
    BLOCK_CHUNKS, BLOCK_SHIFT, JOB_DROP, JOB_FREE, JOB_NONE, STATE_CANCELLED, STATE_COMPLETED, STATE_FAILED,
    STATE_IN_PROGRESS, STATE_PAUSED, Attempt, Big, LOAD_BEYOND, LOAD_SIZE, LOAD_TWICE, Block, LoadResult, Submission,
    attempt_made, attempt_of, available_chunk, block_done, block_length, block_load, block_place, chunk_is_done,
    finish_chunk, give_chunk_back, submission_free_blocks, submission_open, take_chunk,
)
from opsqueue._speedups.watching cimport watching_close, watching_note
from opsqueue._speedups.wheel cimport wheel_clear, wheel_close, wheel_hold, wheel_next_ms, wheel_open, wheel_pop, wheel_set

cdef enum:
    AT_ONCE = 1024                # reservations dropped or blocks freed without making a job of it
    TIMERS_A_TURN = 4096          # fired by one `advance`
    CLOCK_EVERY = 128             # steps of a sliced job between two looks at the clock
    MAX_HOLDER_SLOTS = 1 << 22
    REPLAYED_TOGETHER = 32        # entries of the log whose blocks are waited for at a time
    NO_SLOT = 0xFFFFFFFF

cdef enum:
    SUBMISSION_BYTES = 256        # what a submission costs beside its blocks, index entries included

#: Chunks that a submission may have: its blocks are numbered with 32 bits.
MAX_CHUNKS = (<uint64_t>1 << 32) * BLOCK_CHUNKS - BLOCK_CHUNKS

cdef uint64_t NEVER = ~<uint64_t>0
cdef uint64_t FAR_MS = <uint64_t>1 << 60
cdef bytes TEXT_EXPIRED = b"Reservation expired"
cdef bytes TEXT_DISAPPEARED = b"Requester disappeared"


cdef inline uint64_t promise(Submission *s) noexcept nogil:
    """Bytes that a submission may come to need: two bits per chunk and its constant part."""
    return (s.chunks_total >> 2) + SUBMISSION_BYTES


cdef inline uint32_t id_hash(uint64_t submission) noexcept nogil:
    return <uint32_t>(mixed(submission) >> 32)


cdef inline void add(uint64_t *counters, int counter, uint64_t amount) noexcept nogil:
    counters[counter] += amount


cdef inline void take_off(uint64_t *counters, int counter, uint64_t amount) noexcept nogil:
    counters[counter] -= amount


cdef inline bint over(Submission *s) noexcept nogil:
    """It has ended."""
    return s.state > STATE_PAUSED


cdef struct Replayed:
    Submission *submission
    uint64_t chunk
    uint32_t kind


cdef inline void fetch_together(Replayed *window, uint32_t count) noexcept nogil:
    """Each entry of the log is about another block, none of which is in a cache: waits for all of them at once."""
    cdef uint32_t i, at
    cdef Block *block
    cdef Big *big
    for i in range(count):
        prefetch(window[i].submission.big)
    for i in range(count):
        big = window[i].submission.big
        if big != NULL:
            at = <uint32_t>(window[i].chunk >> BLOCK_SHIFT)
            prefetch(&big.blocks[at])
            prefetch(&big.unavailable[at])
            prefetch(big.dirty[0])
            prefetch(big.dirty[1])
    for i in range(count):
        at = <uint32_t>(window[i].chunk >> BLOCK_SHIFT)
        block = block_place(window[i].submission, at)[0]
        if block != NULL and block != block_done():
            prefetch(block)
            prefetch(&block.bits[(window[i].chunk & (BLOCK_CHUNKS - 1)) >> 6])


cdef class Engine:
    """All submissions that are not finished (and ended ones until the journal needs nothing more of them).

    `reservation_ms` and `grace_ms` are milliseconds; `max_retries` 0 and 1 both mean that the first failure is the last;
    `max_crashes` 0 means no limit. `seed` makes Random repeatable.
    """

    def __cinit__(
        self,
        uint64_t reservation_ms=600_000,
        uint32_t max_retries=10,
        uint32_t max_crashes=0,
        uint64_t grace_ms=2_000,
        seed=None,
    ):
        self.reservation_ms = reservation_ms
        self.max_retries = max_retries if max_retries else 1
        self.max_crashes = max_crashes
        self.grace_ms = grace_ms
        self.random = int.from_bytes(os.urandom(8), "little") if seed is None else seed
        self.own_counters = <uint64_t *>must(calloc(SLOT_COUNTERS, sizeof(uint64_t)))
        self.counters = self.own_counters
        slotmap_open(&self.by_id)
        reservations_open(&self.reservations)
        wheel_open(&self.wheel)
        # a stream of its own: with ours the chunk would follow from the submission that was drawn
        self.orders = Orders(mixed(self.random + 3))
        dirty_open(&self.dirty, mixed(self.random + 2))
        self.free_submission = NO_SLOT
        self.drop_jobs = self.free_jobs = NO_SLOT
        self.ended = []
        self.recovered_ended = []

    def __dealloc__(self):
        cdef uint32_t at
        cdef Submission *s
        for at in range(self.submissions_end):
            s = self.submissions[at]
            if not <size_t>s & 1:
                submission_free_blocks(s, NO_SLOT)
                free(s.values)
                free(s)
        free(self.submissions)
        for at in range(256):
            free(self.holders[at].at)
        slotmap_close(&self.by_id)
        reservations_close(&self.reservations)
        wheel_close(&self.wheel)
        dirty_close(&self.dirty)
        watching_close(&self.watching)
        free(self.notices)
        free(self.log.at)
        free(self.own_counters)

    def use_board(self, Board board not None, uint32_t slot) -> None:
        """Count in the board's slot from now on; its counters go on, its gauges take this engine's values."""
        board._slot(slot)
        cdef uint64_t *shared = board.counters(slot)
        for gauge in (CHUNKS_BACKLOG, OPERATIONS_BACKLOG, CHUNKS_RESERVED, SUBMISSIONS_IN_PROGRESS, MEMORY_PROMISED):
            shared[<int>gauge] = self.counters[<int>gauge]
        self.board = board
        self.counters = shared

    # --- submissions ---

    cdef Submission *find(self, uint64_t submission) noexcept:
        """NULL: not here."""
        cdef uint32_t hash = id_hash(submission)
        cdef uint32_t at = hash & self.by_id.mask
        cdef uint64_t entry = self.by_id.entries[at]
        cdef Submission *s
        while entry:
            if <uint32_t>(entry >> 32) == hash:
                s = self.submissions[<uint32_t>entry - 1]
                if s.id == submission:
                    return s
            at = (at + 1) & self.by_id.mask
            entry = self.by_id.entries[at]
        return NULL

    cdef Submission *known(self, uint64_t submission) except NULL:
        cdef Submission *s = self.find(submission)
        if s == NULL:
            raise KeyError(f"the engine does not hold submission {submission}")
        return s

    cdef Submission *enter(self, uint64_t submission, uint64_t chunks_total, int64_t chunk_size, dict metadata,
                           bint direct, int state) except NULL:
        """A new submission, not yet in any order."""
        cdef Submission *s
        cdef uint32_t slot, capacity
        if self.find(submission) != NULL:
            raise ValueError(f"submission {submission} is there already")
        if not 0 < chunks_total <= <uint64_t>MAX_CHUNKS:
            raise ValueError(f"submission {submission} has {chunks_total} chunks; 1 to {MAX_CHUNKS} are possible")
        for key, amount in metadata.items():
            if not INT64_MIN <= amount <= INT64_MAX:
                raise ValueError(f"submission {submission}: {key!r} is {amount}, which is not a 64-bit integer")
        s = <Submission *>must(calloc(1, sizeof(Submission)))
        if not submission_open(s, chunks_total):
            submission_free_blocks(s, NO_SLOT)
            free(s)
            raise MemoryError(f"no memory for the tables of submission {submission} ({chunks_total} chunks)")
        s.id = submission
        s.chunk_size = chunk_size
        s.direct = direct
        s.state = <uint8_t>state
        s.added_ms = self.now_ms
        self.orders.enter(s, metadata)
        if self.free_submission != NO_SLOT:
            slot = self.free_submission
            self.free_submission = <uint32_t>(<size_t>self.submissions[slot] >> 1)
        else:
            if self.submissions_end == self.submission_capacity:
                capacity = self.submission_capacity * 2 if self.submission_capacity else 64
                self.submissions = <Submission **>must(
                    realloc(self.submissions, <size_t>capacity * sizeof(Submission *))
                )
                self.submission_capacity = capacity
            slot = self.submissions_end
            self.submissions_end += 1
        self.submissions[slot] = s
        s.slot = slot
        self.orders.submissions = self.submissions
        self.orders.submissions_end = self.submissions_end
        slotmap_add(&self.by_id, id_hash(submission), slot)
        self.submission_count += 1
        self.orders.submission_count = self.submission_count
        if not over(s):
            self.promised += promise(s)
            self.counters[<int>MEMORY_PROMISED] = self.promised
            add(self.counters, SUBMISSIONS_IN_PROGRESS, 1)
            add(self.counters, CHUNKS_BACKLOG, chunks_total)
            add(self.counters, OPERATIONS_BACKLOG, chunks_total * <uint64_t>chunk_size)
        return s

    def add_submission(
        self, submission: int, chunks_total: int, chunk_size: int, metadata: dict, *, direct: bool, paused: bool = False
    ) -> None:
        """Hand out its chunks from now on, unless it is paused. Costs the same for any number of chunks."""
        cdef Submission *s = self.enter(
            submission, chunks_total, chunk_size, metadata, direct, STATE_PAUSED if paused else STATE_IN_PROGRESS
        )
        s.changed_batch = 0  # its insert is in the file already
        add(self.counters, CHUNKS_TOTAL, s.chunks_total)
        self.touch(s)

    def set_paused(self, uint64_t submission, bint paused) -> bool:
        """Stop or resume its hand-out; False: it is not here, has ended, or is so already. Held chunks stay held."""
        cdef Submission *s = self.find(submission)
        cdef int wanted = STATE_IN_PROGRESS if paused else STATE_PAUSED
        if s == NULL or s.state != wanted:
            return False
        s.state = STATE_PAUSED if paused else STATE_IN_PROGRESS
        self.touch(s)
        return True

    def begin_cancel(self, uint64_t submission) -> bool:
        """Stop its hand-out until the cancel is committed or aborted; False: not here, ended, or being cancelled."""
        cdef Submission *s = self.find(submission)
        if s == NULL or over(s) or s.cancelling:
            return False
        s.cancelling = True
        self.touch(s)
        return True

    def abort_cancel(self, uint64_t submission) -> None:
        """The cancel could not be stored: hand-out goes on. Nothing happens if the submission has ended meanwhile."""
        cdef Submission *s = self.find(submission)
        if s != NULL and s.cancelling:
            s.cancelling = False
            self.touch(s)

    def finish_cancel(self, uint64_t submission) -> None:
        """The file says cancelled. That is final, also for a submission that ended in memory meanwhile."""
        cdef Submission *s = self.known(submission)
        if not over(s):
            self.finish(s, STATE_CANCELLED, 0, None)
        elif s.reported:
            s.state = STATE_CANCELLED
            self.ended = [entry for entry in self.ended if entry[0] != submission]
        s.state = STATE_CANCELLED
        s.committed = True
        self.count_end(s)
        self.free_if_over(s)

    def ended_committed(self, uint64_t submission) -> None:
        """The file says that it has completed or failed; it is forgotten as soon as nothing of it is needed."""
        cdef Submission *s = self.find(submission)
        if s == NULL or not over(s) or s.committed:
            return
        s.committed = True
        self.count_end(s)
        if s.state == STATE_COMPLETED:
            dirty_forget(&self.dirty, s)
        self.free_if_over(s)

    cdef void count_end(self, Submission *s) noexcept:
        """Count a final state once it is in the file."""
        cdef uint64_t left = s.chunks_total - s.chunks_done
        cdef uint64_t took_ns = (self.now_ms - s.added_ms) * 1_000_000
        if s.state == STATE_COMPLETED:
            add(self.counters, SUBMISSIONS_COMPLETED, 1)
            observe(self.counters, HISTOGRAM_SUBMISSION_COMPLETE, took_ns)
        elif s.state == STATE_FAILED:
            add(self.counters, SUBMISSIONS_FAILED, 1)
            add(self.counters, CHUNKS_FAILED, 1)
            add(self.counters, CHUNKS_SKIPPED, left - 1)
            observe(self.counters, HISTOGRAM_SUBMISSION_FAIL, took_ns)
        else:
            add(self.counters, SUBMISSIONS_CANCELLED, 1)
            add(self.counters, CHUNKS_SKIPPED, left)
            observe(self.counters, HISTOGRAM_SUBMISSION_CANCEL, took_ns)

    def holds(self, uint64_t submission) -> bool:
        """It is here: unfinished, or ended and still needed."""
        return self.find(submission) != NULL

    def state(self, uint64_t submission) -> int:
        """opsqueue.server.writer.batch.State, as a number. Raises KeyError if the engine does not hold it."""
        return self.known(submission).state

    def chunks_done(self, uint64_t submission) -> int:
        """Chunks of it that are done. Raises KeyError if the engine does not hold it."""
        return self.known(submission).chunks_done

    def changed_batch(self, uint64_t submission) -> int:
        """Number of the batch that carries its last change; 0: none since it came. Raises KeyError if not held."""
        return self.known(submission).changed_batch

    cdef void finish(self, Submission *s, int state, uint64_t failed_chunk, object failure) noexcept:
        """It has ended: nothing of it is handed out or counted from here on."""
        cdef uint64_t left = s.chunks_total - s.chunks_done
        cdef uint32_t at
        s.state = <uint8_t>state
        s.cancelling = False
        if state != STATE_CANCELLED:
            s.changed_batch = self.batch  # a cancel ends it after its commit
        self.promised -= promise(s)
        self.counters[<int>MEMORY_PROMISED] = self.promised
        take_off(self.counters, SUBMISSIONS_IN_PROGRESS, 1)
        take_off(self.counters, CHUNKS_BACKLOG, left)
        take_off(self.counters, OPERATIONS_BACKLOG, left * <uint64_t>s.chunk_size)
        take_off(self.counters, CHUNKS_RESERVED, s.held)
        self.orders.in_flight(s, -<int>s.held)
        s.held = 0
        self.touch(s)
        if state != STATE_CANCELLED:
            s.reported = True
            failed = failed_chunk if state == STATE_FAILED else None
            self.ended.append((s.id, state, s.chunks_done, failed, failure))
        if not self.drop_reservations(s, AT_ONCE):
            s.job = JOB_DROP
            s.next_job = self.drop_jobs
            self.drop_jobs = s.slot

    cdef bint drop_reservations(self, Submission *s, uint32_t limit) noexcept:
        """Drop at most `limit` reservations of an ended submission and tell their holders; True: none is left."""
        cdef uint32_t at
        cdef Reservation *record
        cdef Holder *who
        while s.first_reservation:
            if limit == 0:
                return False
            limit -= 1
            at = s.first_reservation
            record = &self.reservations.at[at]
            if record.state == RES_HELD:
                who = self.find_holder(record.holder)
                self.notice(record.holder, s, record.chunk,
                            DROP_CANCELLED if s.state == STATE_CANCELLED else DROP_FAILED)
                reservation_leave(&self.reservations, at, &who.first_reservation)
            wheel_clear(&self.wheel, at)
            reservation_remove(&self.reservations, at, &s.first_reservation)
        return True

    cdef void free_if_over(self, Submission *s) noexcept:
        """Forget an ended submission when the file has its end, its blocks are folded and no job works on it."""
        if over(s) and s.committed and s.job == JOB_NONE and s.first_reservation == 0:
            if s.dirty_nodes[0] == 0 and s.dirty_nodes[1] == 0 and s.folding == 0:
                self.leave(s)

    cdef void leave(self, Submission *s) noexcept:
        slotmap_remove(&self.by_id, id_hash(s.id), s.slot)
        self.submission_count -= 1
        self.orders.submission_count = self.submission_count
        self.orders.leave(s)
        if submission_free_blocks(s, AT_ONCE):
            self.free_slot(s)
        else:
            s.job = JOB_FREE
            s.next_job = self.free_jobs
            self.free_jobs = s.slot

    cdef void free_slot(self, Submission *s) noexcept:
        cdef uint32_t slot = s.slot
        free(s)
        self.submissions[slot] = <Submission *>((<size_t>self.free_submission << 1) | 1)
        self.free_submission = slot

    # --- order ---

    cdef void touch(self, Submission *s) noexcept:
        """Its available chunks or the counts of its values may have changed: every index takes note."""
        cdef uint64_t available = 0
        if s.state == STATE_IN_PROGRESS and not s.cancelling:
            available = s.chunks_total - s.unavailable
        self.orders.sync(s, available)

    cdef void in_flight(self, Submission *s, int change) noexcept:
        """Its held chunks changed in number; `touch` must follow."""
        s.held += change
        add(self.counters, CHUNKS_RESERVED, <uint64_t><int64_t>change)
        self.orders.in_flight(s, change)

    @property
    def held_bytes(self) -> int:
        """Memory of the records of chunks that consumers hold, or will be handed later; without what stands in blocks."""
        return <uint64_t>self.reservations.capacity * sizeof(Reservation) + (
            <uint64_t>self.reservations.by_chunk.mask + 1
        ) * sizeof(uint64_t)

    @property
    def available(self) -> int:
        return self.orders.available

    @property
    def ranking_count(self) -> int:
        return self.orders.ranking_count

    @property
    def refusal(self) -> str:
        return self.orders.refusal

    cdef int strategy(self, const uint8_t *canonical, uint32_t size) noexcept:
        self.orders.now_ms = self.now_ms
        return self.orders.strategy(canonical, size)

    cdef bint strategy_ready(self, int strategy) noexcept:
        self.orders.now_ms = self.now_ms
        return self.orders.ready(strategy)

    cdef uint32_t reserve(self, uint64_t holder, int strategy, uint32_t max, ReservedChunk *out) noexcept:
        cdef Holder *who = self.find_holder(holder)
        cdef Submission *s
        cdef uint64_t chunk, left
        cdef uint32_t count = 0
        cdef uint32_t leaf = 0
        cdef bint whole = False
        if who == NULL:
            return 0
        self.orders.now_ms = self.now_ms
        while count < max:
            s = self.orders.pick(strategy, &leaf, &whole)
            if s == NULL:
                break
            # Oldest and Newest stay with a submission until it has no more: its indexes need be told only then.
            left = s.indexed if whole else 1
            while left and count < max:
                if leaf == LEAF_NEWEST:
                    chunk = available_chunk(s, s.chunks_total - s.unavailable - 1)
                elif leaf == LEAF_RANDOM:
                    chunk = available_chunk(s, random_below(&self.random, s.chunks_total - s.unavailable))
                else:
                    chunk = available_chunk(s, 0)
                self.hold(s, chunk, who, out + count)
                count += 1
                left -= 1
            self.touch(s)
        return count

    # --- holders and reservations ---

    cdef Holder *find_holder(self, uint64_t holder) noexcept:
        """NULL: not open."""
        cdef HolderTable *table = &self.holders[holder >> 56]
        cdef uint32_t slot = <uint32_t>holder
        if slot >= table.capacity or table.at[slot].holder != holder + 1:
            return NULL
        return &table.at[slot]

    cdef void open_holder(self, uint64_t holder, uint32_t features) noexcept:
        cdef HolderTable *table = &self.holders[holder >> 56]
        cdef uint32_t slot = <uint32_t>holder
        cdef uint32_t capacity = table.capacity if table.capacity else 16
        if slot >= MAX_HOLDER_SLOTS:
            return
        if slot >= table.capacity:
            while capacity <= slot:
                capacity *= 2
            table.at = <Holder *>must(realloc(table.at, capacity * sizeof(Holder)))
            memset(table.at + table.capacity, 0, (capacity - table.capacity) * sizeof(Holder))
            table.capacity = capacity
        if table.at[slot].holder:
            self.close_found(&table.at[slot], False)
        table.at[slot].holder = holder + 1
        table.at[slot].features = features

    cdef void close_holder(self, uint64_t holder, bint lost) noexcept:
        cdef Holder *who = self.find_holder(holder)
        if who != NULL:
            self.close_found(who, lost)

    cdef void close_holders_of(self, uint32_t frontend) noexcept:
        cdef HolderTable *table = &self.holders[frontend & 255]
        cdef uint32_t slot
        for slot in range(table.capacity):
            if table.at[slot].holder:
                self.close_found(&table.at[slot], False)

    cdef void close_found(self, Holder *who, bint lost) noexcept:
        """Free all it holds; `lost`: the connection ended without a close frame."""
        cdef uint32_t at = who.first_reservation
        cdef Submission *s
        cdef Submission *changed = NULL
        cdef Submission *crashed = NULL
        cdef Reservation *record
        cdef Attempt *attempt
        cdef uint64_t working = 0
        cdef uint64_t crashed_chunk = 0
        if lost and who.features & FEATURE_CLEAN_CLOSE:
            while at:
                record = &self.reservations.at[at]
                if record.working > working and not over(self.submissions[record.submission]):
                    working = record.working
                    crashed = self.submissions[record.submission]
                    crashed_chunk = record.chunk
                at = record.holder_next
        while who.first_reservation:
            at = who.first_reservation
            record = &self.reservations.at[at]
            s = self.submissions[record.submission]
            if over(s):
                # waits for its sliced job; its counts are right already
                reservation_leave(&self.reservations, at, &who.first_reservation)
                wheel_clear(&self.wheel, at)
                reservation_remove(&self.reservations, at, &s.first_reservation)
                continue
            if changed != NULL and changed != s:
                self.touch(changed)
            changed = s
            self.unhold(s, at)
            give_chunk_back(s, record.chunk)
            reservation_remove(&self.reservations, at, &s.first_reservation)
        if changed != NULL:
            self.touch(changed)
        who.holder = 0
        if crashed != NULL:
            attempt = attempt_made(crashed, crashed_chunk)
            attempt.crashes += 1
            add(self.counters, CHUNKS_CRASHED, 1)
            self.event(EVENT_CRASH, crashed, crashed_chunk)
            if self.max_crashes and attempt.crashes >= self.max_crashes:
                self.finish(
                    crashed,
                    STATE_FAILED,
                    crashed_chunk,
                    f"{attempt.crashes} consumers in a row were lost while they worked on this chunk (--max-chunk-crashes)"
                    if attempt.crashes > 1
                    else "a consumer was lost while it worked on this chunk (--max-chunk-crashes)",
                )

    cdef void hold(self, Submission *s, uint64_t chunk, Holder *who, ReservedChunk *out) noexcept:
        """An available chunk is the holder's; `touch` must follow."""
        cdef uint32_t at
        cdef Reservation *record
        cdef Attempt *attempt = attempt_of(s, chunk)
        take_chunk(s, chunk)
        at = reservation_add(&self.reservations, s.slot, chunk, &s.first_reservation)
        record = &self.reservations.at[at]
        record.state = RES_HELD
        record.holder = who.holder - 1
        record.since_ms = self.now_ms
        reservation_join(&self.reservations, at, &who.first_reservation)
        wheel_hold(&self.wheel, self.reservations.capacity)
        wheel_set(&self.wheel, at, self.now_ms + self.reservation_ms)
        self.in_flight(s, 1)
        out.submission = s.id
        out.chunk = chunk
        out.chunks_done = s.chunks_done
        out.retries = 0 if attempt == NULL else attempt.retries
        out.flags = CHUNK_IS_DIRECT if s.direct else 0

    cdef void unhold(self, Submission *s, uint32_t reservation) noexcept:
        """Nobody holds it any more, what becomes of it is the caller's to say; `touch` must follow."""
        cdef Reservation *record = &self.reservations.at[reservation]
        cdef Holder *who = self.find_holder(record.holder)
        reservation_leave(&self.reservations, reservation, &who.first_reservation)
        wheel_clear(&self.wheel, reservation)
        self.in_flight(s, -1)

    cdef void release_chunk(self, Submission *s, uint32_t reservation) noexcept:
        """A chunk that nobody holds is available again."""
        wheel_clear(&self.wheel, reservation)
        give_chunk_back(s, self.reservations.at[reservation].chunk)
        reservation_remove(&self.reservations, reservation, &s.first_reservation)
        self.touch(s)

    cdef uint32_t held_by(self, uint64_t holder, uint64_t submission, uint64_t chunk, Submission **s) noexcept:
        """The reservation, if the chunk is this holder's now; else 0."""
        cdef uint32_t at
        s[0] = self.find(submission)
        if s[0] == NULL or over(s[0]) or chunk >= s[0].chunks_total:
            return 0
        at = reservation_find(&self.reservations, s[0].slot, chunk)
        if at and self.reservations.at[at].state == RES_HELD and self.reservations.at[at].holder == holder:
            return at
        return 0

    cdef void notice(self, uint64_t holder, Submission *s, uint64_t chunk, uint32_t reason) noexcept:
        """Tell a holder that it has lost a chunk. Expiry is for every peer, the other reasons for those that asked."""
        cdef Holder *who = self.find_holder(holder)
        cdef DroppedRecord *at
        if who == NULL or (reason != DROP_EXPIRED and not who.features & FEATURE_DROPPED):
            return
        if self.notice_count == self.notice_capacity:
            self.notice_capacity = self.notice_capacity * 2 if self.notice_capacity else 64
            self.notices = <DroppedRecord *>must(realloc(self.notices, self.notice_capacity * sizeof(DroppedRecord)))
        at = &self.notices[self.notice_count]
        self.notice_count += 1
        at.connection = holder
        at.submission = s.id
        at.chunk = chunk
        at.reason = reason
        at._reserved = 0

    # --- messages about chunks ---

    cdef int complete(self, uint64_t holder, uint64_t submission, uint64_t chunk) noexcept:
        cdef Submission *s = self.find(submission)
        cdef uint32_t at
        cdef Reservation *record
        if s == NULL or over(s) or chunk >= s.chunks_total or chunk_is_done(s, chunk):
            add(self.counters, COMPLETIONS_IGNORED, 1)
            return IGNORED
        at = reservation_find(&self.reservations, s.slot, chunk)
        if at:
            record = &self.reservations.at[at]
            if record.state == RES_HELD:
                if record.holder == holder:
                    observe(self.counters, HISTOGRAM_CHUNK_COMPLETED, (self.now_ms - record.since_ms) * 1_000_000)
                else:
                    self.notice(record.holder, s, chunk, DROP_COMPLETED)
                self.unhold(s, at)
            wheel_clear(&self.wheel, at)
            reservation_remove(&self.reservations, at, &s.first_reservation)
        add(self.counters, CHUNKS_COMPLETED, 1)
        self.event(EVENT_COMPLETION, s, chunk)
        self.chunk_finished(s, chunk, at != 0)
        return COUNTED

    cdef void chunk_finished(self, Submission *s, uint64_t chunk, bint taken) noexcept:
        """A chunk of an unfinished submission is done; it has no reservation any more."""
        finish_chunk(s, chunk, taken)
        watching_note(&self.watching, s, chunk)
        take_off(self.counters, CHUNKS_BACKLOG, 1)
        take_off(self.counters, OPERATIONS_BACKLOG, <uint64_t>s.chunk_size)
        if s.chunks_done == s.chunks_total:
            self.finish(s, STATE_COMPLETED, 0, None)
        else:
            self.touch(s)

    cdef bint add_retry(self, Submission *s, uint64_t chunk) noexcept:
        """One more; True: that is the limit."""
        cdef Attempt *attempt = attempt_made(s, chunk)
        attempt.retries += 1
        add(self.counters, CHUNKS_RETRIED, 1)
        self.event(EVENT_RETRY, s, chunk)
        return attempt.retries >= self.max_retries

    cdef int fail(self, uint64_t holder, uint64_t submission, uint64_t chunk,
                  const uint8_t *text, uint32_t size) noexcept:
        cdef Submission *s
        cdef uint32_t at = self.held_by(holder, submission, chunk, &s)
        if at == 0 or (size == <uint32_t>len(TEXT_EXPIRED) and memcmp(text, <const char *>TEXT_EXPIRED, size) == 0):
            add(self.counters, FAILURES_IGNORED, 1)
            return IGNORED
        if size == <uint32_t>len(TEXT_DISAPPEARED) and memcmp(text, <const char *>TEXT_DISAPPEARED, size) == 0:
            return self.release(holder, submission, chunk)
        observe(
            self.counters, HISTOGRAM_CHUNK_FAILURE, (self.now_ms - self.reservations.at[at].since_ms) * 1_000_000
        )
        self.unhold(s, at)
        if self.add_retry(s, chunk):
            # it is this holder that ended it, so it needs no notice
            reservation_remove(&self.reservations, at, &s.first_reservation)
            self.finish(s, STATE_FAILED, chunk, text[:size].decode("utf-8", "replace"))
        else:
            self.release_chunk(s, at)
        return COUNTED

    cdef int release(self, uint64_t holder, uint64_t submission, uint64_t chunk) noexcept:
        cdef Submission *s
        cdef uint32_t at = self.held_by(holder, submission, chunk, &s)
        if at == 0:
            return IGNORED
        add(self.counters, CHUNKS_RELEASED, 1)
        self.unhold(s, at)
        self.release_chunk(s, at)
        return COUNTED

    cdef int extend(self, uint64_t holder, uint64_t submission, uint64_t chunk) noexcept:
        cdef Submission *s
        cdef uint32_t at = self.held_by(holder, submission, chunk, &s)
        if at == 0:
            return IGNORED
        wheel_set(&self.wheel, at, self.now_ms + self.reservation_ms)
        return COUNTED

    cdef int retry_later(self, uint64_t holder, uint64_t submission, uint64_t chunk, uint64_t delay_ms) noexcept:
        cdef Submission *s
        cdef uint32_t at = self.held_by(holder, submission, chunk, &s)
        if at == 0:
            return IGNORED
        self.unhold(s, at)
        if delay_ms == 0:
            self.release_chunk(s, at)
            return COUNTED
        self.reservations.at[at].state = RES_DELAYED
        self.reservations.at[at].holder = 0
        wheel_set(&self.wheel, at, self.now_ms + (delay_ms if delay_ms < FAR_MS else FAR_MS))
        self.touch(s)
        return COUNTED

    cdef int fail_submission(self, uint64_t holder, uint64_t submission, uint64_t chunk,
                             const uint8_t *text, uint32_t size) noexcept:
        cdef Submission *s
        cdef uint32_t at = self.held_by(holder, submission, chunk, &s)
        if at == 0:
            add(self.counters, FAILURES_IGNORED, 1)
            return IGNORED
        observe(
            self.counters, HISTOGRAM_CHUNK_FAILURE, (self.now_ms - self.reservations.at[at].since_ms) * 1_000_000
        )
        self.unhold(s, at)
        reservation_remove(&self.reservations, at, &s.first_reservation)
        self.finish(s, STATE_FAILED, chunk, text[:size].decode("utf-8", "replace"))
        return COUNTED

    cdef int working_on(self, uint64_t holder, uint64_t submission, uint64_t chunk) noexcept:
        cdef Submission *s
        cdef uint32_t at = self.held_by(holder, submission, chunk, &s)
        if at == 0:
            return IGNORED
        self.workings += 1
        self.reservations.at[at].working = self.workings
        return COUNTED

    # --- time ---

    cpdef bint advance(self, uint64_t now_ms) noexcept:
        """The clock says so (never less than before): expire what is due, a bounded number; True: more is due."""
        cdef uint32_t at
        cdef uint32_t fired = 0
        if now_ms > self.now_ms:
            self.now_ms = now_ms
        while fired < TIMERS_A_TURN:
            at = wheel_pop(&self.wheel, self.now_ms)
            if at == 0:
                return False
            self.expired(at)
            fired += 1
        return True

    def next_timer_ms(self) -> int | None:
        """Milliseconds from the last `advance` until it should be called again; None: no timer is set."""
        cdef uint64_t at = self.next_timer()
        if at == NEVER:
            return None
        return at - self.now_ms if at > self.now_ms else 0

    cdef uint64_t next_timer(self) noexcept:
        """When `advance` should be called again, in milliseconds of the monotonic clock; the largest number: no timer."""
        cdef uint64_t at = wheel_next_ms(&self.wheel)
        if self.orders.starving:
            at = min(at, self.orders.starving_until_ms)
        return at

    cdef void expired(self, uint32_t reservation) noexcept:
        cdef Reservation *record = &self.reservations.at[reservation]
        cdef Submission *s = self.submissions[record.submission]
        if over(s):
            return  # waits for its sliced job
        if record.state == RES_DELAYED:
            self.release_chunk(s, reservation)
        elif record.state == RES_DOOMED:
            self.finish(s, STATE_FAILED, record.chunk, TEXT_EXPIRED.decode())
        else:
            self.notice(record.holder, s, record.chunk, DROP_EXPIRED)
            self.unhold(s, reservation)
            add(self.counters, CHUNKS_EXPIRED, 1)
            if self.add_retry(s, record.chunk):
                record.state = RES_DOOMED
                record.holder = 0
                wheel_set(&self.wheel, reservation, self.now_ms + self.grace_ms)
                self.touch(s)
            else:
                self.release_chunk(s, reservation)

    cdef void doom(self, Submission *s, uint64_t chunk) noexcept:
        """Found at its retry limit in the journal: as if it had expired now."""
        cdef uint32_t at
        take_chunk(s, chunk)
        at = reservation_add(&self.reservations, s.slot, chunk, &s.first_reservation)
        self.reservations.at[at].state = RES_DOOMED
        wheel_hold(&self.wheel, self.reservations.capacity)
        wheel_set(&self.wheel, at, self.now_ms + self.grace_ms)

    cpdef bint work(self, uint64_t budget_ns) noexcept:
        """Go on with sliced jobs for about so long: indexes, freeing, dropping; True: there is more to do."""
        if not self.orders.building and self.drop_jobs == NO_SLOT and self.free_jobs == NO_SLOT and not self.recovered_ended:
            return False
        return self.work_until(clock_ns() + budget_ns)

    cdef bint work_until(self, uint64_t until_ns) noexcept:
        cdef Submission *s
        while self.recovered_ended:
            s = self.find(self.recovered_ended.pop())
            if s != NULL:
                self.free_if_over(s)
        while self.drop_jobs != NO_SLOT:
            s = self.submissions[self.drop_jobs]
            while not self.drop_reservations(s, CLOCK_EVERY):
                if clock_ns() >= until_ns:
                    return True
            self.drop_jobs = s.next_job
            s.job = JOB_NONE
            self.free_if_over(s)
        if self.orders.building and self.orders.build(until_ns):
            return True
        while self.free_jobs != NO_SLOT:
            s = self.submissions[self.free_jobs]
            while not submission_free_blocks(s, CLOCK_EVERY):
                if clock_ns() >= until_ns:
                    return True
            self.free_jobs = s.next_job
            self.free_slot(s)
        return False

    # --- for the journal (docs/journal.md) ---

    cdef void event(self, uint32_t kind, Submission *s, uint64_t chunk) noexcept:
        """Log what happened to a chunk: an entry, a dirty block, the batch that it belongs to."""
        event_add(&self.log, kind, s.id, chunk)
        s.changed_batch = self.batch
        dirty_mark(&self.dirty, s, <uint32_t>(chunk >> BLOCK_SHIFT), self.dirty.gathering)

    cdef bytes take_events(self):
        cdef bytes taken = (<const char *>self.log.at)[: self.log.size] if self.log.size else b""
        self.log.size = 0
        return taken

    cdef list take_ended(self):
        cdef list taken = self.ended
        self.ended = []
        return taken

    cdef bint has_changes(self) noexcept:
        return self.log.size != 0 or len(self.ended) != 0

    def fold_start(self) -> None:
        """Freeze the set of blocks that are dirty now; `fold_take` gives them. Raises RuntimeError in mid-round."""
        if self.fold_remaining():
            raise RuntimeError(f"a fold is under way: {self.fold_remaining()} blocks are still to be taken")
        self.dirty.gathering ^= 1

    def fold_remaining(self) -> int:
        """Blocks of the round that have not been taken, or have come back."""
        return self.dirty.blocks[self.dirty.gathering ^ 1]

    def fold_take(self, uint32_t max_blocks) -> tuple:
        """(submission, block, done, attempts) of the round's next blocks, as they are now; for about 1 ms at most."""
        cdef uint64_t until = clock_ns() + 1_000_000
        cdef uint32_t node, slot = 0
        cdef Submission *s
        cdef list rows = []
        while <uint32_t>len(rows) < max_blocks and (clock_ns() < until or not rows):
            node = dirty_first(&self.dirty, &slot)
            if node == 0:
                break
            s = self.submissions[slot]
            rows.append(self.block_row(s, dirty_take(&self.dirty, s, node)))
            s.folding += 1
        return tuple(rows)

    def fold_committed(self, rows: tuple) -> None:
        """Rows that `fold_take` gave are in the file: an ended submission without any other can be forgotten."""
        cdef Submission *s
        for row in rows:
            s = self.find(row[0])
            if s != NULL and s.folding:
                s.folding -= 1
                self.free_if_over(s)

    def fold_failed(self, rows: tuple) -> None:
        """Rows that `fold_take` gave could not be stored: the round gives them again."""
        cdef Submission *s
        for row in rows:
            s = self.find(row[0])
            if s != NULL and s.folding:
                s.folding -= 1
                dirty_mark(&self.dirty, s, row[1], self.dirty.gathering ^ 1)

    cdef tuple block_row(self, Submission *s, uint32_t at):
        cdef Block *block = block_place(s, at)[0]
        cdef uint32_t size = (block_length(s, at) + 7) >> 3
        cdef uint32_t i
        cdef uint8_t packed[32]
        cdef uint8_t *end
        if block == block_done():
            return (s.id, at, b"", b"")
        if block == NULL:
            return (s.id, at, bytes(size), b"")
        attempts = bytearray()
        if block.attempts != NULL:
            for i in range(block.attempts.count):
                end = put_varint(packed, block.attempts.at[i].offset)
                end = put_varint(end, block.attempts.at[i].retries)
                end = put_varint(end, block.attempts.at[i].crashes)
                attempts += (<const char *>packed)[: end - packed]
        return (s.id, at, (<const char *>block.bits)[:size], bytes(attempts))

    # --- recovery (opsqueue.server.writer.batch.RecoverySink) ---

    def load_submissions(self, rows) -> None:
        """As RecoverySink says; ended ones stay until the blocks that the log touches are folded."""
        cdef Submission *s
        for submission, state, chunks_total, chunk_size, direct, metadata in rows:
            s = self.enter(submission, chunks_total, chunk_size, metadata, direct, state)
            if over(s):
                s.committed = True
                self.recovered_ended.append(s.id)
            else:
                self.touch(s)

    def load_blocks(self, rows) -> None:
        """As RecoverySink says. Raises ValueError naming the row that cannot be what was written."""
        for row in rows:
            try:
                self.load_block(row[0], row[1], row[3], row[4])
            except ValueError as error:
                raise ValueError(f"row ({row[0]}, {row[1]}): {error}") from None

    cdef int load_block(self, uint64_t submission, uint64_t place, bytes done, bytes attempts) except -1:
        cdef Submission *s = self.find(submission)
        cdef uint32_t at, count = 0
        cdef const uint8_t *read
        cdef const uint8_t *end
        cdef uint64_t offset = 0, retries = 0, crashes = 0
        cdef Attempt *attempt
        cdef LoadResult result
        if s == NULL:
            raise ValueError("there is no such submission")
        if place >= s.block_count:
            raise ValueError(f"the submission has {s.block_count} blocks")
        at = <uint32_t>place
        result = block_load(s, at, <const uint8_t *><const char *>done, <uint32_t>len(done), &count)
        if result == LOAD_TWICE:
            raise ValueError("it comes twice")
        if result == LOAD_SIZE or result == LOAD_BEYOND:
            raise ValueError(f"{len(done)} bytes, which are not the bits of {block_length(s, at)} chunks")
        if not over(s):
            take_off(self.counters, CHUNKS_BACKLOG, count)
            take_off(self.counters, OPERATIONS_BACKLOG, count * <uint64_t>s.chunk_size)
        read = <const uint8_t *><const char *>attempts
        end = read + len(attempts)
        while read < end:
            if not (
                get_varint(&read, end, &offset) and get_varint(&read, end, &retries) and get_varint(&read, end, &crashes)
            ) or offset >= block_length(s, at) or retries >> 32 or crashes >> 32:
                raise ValueError("the attempts are damaged")
            offset += <uint64_t>at << BLOCK_SHIFT
            if chunk_is_done(s, offset):
                continue
            attempt = attempt_made(s, offset)
            attempt.retries = <uint32_t>retries
            attempt.crashes = <uint32_t>crashes
            if retries >= self.max_retries and not over(s):
                self.doom(s, offset)
        if over(s):
            return 0
        if s.chunks_done == s.chunks_total:
            self.finish(s, STATE_COMPLETED, 0, None)
        else:
            self.touch(s)
        return 0

    def events(self, bytes events not None) -> None:
        """A log row. Raises ValueError if it is damaged; entries about submissions that are not here are passed over."""
        cdef const uint8_t *start = <const uint8_t *><const char *>events
        cdef const uint8_t *read = start
        cdef const uint8_t *end = start + len(events)
        cdef Event event = Event(0, 0, 0)
        cdef Submission *s = NULL
        cdef uint64_t last = 0
        cdef Replayed window[REPLAYED_TOGETHER]
        cdef uint32_t count = 0, i
        while read < end:
            if not event_read(&read, end, read == start, &event):
                raise ValueError(f"a log row of {len(events)} bytes is damaged before byte {read - start}")
            if s == NULL or event.submission != last:
                s = self.find(event.submission)
                last = event.submission
            if s == NULL:
                continue
            if event.chunk >= s.chunks_total:
                raise ValueError(
                    f"a log row names chunk {event.chunk} of submission {s.id}, which has {s.chunks_total} chunks"
                )
            window[count] = Replayed(s, event.chunk, event.kind)
            count += 1
            if count < REPLAYED_TOGETHER and read < end:
                continue
            fetch_together(window, count)
            for i in range(count):
                self.replay(window[i].submission, window[i].kind, window[i].chunk)
            count = 0
        for i in range(count):  # when the last ones are about submissions that are not here
            self.replay(window[i].submission, window[i].kind, window[i].chunk)

    cdef void replay(self, Submission *s, uint32_t kind, uint64_t chunk) noexcept:
        """Apply an entry; the journal leaves out those that the blocks contain."""
        cdef uint32_t at
        cdef Attempt *attempt
        dirty_mark(&self.dirty, s, <uint32_t>(chunk >> BLOCK_SHIFT), self.dirty.gathering)
        if chunk_is_done(s, chunk):
            return
        if kind == EVENT_COMPLETION:
            at = reservation_find(&self.reservations, s.slot, chunk)
            if at:
                wheel_clear(&self.wheel, at)
                reservation_remove(&self.reservations, at, &s.first_reservation)
            if over(s):
                finish_chunk(s, chunk, at != 0)
            else:
                self.chunk_finished(s, chunk, at != 0)
            return
        attempt = attempt_made(s, chunk)
        if kind == EVENT_CRASH:
            attempt.crashes += 1
            return
        attempt.retries += 1
        if attempt.retries >= self.max_retries and not over(s):
            if reservation_find(&self.reservations, s.slot, chunk) == 0:
                self.doom(s, chunk)
                self.touch(s)

# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""The writer's inner loop: drains the rings into the engine, parks requests, writes replies. Decides nothing itself.

Hot records (reserve, complete, fail, ...) are handled without a Python object; cold ones go to the Python loop.
"""

from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, realloc
from libc.string cimport memcpy, memset

from collections import deque

from opsqueue._speedups.bits cimport must
from opsqueue._speedups.board cimport Board
from opsqueue._speedups.counters cimport (
    HISTOGRAM_COMPLETE_MESSAGE,
    HISTOGRAM_FAIL_MESSAGE,
    RECORDS_RECEIVED,
    RECORDS_SENT,
    REQUESTS_PARKED,
    RESERVATIONS_FAILED,
    RESERVATIONS_SUCCEEDED,
    observe,
)
from opsqueue._speedups.engine cimport COUNTED, Engine
from opsqueue._speedups.orders cimport Orders
from opsqueue._speedups.records cimport (
    CHUNK_HAS_OUTPUT,
    CLOSE_LOST,
    CREDIT_ADD,
    CREDIT_OPEN,
    CREDIT_WITHDRAW,
    MAX_REPORTED,
    REC_CLOSE,
    REC_COMPLETE,
    REC_CREDIT,
    REC_DROPPED,
    REC_EXTEND,
    REC_FAIL,
    REC_FAIL_SUBMISSION,
    REC_OPEN,
    REC_REFUSED,
    REC_RELEASE,
    REC_REPLY,
    REC_REPORT,
    REC_REQUEST,
    REC_RESERVE,
    REC_RESERVED,
    REC_RETRY_LATER,
    REC_WITHDRAWN,
    REC_WORKING_ON,
    RESERVED_ON_CREDIT,
    RUN_FAILED,
    RUN_HAS_OUTPUT,
    ChunkRecord,
    CloseRecord,
    CreditRecord,
    DroppedRecord,
    OpenRecord,
    RefusedRecord,
    ReportRecord,
    ReportRun,
    RequestRecord,
    ReservedChunk,
    ReservedRecord,
    ReserveRecord,
    WithdrawnRecord,
)
from opsqueue._speedups.ring cimport CONNECTED, PEER_RESTARTED, Endpoint

cdef extern from "time.h" nogil:
    ctypedef long time_t
    struct timespec:
        time_t tv_sec
        long tv_nsec
    int clock_gettime(int clock, timespec *now)
    enum: CLOCK_MONOTONIC

cdef enum:
    MAX_CHUNKS = 4096             # of one reply (WIRE section 4)
    CREDIT_SLICE = 64             # chunks that a credit is given before the next waiter has its turn
    PUBLISH_CHUNKS = 128          # reserved chunks after which replies become visible before the end of a turn
    CHUNKS_A_RECORD = 16          # reported chunks that count as one record of a turn
    NO_WAITER = 0xFFFFFFFF
    FRONTEND_SHIFT = 56           # of a holder
    MAX_SLOTS = 1 << 22           # connections of one front-end; a larger slot is a damaged record
    RECORDS_A_TURN = 512          # of one front-end, so that none starves the others
    WAITERS_A_TURN = 4096         # waiters looked at in one call, so that timers and commits are not delayed

cdef uint64_t CONNECTION_MASK = (<uint64_t>1 << FRONTEND_SHIFT) - 1
cdef uint32_t LARGEST_REPLY = sizeof(ReservedRecord) + MAX_CHUNKS * sizeof(ReservedChunk)


cdef inline uint64_t monotonic_ns() noexcept nogil:
    cdef timespec now
    clock_gettime(CLOCK_MONOTONIC, &now)
    return <uint64_t>now.tv_sec * 1000000000 + <uint64_t>now.tv_nsec


cdef void leave_all(dict lines, list places, uint32_t number):
    """Take a line out of each of these places; one without any line goes."""
    for place in places:
        waiting = lines.get(place)
        if waiting is not None:
            waiting.pop(number, None)
            if not waiting:
                del lines[place]


cdef class Dispatch:
    """Joins the engine to one endpoint per front-end.

    `on_request(frontend, incarnation, request, payload)` takes each cold request; `on_output(submission, chunk, output)`
    takes the output of a direct chunk whose completion counted. Neither may raise.
    """

    def __cinit__(self, Engine engine not None, endpoints, Board board not None, int slot, on_request, on_output):
        cdef uint32_t index
        self.engine = engine
        self.endpoints = list(endpoints)
        self.frontend_count = <uint32_t>len(self.endpoints)
        self.frontends = <Frontend *>calloc(max(self.frontend_count, 1), sizeof(Frontend))
        self.reserved = <ReservedChunk *>calloc(MAX_CHUNKS, sizeof(ReservedChunk))
        if self.frontends == NULL or self.reserved == NULL:
            raise MemoryError("no memory for the dispatch tables")
        for endpoint in self.endpoints:
            if (<Endpoint>endpoint).outgoing.largest < LARGEST_REPLY:
                raise ValueError(
                    f"a ring takes records of {(<Endpoint>endpoint).outgoing.largest} bytes, a reply has up to {LARGEST_REPLY}"
                )
        self.free_waiter = NO_WAITER
        self.selecting = {}
        self.limited = {}
        self.waiting_for_room = [[] for _ in self.endpoints]
        self.on_request = on_request
        self.on_output = on_output
        self.overflow = [deque() for _ in self.endpoints]
        self.bad_frontends = []
        self.board = board
        self.counters = board.counters(slot)

    def __dealloc__(self):
        cdef uint32_t index
        if self.frontends != NULL:
            for index in range(self.frontend_count):
                free(self.frontends[index].holders)
        free(self.frontends)
        free(self.waiters)
        free(self.lines)
        free(self.awake_lines)
        free(self.general_lines)
        free(self.reserved)

    # --- one turn of the loop ---

    cpdef bint turn(self) except -1:
        """Take what the front-ends sent (a bounded number of records each); True: there may be more at once."""
        cdef uint32_t step, index
        cdef bint more = False
        cdef uint32_t first = self.first_turn
        self.first_turn = first + 1 if first + 1 < self.frontend_count else 0
        for step in range(self.frontend_count):
            index = first + step
            if index >= self.frontend_count:
                index -= self.frontend_count
            more |= self.drain(index, RECORDS_A_TURN)
        return more

    cpdef int serve(self) except -1:
        """Send notices, answer parked requests with what has become available, make everything visible."""
        if self.engine.notice_count:
            # First: a holder that has lost a chunk may be given the same one again below, and must hear of it in this order.
            self.send_notices()
        self.more_waiters = False
        if self.parked:
            self.serve_waiters()
        elif self.engine.orders.starving:
            self.engine.orders.now_ms = self.engine.now_ms
            self.engine.orders.take_waking()  # nobody waits for them any more
        self.publish()
        return 0

    cdef void publish(self):
        """Make what was written visible to the front-ends."""
        cdef Endpoint endpoint
        for endpoint in self.endpoints:
            endpoint.flush()
        self.unpublished = 0

    def has_changes(self) -> bool:
        """The engine has events or ended submissions that no batch has taken."""
        return self.engine.has_changes()

    def take_events(self) -> bytes:
        """The packed log row of what changed since the last call."""
        return self.engine.take_events()

    def take_ended(self) -> list:
        """(submission, state, chunks_done, failed_chunk, failure) of those that completed or failed since the last call."""
        return self.engine.take_ended()

    cdef bint prepare_to_sleep(self):
        """Ask all front-ends for signals; False: there is something to do."""
        cdef Endpoint endpoint
        cdef uint32_t index = 0
        if self.more_waiters:
            return False
        for endpoint in self.endpoints:
            if endpoint.incoming.header.consumer_seen != endpoint.incoming.header.producer_epoch:
                return False
            if not self.frontends[index].bad and self.has_room(index):
                if not endpoint.incoming.sleep():
                    return False
            elif endpoint.outgoing.wait_for_room(LARGEST_REPLY) and not self.frontends[index].bad:
                return False
            index += 1
        return True

    cdef void awake(self):
        """No signals needed: the loop runs."""
        cdef Endpoint endpoint
        for endpoint in self.endpoints:
            endpoint.incoming.wake()

    cdef bint drain(self, uint32_t index, uint32_t limit):
        """True: more is there, or may come at once."""
        cdef Endpoint endpoint = <Endpoint>self.endpoints[index]
        cdef Frontend *frontend = &self.frontends[index]
        cdef uint32_t kind, size, taken = 0
        cdef uint8_t *payload
        cdef int got = 0
        if endpoint.poll_epochs() & PEER_RESTARTED:
            self.forget_frontend(index)
        if frontend.bad:
            return False
        while taken < limit:
            # A reply must never wait for room: what could make one is not taken before there is room for the largest.
            if not self.has_room(index):
                break
            got = endpoint.receive(&kind, &payload, &size)
            if got <= 0:
                break
            taken += 1
            if not self.handle(index, kind, payload, size):
                got = -1
                break
            if self.chunks_reported >= CHUNKS_A_RECORD:
                limit -= min(limit - taken, self.chunks_reported // CHUNKS_A_RECORD)
            self.chunks_reported = 0
            if self.unpublished >= PUBLISH_CHUNKS:
                # The front-ends work on these meanwhile.
                self.publish()
        if got < 0:
            frontend.bad = True
            self.bad_frontends.append(index)
            return False
        self.counters[<int>RECORDS_RECEIVED] += taken
        # Also when no record was whole: the rest of one larger than the ring needs the room of its first parts.
        endpoint.done_receiving()
        return taken == limit

    cdef bint has_room(self, uint32_t index) noexcept:
        if not (<Endpoint>self.endpoints[index]).outgoing.has_room(LARGEST_REPLY) or self.frontends[index].notices_kept:
            return False
        return not self.overflow[index] or self.send_overflow(index)

    # --- records ---

    cdef bint handle(self, uint32_t index, uint32_t kind, uint8_t *payload, uint32_t size):
        """False: the record is not valid, the front-end's ring cannot be trusted."""
        cdef uint64_t side = <uint64_t>index << FRONTEND_SHIFT
        cdef ReserveRecord *reserve
        cdef ChunkRecord *chunk
        cdef CreditRecord *credit
        cdef OpenRecord *opened
        cdef CloseRecord *closed
        if kind == REC_RESERVE:
            reserve = <ReserveRecord *>payload
            if size < sizeof(ReserveRecord) or reserve.strategy_size != size - sizeof(ReserveRecord):
                return False
            if reserve.connection & 0xFFFFFFFF >= MAX_SLOTS:
                return False
            self.handle_reserve(<Endpoint>self.endpoints[index], side | (reserve.connection & CONNECTION_MASK), reserve)
        elif REC_COMPLETE <= kind <= REC_FAIL_SUBMISSION:
            chunk = <ChunkRecord *>payload
            if size < sizeof(ChunkRecord) or chunk.tail_size != size - sizeof(ChunkRecord):
                return False
            self.handle_chunk(kind, side | (chunk.connection & CONNECTION_MASK), chunk)
        elif kind == REC_REPORT:
            if size < sizeof(ReportRecord):
                return False
            return self.handle_report(
                side | ((<ReportRecord *>payload).connection & CONNECTION_MASK), <ReportRecord *>payload, size
            )
        elif kind == REC_CREDIT:
            credit = <CreditRecord *>payload
            if size < sizeof(CreditRecord) or credit.strategy_size != size - sizeof(CreditRecord):
                return False
            if credit.connection & 0xFFFFFFFF >= MAX_SLOTS:
                return False
            self.handle_credit(<Endpoint>self.endpoints[index], side | (credit.connection & CONNECTION_MASK), credit)
        elif kind == REC_OPEN:
            opened = <OpenRecord *>payload
            if size != sizeof(OpenRecord) or opened.connection & 0xFFFFFFFF >= MAX_SLOTS:
                return False
            self.holder_slot(side | (opened.connection & CONNECTION_MASK)).holder = (
                side | (opened.connection & CONNECTION_MASK)
            )
            self.engine.open_holder(side | (opened.connection & CONNECTION_MASK), opened.features)
        elif kind == REC_CLOSE:
            closed = <CloseRecord *>payload
            if size != sizeof(CloseRecord) or closed.connection & 0xFFFFFFFF >= MAX_SLOTS:
                return False
            self.close(side | (closed.connection & CONNECTION_MASK), closed.cause == CLOSE_LOST)
        elif kind == REC_REQUEST:
            if size < sizeof(RequestRecord):
                return False
            self.asked = True
            self.on_request(
                index,
                self.frontends[index].incarnation,
                (<RequestRecord *>payload).request,
                <bytes>payload[sizeof(RequestRecord):size],
            )
        else:
            return False
        return True

    cdef void handle_reserve(self, Endpoint endpoint, uint64_t holder, ReserveRecord *record):
        cdef int strategy
        if self.holder_slot(holder).holder != holder:
            return  # closed meanwhile
        strategy = self.engine.strategy(<const uint8_t *>record + sizeof(ReserveRecord), record.strategy_size)
        if strategy < 0:
            self.refuse(endpoint, holder, record.nonce, 0)
            return
        if self.parked:
            self.serve_waiters()  # who came first is served first
        if not self.has_room(<uint32_t>(holder >> FRONTEND_SHIFT)):
            self.park(holder, record.nonce, record.max, strategy, False)
            self.wake_strategy(strategy)
        elif not self.answer(endpoint, holder, record.nonce, record.max, strategy, 0):
            self.park(holder, record.nonce, record.max, strategy, False)

    cdef void refuse(self, Endpoint endpoint, uint64_t holder, uint64_t nonce, uint32_t flags):
        """Say why the engine does not know the strategy."""
        cdef RefusedRecord *refused
        cdef uint8_t *at
        cdef const char *text
        reason = (<str>self.engine.orders.refusal).encode()[:1024]
        at = endpoint.outgoing.reserve(REC_REFUSED, <uint32_t>(sizeof(RefusedRecord) + len(reason)))
        refused = <RefusedRecord *>at
        refused.connection = holder & CONNECTION_MASK
        refused.nonce = nonce
        refused.size = <uint32_t>len(reason)
        refused.flags = flags
        text = reason
        memcpy(at + sizeof(RefusedRecord), text, refused.size)
        self.counters[<int>RESERVATIONS_FAILED] += 1

    cdef void handle_credit(self, Endpoint endpoint, uint64_t holder, CreditRecord *record):
        cdef WithdrawnRecord *withdrawn
        cdef uint32_t at
        cdef int strategy
        if self.holder_slot(holder).holder != holder:
            return
        if record.action == CREDIT_OPEN:
            strategy = self.engine.strategy(<const uint8_t *>record + sizeof(CreditRecord), record.strategy_size)
            if strategy < 0:
                self.refuse(endpoint, holder, record.nonce, RESERVED_ON_CREDIT)
                return
            self.park(holder, record.nonce, record.chunks, strategy, True)
            self.wake_strategy(strategy)
        else:
            at = self.find_credit(holder, record.nonce)
            if at == NO_WAITER:
                return  # refused
            if record.action == CREDIT_ADD:
                if record.chunks and self.waiters[at].max == 0:
                    self.queue(at)
                    self.wake_strategy(self.waiters[at].strategy)
                self.waiters[at].max += record.chunks
            elif record.action == CREDIT_WITHDRAW:
                withdrawn = <WithdrawnRecord *>endpoint.outgoing.reserve(REC_WITHDRAWN, sizeof(WithdrawnRecord))
                withdrawn.connection = holder & CONNECTION_MASK
                withdrawn.nonce = record.nonce
                withdrawn.left = self.waiters[at].max
                withdrawn._reserved = 0
                self.counters[<int>RECORDS_SENT] += 1
                self.unpark(at)
        if self.parked:
            self.serve_waiters()

    cdef bint handle_report(self, uint64_t holder, ReportRecord *record, uint32_t size):
        """False: the record is not valid."""
        cdef const ReportRun *run = <const ReportRun *>(<const uint8_t *>record + sizeof(ReportRecord))
        cdef const ReportRun *end = run + record.runs
        cdef const uint8_t *tails = <const uint8_t *>end
        cdef uint64_t fixed = sizeof(ReportRecord) + <uint64_t>record.runs * sizeof(ReportRun)
        cdef uint64_t chunk, begun
        cdef uint32_t chunks = 0, done = 0, i
        cdef int verdict
        if fixed > size or record.chunks > MAX_REPORTED or record.runs > record.chunks:
            return False
        self.chunks_reported += record.chunks
        while run < end:
            chunks += run.count
            if run.count > MAX_REPORTED or chunks > record.chunks:
                return False
            if <uint64_t>run.tail_at + run.tail_size > size - fixed:
                return False
            for i in range(run.count):
                chunk = run.first + i
                if run.flags == RUN_FAILED:
                    begun = monotonic_ns()
                    self.engine.fail(holder, run.submission, chunk, tails + run.tail_at, run.tail_size)
                    observe(self.counters, HISTOGRAM_FAIL_MESSAGE, monotonic_ns() - begun)
                    continue
                # Timing every one would cost more than it does: the first of a report stands for all.
                begun = monotonic_ns() if done == 0 else 0
                verdict = self.engine.complete(holder, run.submission, chunk)
                done += 1
                if begun:
                    observe(self.counters, HISTOGRAM_COMPLETE_MESSAGE, monotonic_ns() - begun)
                if verdict == COUNTED and run.flags == RUN_HAS_OUTPUT:
                    self.on_output(run.submission, chunk, <bytes>tails[run.tail_at:run.tail_at + run.tail_size])
            run += 1
        return True

    cdef uint32_t answer(self, Endpoint endpoint, uint64_t holder, uint64_t nonce, uint32_t max, int strategy,
                         uint32_t flags) noexcept:
        """Reserve and reply; how many, 0: nothing to reserve now. There is room for the reply."""
        cdef uint32_t count
        cdef uint8_t *at
        cdef ReservedRecord *record
        if max > MAX_CHUNKS:
            max = MAX_CHUNKS
        count = self.engine.reserve(holder, strategy, max, self.reserved)
        if count == 0:
            return 0
        at = endpoint.outgoing.reserve(REC_RESERVED, <uint32_t>(sizeof(ReservedRecord) + count * sizeof(ReservedChunk)))
        record = <ReservedRecord *>at
        record.connection = holder & CONNECTION_MASK
        record.nonce = nonce
        record.count = count
        record.flags = flags
        memcpy(at + sizeof(ReservedRecord), self.reserved, count * sizeof(ReservedChunk))
        self.counters[<int>RESERVATIONS_SUCCEEDED] += 1
        self.counters[<int>RECORDS_SENT] += 1
        self.unpublished += count
        return count

    cdef void handle_chunk(self, uint32_t kind, uint64_t holder, ChunkRecord *record):
        cdef const uint8_t *tail = <const uint8_t *>record + sizeof(ChunkRecord)
        cdef uint64_t begun
        cdef int verdict
        if kind == REC_COMPLETE:
            # Timing every one would cost more than it does.
            begun = monotonic_ns() if self.counters[<int>RECORDS_RECEIVED] & 15 == 0 else 0
            verdict = self.engine.complete(holder, record.submission, record.chunk)
            if begun:
                observe(self.counters, HISTOGRAM_COMPLETE_MESSAGE, monotonic_ns() - begun)
            if verdict == COUNTED and record.flags & CHUNK_HAS_OUTPUT:
                self.on_output(record.submission, record.chunk, <bytes>tail[:record.tail_size])
        elif kind == REC_FAIL:
            begun = monotonic_ns()
            self.engine.fail(holder, record.submission, record.chunk, tail, record.tail_size)
            observe(self.counters, HISTOGRAM_FAIL_MESSAGE, monotonic_ns() - begun)
        elif kind == REC_WORKING_ON:
            self.engine.working_on(holder, record.submission, record.chunk)
        elif kind == REC_RELEASE:
            self.engine.release(holder, record.submission, record.chunk)
        elif kind == REC_EXTEND:
            self.engine.extend(holder, record.submission, record.chunk)
        elif kind == REC_RETRY_LATER:
            self.engine.retry_later(holder, record.submission, record.chunk, record.argument)
        else:
            self.engine.fail_submission(holder, record.submission, record.chunk, tail, record.tail_size)

    # --- waiters ---

    cdef HolderSlot *holder_slot(self, uint64_t holder) except NULL:
        cdef Frontend *frontend = &self.frontends[holder >> FRONTEND_SHIFT]
        cdef uint32_t slot = <uint32_t>holder
        cdef uint32_t capacity = frontend.holder_capacity
        cdef HolderSlot *grown
        if slot >= capacity:
            capacity = capacity * 2 if capacity else 64
            while capacity <= slot:
                capacity *= 2
            grown = <HolderSlot *>realloc(frontend.holders, capacity * sizeof(HolderSlot))
            if grown == NULL:
                raise MemoryError(f"no memory for {capacity} connections")
            memset(grown + frontend.holder_capacity, 0, (capacity - frontend.holder_capacity) * sizeof(HolderSlot))
            for at in range(frontend.holder_capacity, capacity):
                grown[at].first_waiter = NO_WAITER
            frontend.holders = grown
            frontend.holder_capacity = capacity
        return &frontend.holders[slot]

    cdef int park(self, uint64_t holder, uint64_t nonce, uint32_t max, int strategy, bint is_credit) except -1:
        cdef HolderSlot *slot = self.holder_slot(holder)
        cdef uint32_t at, capacity
        cdef Waiter *grown
        cdef Waiter *waiter
        if self.free_waiter == NO_WAITER:
            capacity = self.waiter_capacity * 2 if self.waiter_capacity else 256
            grown = <Waiter *>realloc(self.waiters, capacity * sizeof(Waiter))
            if grown == NULL:
                raise MemoryError(f"no memory for {capacity} parked requests")
            self.waiters = grown
            for at in range(self.waiter_capacity, capacity):
                grown[at].next = at + 1 if at + 1 < capacity else NO_WAITER
            self.free_waiter = self.waiter_capacity
            self.waiter_capacity = capacity
        at = self.free_waiter
        waiter = &self.waiters[at]
        self.free_waiter = waiter.next
        waiter.holder = holder
        waiter.nonce = nonce
        waiter.max = max
        waiter.strategy = strategy
        waiter.is_credit = is_credit
        self.engine.orders.hold(strategy, 1)
        if max or not is_credit:
            self.queue(at)
        waiter.holder_previous = NO_WAITER
        waiter.holder_next = slot.first_waiter
        if slot.first_waiter != NO_WAITER:
            self.waiters[slot.first_waiter].holder_previous = at
        slot.first_waiter = at
        return 0

    cdef void queue(self, uint32_t at):
        """To the end of its line: whoever has come before is served before."""
        cdef Waiter *waiter = &self.waiters[at]
        cdef uint32_t number = self.line_of(waiter)
        cdef Line *line = &self.lines[number]
        waiter.arrival = self.arrivals
        self.arrivals += 1
        waiter.previous = line.last
        waiter.next = NO_WAITER
        if line.last == NO_WAITER:
            line.first = line.last = at
            self.opened(number)
        else:
            self.waiters[line.last].next = at
            line.last = at
        self.parked += 1
        self.counters[<int>REQUESTS_PARKED] = self.parked

    cdef void unqueue(self, uint32_t at):
        cdef Waiter *waiter = &self.waiters[at]
        cdef uint32_t number = self.line_of(waiter)
        cdef Line *line = &self.lines[number]
        if waiter.next == NO_WAITER:
            line.last = waiter.previous
        else:
            self.waiters[waiter.next].previous = waiter.previous
        if waiter.previous != NO_WAITER:
            self.waiters[waiter.previous].next = waiter.next
        else:
            line.first = waiter.next
            if line.first == NO_WAITER:
                self.closed(number)
            elif line.awake:
                self.settle(line.awake)
        self.parked -= 1
        self.counters[<int>REQUESTS_PARKED] = self.parked

    # --- lines: the waiters that get the same answer at the same time ---

    cdef uint32_t line_of(self, Waiter *waiter) except 0xFFFFFFFF:
        cdef uint32_t number = <uint32_t>waiter.strategy * self.frontend_count + <uint32_t>(waiter.holder >> FRONTEND_SHIFT)
        cdef uint32_t count = self.line_count if self.line_count else 64
        cdef uint32_t at
        if number < self.line_count:
            return number
        while count <= number:
            count *= 2
        self.lines = <Line *>must(realloc(self.lines, count * sizeof(Line)))
        self.awake_lines = <uint32_t *>must(realloc(self.awake_lines, (count + 1) * sizeof(uint32_t)))
        self.general_lines = <uint32_t *>must(realloc(self.general_lines, (count + 1) * sizeof(uint32_t)))
        for at in range(self.line_count, count):
            self.lines[at] = Line(NO_WAITER, NO_WAITER, 0, 0, False)
        self.line_count = count
        return number

    cdef void opened(self, uint32_t number):
        """Somebody waits in it now: note which chunks it is about."""
        cdef int strategy = <int>(number // self.frontend_count)
        selections = self.engine.orders.selections(strategy)
        limits = self.engine.orders.limits(strategy)
        if limits:
            self.engine.orders.limits_waited += 1
            for limit in limits:
                self.limited.setdefault(limit, {})[number] = None
        if selections is None:
            self.general_count += 1
            self.general_lines[self.general_count] = number
            self.lines[number].general = self.general_count
            return
        for selection in selections:
            self.selecting.setdefault(selection, {})[number] = None

    cdef void closed(self, uint32_t number):
        """Nobody waits in it any more."""
        cdef int strategy = <int>(number // self.frontend_count)
        cdef uint32_t place = self.lines[number].general
        cdef uint32_t moved
        self.sleep(number)
        if place:
            moved = self.general_lines[self.general_count]
            self.general_lines[place] = moved
            self.lines[moved].general = place
            self.lines[number].general = 0
            self.general_count -= 1
        else:
            leave_all(self.selecting, self.engine.orders.selections(strategy), number)
        limits = self.engine.orders.limits(strategy)
        if limits:
            self.engine.orders.limits_waited -= 1
            leave_all(self.limited, limits, number)

    cdef void settle(self, uint32_t place) noexcept:
        """Move a line of the heap to where its first waiter's arrival says."""
        cdef uint32_t *heap = self.awake_lines
        cdef uint32_t number = heap[place]
        cdef uint64_t arrival = self.waiters[self.lines[number].first].arrival
        cdef uint32_t child
        while place > 1 and self.waiters[self.lines[heap[place >> 1]].first].arrival > arrival:
            heap[place] = heap[place >> 1]
            self.lines[heap[place]].awake = place
            place >>= 1
        while place * 2 <= self.awake_count:
            child = place * 2
            if child < self.awake_count and (
                self.waiters[self.lines[heap[child + 1]].first].arrival < self.waiters[self.lines[heap[child]].first].arrival
            ):
                child += 1
            if self.waiters[self.lines[heap[child]].first].arrival >= arrival:
                break
            heap[place] = heap[child]
            self.lines[heap[place]].awake = place
            place = child
        heap[place] = number
        self.lines[number].awake = place

    cdef void wake(self, uint32_t number) noexcept:
        cdef uint32_t index = number % self.frontend_count
        if self.lines[number].awake or self.lines[number].first == NO_WAITER:
            return
        if self.frontends[index].full:
            if not self.lines[number].waits_for_room:
                self.lines[number].waits_for_room = True
                (<list>self.waiting_for_room[index]).append(number)
            return
        self.awake_count += 1
        self.awake_lines[self.awake_count] = number
        self.settle(self.awake_count)

    cdef void sleep(self, uint32_t number) noexcept:
        cdef uint32_t place = self.lines[number].awake
        cdef uint32_t last
        if place == 0:
            return
        self.lines[number].awake = 0
        last = self.awake_lines[self.awake_count]
        self.awake_count -= 1
        if last != number:
            self.awake_lines[place] = last
            self.settle(place)

    cdef void wake_strategy(self, int strategy) noexcept:
        cdef uint32_t index
        for index in range(self.frontend_count):
            if <uint32_t>strategy * self.frontend_count + index < self.line_count:
                self.wake(<uint32_t>strategy * self.frontend_count + index)

    cdef void wake_concerned(self):
        """The lines that what has happened since the last call may concern."""
        cdef uint32_t place
        cdef list found
        cdef Orders orders = self.engine.orders
        orders.now_ms = self.engine.now_ms
        if orders.starving or orders.waking:
            for strategy in orders.take_waking():
                self.wake_strategy(strategy)
        if orders.fallen or orders.all_fallen:
            found = []
            if orders.take_fallen(found):
                found = list(self.limited)
            for limit in found:
                for number in self.limited.get(limit, ()):
                    self.wake(number)
        if self.seen_epoch == orders.epoch:
            return
        self.seen_epoch = orders.epoch
        for place in range(1, self.general_count + 1):
            self.wake(self.general_lines[place])
        if not self.selecting:
            orders.take_woken([])
            return
        found = []
        if orders.take_woken(found):
            found = list(self.selecting)
        for selection in found:
            for number in self.selecting.get(selection, ()):
                self.wake(number)

    cdef uint32_t find_credit(self, uint64_t holder, uint64_t nonce) noexcept:
        cdef uint32_t at = self.holder_slot(holder).first_waiter
        while at != NO_WAITER and not (self.waiters[at].is_credit and self.waiters[at].nonce == nonce):
            at = self.waiters[at].holder_next
        return at

    cdef void unpark(self, uint32_t at):
        cdef Waiter *waiter = &self.waiters[at]
        cdef Frontend *frontend = &self.frontends[waiter.holder >> FRONTEND_SHIFT]
        if waiter.max or not waiter.is_credit:
            self.unqueue(at)
        self.engine.orders.hold(waiter.strategy, -1)
        if waiter.holder_previous == NO_WAITER:
            frontend.holders[<uint32_t>waiter.holder].first_waiter = waiter.holder_next
        else:
            self.waiters[waiter.holder_previous].holder_next = waiter.holder_next
        if waiter.holder_next != NO_WAITER:
            self.waiters[waiter.holder_next].holder_previous = waiter.holder_previous
        waiter.next = self.free_waiter
        self.free_waiter = at

    cdef void serve_waiters(self):
        """Oldest first over all lines that may get something and whose front-end has room.

        A line whose first waiter gets nothing sleeps until a chunk comes that may concern it.
        """
        cdef uint32_t number, at, given
        cdef uint32_t looked = 0
        cdef uint32_t index
        cdef Waiter *waiter
        for index in range(self.frontend_count):
            if self.frontends[index].full and self.has_room(index):
                self.frontends[index].full = False
                returned = self.waiting_for_room[index]
                self.waiting_for_room[index] = []
                for line in returned:
                    self.lines[<uint32_t>line].waits_for_room = False
                    self.wake(line)
        self.wake_concerned()
        while self.awake_count and looked < WAITERS_A_TURN:
            number = self.awake_lines[1]
            index = number % self.frontend_count
            if not self.has_room(index):
                # Each of its lines comes here once, then it costs nothing until there is room.
                self.frontends[index].full = True
                self.sleep(number)
                self.wake(number)
                continue
            looked += 1
            at = self.lines[number].first
            waiter = &self.waiters[at]
            given = self.answer(
                <Endpoint>self.endpoints[index],
                waiter.holder,
                waiter.nonce,
                min(waiter.max, <uint32_t>CREDIT_SLICE) if waiter.is_credit else waiter.max,
                waiter.strategy,
                RESERVED_ON_CREDIT if waiter.is_credit else 0,
            )
            if given == 0:
                self.sleep(number)
                continue
            if not waiter.is_credit:
                self.unpark(at)
                continue
            self.unqueue(at)
            waiter.max -= given
            if waiter.max:
                self.queue(at)  # behind whoever waits now
                self.wake(number)
        self.more_waiters = looked == WAITERS_A_TURN and self.awake_count > 0

    # --- connections and front-ends that end ---

    cdef void close(self, uint64_t holder, bint lost):
        cdef HolderSlot *slot = self.holder_slot(holder)
        if slot.holder != holder:
            return
        while slot.first_waiter != NO_WAITER:
            self.unpark(slot.first_waiter)
        slot.holder = 0
        self.engine.close_holder(holder, lost)

    cdef void forget_frontend(self, uint32_t index):
        """A new process took the front-end's place: what its predecessor's connections held and asked is void."""
        cdef Frontend *frontend = &self.frontends[index]
        cdef uint32_t at
        cdef uint32_t kept = 0
        for at in range(self.engine.notice_count):
            if self.engine.notices[at].connection >> FRONTEND_SHIFT != index:
                self.engine.notices[kept] = self.engine.notices[at]
                kept += 1
        self.engine.notice_count = kept
        frontend.notices_kept = False
        for at in range(frontend.holder_capacity):
            while frontend.holders[at].first_waiter != NO_WAITER:
                self.unpark(frontend.holders[at].first_waiter)
        if frontend.holder_capacity:
            memset(frontend.holders, 0, frontend.holder_capacity * sizeof(HolderSlot))
            for at in range(frontend.holder_capacity):
                frontend.holders[at].first_waiter = NO_WAITER
        self.engine.close_holders_of(index)
        self.overflow[index].clear()
        frontend.incarnation += 1
        frontend.bad = False

    # --- notices and replies ---

    cdef bint send_notices(self) noexcept:
        """Send what finds room; keep the rest in order."""
        cdef uint32_t at, kept = 0, index
        cdef DroppedRecord *notice
        cdef uint8_t *room
        for index in range(self.frontend_count):
            self.frontends[index].notices_kept = False
        for at in range(self.engine.notice_count):
            notice = &self.engine.notices[at]
            index = <uint32_t>(notice.connection >> FRONTEND_SHIFT)
            room = NULL
            if not self.frontends[index].notices_kept:
                room = (<Endpoint>self.endpoints[index]).outgoing.reserve(REC_DROPPED, sizeof(DroppedRecord))
            if room == NULL:
                self.engine.notices[kept] = notice[0]
                self.frontends[index].notices_kept = True
                kept += 1
                continue
            memcpy(room, notice, sizeof(DroppedRecord))
            (<DroppedRecord *>room).connection = notice.connection & CONNECTION_MASK
            self.counters[<int>RECORDS_SENT] += 1
        self.engine.notice_count = kept
        return kept == 0

    def reply(self, uint32_t index, uint32_t incarnation, uint64_t request, bytes payload not None) -> None:
        """Answer a cold request; void when its front-end has restarted since."""
        if self.frontends[index].incarnation != incarnation:
            return
        self.overflow[index].append((request, payload))
        self.send_overflow(index)

    cdef bint send_overflow(self, uint32_t index):
        """Replies that wait for room, oldest first; True: none is left."""
        cdef Endpoint endpoint = <Endpoint>self.endpoints[index]
        cdef uint8_t *at
        cdef const char *content
        cdef uint64_t request
        waiting = self.overflow[index]
        while waiting:
            request, payload = waiting[0]
            at = endpoint.outgoing.reserve(REC_REPLY, <uint32_t>(sizeof(RequestRecord) + len(<bytes>payload)))
            if at == NULL:
                return False
            (<RequestRecord *>at).request = request
            content = <bytes>payload
            memcpy(at + sizeof(RequestRecord), content, len(<bytes>payload))
            waiting.popleft()
            self.counters[<int>RECORDS_SENT] += 1
        return True

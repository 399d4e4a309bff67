# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""Compact messages of consumers' connections. See compact.pxd for what is here and what is not."""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_GET_SIZE
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memcpy

from opsqueue._speedups.buffers cimport Bytes, append, discard, ensure
from opsqueue._speedups.cbor cimport CBOR_NULL, MAJOR_ARRAY, MAJOR_BYTES, write_head
from opsqueue._speedups.descriptions cimport Description, DescriptionCache
from opsqueue._speedups.packed cimport RUN_BYTES, Report, put_number, put_run, scan_report
from opsqueue._speedups.records cimport (
    CHUNK_IS_DIRECT,
    CREDIT_ADD,
    CREDIT_OPEN,
    CREDIT_WITHDRAW,
    MAX_REPORTED,
    REC_CREDIT,
    CreditRecord,
    ReportRecord,
    ReportRun,
    ReservedChunk,
)
from opsqueue._speedups.replies cimport put, put_unsigned
from opsqueue._speedups.ring cimport Ring

cdef enum:
    GROUP_HEADS = 64              # bytes of a group beside its description and its strings
    CHUNK_BYTES = 48              # the most that a chunk adds beside its input: a run, its retries, a head
    KEPT_BYTES = 64 * 1024        # a larger buffer is not kept

#: Descriptions that a peer remembers of those that it was sent.
REMEMBERED_DESCRIPTIONS = RECENT
#: Credits that a connection may have open, and chunks that one may grant.
CREDITS_LIMIT = MAX_CREDITS
CREDIT_LIMIT = MAX_CREDIT
#: Chunks of a credit that the writer may use ahead of what has been written to its peer.
CREDIT_WINDOW = WINDOW
#: Chunks that one ReportChunks may name.
REPORT_LIMIT = MAX_REPORTED


cdef class CompactPeer:
    """What a connection with the feature compact remembers."""

    def __dealloc__(self):
        cdef uint32_t i
        for i in range(self.credit_count):
            free(self.credits[i].strategy)

    # --- descriptions ---

    cdef bint remembers(self, uint64_t submission) noexcept nogil:
        cdef uint32_t i
        for i in range(self.recent_count):
            if self.recent[i] == submission:
                return True
        return False

    cdef void remember(self, uint64_t submission) noexcept nogil:
        """Its description is being sent; the peer forgets the one that was sent `RECENT` descriptions before."""
        self.recent[self.recent_at] = submission
        self.recent_at = (self.recent_at + 1) % RECENT
        if self.recent_count < RECENT:
            self.recent_count += 1

    # --- credits ---

    cdef Credit *find(self, uint64_t nonce) noexcept nogil:
        cdef uint32_t i
        for i in range(self.credit_count):
            if self.credits[i].nonce == nonce:
                return &self.credits[i]
        return NULL

    cdef const char *open(self, uint64_t nonce, uint64_t chunks, const uint8_t *strategy, uint32_t size):
        """NULL, or why the peer is at fault."""
        cdef Credit *credit
        if chunks > MAX_CREDIT:
            return b"a credit may have 65536 chunks that are not used"
        if self.find(nonce) != NULL:
            return b"the nonce of OpenCredit names a credit that is open"
        if self.credit_count == MAX_CREDITS:
            return b"a connection may have 16 credits open"
        credit = &self.credits[self.credit_count]
        credit.strategy = <uint8_t *>malloc(size)
        if credit.strategy == NULL:
            raise MemoryError("no memory for a strategy")
        memcpy(credit.strategy, strategy, size)
        credit.strategy_size = size
        credit.nonce = nonce
        credit.left = <uint32_t>chunks
        credit.passed_on = 0
        credit.withdrawn = credit.told = False
        self.credit_count += 1
        self.due = True
        return NULL

    cdef const char *add(self, uint64_t nonce, uint64_t chunks) noexcept:
        """NULL, or why the peer is at fault. For a credit that is not open, which a refusal may have ended: nothing."""
        cdef Credit *credit = self.find(nonce)
        if credit == NULL or credit.withdrawn:
            return NULL
        if chunks > MAX_CREDIT or credit.left + credit.passed_on + chunks > MAX_CREDIT:
            return b"a credit may have 65536 chunks that are not used"
        credit.left += <uint32_t>chunks
        self.due = True
        return NULL

    cdef bint withdraw(self, uint64_t nonce) noexcept:
        """False: there is no such credit; the answer is due at once."""
        cdef Credit *credit = self.find(nonce)
        if credit == NULL:
            return False
        credit.withdrawn = True
        self.due = True
        return True

    cdef void used(self, Credit *credit, uint32_t passed_on, uint32_t given_back, bint later) noexcept:
        """The writer has used that much of it; what was given back is granted again, at once unless `later`."""
        credit.passed_on -= passed_on if passed_on < credit.passed_on else credit.passed_on
        credit.left += given_back
        if credit.left and credit.passed_on <= WINDOW // 2 and not credit.withdrawn and not later:
            self.due = True

    cdef void remove(self, Credit *credit) noexcept:
        free(credit.strategy)
        self.credit_count -= 1
        credit[0] = self.credits[self.credit_count]

    cdef bint pass_on(self, Ring ring, uint64_t connection, uint32_t *need) noexcept:
        """Tell the writer what is due. False: no room; goes on where it stopped."""
        cdef uint32_t i, size, chunks, action
        cdef Credit *credit
        cdef CreditRecord *record
        for i in range(self.credit_count):
            credit = &self.credits[i]
            while True:
                size = 0
                chunks = 0
                if credit.strategy != NULL:
                    action = CREDIT_OPEN
                    size = credit.strategy_size
                elif credit.withdrawn:
                    if credit.told:
                        break
                    action = CREDIT_WITHDRAW
                elif credit.left and credit.passed_on <= WINDOW // 2:
                    action = CREDIT_ADD
                else:
                    break
                need[0] = <uint32_t>sizeof(CreditRecord) + size
                record = <CreditRecord *>ring.reserve(REC_CREDIT, need[0])
                if record == NULL:
                    return False
                if action != CREDIT_WITHDRAW and not credit.withdrawn:
                    chunks = min(credit.left, WINDOW - credit.passed_on)
                credit.left -= chunks
                credit.passed_on += chunks
                record.connection = connection
                record.nonce = credit.nonce
                record.action = action
                record.chunks = chunks
                record.strategy_size = size
                record._reserved = 0
                if action == CREDIT_OPEN:
                    memcpy(<uint8_t *>record + sizeof(CreditRecord), credit.strategy, size)
                    free(credit.strategy)
                    credit.strategy = NULL
                elif action == CREDIT_WITHDRAW:
                    credit.told = True
        self.due = False
        return True


cdef class Packer:
    """Packs replies and unpacks reports, one at a time."""

    def __cinit__(self):
        self.report.at = <ReportRun *>calloc(MAX_REPORTED, sizeof(ReportRun))
        if self.report.at == NULL:
            raise MemoryError("no memory for reports")

    def __dealloc__(self):
        free(self.report.at)
        discard(&self.runs)
        discard(&self.retries)
        discard(&self.inputs)

    cdef uint32_t pack(self, CompactPeer peer, DescriptionCache descriptions, direct_input, ReservedChunk *chunks,
                       uint32_t count, size_t limit, Bytes *to, list returned) except? 0xFFFFFFFF:
        """Append groups of chunks to `to`, which may grow to `limit` bytes (once it holds a chunk); how many groups.

        What cannot be described or has no room is added to `returned`.
        """
        cdef uint32_t i = 0, groups = 0, members
        cdef uint64_t submission, first, length
        cdef ReservedChunk *chunk
        cdef Description about
        cdef bytes content
        cdef uint8_t *at
        cdef size_t size
        cdef bint retried, full = False
        while i < count:
            submission = chunks[i].submission
            about = None if full else descriptions.get(submission)
            if about is None:
                returned.append((submission, chunks[i].chunk))
                i += 1
                continue
            self.runs.size = self.retries.size = self.inputs.size = 0
            size = to.size + GROUP_HEADS + PyBytes_GET_SIZE(about.before) + PyBytes_GET_SIZE(about.after)
            members = 0
            first = length = 0
            retried = False
            while i < count and chunks[i].submission == submission:
                chunk = &chunks[i]
                content = None
                if chunk.flags & CHUNK_IS_DIRECT:
                    content = direct_input(submission, chunk.chunk)
                    if content is None:
                        returned.append((submission, chunk.chunk))
                        i += 1
                        continue
                size += CHUNK_BYTES + (PyBytes_GET_SIZE(content) if content is not None else 0)
                if size > limit and (groups or members):
                    full = True
                    break
                if content is not None:
                    ensure(&self.inputs, PyBytes_GET_SIZE(content) + 9)
                    at = self.inputs.data + self.inputs.size
                    at += write_head(at, MAJOR_BYTES, PyBytes_GET_SIZE(content))
                    at = put(at, PyBytes_AS_STRING(content), PyBytes_GET_SIZE(content))
                    self.inputs.size = at - self.inputs.data
                if length and chunk.chunk == first + length:
                    length += 1
                else:
                    if length:
                        ensure(&self.runs, RUN_BYTES)
                        self.runs.size = put_run(self.runs.data + self.runs.size, first, length) - self.runs.data
                    first = chunk.chunk
                    length = 1
                ensure(&self.retries, RUN_BYTES)
                self.retries.size = put_number(self.retries.data + self.retries.size, chunk.retries) - self.retries.data
                retried |= chunk.retries != 0
                members += 1
                i += 1
            if members == 0:
                continue
            ensure(&self.runs, RUN_BYTES)
            self.runs.size = put_run(self.runs.data + self.runs.size, first, length) - self.runs.data
            ensure(to, GROUP_HEADS + PyBytes_GET_SIZE(about.before) + PyBytes_GET_SIZE(about.after) + self.runs.size
                   + self.retries.size + self.inputs.size)
            at = put(to.data + to.start + to.size, b"\x85", 1)
            if peer.remembers(submission):
                at = put_unsigned(at, submission)
            else:
                at = put(at, PyBytes_AS_STRING(about.before), PyBytes_GET_SIZE(about.before))
                at = put_unsigned(at, chunks[i - 1].chunks_done)
                at = put(at, PyBytes_AS_STRING(about.after), PyBytes_GET_SIZE(about.after))
                peer.remember(submission)
            at = put_unsigned(at, chunks[i - 1].chunks_done)
            at += write_head(at, MAJOR_BYTES, self.runs.size)
            at = put(at, <char *>self.runs.data, self.runs.size)
            if retried:
                at += write_head(at, MAJOR_BYTES, self.retries.size)
                at = put(at, <char *>self.retries.data, self.retries.size)
            else:
                at[0] = CBOR_NULL
                at += 1
            if self.inputs.size:
                at += write_head(at, MAJOR_ARRAY, members)
                at = put(at, <char *>self.inputs.data, self.inputs.size)
            else:
                at[0] = CBOR_NULL
                at += 1
            to.size = at - to.data - to.start
            groups += 1
        if self.inputs.capacity > KEPT_BYTES:
            discard(&self.inputs)
        return groups

    # --- reports ---

    cdef bint scan(self, const uint8_t *data, size_t size, size_t text_limit) noexcept:
        """Whether the message is a ReportChunks in the usual form, which `write_record` then writes."""
        return scan_report(data, size, &self.report, text_limit)

    cdef uint64_t record_size(self) noexcept:
        return sizeof(ReportRecord) + self.report.runs * sizeof(ReportRun) + self.report.tails

    cdef void write_record(self, uint8_t *at, uint64_t connection, const uint8_t *data) noexcept:
        """The record of the message at `data` that was scanned last; `at` has room for `record_size`."""
        cdef ReportRecord *record = <ReportRecord *>at
        cdef ReportRun *run = <ReportRun *>(at + sizeof(ReportRecord))
        cdef ReportRun *end = run + self.report.runs
        cdef uint8_t *tails = <uint8_t *>end
        cdef uint32_t placed = 0, taken = 0, text = 0
        record.connection = connection
        record.runs = self.report.runs
        record.chunks = self.report.chunks
        memcpy(run, self.report.at, self.report.runs * sizeof(ReportRun))
        while run < end:
            if run.flags:
                if run.tail_at != taken:       # the runs of one report share its text
                    taken = run.tail_at
                    text = placed
                    memcpy(tails + placed, data + run.tail_at, run.tail_size)
                    placed += run.tail_size
                run.tail_at = text
            run += 1

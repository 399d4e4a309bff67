# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""Rings in shared memory between two processes: moves records, knows nothing of what they say."""

from libc.errno cimport EAGAIN, errno
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy
from posix.mman cimport MAP_ANONYMOUS, MAP_FAILED, MAP_FIXED, MAP_PRIVATE, MAP_SHARED, PROT_NONE, PROT_READ, PROT_WRITE, mmap, munmap
from posix.unistd cimport write

import os

from opsqueue._speedups.records cimport REC_FRAGMENT, FragmentRecord, RecordHeader

cdef extern from *:
    """
    #define oq_load(p) __atomic_load_n((p), __ATOMIC_ACQUIRE)
    #define oq_store(p, v) __atomic_store_n((p), (v), __ATOMIC_RELEASE)
    #define oq_exchange(p, v) __atomic_exchange_n((p), (v), __ATOMIC_SEQ_CST)
    #define oq_fence() __atomic_thread_fence(__ATOMIC_SEQ_CST)
    """
    uint64_t oq_load(uint64_t *at) noexcept nogil
    void oq_store(uint64_t *at, uint64_t value) noexcept nogil
    uint32_t oq_load32 "oq_load"(uint32_t *at) noexcept nogil
    uint32_t oq_exchange(uint32_t *at, uint32_t value) noexcept nogil
    void oq_fence() noexcept nogil

cdef enum:
    PAGE = 4096

cdef uint64_t MAGIC = 0x474E495251534F01   # "\x01OSQRING": layout version 1

#: Bytes of data per ring unless told otherwise.
DEFAULT_CAPACITY = 4 * 1024 * 1024
#: A record of more bytes than this is refused, also in fragments.
LARGEST_RECORD = 64 * 1024 * 1024
#: Fragments of unfinished records may hold this much in one process's memory.
LARGEST_PARTIAL = 256 * 1024 * 1024

cdef uint64_t largest_record = LARGEST_RECORD
cdef uint64_t largest_partial = LARGEST_PARTIAL


cdef inline uint64_t padded(uint64_t size) noexcept nogil:
    return sizeof(RecordHeader) + ((size + 7) & ~<uint64_t>7)


cdef void signal(int eventfd) noexcept nogil:
    """Wake the process that sleeps on `eventfd`; a full counter already wakes it."""
    cdef uint64_t one = 1
    write(eventfd, &one, 8)


cdef class Ring:
    """One direction. `capacity`: bytes, a power of two of at least 64 KiB. The producer and the consumer each use their own
    copy of this object (they inherit it by fork); only the mapping is shared."""

    def __cinit__(self, uint64_t capacity=DEFAULT_CAPACITY):
        cdef uint8_t *base
        cdef int fd
        if capacity < 65536 or capacity & (capacity - 1) or capacity > (1 << 30):
            raise ValueError(f"a ring's capacity is a power of two from 64 KiB to 1 GiB, not {capacity}")
        fd = os.memfd_create("opsqueue-ring", os.MFD_CLOEXEC)
        try:
            os.ftruncate(fd, PAGE + capacity)
            # One reservation, then the file over it, then the data part once more behind itself.
            base = <uint8_t *>mmap(NULL, PAGE + 2 * capacity, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)
            if <void *>base == MAP_FAILED:
                raise MemoryError(f"no address space for a ring of {capacity} bytes")
            if (
                mmap(base, PAGE + capacity, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, fd, 0) == MAP_FAILED
                or mmap(base + PAGE + capacity, capacity, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, fd, PAGE)
                == MAP_FAILED
            ):
                munmap(base, PAGE + 2 * capacity)
                raise MemoryError(f"no shared memory for a ring of {capacity} bytes")
        finally:
            os.close(fd)
        self.header = <RingHeader *>base
        self.data = base + PAGE
        self.capacity = capacity
        self.mask = capacity - 1
        self.largest = <uint32_t>(capacity // 4 - sizeof(RecordHeader))
        self.header.magic = MAGIC
        self.header.capacity = capacity

    def __dealloc__(self):
        if self.header != NULL:
            munmap(self.header, PAGE + 2 * self.capacity)

    # --- producer ---

    cdef bint has_room(self, uint32_t size) noexcept nogil:
        cdef uint64_t end = self.write_at + padded(size)
        if end - self.head_seen <= self.capacity:
            return True
        self.head_seen = oq_load(&self.header.head)
        return end - self.head_seen <= self.capacity

    cdef uint8_t *reserve(self, uint32_t kind, uint32_t size) noexcept nogil:
        cdef RecordHeader *record
        if size > self.largest or not self.has_room(size):
            return NULL
        record = <RecordHeader *>(self.data + (self.write_at & self.mask))
        record.size = size
        record.kind = kind
        self.write_at += padded(size)
        return <uint8_t *>record + sizeof(RecordHeader)

    cdef bint publish(self) noexcept nogil:
        if self.header.tail == self.write_at:
            return False
        oq_store(&self.header.tail, self.write_at)
        oq_fence()  # the flag is read after the tail is visible: the consumer sets it before it looks at the tail
        return oq_load32(&self.header.consumer_sleeps) != 0 and oq_exchange(&self.header.consumer_sleeps, 0) != 0

    cdef bint wait_for_room(self, uint32_t size) noexcept nogil:
        if self.has_room(size):
            return True
        oq_exchange(&self.header.producer_waits, 1)
        oq_fence()
        if self.has_room(size):
            oq_exchange(&self.header.producer_waits, 0)
            return True
        return False

    # --- consumer ---

    cdef int next(self, uint32_t *kind, uint8_t **payload, uint32_t *size) noexcept nogil:
        cdef RecordHeader *record
        cdef uint64_t unread = self.tail_seen - self.read_at
        if unread == 0:
            self.tail_seen = oq_load(&self.header.tail)
            unread = self.tail_seen - self.read_at
            if unread == 0:
                return 0
            if unread > self.capacity or unread & 7:
                return -1
        record = <RecordHeader *>(self.data + (self.read_at & self.mask))
        if record.size > self.largest or padded(record.size) > unread:
            return -1
        kind[0] = record.kind
        size[0] = record.size
        payload[0] = <uint8_t *>record + sizeof(RecordHeader)
        self.read_at += padded(record.size)
        return 1

    cdef bint release(self) noexcept nogil:
        if self.header.head == self.read_at:
            return False
        oq_store(&self.header.head, self.read_at)
        oq_fence()
        return oq_load32(&self.header.producer_waits) != 0 and oq_exchange(&self.header.producer_waits, 0) != 0

    cdef bint is_empty(self) noexcept nogil:
        return oq_load(&self.header.tail) == self.read_at

    cdef bint sleep(self) noexcept nogil:
        oq_exchange(&self.header.consumer_sleeps, 1)
        oq_fence()
        if self.is_empty():
            return True
        oq_exchange(&self.header.consumer_sleeps, 0)
        return False

    cdef void wake(self) noexcept nogil:
        if oq_load32(&self.header.consumer_sleeps) != 0:
            oq_exchange(&self.header.consumer_sleeps, 0)

    # --- for tests and tools: the same calls from Python ---

    def put(self, uint32_t kind, const uint8_t[::1] payload not None) -> bool:
        """Write one record without publishing it; False: full. ValueError for one that must be fragmented."""
        cdef uint32_t size = <uint32_t>payload.shape[0]
        if size > self.largest:
            raise ValueError(f"a record of {size} bytes; this ring takes {self.largest} in one piece")
        cdef uint8_t *at = self.reserve(kind, size)
        if at == NULL:
            return False
        if size:
            memcpy(at, &payload[0], size)
        return True

    def publish_records(self) -> bool:
        """Make the written records visible; True: the consumer sleeps and must be signalled."""
        return self.publish()

    def take(self):
        """The next record as (kind, payload), or None. ValueError for a damaged ring."""
        cdef uint32_t kind, size
        cdef uint8_t *payload
        cdef int got = self.next(&kind, &payload, &size)
        if got < 0:
            raise ValueError("the ring's positions or lengths are not valid")
        return (kind, payload[:size]) if got else None

    def release_records(self) -> bool:
        """Give the room of the records taken back; True: the producer waits for it and must be signalled."""
        return self.release()

    def poke(self, uint64_t position, const uint8_t[::1] content not None) -> None:
        """Overwrite bytes of the data area: for tests that damage a ring."""
        memcpy(self.data + (position & self.mask), &content[0], min(<uint64_t>content.shape[0], self.capacity))


cdef class Channel:
    """Two rings and two eventfds, made by the supervisor before it forks a front-end and the writer."""

    def __cinit__(self, uint64_t capacity=DEFAULT_CAPACITY):
        self.up = Ring(capacity)
        self.down = Ring(capacity)
        self.writer_wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.frontend_wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def close(self) -> None:
        """Close the eventfds (the mappings go with the object)."""
        if self.writer_wake >= 0:
            os.close(self.writer_wake)
            os.close(self.frontend_wake)
            self.writer_wake = self.frontend_wake = -1

    def writer_end(self) -> Endpoint:
        """The writer's side, started: its epoch is raised."""
        return Endpoint(self, True)

    def frontend_end(self) -> Endpoint:
        """The front-end's side, started: its epoch is raised."""
        return Endpoint(self, False)


cdef class Endpoint:
    """One process's side of a channel. Making one is starting: what the other side had sent to a predecessor is discarded."""

    def __cinit__(self, Channel channel not None, bint is_writer):
        self.channel = channel
        self.incoming = channel.up if is_writer else channel.down
        self.outgoing = channel.down if is_writer else channel.up
        self.own_wake = channel.writer_wake if is_writer else channel.frontend_wake
        self.peer_wake = channel.frontend_wake if is_writer else channel.writer_wake
        self.partial = {}
        cdef Ring ring = self.outgoing
        ring.write_at = oq_load(&ring.header.tail)
        ring.head_seen = oq_load(&ring.header.head)
        oq_store(&ring.header.producer_epoch, ring.header.producer_epoch + 1)
        self.accept_peer()
        signal(self.peer_wake)

    cdef void accept_peer(self) noexcept nogil:
        """Discard what the other side sent before now, say from where ours counts, acknowledge its epoch."""
        cdef uint64_t epoch = oq_load(&self.incoming.header.producer_epoch)
        self.incoming.tail_seen = oq_load(&self.incoming.header.tail)
        self.incoming.read_at = self.incoming.tail_seen
        oq_store(&self.incoming.header.head, self.incoming.read_at)
        self.outgoing.publish()
        oq_store(&self.outgoing.header.start, self.outgoing.write_at)
        oq_store(&self.incoming.header.consumer_seen, epoch)

    cdef int poll_epochs(self) noexcept:
        cdef int events = 0
        cdef Ring ring
        if oq_load(&self.incoming.header.producer_epoch) != self.incoming.header.consumer_seen:
            self.accept_peer()
            self.partial = {}
            self.partial_bytes = 0
            signal(self.peer_wake)
            events |= PEER_RESTARTED
        if not self.connected:
            ring = self.outgoing
            if oq_load(&ring.header.consumer_seen) == ring.header.producer_epoch:
                ring = self.incoming
                ring.read_at = oq_load(&ring.header.start)
                ring.tail_seen = ring.read_at
                oq_store(&ring.header.head, ring.read_at)
                self.connected = True
                events |= CONNECTED
        return events

    cdef int receive(self, uint32_t *kind, uint8_t **payload, uint32_t *size):
        cdef int got
        while True:
            if not self.connected:
                return 0
            got = self.incoming.next(kind, payload, size)
            if got <= 0 or kind[0] != REC_FRAGMENT:
                return got
            got = self.take_fragment(kind, payload, size)
            if got != 0:
                return got

    cdef int take_fragment(self, uint32_t *kind, uint8_t **payload, uint32_t *size):
        """1: a record is whole, and in kind, payload, size; 0: parts are missing; -1: nonsense."""
        cdef FragmentRecord *part = <FragmentRecord *>payload[0]
        cdef uint8_t *at
        cdef uint64_t stream
        if size[0] < sizeof(FragmentRecord) or part.size != size[0] - sizeof(FragmentRecord):
            return -1
        if part.total > largest_record or <uint64_t>part.offset + part.size > part.total or part.kind == REC_FRAGMENT:
            return -1
        stream = part.stream
        if part.offset == 0:
            if stream in self.partial or self.partial_bytes + part.total > largest_partial:
                return -1
            self.partial[stream] = (part.kind, bytearray(part.total))
            self.partial_bytes += part.total
        entry = self.partial.get(stream)
        if entry is None or entry[0] != part.kind or len(<bytearray>entry[1]) != part.total:
            return -1
        buffer = <bytearray>entry[1]
        at = <uint8_t *><char *>buffer
        memcpy(at + part.offset, payload[0] + sizeof(FragmentRecord), part.size)
        if part.offset + part.size < part.total:
            return 0
        del self.partial[stream]
        self.partial_bytes -= part.total
        self.assembled = buffer
        kind[0] = part.kind
        size[0] = part.total
        payload[0] = at
        return 1

    cdef void done_receiving(self) noexcept nogil:
        if self.incoming.release():
            signal(self.peer_wake)

    cdef void flush(self) noexcept nogil:
        if self.outgoing.publish():
            signal(self.peer_wake)

    cdef uint64_t new_stream(self) noexcept nogil:
        self.next_stream += 1
        return self.next_stream

    cdef uint32_t send_part(self, uint64_t stream, uint32_t kind, const uint8_t *payload,
                            uint32_t total, uint32_t offset) noexcept nogil:
        cdef uint32_t size = total - offset
        cdef uint8_t *at
        if size > self.outgoing.largest - <uint32_t>sizeof(FragmentRecord):
            size = self.outgoing.largest - <uint32_t>sizeof(FragmentRecord)
        at = self.outgoing.reserve(REC_FRAGMENT, <uint32_t>sizeof(FragmentRecord) + size)
        if at == NULL:
            return offset
        (<FragmentRecord *>at).stream = stream
        (<FragmentRecord *>at).kind = kind
        (<FragmentRecord *>at).total = total
        (<FragmentRecord *>at).offset = offset
        (<FragmentRecord *>at).size = size
        memcpy(at + sizeof(FragmentRecord), payload + offset, size)
        return offset + size

    # --- for tests and tools ---

    def poll(self) -> int:
        """EpochEvents since the last poll: 1 the peer restarted, 2 connected."""
        return self.poll_epochs()

    def get(self):
        """The next whole record as (kind, payload), or None. ValueError for a damaged ring."""
        cdef uint32_t kind, size
        cdef uint8_t *payload
        cdef int got = self.receive(&kind, &payload, &size)
        if got < 0:
            raise ValueError("the ring's positions, lengths or fragments are not valid")
        return (kind, payload[:size]) if got else None

    def release(self) -> None:
        """Give back the room of the records got, and signal the peer if it waits for it."""
        self.done_receiving()

    def send(self, uint32_t kind, const uint8_t[::1] payload not None) -> bool:
        """Write one unfragmented record without publishing it; False: full."""
        return self.outgoing.put(kind, payload)

    def begin_parts(self) -> int:
        """A stream number for a record that goes in parts."""
        return self.new_stream()

    def part(self, uint64_t stream, uint32_t kind, const uint8_t[::1] payload not None, uint32_t offset) -> int:
        """Write the next part of a large record; the new offset, unchanged when there is no room."""
        return self.send_part(stream, kind, &payload[0], <uint32_t>payload.shape[0], offset)

    def publish(self) -> None:
        """Make what was sent visible, and signal the peer if it sleeps."""
        self.flush()

    def prepare_to_sleep(self) -> bool:
        """Ask for a signal; False: there is something to read, do not sleep."""
        return self.incoming.sleep()

    def awake(self) -> None:
        """No signals needed: this side is going to look at the ring anyway."""
        self.incoming.wake()

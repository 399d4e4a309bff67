# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""Submissions as consumers are told of them. See descriptions.pxd for what is here and what is not."""

from cpython.bytes cimport PyBytes_GET_SIZE
from libc.stdint cimport uint64_t

cdef enum:
    ENTRY_BYTES = 256             # of an entry beside its texts


cdef class Description:
    def __cinit__(self, bytes before not None, bytes after not None):
        self.before = before
        self.after = after


cdef inline size_t weight(Description description):
    return PyBytes_GET_SIZE(description.before) + PyBytes_GET_SIZE(description.after) + ENTRY_BYTES


cdef class DescriptionCache:
    """What `describe(submission)` gave, (before, after) or None; what is unknown is asked for every time."""

    def __cinit__(self, describe, size_t limit):
        self.describe = describe
        self.limit = limit
        self.entries = {}

    cdef Description get(self, uint64_t submission):
        cdef Description found
        if self.last is not None and self.last_submission == submission:
            return self.last
        key = submission
        found = <Description>self.entries.get(key)
        if found is None:
            pair = self.describe(key)
            if pair is None:
                return None
            found = Description(pair[0], pair[1])
            self.size += weight(found)
            self.entries[key] = found
            while self.size > self.limit and len(self.entries) > 1:
                self.evict()
        else:
            found.used = True
        self.last = found
        self.last_submission = submission
        return found

    cdef void evict(self):
        """The oldest that was not used since the hand last passed it."""
        cdef Description oldest
        key = next(iter(self.entries))
        oldest = <Description>self.entries.pop(key)
        if oldest.used:
            oldest.used = False
            self.entries[key] = oldest
        else:
            self.size -= weight(oldest)

    def __len__(self) -> int:
        return len(self.entries)

    def find(self, uint64_t submission):
        """(before, after), or None: for tests and tools."""
        cdef Description found = self.get(submission)
        return None if found is None else (found.before, found.after)

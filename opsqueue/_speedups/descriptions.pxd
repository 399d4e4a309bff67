"""Submissions as consumers are told of them: a cache bounded in bytes. Reads nothing itself."""

from libc.stdint cimport uint64_t


cdef class Description:           # as it stands in every one of its chunks' replies; never changes
    cdef bytes before             # CBOR up to the value of chunks_done
    cdef bytes after
    cdef bint used                # since the eviction's hand last passed


cdef class DescriptionCache:
    cdef object describe
    cdef readonly size_t limit
    cdef readonly size_t size
    cdef dict entries             # by submission; the eviction's hand stands at the first
    # the last one asked for: most replies are about one submission
    cdef uint64_t last_submission
    cdef Description last

    cdef Description get(self, uint64_t submission)
    cdef void evict(self)

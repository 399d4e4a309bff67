# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, cdivision=True
"""Checks the rows of the block table as a start reads them: hundreds of thousands. Keeps and changes nothing.

A row is (submission, block, batch, done, attempts, the submission's chunks, packing); docs/journal.md says what makes sense
in it.
"""

from cpython.bytes cimport PyBytes_AS_STRING
from libc.stdint cimport int64_t, uint8_t, uint64_t

from opsqueue._speedups.bitmaps import unpack
from opsqueue._speedups.eventlog cimport get_varint

cdef enum:
    BLOCK_CHUNKS = 4096
    PACKED = 1


def checked(rows, dict attempts_as_of not None):
    """Gives the rows that make sense, in order, without `packing`, `done` bit by bit; notes in `attempts_as_of` the batch of each (submission, block) that has
    attempts. Raises ValueError naming the row that does not.
    """
    cdef bytes done, attempts
    cdef int64_t block, chunks_total
    cdef uint64_t chunks, offset = 0, number = 0, following = 0
    cdef Py_ssize_t size
    cdef const uint8_t *read
    cdef const uint8_t *end
    for row in rows:
        block, done, attempts, chunks_total = row[1], row[3], row[4], row[5]
        if block < 0 or block > (chunks_total - 1) // BLOCK_CHUNKS or chunks_total <= 0:
            raise ValueError(f"row ({row[0]}, {block}): the submission has {chunks_total} chunks")
        chunks = min(<int64_t>BLOCK_CHUNKS, chunks_total - block * BLOCK_CHUNKS)
        if row[6]:
            if row[6] != PACKED:
                raise ValueError(f"row ({row[0]}, {block}): {row[6]} is no packing")
            try:
                done = unpack(done)
            except ValueError as error:
                raise ValueError(f"row ({row[0]}, {block}): {error}") from None
        size = len(done)
        if size:
            if <uint64_t>size != (chunks + 7) // 8:
                raise ValueError(f"row ({row[0]}, {block}): {size} bytes for {chunks} chunks")
            if chunks % 8 and <uint8_t>PyBytes_AS_STRING(done)[size - 1] >> chunks % 8:
                raise ValueError(f"row ({row[0]}, {block}): chunks behind the last one are done")
        if attempts:
            following = 0
            read = <const uint8_t *>PyBytes_AS_STRING(attempts)
            end = read + len(attempts)
            while read < end:
                if not (
                    get_varint(&read, end, &offset)
                    and get_varint(&read, end, &number)
                    and get_varint(&read, end, &number)
                ):
                    raise ValueError(f"row ({row[0]}, {block}): a number of the attempts is cut off or too large")
                if offset < following:
                    raise ValueError(f"row ({row[0]}, {block}): the attempts are not in the order of their chunks")
                following = offset + 1
                if offset >= chunks:
                    raise ValueError(f"row ({row[0]}, {block}): attempts of chunk {offset}, the block has {chunks}")
            attempts_as_of[row[0], block] = row[2]
        yield (row[0], block, row[2], done, attempts, chunks_total)

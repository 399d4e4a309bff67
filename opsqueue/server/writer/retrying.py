"""Stores the retry of a failed submission, or says why there is none: decided inside the batch's transaction.

The new submission is a copy with the failed one's done chunks as blocks; the failed one does not change.
"""

from __future__ import annotations

from collections.abc import Sequence

import apsw

from opsqueue._speedups.bitmaps import unpack
from opsqueue.server.sql import queries
from opsqueue.server.writer.batch import (
    BlockRow,
    LoadedSubmission,
    NewRetry,
    RetryOutcome,
    RetryResult,
    State,
)
from opsqueue.server.writer.blocks import write_blocks
from opsqueue.server.writer.recovery import BLOCK_CHUNKS, strategic_pairs

_SQL = queries("retrying")
_FAILED = _SQL["failed"]
_NEWEST_RETRY = _SQL["newest_retry"]
_BLOCKS = _SQL["blocks"]
_COPY_SUBMISSION = _SQL["copy_submission"]
_COPY_DIRECT = (_SQL["copy_direct_inputs"], _SQL["copy_direct_outputs"])
_NOTE_RETRY = _SQL["note_retry"]
_INSERTS = queries("journal")
_NEWEST_BY_PREFIX = _INSERTS["newest_by_prefix"]
_NEWEST_BY_KEY = _INSERTS["newest_by_key"]
_INSERT_STRATEGIC = _INSERTS["insert_strategic"]

#: Blocks (512 bytes each) whose bits are counted in one go.
COUNTED_AT_ONCE = 1_024

_UNFINISHED = (State.IN_PROGRESS, State.PAUSED)


def retry(connection: apsw.Connection, batch: int, new: NewRetry) -> RetryOutcome:
    """Within the caller's transaction, after everything else that batch number `batch` writes. Raises apsw.Error."""
    row = connection.execute(_FAILED, (new.failed,)).fetchone()
    if row is None:
        return RetryOutcome(RetryResult.UNKNOWN)
    state, chunks_total, chunks_done, chunk_size, direct, pairs, prefix, key = row
    if state != State.FAILED:
        return RetryOutcome(RetryResult.NOT_FAILED, state=State(state))
    earlier = connection.execute(_NEWEST_RETRY, (new.failed,)).fetchone()
    if earlier is not None and earlier[1] in (*_UNFINISHED, State.COMPLETED):
        return RetryOutcome(RetryResult.KNOWN, earlier[0])
    conflict = _unfinished_twin(connection, prefix, key)
    if conflict is not None:
        return RetryOutcome(RetryResult.CONFLICT, conflict)
    blocks = new.blocks
    if blocks is None:
        rows = connection.execute(_BLOCKS, (new.failed,))
        try:
            blocks = tuple((block, unpack(done) if packing else done) for block, done, packing in rows)
        except ValueError:  # damaged: not what was done
            return RetryOutcome(RetryResult.INCOMPLETE)
    if _count(blocks, chunks_total) != chunks_done:
        return RetryOutcome(RetryResult.INCOMPLETE)
    strategic = strategic_pairs(pairs)
    _store(connection, batch, new, blocks, strategic)
    return RetryOutcome(
        RetryResult.NEW,
        new.submission,
        loaded=LoadedSubmission(new.submission, State.IN_PROGRESS, chunks_total, chunk_size, bool(direct), strategic),
        blocks=tuple((new.submission, block, batch, done, b"", chunks_total) for block, done in blocks),
    )


def _unfinished_twin(connection: apsw.Connection, prefix: str | None, key: str | None) -> int | None:
    """Another submission that is working on the same inputs: an insert of them would not make a second one either."""
    for query, name in ((_NEWEST_BY_PREFIX, prefix), (_NEWEST_BY_KEY, key)):
        row = None if name is None else connection.execute(query, (name,)).fetchone()
        if row is not None and row[1] in _UNFINISHED:
            return int(row[0])
    return None


def _count(blocks: Sequence[tuple[int, bytes]], chunks_total: int) -> int:
    """Chunks that are done; many blocks at once, because each one by itself takes as long as writing it."""
    whole = sum(min(BLOCK_CHUNKS, chunks_total - block * BLOCK_CHUNKS) for block, done in blocks if not done)
    bitmaps = [done for _, done in blocks if done]
    return whole + sum(
        int.from_bytes(b"".join(bitmaps[at : at + COUNTED_AT_ONCE])).bit_count()
        for at in range(0, len(bitmaps), COUNTED_AT_ONCE)
    )


def _store(
    connection: apsw.Connection,
    batch: int,
    new: NewRetry,
    blocks: Sequence[tuple[int, bytes]],
    strategic: dict[str, int],
) -> None:
    connection.execute(_COPY_SUBMISSION, (new.submission, new.failed))
    if strategic:
        connection.executemany(_INSERT_STRATEGIC, ((key, value, new.submission) for key, value in strategic.items()))
    for copy in _COPY_DIRECT:
        connection.execute(copy, (new.submission, new.failed))
    write_blocks(connection, batch, [BlockRow(new.submission, block, done, b"") for block, done in blocks])
    connection.execute(_NOTE_RETRY, (new.failed, new.submission))

"""Folding: moves what the log rows say into the block table, in slices, so that log and recovery stay short.

It decides when and how much; the engine knows which blocks changed, the journal writes them.
"""

from __future__ import annotations

from dataclasses import dataclass

from opsqueue._speedups.engine import Engine
from opsqueue.server.writer.batch import Batch, BlockRow, Outcome

#: Start to fold when the log has grown by this many bytes.
FOLD_AFTER_BYTES = 8 * 1024 * 1024
#: ... or by this many rows, so that a slow trickle does not make a long recovery either.
FOLD_AFTER_ROWS = 5_000
#: Blocks (512 bytes each) that one batch carries: as few, and as many, as these.
FEWEST_BLOCKS = 128
MOST_BLOCKS = 2048
#: Bytes of blocks that a round may write for each byte by which the log grows meanwhile: with completions at random
#: every block changes all the time, and more rounds would only write more.
BLOCKS_TO_LOG = 2.5
BLOCK_BYTES = 512
#: Entries are so many times as long as the log row that is made of them, about.
ENTRY_TO_LOG = 3


@dataclass(frozen=True, slots=True)
class FoldSlice:
    rows: tuple[BlockRow, ...] = ()
    log_through: int | None = None


NOTHING = FoldSlice()


class Folding:
    """One round at a time: freeze the dirty blocks, write them over several batches, drop the log rows they cover."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        #: What the log has grown by since the last round began.
        self._bytes = 0
        self._rows = 0
        #: The batch that the round covers, or None between rounds.
        self._through: int | None = None
        #: What the log may have grown by when the round ends.
        self._allowed = 0

    @property
    def active(self) -> bool:
        """A round is under way, or should begin: batches should go to the journal even if nothing else waits."""
        return self._through is not None or self._is_due

    @property
    def _is_due(self) -> bool:
        return self._bytes >= FOLD_AFTER_BYTES or self._rows >= FOLD_AFTER_ROWS

    def recovered(self, events_bytes: int, rows: int) -> None:
        """What the log held at start counts as grown."""
        self._bytes += events_bytes
        self._rows += rows

    def slice_for(self, number: int, events: bytes) -> FoldSlice:
        """What batch `number`, which carries `events`, should fold. Called once per batch, when it closes."""
        if self._through is None:
            if not self._is_due:
                return NOTHING
            self._engine.fold_start()
            self._through = number
            self._bytes = self._rows = 0
            self._allowed = max(FOLD_AFTER_BYTES, int(self._engine.fold_remaining() * BLOCK_BYTES / BLOCKS_TO_LOG))
        rows = tuple(BlockRow(*row) for row in self._engine.fold_take(self._share(len(events))))
        return FoldSlice(rows, None if self._engine.fold_remaining() else self._through)

    def _share(self, events_bytes: int) -> int:
        """Blocks for a batch with so many bytes of entries, so that the round ends in time."""
        left = max(1, self._allowed - self._bytes)
        return min(
            MOST_BLOCKS, max(FEWEST_BLOCKS, self._engine.fold_remaining() * (events_bytes // ENTRY_TO_LOG) // left)
        )

    def committed(self, batch: Batch, outcome: Outcome) -> None:
        """The batch is in the file."""
        if outcome.log_bytes:
            self._bytes += outcome.log_bytes
            self._rows += 1
        if batch.blocks:
            self._engine.fold_committed(_tuples(batch))
        if batch.log_through is not None:
            self._through = None

    def failed(self, batch: Batch) -> None:
        """Nothing of the batch is in the file: its blocks are dirty again, its round goes on."""
        if batch.blocks:
            self._engine.fold_failed(_tuples(batch))


def _tuples(batch: Batch) -> tuple[tuple[int, int, bytes, bytes], ...]:
    return tuple((row.submission, row.block, row.done, row.attempts) for row in batch.blocks)

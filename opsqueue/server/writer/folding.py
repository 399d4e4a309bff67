"""Folding: moves what the log rows say into the block table, in slices, so that log and recovery stay short.

It decides when and how much; the engine knows which blocks changed, the journal writes them.
"""

from __future__ import annotations

from dataclasses import dataclass

from opsqueue._speedups.engine import Engine
from opsqueue.server.writer.batch import Batch, BlockRow

#: Start to fold when the log has grown by this many bytes of events.
FOLD_AFTER_BYTES = 8 * 1024 * 1024
#: ... or by this many rows, so that a slow trickle does not make a long recovery either.
FOLD_AFTER_ROWS = 5_000
#: Blocks (512 bytes each) that one batch carries.
BLOCKS_A_BATCH = 128


@dataclass(frozen=True, slots=True)
class FoldSlice:
    rows: tuple[BlockRow, ...] = ()
    log_through: int | None = None


NOTHING = FoldSlice()


class Folding:
    """One round at a time: freeze the dirty blocks, write them over several batches, drop the log rows they cover."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._bytes = 0
        self._rows = 0
        #: The batch that the round covers, or None between rounds.
        self._through: int | None = None

    @property
    def active(self) -> bool:
        """A round is under way: batches should go to the journal even if nothing else waits."""
        return self._through is not None

    def recovered(self, events_bytes: int, rows: int) -> None:
        """What the log held at start counts as grown."""
        self._bytes += events_bytes
        self._rows += rows

    def slice_for(self, number: int, events: bytes) -> FoldSlice:
        """What batch `number`, which carries `events`, should fold. Called once per batch, when it closes."""
        if events:
            self._bytes += len(events)
            self._rows += 1
        if self._through is None:
            if self._bytes < FOLD_AFTER_BYTES and self._rows < FOLD_AFTER_ROWS:
                return NOTHING
            self._engine.fold_start()
            self._through = number
            self._bytes = self._rows = 0
        rows = tuple(BlockRow(*row) for row in self._engine.fold_take(BLOCKS_A_BATCH))
        return FoldSlice(rows, None if self._engine.fold_remaining() else self._through)

    def committed(self, batch: Batch) -> None:
        """The batch is in the file."""
        if batch.log_through is not None:
            self._through = None

    def failed(self, batch: Batch) -> None:
        """Nothing of the batch is in the file: its blocks are dirty again, its round goes on."""
        if batch.blocks:
            self._engine.fold_failed(tuple((row.submission, row.block, row.done, row.attempts) for row in batch.blocks))

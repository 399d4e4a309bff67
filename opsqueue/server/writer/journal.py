"""The journal in an SQLite file: applies batches, each whole or not at all. The only code that writes to the file
while a server runs.

Decides nothing but the idempotency of an insert and of a retry. docs/journal.md describes the file.
"""

from __future__ import annotations

import errno
import time

import apsw

from opsqueue._speedups.log_packing import pack
from opsqueue.server.sql import queries
from opsqueue.server.writer.batch import (
    Batch,
    EndedSubmission,
    Failure,
    InsertOutcome,
    JournalOptions,
    Loaded,
    Outcome,
    RecoverySink,
    RetryOutcome,
    State,
)
from opsqueue.server.writer.blocks import write_blocks
from opsqueue.server.writer.checkpoints import Checkpoints
from opsqueue.server.writer.cleanup import Cleanup
from opsqueue.server.writer.database_file import open_for_writing, startup_error
from opsqueue.server.writer.inserting import insert
from opsqueue.server.writer.recovery import Recovery, strategic_pairs
from opsqueue.server.writer.retrying import retry

_SQL = queries("journal")
_LOG_ROW = _SQL["log_row"]
_END = _SQL["end"]
_DROP_STRATEGIC = _SQL["drop_strategic"]
_PAUSE = _SQL["pause"]
_INSERT_DIRECT_OUTPUT = _SQL["insert_direct_output"]
_DELETE_LOG = _SQL["delete_log"]
_SET_MARK = _SQL["set_mark"]

#: What a statement raises for its storage or its values; anything else is a mistake in the program.
_REFUSALS = (apsw.Error, OverflowError, UnicodeError)
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)


class SqliteJournal:
    """Opened with the constructor, which raises a StartupError. Belongs to one thread at a time."""

    def __init__(self, options: JournalOptions) -> None:
        self._options = options
        self._connection = open_for_writing(options)
        self._checkpoints = Checkpoints(self._connection, options)
        self._cleanup = Cleanup(self._connection, options)
        self._last_failed = False
        self._cleanup_failure = ""
        self._log_bytes = 0

    def load(self, sink: RecoverySink) -> Loaded:
        """Give everything unfinished to `sink`; once, before the first batch. Raises a StartupError."""
        try:
            return Recovery(self._connection, self._options.path, sink).run()
        except apsw.Error as error:
            raise startup_error(self._options.path, error) from error

    def apply(self, batch: Batch) -> Outcome:
        """Store the batch, whole or not at all; the outcome says which. Raises only for mistakes in the program."""
        begun = time.perf_counter()
        self._log_bytes = 0
        if not self._last_failed and _is_empty(batch):
            return self._succeeded(batch, (), (), begun)
        try:
            self._connection.execute("BEGIN IMMEDIATE")
            inserts, retries = self._write(batch)
            self._connection.execute("COMMIT")
        except _REFUSALS as error:
            return self._failed(batch, error, begun)
        except BaseException:
            self._roll_back()
            raise
        return self._succeeded(batch, inserts, retries, begun)

    def maintain(self) -> bool:
        """Forget a little of what is old enough; True: there is more to do now. A failure becomes a warning."""
        try:
            more = self._cleanup.slice()
        except apsw.Error as error:
            self._roll_back()
            self._cleanup_failure = f"the clean-up failed: {error}"
            return False
        self._cleanup_failure = ""
        self._checkpoints.after_commit()
        return more

    def close(self) -> None:
        """Finish what the durability setting promises and close the file; another connection may keep its WAL alive."""
        if self._checkpoints.shrink():
            # The last connection to close may now remove the empty WAL.
            self._connection.config(apsw.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, 0)
        self._connection.close(True)

    def _write(self, batch: Batch) -> tuple[tuple[InsertOutcome, ...], tuple[RetryOutcome, ...]]:
        connection = self._connection
        if batch.events:
            row = pack(batch.events)
            self._log_bytes = len(row)
            connection.execute(_LOG_ROW, (batch.number, row))
        if batch.ended:
            self._end(batch.ended)
        if batch.cancelled:
            self._end(batch.cancelled)
        if batch.pauses:
            connection.executemany(
                _PAUSE,
                (
                    (int(State.PAUSED if change.paused else State.IN_PROGRESS), change.submission)
                    for change in batch.pauses
                ),
            )
        inserts = tuple(insert(connection, new) for new in batch.inserts)
        if batch.outputs:
            connection.executemany(
                _INSERT_DIRECT_OUTPUT, ((output.submission, output.chunk, output.content) for output in batch.outputs)
            )
        if batch.blocks:
            write_blocks(connection, batch.number, batch.blocks)
        retries = tuple(retry(connection, batch.number, new) for new in batch.retries)
        if batch.log_through is not None:
            connection.execute(_DELETE_LOG, (batch.log_through,))
        if batch.blocks or batch.retries or batch.log_through is not None or self._last_failed:
            # A number that a block carries must not come again for a log row, see Recovery.
            connection.execute(_SET_MARK, ("last_batch", batch.number))
        if batch.id_mark_ms is not None:
            connection.execute(_SET_MARK, ("id_mark_ms", batch.id_mark_ms))
        return inserts, retries

    def _end(self, ended: tuple[EndedSubmission, ...]) -> None:
        """Those that are unfinished; their strategic metadata leaves the lookup table."""
        rows = self._connection.executemany(
            _END,
            (
                (int(one.state), one.chunks_done, one.ended_us, one.failed_chunk, one.failure, one.submission)
                for one in ended
            ),
        )
        dropped = [
            (key, value, submission)
            for submission, pairs in rows
            if pairs != "{}"
            for key, value in strategic_pairs(pairs).items()
        ]
        if dropped:
            self._connection.executemany(_DROP_STRATEGIC, dropped)

    def _succeeded(
        self, batch: Batch, inserts: tuple[InsertOutcome, ...], retries: tuple[RetryOutcome, ...], begun: float
    ) -> Outcome:
        self._last_failed = False
        seconds = time.perf_counter() - begun
        wal_bytes = self._checkpoints.wal_bytes
        checkpoint_seconds = self._checkpoints.after_commit()
        forgotten, forgotten_completed = self._cleanup.take_forgotten()
        return Outcome(
            number=batch.number,
            inserts=inserts,
            retries=retries,
            seconds=seconds,
            log_bytes=self._log_bytes,
            wal_bytes=wal_bytes,
            checkpoint_seconds=checkpoint_seconds,
            fsyncs=self._checkpoints.take_fsyncs(),
            forgotten=forgotten,
            forgotten_completed=forgotten_completed,
            warning=self._checkpoints.failure or self._cleanup_failure,
        )

    def _failed(self, batch: Batch, error: Exception, begun: float) -> Outcome:
        self._last_failed = True
        failure = self._failure(error)
        self._roll_back()
        if failure is Failure.STORAGE_FULL:
            self._checkpoints.shrink()
        return Outcome(
            number=batch.number,
            failure=failure,
            reason=str(error),
            seconds=time.perf_counter() - begun,
            wal_bytes=self._checkpoints.wal_bytes,
            fsyncs=self._checkpoints.take_fsyncs(),
            warning=self._checkpoints.failure or self._cleanup_failure,
        )

    def _failure(self, error: Exception) -> Failure:
        if isinstance(error, apsw.FullError):
            return Failure.STORAGE_FULL
        no_space = isinstance(error, apsw.IOError | apsw.CantOpenError) and self._connection.system_errno in _NO_SPACE
        return Failure.STORAGE_FULL if no_space else Failure.ERROR

    def _roll_back(self) -> None:
        # SQLite has rolled back by itself after some errors.
        if self._connection.in_transaction:
            self._connection.execute("ROLLBACK")


def _is_empty(batch: Batch) -> bool:
    return not (
        batch.events
        or batch.ended
        or batch.cancelled
        or batch.pauses
        or batch.inserts
        or batch.retries
        or batch.outputs
        or batch.blocks
        or batch.log_through is not None
        or batch.id_mark_ms is not None
    )

"""Keeps the WAL short: finishes a checkpoint between two commits. With external checkpoints it only measures."""

from __future__ import annotations

import time

import apsw

from opsqueue.server.writer.batch import JournalOptions
from opsqueue.server.writer.database_file import BUSY_TIMEOUT_MS, PAGE_SIZE

#: How long a checkpoint waits for readers to end their snapshots, which are short.
READERS_WAIT_MS = 10
#: After a checkpoint that readers kept from finishing, the WAL grows by this many bytes before the next attempt.
RETRY_AFTER_BYTES = 1024 * 1024

_WAL_HEADER_BYTES = 32
_FRAME_HEADER_BYTES = 24


class Checkpoints:
    """Belongs to the writing connection and its thread."""

    def __init__(self, connection: apsw.Connection, options: JournalOptions) -> None:
        self._connection = connection
        self._options = options
        self._frames = 0
        self._fsyncs = 0
        self._next_at_bytes = options.checkpoint_bytes
        #: Why the last checkpoint failed, other than for a reader; empty when it did not.
        self.failure = ""
        connection.set_wal_hook(self._committed_frames)

    @property
    def wal_bytes(self) -> int:
        """Of the WAL's part in use; the file may be longer and is written again from its beginning."""
        if not self._frames:
            return 0
        return _WAL_HEADER_BYTES + self._frames * (_FRAME_HEADER_BYTES + PAGE_SIZE)

    def take_fsyncs(self) -> int:
        """Times that SQLite told the disk to keep what was written, since this was asked last: what its way of doing
        things amounts to, which a test compares with the calls themselves.
        """
        taken, self._fsyncs = self._fsyncs, 0
        return taken

    def after_commit(self) -> float | None:
        """Finish a checkpoint if one is due; the seconds it took, None: none was finished."""
        if self._options.external_checkpoints or self.wal_bytes < self._next_at_bytes:
            return None
        begun = time.perf_counter()
        # RESTART, not PASSIVE: only a WAL that is wholly in the file is written again from its beginning.
        if not self._checkpoint(apsw.SQLITE_CHECKPOINT_RESTART, READERS_WAIT_MS):
            self._next_at_bytes = self.wal_bytes + RETRY_AFTER_BYTES
            return None
        return time.perf_counter() - begun

    def shrink(self) -> bool:
        """Empty the WAL and give its space back, as far as readers allow; False: not now."""
        if self._options.external_checkpoints:
            return False
        return self._checkpoint(apsw.SQLITE_CHECKPOINT_TRUNCATE, READERS_WAIT_MS)

    def _checkpoint(self, mode: int, wait_ms: int) -> bool:
        self.failure = ""
        self._connection.set_busy_timeout(wait_ms)
        try:
            self._connection.wal_checkpoint("main", mode)
        except apsw.BusyError:
            return False
        except apsw.Error as error:
            self.failure = f"a checkpoint failed: {error}"
            return False
        finally:
            self._connection.set_busy_timeout(BUSY_TIMEOUT_MS)
        if self._frames:
            self._fsyncs += 2  # the log, then the database
        self._frames = 0
        self._next_at_bytes = self._options.checkpoint_bytes
        return True

    def _committed_frames(self, connection: apsw.Connection, database: str, frames: int) -> int:
        # The frames' own; with the first of a log that begins again, its header's.
        self._fsyncs += (self._options.durability == "full") + (frames < self._frames or not self._frames)
        self._frames = frames
        return apsw.SQLITE_OK

"""Forgets submissions that ended long enough ago, and gives free pages back, a few milliseconds at a time.

Everything that belongs to a submission goes before its row, so that an interrupted clean-up goes on where it stopped.
"""

from __future__ import annotations

import time
from typing import Any

import apsw

from opsqueue.server.sql import queries
from opsqueue.server.writer.batch import JournalOptions, State

#: One slice holds the connection about this long.
SLICE_S = 0.004
#: Submissions that a slice looks at.
CANDIDATES = 256
#: A statement may delete more rows at once while the last one was faster than this.
QUICK_STATEMENT_S = 0.0005
#: Free pages that stay in the file for what comes next: these, or a quarter of the file.
KEEP_FREE_PAGES = 4_096
#: Pages that one slice gives back.
VACUUM_PAGES = 64

_SQL = queries("cleanup")
_OLDEST_ENDED = _SQL["oldest_ended"]
_PARTS = (_SQL["delete_inputs"], _SQL["delete_outputs"], _SQL["delete_blocks"])
_DELETE_RETRY = _SQL["delete_retry"]
_DELETE_SUBMISSION = _SQL["delete_submission"]


class Cleanup:
    """Belongs to the writing connection and its thread. Raises apsw.Error with the transaction still open."""

    def __init__(self, connection: apsw.Connection, options: JournalOptions) -> None:
        self._connection = connection
        self._age_us = int(options.max_submission_age_s * 1_000_000)
        #: Forgotten since `take_forgotten`.
        self._forgotten = 0
        self._forgotten_completed = 0

    def take_forgotten(self) -> tuple[int, int]:
        """Submissions forgotten since the last call, and how many of them were completed."""
        taken = self._forgotten, self._forgotten_completed
        self._forgotten = self._forgotten_completed = 0
        return taken

    def slice(self) -> bool:
        """Do a little; True: there is more to do now."""
        cutoff_us = time.time_ns() // 1000 - self._age_us
        candidates: list[tuple[Any, ...]]
        candidates = self._connection.execute(_OLDEST_ENDED, (cutoff_us, CANDIDATES)).fetchall()
        if not candidates:
            return self._vacuum()
        deadline = time.perf_counter() + SLICE_S
        gone: list[int] = []
        self._connection.execute("BEGIN IMMEDIATE")
        for submission, state in candidates:
            if not self._forget(submission, state, deadline):
                break
            gone.append(state)
        self._connection.execute("COMMIT")
        self._forgotten += len(gone)
        self._forgotten_completed += gone.count(State.COMPLETED)
        return True

    def _forget(self, submission: int, state: int, deadline: float) -> bool:
        """False: the time was over first, and its row is still there."""
        for delete in _PARTS:
            rows = 1
            begun = time.perf_counter()
            while True:
                if begun > deadline:
                    return False
                self._connection.execute(delete, (submission, rows))
                if not self._connection.changes():
                    break
                ended = time.perf_counter()
                rows = rows * 2 if ended - begun < QUICK_STATEMENT_S else 1
                begun = ended
        if state == State.FAILED:
            self._connection.execute(_DELETE_RETRY, (submission,))
        self._connection.execute(_DELETE_SUBMISSION, (submission,))
        return True

    def _vacuum(self) -> bool:
        free: int = self._connection.pragma("freelist_count")
        if free <= KEEP_FREE_PAGES or free <= self._connection.pragma("page_count") // 4:
            return False
        self._connection.execute(f"PRAGMA incremental_vacuum({VACUUM_PAGES})").fetchall()
        return True

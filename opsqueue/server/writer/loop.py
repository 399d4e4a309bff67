"""The writer's loop: one thread that drains the rings, decides, hands batches to the journal thread, and sleeps.

No asyncio, no parsing, no network, no SQLite.
"""

from __future__ import annotations

import contextlib
import math
import os
import select
import signal
import time

from opsqueue._speedups.board import Board
from opsqueue._speedups.counters import Counter
from opsqueue._speedups.dispatch import Dispatch
from opsqueue._speedups.engine import Engine
from opsqueue._speedups.rounds import Rounds
from opsqueue.server.context import WRITER_SLOT, Control, ServerContext, frontend_slot
from opsqueue.server.logs import logger
from opsqueue.server.writer.commits import Commits
from opsqueue.server.writer.journal_thread import JournalThread

#: How long a stop waits for the commit in hand and the last one.
STOP_COMMITS_WITHIN_S = 0.6

log = logger("writer")


class SupervisorGoneError(Exception):
    """The supervisor is gone; the writer ends at once, the journal has what was acknowledged."""


class WriterLoop:
    """Runs until the supervisor says stop."""

    def __init__(
        self,
        *,
        context: ServerContext,
        control: Control,
        engine: Engine,
        dispatch: Dispatch,
        commits: Commits,
        journal: JournalThread,
        journal_wake: int,
    ) -> None:
        self._board: Board = context.board
        self._control = control
        self._dispatch = dispatch
        self._commits = commits
        self._journal = journal
        self._journal_wake = journal_wake
        self._rounds = Rounds(
            engine,
            dispatch,
            context.board,
            WRITER_SLOT,
            rings=[channel.writer_wake for channel in context.channels],
            others=[journal_wake, control.channel.fileno()],
        )
        self._stopping = False

    def run(self) -> None:
        """Until told to stop; then everything that was applied is in the file, or the log says why not."""
        while not self._stopping:
            due = self._journals_part()
            ready = self._rounds.run(
                due,
                until_change=due == math.inf and not self._journal.busy,
                receiving=not self._commits.overloaded,
            )
            if self._journal_wake in ready:
                os.eventfd_read(self._journal_wake)
            if self._control.channel.fileno() in ready:
                self._obey()
            if self._dispatch.bad_frontends:
                self._end_bad_frontends()
        self._stop()

    def _journals_part(self) -> float:
        """Take what the journal has finished, hand it what is due; when the next is due, on the monotonic clock."""
        if self._journal.failed is not None:
            raise RuntimeError("the journal thread ended") from self._journal.failed
        commits = self._commits
        if commits.take_outcome():
            self._dispatch.serve()
        now = time.monotonic()
        due = commits.due_in(now)
        if due is None:
            return math.inf
        if due > 0:
            return now + due
        commits.close_batch()
        return math.inf

    def _obey(self) -> None:
        order = self._control.channel.recv(64)
        if not order:
            raise SupervisorGoneError
        if b"S" in order:
            self._stopping = True

    def _end_bad_frontends(self) -> None:
        """A ring with invalid positions or lengths ends its front-end, and nothing else; the supervisor replaces it."""
        for index in self._dispatch.bad_frontends:
            pid = self._board.pid(frontend_slot(index))
            log.error("a front-end's ring is damaged; the front-end is ended", frontend=index, pid=pid)
            self._board.add(WRITER_SLOT, Counter.BAD_RINGS, 1)
            with contextlib.suppress(ProcessLookupError):  # it has ended by itself
                os.kill(pid, signal.SIGKILL)
        self._dispatch.bad_frontends.clear()

    def _stop(self) -> None:
        """Take what is still in the rings, store it, and end the journal in order."""
        deadline = time.monotonic() + STOP_COMMITS_WITHIN_S
        while self._dispatch.turn():
            pass
        while time.monotonic() < deadline:
            self._commits.take_outcome()
            if not self._journal.busy:
                if self._commits.due_in(time.monotonic()) is None:
                    break
                self._commits.close_batch()
            select.select([self._journal_wake], [], [], 0.01)
        else:
            log.error("stopped with changes that could not be stored in time; they will be done again")
        self._dispatch.serve()
        self._journal.close(timeout=STOP_COMMITS_WITHIN_S)

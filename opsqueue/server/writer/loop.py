"""The writer's loop: one thread that drains the rings, decides, hands batches to the journal thread, and sleeps.

No asyncio, no parsing, no network, no SQLite.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import time

from opsqueue._speedups.board import Board
from opsqueue._speedups.counters import Counter
from opsqueue._speedups.dispatch import Dispatch
from opsqueue._speedups.engine import Engine
from opsqueue.server.context import WRITER_SLOT, Control, ServerContext, frontend_slot
from opsqueue.server.logs import logger
from opsqueue.server.writer.commits import Commits
from opsqueue.server.writer.journal_thread import JournalThread

#: Time that the engine may spend on sliced work (index builds, freeing) in one turn.
WORK_SLICE_NS = 2_000_000
#: The loop goes round at least this often, so that its progress word moves.
LONGEST_SLEEP_S = 1.0
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
        self._engine = engine
        self._dispatch = dispatch
        self._commits = commits
        self._journal = journal
        self._eventfds = {channel.writer_wake for channel in context.channels} | {journal_wake}
        self._poll = select.poll()
        for fd in self._eventfds:
            self._poll.register(fd, select.POLLIN)
        self._poll.register(control.channel.fileno(), select.POLLIN)
        self._stopping = False

    def run(self) -> None:
        """Until told to stop; then everything that was applied is in the file, or the log says why not."""
        while not self._stopping:
            more = self._turn()
            if not more:
                self._sleep()
        self._stop()

    def _turn(self) -> bool:
        """One round; True: there may be more to do at once."""
        engine, dispatch, commits = self._engine, self._dispatch, self._commits
        # Before the records: a reservation's time must not begin when the loop fell asleep. What arrived in time counts
        # before what is due now expires.
        engine.now_ms = time.monotonic_ns() // 1_000_000
        more = not commits.overloaded and dispatch.turn()
        engine.advance(time.monotonic_ns() // 1_000_000)
        if self._journal.failed is not None:
            raise RuntimeError("the journal thread ended") from self._journal.failed
        more |= commits.take_outcome()
        more |= engine.work(WORK_SLICE_NS)
        due = commits.due_in(time.monotonic())
        if due is not None and due <= 0:
            commits.close_batch()
        dispatch.serve()
        if dispatch.bad_frontends:
            self._end_bad_frontends()
        self._board.progress(WRITER_SLOT)
        return more

    def _sleep(self) -> None:
        if not self._commits.overloaded and not self._dispatch.prepare_to_sleep():
            return
        self._board.add(WRITER_SLOT, Counter.WRITER_WAKEUPS, 1)
        for fd, _ in self._poll.poll(self._sleep_ms()):
            if fd in self._eventfds:
                os.eventfd_read(fd)
            else:
                self._obey()
        self._dispatch.awake()

    def _sleep_ms(self) -> int:
        """Until the next timer or commit, rounded up: waking too early would only spin."""
        waits = [LONGEST_SLEEP_S]
        due = self._commits.due_in(time.monotonic())
        if due is not None:
            waits.append(due)
        timer_ms = self._engine.next_timer_ms()
        if timer_ms is not None:
            waits.append(timer_ms / 1000)
        return max(0, int(min(waits) * 1000 + 0.999))

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
            self._poll.poll(10)
        else:
            log.error("stopped with changes that could not be stored in time; they will be done again")
        self._dispatch.serve()
        self._journal.close(timeout=STOP_COMMITS_WITHIN_S)

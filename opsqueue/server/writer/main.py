"""The writer process: opens the journal, recovers the engine from it, and runs the loop. Forked by the supervisor."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable, Iterator

from opsqueue._speedups.board import Board, SlotState
from opsqueue._speedups.counters import Counter
from opsqueue._speedups.dispatch import Dispatch
from opsqueue._speedups.engine import Engine
from opsqueue.server import requests
from opsqueue.server.context import WRITER_SLOT, Control, ServerContext
from opsqueue.server.errors import StartupError
from opsqueue.server.logs import logger
from opsqueue.server.writer.batch import JournalOptions, LoadedBlock, LoadedSubmission, State
from opsqueue.server.writer.commits import Commits
from opsqueue.server.writer.decisions import Decisions
from opsqueue.server.writer.gathering import Asker
from opsqueue.server.writer.ids import SubmissionIds
from opsqueue.server.writer.journal import SqliteJournal
from opsqueue.server.writer.journal_thread import JournalThread
from opsqueue.server.writer.loop import SupervisorGoneError, WriterLoop
from opsqueue.server.writer.watches import Watches

#: A chunk that expired at its retry limit may still be completed for this long, then its submission fails.
GRACE_MS = 2_000
#: While it recovers, the writer says that it lives after so many rows.
ROWS_A_SIGN = 256

log = logger("writer")


class _Recovery:
    """Passes what the journal loads to the engine, and counts it; a long one is not taken for a hang."""

    def __init__(self, engine: Engine, board: Board) -> None:
        self._engine = engine
        self._board = board
        self.unfinished = 0
        self.log_bytes = 0
        self.log_rows = 0

    def load_submissions(self, rows: Iterable[LoadedSubmission]) -> None:
        self._engine.load_submissions(self._counted(rows))

    def _counted(self, rows: Iterable[LoadedSubmission]) -> Iterator[LoadedSubmission]:
        for number, row in enumerate(rows):
            if number % ROWS_A_SIGN == 0:
                self._board.progress(WRITER_SLOT)
            self.unfinished += row[1] <= State.PAUSED  # by its place: there may be a million
            yield row

    def load_blocks(self, rows: Iterable[LoadedBlock]) -> None:
        self._engine.load_blocks(self._with_signs(rows))

    def _with_signs(self, rows: Iterable[LoadedBlock]) -> Iterator[LoadedBlock]:
        for number, row in enumerate(rows):
            if number % ROWS_A_SIGN == 0:
                self._board.progress(WRITER_SLOT)
            yield row

    def events(self, events: bytes) -> None:
        self.log_bytes += len(events)
        self.log_rows += 1
        self._engine.events(events)
        self._board.progress(WRITER_SLOT)


#: Seconds that the journal thread waits for the interpreter's lock while the loop is busy, once a statement: with
#: Python's 0.005 s a commit under full load took three times as long.
SWITCH_INTERVAL_S = 0.001


def run(context: ServerContext, control: Control, lock_fd: int) -> int:
    """Serve until told to stop; the exit code. `lock_fd` is the database's lock, held by being open."""
    context.board.start(WRITER_SLOT, SlotState.STARTING)
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    try:
        _serve(context, control)
    except StartupError as error:
        print(f"opsqueue: {error}", file=sys.stderr, flush=True)
        return 1
    except SupervisorGoneError:
        return 1
    finally:
        os.close(lock_fd)
    return 0


def _serve(context: ServerContext, control: Control) -> None:
    settings = context.settings
    begun = time.monotonic()
    # Raised first: the front-ends close their consumers and answer 503 while this one recovers.
    endpoints = [channel.writer_end() for channel in context.channels]
    engine = Engine(
        reservation_ms=int(settings.reservation_expiration * 1000),
        max_retries=settings.max_chunk_retries,
        max_crashes=settings.max_chunk_crashes,
        grace_ms=GRACE_MS,
    )
    engine.use_board(context.board, WRITER_SLOT)
    engine.advance(time.monotonic_ns() // 1_000_000)
    journal = SqliteJournal(
        JournalOptions(
            path=context.database_path,
            temporary=context.database_is_temporary,
            durability=settings.durability,
            external_checkpoints=settings.external_checkpoints,
            max_submission_age_s=settings.max_submission_age,
        )
    )
    recovery = _Recovery(engine, context.board)
    loaded = journal.load(recovery)
    journal_wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    thread = JournalThread(journal, wake=lambda: os.eventfd_write(journal_wake, 1))
    ids = SubmissionIds(settings.instance, loaded.id_mark_ms)

    def reply(asker: Asker, answer: requests.Reply) -> None:
        dispatch.reply(asker.frontend, asker.incarnation, asker.request, requests.encode(answer))

    dispatch = Dispatch(
        engine,
        endpoints,
        context.board,
        WRITER_SLOT,
        lambda *request: decisions.take(*request),
        lambda *output: decisions.output(*output),
    )
    watches = Watches(engine)
    commits = Commits(
        engine=engine,
        dispatch=dispatch,
        journal=thread,
        ids=ids,
        board=context.board,
        reply=reply,
        last_batch=loaded.last_batch,
        completed=loaded.completed,
        in_progress=recovery.unfinished,
        watches=watches,
    )
    commits.folding.recovered(recovery.log_bytes, recovery.log_rows)
    decisions = Decisions(
        engine=engine,
        commits=commits,
        ids=ids,
        watches=watches,
        memory_limit=settings.memory_limit,
        reply=reply,
    )
    loop = WriterLoop(
        context=context,
        control=control,
        engine=engine,
        dispatch=dispatch,
        commits=commits,
        journal=thread,
        journal_wake=journal_wake,
    )
    context.board.put(WRITER_SLOT, Counter.COMMIT_HEALTHY, 1)
    context.board.set_state(WRITER_SLOT, SlotState.SERVING)
    control.channel.sendall(b"R")
    log.info(
        "writer serves",
        database=context.database_path,
        submissions=recovery.unfinished,
        log_rows=recovery.log_rows,
        seconds=round(time.monotonic() - begun, 3),
    )
    loop.run()

"""Group commit: closes batches, sends one at a time to the journal, and carries out what its outcome means.

Owns what is staged and what is applied but not stored. Reads no ring and sends no reply itself: `reply` does.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

from opsqueue._speedups.board import Board
from opsqueue._speedups.counters import Counter, observe_seconds
from opsqueue._speedups.dispatch import Dispatch
from opsqueue._speedups.engine import Engine
from opsqueue.server import requests
from opsqueue.server.context import WRITER_SLOT
from opsqueue.server.logs import logger
from opsqueue.server.writer.batch import (
    Batch,
    EndedSubmission,
    Failure,
    InsertOutcome,
    InsertResult,
    LoadedBlock,
    LoadedSubmission,
    NewRetry,
    Outcome,
    RetryOutcome,
    RetryResult,
    State,
)
from opsqueue.server.writer.folding import NOTHING, Folding
from opsqueue.server.writer.gathering import Applied, Asker, Commit, Staged
from opsqueue.server.writer.ids import SubmissionIds
from opsqueue.server.writer.journal_thread import JournalThread
from opsqueue.server.writer.watches import Watches

#: The oldest change waits at most this long for its commit when no answer depends on it. DESIGN: deferring by 5 ms is
#: worth more than a second thread.
COMMIT_AFTER_S = 0.005
#: Bytes of applied changes that may wait for a commit that succeeds. Beyond that no record is taken until one does: one
#: log row holds them all, and memory is not to grow without bound while the disk is full.
LARGEST_CARRIED_BYTES = 64 * 1024 * 1024
#: Pause between two attempts while commits fail.
RETRY_AFTER_S = 0.1
#: What a producer is told to wait when a commit failed.
RETRY_AFTER_ANSWER_S = 1

log = logger("writer")


class Commits:
    """One commit at a time; the next gathers meanwhile."""

    def __init__(
        self,
        *,
        engine: Engine,
        dispatch: Dispatch,
        journal: JournalThread,
        ids: SubmissionIds,
        board: Board,
        reply: Callable[[Asker, requests.Reply], None],
        last_batch: int,
        completed: int,
        in_progress: int,
        watches: Watches,
    ) -> None:
        self._engine = engine
        self._dispatch = dispatch
        self._journal = journal
        self._ids = ids
        self._board = board
        self._reply = reply
        self._watches = watches
        self._folding = Folding(engine)
        self._committed = last_batch
        self._in_hand: Commit | None = None
        self._carried = Applied()
        self._carried_bytes = 0
        self._changed_at: float | None = None
        self._not_before = 0.0
        self._last_success = time.monotonic()
        #: The next batch's.
        self.staged = Staged()
        self.applied = Applied()
        #: As the file has it: unfinished submissions, and completed ones that are not forgotten.
        self.in_progress = in_progress
        self.completed = completed
        self.healthy = True
        engine.batch = last_batch + 1
        self._publish_gauges()

    @property
    def folding(self) -> Folding:
        return self._folding

    @property
    def overloaded(self) -> bool:
        """Commits have failed for so long that nothing more should be applied before one succeeds."""
        return self._carried_bytes > LARGEST_CARRIED_BYTES

    def covers(self, submission: int) -> bool:
        """The file has every change of an unfinished submission."""
        return self._engine.changed_batch(submission) <= self._committed

    @property
    def promised_bytes(self) -> int:
        """Memory that submissions which the engine does not hold yet may come to need: staged, or with the journal."""
        return self.staged.needed + (self._in_hand.staged.needed if self._in_hand else 0)

    def is_being_cancelled(self, submission: int) -> bool:
        """A cancel of it is staged, or on its way through the journal."""
        return submission in self.staged.cancels or (
            self._in_hand is not None and submission in self._in_hand.staged.cancels
        )

    def join_cancel(self, submission: int, asker: Asker) -> bool:
        """Wait for the outcome of a cancel that another has asked for; False: there is none."""
        for staged in (self.staged, self._in_hand.staged if self._in_hand else None):
            if staged is not None and submission in staged.cancels:
                staged.cancels[submission].append(asker)
                return True
        return False

    def seconds_since_success(self, now: float) -> float:
        """Since the last commit that succeeded, on the monotonic clock."""
        return now - self._last_success

    # --- closing a batch ---

    def due_in(self, now: float) -> float | None:
        """Seconds until a batch should close: 0 now, None nothing to store or the journal is busy."""
        if self._journal.busy:
            return None
        if self._changed_at is None and (self._dispatch.has_changes() or self.applied or self._carried):
            self._changed_at = now
        if self.staged or self._folding.active:
            wait = 0.0
        elif self._changed_at is not None:
            wait = max(0.0, self._changed_at + COMMIT_AFTER_S - now)
        else:
            return None
        return max(wait, self._not_before - now)

    def close_batch(self) -> None:
        """Close what has gathered and hand it to the journal."""
        engine = self._engine
        number = engine.batch
        now_us = time.time_ns() // 1000
        fresh = Applied(
            self._dispatch.take_events(),
            [
                EndedSubmission(submission, State(state), chunks_done, now_us, failed_chunk, failure)
                for submission, state, chunks_done, failed_chunk, failure in self._dispatch.take_ended()
            ],
            self.applied.outputs,
        )
        applied = self._carried.before(fresh)
        staged = self.staged
        self.staged, self.applied, self._carried = Staged(), Applied(), Applied()
        self._changed_at = None
        self._drop_overtaken_cancels(staged, applied)
        if self._watches:
            woken = self._watches.woken(ended.submission for ended in applied.ended)
            staged.answers.extend((asker, requests.Done()) for asker in woken)
        mark = self._ids.mark_to_store()
        if mark is None and staged.pings:
            mark = self._ids.next_mark()  # so that the commit writes, and a ping says whether it can
        # after the ends of this batch were taken, before a fold may make the engine forget a failed submission
        retries = tuple(self._with_blocks(new) for new, _ in staged.retries)
        fold = self._folding.slice_for(number, applied.events) if self.healthy else NOTHING
        batch = Batch(
            number=number,
            events=applied.events,
            ended=tuple(applied.ended),
            cancelled=tuple(
                EndedSubmission(submission, State.CANCELLED, engine.chunks_done(submission), now_us)
                for submission in staged.cancels
            ),
            pauses=tuple(change for change, _ in staged.pauses),
            inserts=tuple(new for new, _ in staged.inserts),
            outputs=tuple(applied.outputs),
            blocks=fold.rows,
            retries=retries,
            log_through=fold.log_through,
            id_mark_ms=mark,
        )
        engine.batch = number + 1
        self._in_hand = Commit(batch, staged, applied)
        self._journal.submit(batch)

    def _with_blocks(self, new: NewRetry) -> NewRetry:
        """What the engine knows of a failed submission is final, and the file may not have all of it."""
        engine = self._engine
        if not engine.holds(new.failed) or engine.state(new.failed) != State.FAILED:
            return new
        return replace(new, blocks=self._watches.all_done(new.failed))

    def _drop_overtaken_cancels(self, staged: Staged, applied: Applied) -> None:
        """A submission that ended before its cancel was sent has ended: whoever cancelled reads that in the file."""
        for ended in applied.ended:
            askers = staged.cancels.pop(ended.submission, None)
            if askers:
                staged.answers.extend((asker, requests.NotHeld()) for asker in askers)

    # --- outcomes ---

    def take_outcome(self) -> bool:
        """Carry out what the journal has finished, if anything; True: something was."""
        outcome = self._journal.poll()
        if outcome is None:
            return False
        commit = self._in_hand
        if commit is None or commit.batch.number != outcome.number:
            raise RuntimeError(f"the journal answered batch {outcome.number}, which is not in hand")
        self._in_hand = None
        self._count(outcome, commit)
        if outcome.warning:
            log.warning(outcome.warning)
        if outcome.failure is None:
            self._succeeded(commit, outcome)
        else:
            self._failed(commit, outcome)
        self._publish_gauges()
        return True

    def _succeeded(self, commit: Commit, outcome: Outcome) -> None:
        if not self.healthy:
            log.info("commits succeed again", batch=outcome.number)
        self.healthy = True
        self._carried_bytes = 0
        self._committed = outcome.number
        self._last_success = time.monotonic()
        self._not_before = 0.0
        batch, staged = commit.batch, commit.staged
        if batch.id_mark_ms is not None:
            self._ids.mark_stored(batch.id_mark_ms)
        self._folding.committed(batch, outcome)
        self.completed -= outcome.forgotten_completed
        for ended in batch.ended:
            self.in_progress -= 1
            self.completed += ended.state is State.COMPLETED
            self._engine.ended_committed(ended.submission)
        for (new, asker), result in zip(staged.inserts, outcome.inserts, strict=True):
            self._inserted(new.submission, new.insert, asker, result)
        for (_, asker), retried in zip(staged.retries, outcome.retries, strict=True):
            self._reply(asker, self._retried(retried))
        for submission, askers in staged.cancels.items():
            self._cancelled(submission)
            for asker in askers:
                self._reply(asker, requests.Done())
        for change, asker in staged.pauses:
            self._engine.set_paused(change.submission, change.paused)
            self._reply(asker, requests.Done())
        for asker, answer in staged.answers:
            self._reply(asker, answer)
        for asker in staged.pings:
            self._reply(asker, requests.Done())

    def _inserted(self, submission: int, insert: requests.Insert, asker: Asker, result: InsertOutcome) -> None:
        if result.result is InsertResult.CONFLICT:
            self._reply(asker, requests.Conflict(result.submission))
            return
        if result.result is InsertResult.NEW:
            self._board.add(WRITER_SLOT, Counter.SUBMISSIONS_TOTAL, 1)
            if insert.count == 0:
                self._board.add(WRITER_SLOT, Counter.SUBMISSIONS_COMPLETED, 1)
                self.completed += 1
            else:
                self.in_progress += 1
                self._engine.add_submission(
                    submission,
                    insert.count,
                    insert.chunk_size,
                    insert.strategic_metadata,
                    direct=insert.contents is not None,
                    paused=insert.paused,
                )
        self._reply(asker, requests.Inserted(result.submission, result.result is InsertResult.KNOWN))

    def _retried(self, outcome: RetryOutcome) -> requests.Reply:
        """Hand out what is left of a new retry; the answer, whatever came of it."""
        match outcome.result:
            case RetryResult.NEW if outcome.loaded is not None:
                self._add_retry(outcome.loaded, outcome.blocks)
                return requests.Inserted(outcome.submission, False)
            case RetryResult.KNOWN:
                return requests.Inserted(outcome.submission, True)
            case RetryResult.NOT_FAILED if outcome.state is not None:
                return requests.NotRetryable(outcome.state, None)
            case RetryResult.CONFLICT:
                return requests.NotRetryable(State.FAILED, outcome.submission)
            case RetryResult.INCOMPLETE if self._folding.active:
                reason = "the submission's done chunks are still being written; try again"
                return requests.Unavailable(reason, RETRY_AFTER_ANSWER_S, False)
            case RetryResult.INCOMPLETE:
                return requests.NotRetryable(State.FAILED, None)
            case RetryResult.UNKNOWN:
                return requests.NotHeld()
        raise RuntimeError(f"the journal answered a retry with {outcome.result}, and not what belongs to it")

    def _add_retry(self, loaded: LoadedSubmission, blocks: tuple[LoadedBlock, ...]) -> None:
        """As a start would find it, before any of its chunks is handed out."""
        self._engine.load_submissions((loaded,))
        self._engine.load_blocks(blocks)
        self.in_progress += 1
        left = loaded.chunks_total - self._engine.chunks_done(loaded.submission)
        self._board.add(WRITER_SLOT, Counter.SUBMISSIONS_TOTAL, 1)
        self._board.add(WRITER_SLOT, Counter.CHUNKS_TOTAL, left)

    def _cancelled(self, submission: int) -> None:
        """The file says cancelled: that is final, even if its last chunk was completed meanwhile."""
        self.in_progress -= 1
        # before the engine forgets it, and with it that it is watched
        waiting = self._watches.ended(submission) if self._watches else []
        self._engine.finish_cancel(submission)
        for asker in waiting:
            self._reply(asker, requests.Done())
        for applied in (self.applied, self._carried):
            applied.ended = [ended for ended in applied.ended if ended.submission != submission]

    def _failed(self, commit: Commit, outcome: Outcome) -> None:
        if self.healthy:
            log.error(
                "a commit failed; nothing is lost, it is tried again", batch=outcome.number, reason=outcome.reason
            )
        self.healthy = False
        self._not_before = time.monotonic() + RETRY_AFTER_S
        self._folding.failed(commit.batch)
        self._carried = commit.applied.before(self._carried)
        self._carried_bytes = self._carried.size
        unavailable = requests.Unavailable(
            f"the database refused the commit: {outcome.reason}",
            RETRY_AFTER_ANSWER_S,
            outcome.failure is Failure.STORAGE_FULL,
        )
        staged = commit.staged
        for _, asker in staged.inserts:
            self._reply(asker, unavailable)
        for _, asker in staged.retries:
            self._reply(asker, unavailable)
        for submission, askers in staged.cancels.items():
            self._engine.abort_cancel(submission)
            for asker in askers:
                self._reply(asker, unavailable)
        for _, asker in staged.pauses:
            self._reply(asker, unavailable)
        for asker in staged.pings:
            self._reply(asker, unavailable)
        # What these answers say is in memory and stays true: they wait for the commit that stores it.
        self.staged.answers[:0] = staged.answers

    # --- figures ---

    def _count(self, outcome: Outcome, commit: Commit) -> None:
        board = self._board
        board.add(WRITER_SLOT, Counter.COMMITS if outcome.failure is None else Counter.COMMITS_FAILED, 1)
        board.add(WRITER_SLOT, Counter.FSYNCS, outcome.fsyncs)
        board.add(WRITER_SLOT, Counter.COMMITTED_EVENTS_BYTES, len(commit.batch.events))
        board.add(WRITER_SLOT, Counter.SUBMISSIONS_FORGOTTEN, outcome.forgotten)
        observe_seconds(board, WRITER_SLOT, Counter.HISTOGRAM_COMMIT, outcome.seconds)
        if outcome.checkpoint_seconds is not None:
            board.add(WRITER_SLOT, Counter.CHECKPOINTS, 1)
            observe_seconds(board, WRITER_SLOT, Counter.HISTOGRAM_CHECKPOINT, outcome.checkpoint_seconds)
        board.put(WRITER_SLOT, Counter.WAL_BYTES, outcome.wal_bytes)

    def _publish_gauges(self) -> None:
        self._board.put(WRITER_SLOT, Counter.COMMIT_HEALTHY, int(self.healthy))
        self._board.put(WRITER_SLOT, Counter.SUBMISSIONS_COMPLETED_KEPT, self.completed)

"""Decides the cold requests (opsqueue.server.requests). Stores nothing: it stages, parks or answers."""

from __future__ import annotations

import time
from collections.abc import Callable

import msgspec

from opsqueue._speedups.engine import Engine
from opsqueue.server import requests
from opsqueue.server.logs import logger
from opsqueue.server.writer.batch import DirectOutput, NewRetry, NewSubmission, PauseChange, State
from opsqueue.server.writer.commits import Commits
from opsqueue.server.writer.gathering import Asker
from opsqueue.server.writer.ids import SubmissionIds
from opsqueue.server.writer.watches import Watches

#: A ping believes a commit that succeeded within this time, and asks for one otherwise.
PING_BELIEVES_S = 1.0
#: What a producer is told to wait when the memory limit is reached.
MEMORY_RETRY_AFTER_S = 5

log = logger("writer")


class Decisions:
    """Takes each cold request as it comes from a ring."""

    def __init__(
        self,
        *,
        engine: Engine,
        commits: Commits,
        ids: SubmissionIds,
        watches: Watches,
        memory_limit: int,
        reply: Callable[[Asker, requests.Reply], None],
    ) -> None:
        self._engine = engine
        self._commits = commits
        self._ids = ids
        self._watches = watches
        self._memory_limit = memory_limit
        self._reply = reply

    def take(self, frontend: int, incarnation: int, request: int, payload: bytes) -> None:
        """Decide one request; never raises for what a front-end sent."""
        asker = Asker(frontend, incarnation, request)
        try:
            decoded = requests.decode_request(payload)
        except msgspec.MsgspecError as error:
            log.error("a front-end sent a request that does not decode", frontend=frontend, error=str(error))
            self._reply(asker, requests.Unavailable(f"internal: the request did not decode: {error}", 1, False))
            return
        match decoded:
            case requests.Insert():
                self._insert(asker, decoded)
            case requests.Retry():
                self._retry(asker, decoded)
            case requests.Status():
                self._status(asker, decoded.submission)
            case requests.Progresses():
                self._progresses(asker, decoded.submissions)
            case requests.Cancel():
                self._cancel(asker, decoded.submission)
            case requests.Pause():
                self._pause(asker, decoded.submission, decoded.paused)
            case requests.Counts():
                self._reply(asker, requests.Counted(self._commits.in_progress, self._commits.completed))
            case requests.Ping():
                self._ping(asker)
            case requests.Watch():
                if not self._watches.add(asker, decoded.submission, decoded.beyond):
                    self._reply(asker, requests.Done())
            case requests.Unwatch():
                self._watches.remove(Asker(frontend, incarnation, decoded.watch))
                self._reply(asker, requests.Done())
            case requests.DoneBlocks():
                self._done_blocks(asker, decoded)

    def output(self, submission: int, chunk: int, content: bytes) -> None:
        """The output of a direct chunk whose completion counted."""
        self._commits.applied.outputs.append(DirectOutput(submission, chunk, content))

    def _insert(self, asker: Asker, insert: requests.Insert) -> None:
        if not self._has_room(asker, insert.count):
            return
        now_ns = time.time_ns()
        submission = self._ids.next(now_ns // 1_000_000)
        self._commits.staged.inserts.append((NewSubmission(submission, insert, now_ns // 1000), asker))

    def _retry(self, asker: Asker, retry: requests.Retry) -> None:
        """The file decides whether there is anything to retry, after the ends that are stored with it."""
        if self._has_room(asker, retry.count):
            submission = self._ids.next(time.time_ns() // 1_000_000)
            self._commits.staged.retries.append((NewRetry(submission, retry.submission, retry.count), asker))

    def _has_room(self, asker: Asker, count: int) -> bool:
        """Whether so many chunks more keep the memory limit: then they are counted. If not, it is answered."""
        needed = requests.worst_case_bytes(count)
        held = self._engine.held_bytes
        promised = self._engine.promised + self._commits.promised_bytes + held
        if promised + needed <= self._memory_limit:
            self._commits.staged.needed += needed
            return True
        reason = (
            f"{count} chunks need up to {needed} bytes of memory, {promised} of "
            f"{self._memory_limit} (--memory-limit) are promised, {held} of them for chunks that consumers "
            "hold; try again when submissions have ended"
        )
        self._reply(asker, requests.Unavailable(reason, MEMORY_RETRY_AFTER_S, False))
        return False

    def _status(self, asker: Asker, submission: int) -> None:
        if not self._engine.holds(submission):
            self._reply(asker, requests.NotHeld())
            return
        state = self._engine.state(submission)
        answer: requests.Reply
        if state in (State.IN_PROGRESS, State.PAUSED):
            answer = requests.Progress(self._engine.chunks_done(submission), state == State.PAUSED)
        else:
            answer = requests.NotHeld()
        self._answer_when_covered(asker, submission, answer)

    def _progresses(self, asker: Asker, submissions: list[int]) -> None:
        engine = self._engine
        held = [submission for submission in submissions if engine.holds(submission)]
        done = {
            submission: engine.chunks_done(submission)
            for submission in held
            if engine.state(submission) in (State.IN_PROGRESS, State.PAUSED)
        }
        answer = requests.Progressed([done.get(submission) for submission in submissions])
        if all(map(self._commits.covers, held)):
            self._reply(asker, answer)
        else:
            self._commits.staged.answers.append((asker, answer))

    def _done_blocks(self, asker: Asker, question: requests.DoneBlocks) -> None:
        if not self._engine.holds(question.submission):
            self._reply(asker, requests.NotHeld())
            return
        try:
            answer = self._watches.blocks(question)
        except MemoryError as error:
            self._reply(asker, requests.Unavailable(str(error), MEMORY_RETRY_AFTER_S, False))
            return
        self._answer_when_covered(asker, question.submission, answer)

    def _answer_when_covered(self, asker: Asker, submission: int, answer: requests.Reply) -> None:
        if self._commits.covers(submission):
            self._reply(asker, answer)
        else:
            self._commits.staged.answers.append((asker, answer))

    def _cancel(self, asker: Asker, submission: int) -> None:
        if self._commits.join_cancel(submission, asker):
            return
        if not self._engine.holds(submission):
            self._reply(asker, requests.NotHeld())
        elif self._engine.begin_cancel(submission):
            self._commits.staged.cancels[submission] = [asker]
        else:  # it has ended, and the file may not say so yet
            self._answer_when_covered(asker, submission, requests.NotHeld())

    def _pause(self, asker: Asker, submission: int, paused: bool) -> None:
        held = self._engine.holds(submission)
        state = self._engine.state(submission) if held else None
        wanted = State.IN_PROGRESS if paused else State.PAUSED
        if state != wanted or self._commits.is_being_cancelled(submission):
            self._reply(asker, requests.NotHeld())
            return
        self._commits.staged.pauses.append((PauseChange(submission, paused), asker))

    def _ping(self, asker: Asker) -> None:
        recent = self._commits.seconds_since_success(time.monotonic()) < PING_BELIEVES_S
        if self._commits.healthy and recent:
            self._reply(asker, requests.Done())
        else:  # also after a failure: where nothing else happens, only a ping's commit finds out that it is over
            self._commits.staged.pings.append(asker)

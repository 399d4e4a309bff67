"""Who waits for a submission's end or its next completions, and which of its blocks have changed for those who ask.

Wakes with the commit that covers what happened, never before, and keeps nothing for submissions that nobody asks about.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Iterable

from opsqueue._speedups.done_blocks import DoneBlocks
from opsqueue._speedups.engine import Engine
from opsqueue.server import requests
from opsqueue.server.writer.batch import State
from opsqueue.server.writer.gathering import Asker

#: Blocks (512 bytes each) and runs of done blocks in one answer: less than a quarter of a ring, so no fragments.
BLOCKS_AN_ANSWER = 1_024
#: Blocks that the engine tells in one go where they go into no answer.
BLOCKS_AT_ONCE = 1 << 16
#: Bytes of stamps (8 for a block) of all followed submissions; the one that was asked for longest ago goes first.
FOLLOWED_BYTES = 64 * 1024 * 1024
#: What a followed submission counts beside its stamps.
FOLLOWED_OVERHEAD = 256

_UNFINISHED = (State.IN_PROGRESS, State.PAUSED)


class Watches:
    """Parked watches by submission and by asker. Those of a front-end that was replaced go when its successor asks."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._done = DoneBlocks(engine)
        #: Change numbers are valid in this process only: a file that was restored may tell another history.
        self._epoch = time.time_ns() // 1_000_000
        #: The change that each waits to be exceeded; None: waits for the end.
        self._waiting: dict[int, dict[Asker, int | None]] = {}
        self._submission_of: dict[Asker, int] = {}
        #: How many of them wait for a change, by submission: thousands may wait for one, so nobody counts them again.
        self._for_change: dict[int, int] = {}
        self._incarnations: dict[int, int] = {}
        self._followed: OrderedDict[int, int] = OrderedDict()
        self._followed_bytes = 0

    def __len__(self) -> int:
        return len(self._submission_of)

    def add(self, asker: Asker, submission: int, beyond: int | None) -> bool:
        """Park it; False: what it waits for is so already, or there is no such submission here."""
        engine = self._engine
        if not engine.holds(submission) or engine.state(submission) not in _UNFINISHED:
            return False
        if beyond is not None and engine.chunks_done(submission) != beyond:
            return False
        if self._incarnations.get(asker.frontend) != asker.incarnation:
            self._forget_frontend(asker)
        self._waiting.setdefault(submission, {})[asker] = beyond
        self._submission_of[asker] = submission
        if beyond is not None:
            self._for_change[submission] = self._for_change.get(submission, 0) + 1
            self._done.watch(submission)
        return True

    def remove(self, asker: Asker) -> None:
        """It waits no more; nothing if it is not parked."""
        submission = self._submission_of.pop(asker, None)
        if submission is None:
            return
        waiting = self._waiting[submission]
        beyond = waiting.pop(asker)
        if not waiting:
            del self._waiting[submission]
        if beyond is None:
            return
        self._for_change[submission] -= 1
        if self._for_change[submission] == 0:
            del self._for_change[submission]
            self._done.unwatch(submission)

    def _forget_frontend(self, asker: Asker) -> None:
        self._incarnations[asker.frontend] = asker.incarnation
        for other in [known for known in self._submission_of if known.frontend == asker.frontend]:
            self.remove(other)

    def woken(self, ended: Iterable[int]) -> list[Asker]:
        """Whom to tell when the batch that closes now is in the file; `ended`: the submissions that it ends."""
        askers = [asker for submission in ended for asker in self.ended(submission)]
        for submission in self._done.take_changed():
            waiting = self._waiting.get(submission)
            if waiting is None or not self._engine.holds(submission):
                continue
            done = self._engine.chunks_done(submission)
            changed = [asker for asker, beyond in waiting.items() if beyond is not None and done > beyond]
            for asker in changed:
                self.remove(asker)
            if submission in self._for_change:
                self._done.watch(submission)
            askers += changed
        return askers

    def ended(self, submission: int) -> list[Asker]:
        """All that wait for anything of a submission that has ended; they are parked no more."""
        askers = list(self._waiting.pop(submission, ()))
        for asker in askers:
            del self._submission_of[asker]
        if self._for_change.pop(submission, 0):
            self._done.unwatch(submission)
        return askers

    # --- which blocks have changed ---

    def blocks(self, question: requests.DoneBlocks) -> requests.Blocks:
        """The answer to a question about a submission that the engine holds, as memory has it."""
        submission, engine, done = question.submission, self._engine, self._done
        state = engine.state(submission)
        if state in _UNFINISHED:
            self._follow(submission)
        since, upto, at = question.since, question.upto, question.at
        valid = question.epoch == self._epoch and done.knows(submission, upto) and (since == 0 or since <= upto)
        if valid and since:
            valid = done.knows(submission, since)
        if not valid:
            since, upto, at = 0, engine.chunks_done(submission), 0
        elif at == 0:
            since, upto = upto, engine.chunks_done(submission)
        whole = since == 0
        next_at, runs, blocks = done.changed(submission, since, whole, at, BLOCKS_AN_ANSWER)
        return requests.Blocks(
            state=state,
            chunks_total=done.chunks_total(submission),
            chunks_done=engine.chunks_done(submission),
            epoch=self._epoch,
            since=since,
            upto=upto,
            next=next_at,
            reset=not valid,
            runs=runs,
            blocks=blocks,
        )

    def all_done(self, submission: int) -> tuple[tuple[int, bytes], ...]:
        """Every block with done chunks of a submission that the engine holds: (block, done) of BlockRow."""
        found: list[tuple[int, bytes]] = []
        at: int | None = 0
        while at is not None:
            at, runs, blocks = self._done.changed(submission, 0, True, at, BLOCKS_AT_ONCE)
            found += ((block, b"") for first, count in runs for block in range(first, first + count))
            found += blocks
        return tuple(found)

    def _follow(self, submission: int) -> None:
        size = self._done.follow(submission)
        if size == 0:
            return
        if submission not in self._followed:
            self._followed[submission] = size + FOLLOWED_OVERHEAD
            self._followed_bytes += size + FOLLOWED_OVERHEAD
        self._followed.move_to_end(submission)
        while self._followed_bytes > FOLLOWED_BYTES and len(self._followed) > 1:
            self._unfollow(next(iter(self._followed)))

    def _unfollow(self, submission: int) -> None:
        size = self._followed.pop(submission, None)
        if size is not None:
            self._followed_bytes -= size
            self._done.unfollow(submission)

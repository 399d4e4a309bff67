"""How far a submission is and how fast it goes on: from the counts that a client has seen. Does no I/O."""

from __future__ import annotations

import time
from collections import OrderedDict, deque
from typing import Final

import msgspec

from opsqueue.client.values import SubmissionStatus

#: Seconds over which a rate is an average.
WINDOW_S: Final = 30.0
#: Submissions whose rate is known; the one that was asked for least lately is forgotten first.
_REMEMBERED: Final = 1_000


class Progress(msgspec.Struct, frozen=True):
    """How far a submission is: `done` of `total` chunks. `state` is "InProgress", "Paused", "Completed" or the like.

    `rate` is in chunks a second and `estimate` in seconds until the end. Both are None when they are not known: at the
    first look, when nothing moves, and after the end. `failed` counts chunks that failed for good: one at most, since
    it ends the submission.
    """

    state: str
    done: int
    total: int
    failed: int
    rate: float | None
    estimate: float | None

    @property
    def ended(self) -> bool:
        """Completed, failed or cancelled."""
        return self.state in ("Completed", "Failed", "Cancelled")


class Meter:
    """The rates of submissions, from one look to the next."""

    def __init__(self) -> None:
        self._seen: OrderedDict[int, deque[tuple[float, int]]] = OrderedDict()

    def progress(self, status: SubmissionStatus) -> Progress:
        """The progress as of `status`, which was just received."""
        now = time.monotonic()
        match status:
            case SubmissionStatus.Completed(submission=submission):
                total = submission.chunks_total
                return Progress("Completed", total, total, 0, None, None)
            case SubmissionStatus.Failed(submission=failed):
                return Progress("Failed", failed.chunks_done or 0, failed.chunks_total, 1, None, None)
            case SubmissionStatus.Cancelled(submission=cancelled):
                return Progress("Cancelled", cancelled.chunks_done, cancelled.chunks_total, 0, None, None)
            case SubmissionStatus.InProgress(submission=going):
                done, total = going.chunks_done, going.chunks_total
                rate = self._rate(going.id.id, now, done)
                estimate = (total - done) / rate if rate else None
                return Progress(type(status).__name__, done, total, 0, rate, estimate)
        raise TypeError(f"{status!r} is no status of a submission")

    def _rate(self, submission: int, now: float, done: int) -> float | None:
        looks = self._seen.setdefault(submission, deque())
        self._seen.move_to_end(submission)
        if len(self._seen) > _REMEMBERED:
            self._seen.popitem(last=False)
        looks.append((now, done))
        while len(looks) > 2 and now - looks[0][0] > WINDOW_S:
            looks.popleft()
        since, before = looks[0]
        return (done - before) / (now - since) if now > since and done > before else None

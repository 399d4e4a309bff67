"""What gathers for the next commit: staged changes, applied changes, and the answers that wait for it.

Staged changes (inserts, retries of submissions, cancels, pauses) take effect when their commit succeeds. Applied
changes (completions, retries of chunks, ends) are true in memory already and stay here until a commit succeeds. Decides
nothing and answers nobody.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from opsqueue.server.requests import Reply
from opsqueue.server.writer.batch import Batch, DirectOutput, EndedSubmission, NewRetry, NewSubmission, PauseChange


@dataclass(frozen=True, slots=True)
class Asker:
    """Who waits for a reply: a front-end, its incarnation, and its number for the request."""

    frontend: int
    incarnation: int
    request: int


@dataclass(slots=True)
class Staged:
    """Decisions that wait for a commit, and who asked."""

    inserts: list[tuple[NewSubmission, Asker]] = field(default_factory=list)
    retries: list[tuple[NewRetry, Asker]] = field(default_factory=list)
    cancels: dict[int, list[Asker]] = field(default_factory=dict)
    pauses: list[tuple[PauseChange, Asker]] = field(default_factory=list)
    #: Replies that are true once the commit has succeeded.
    answers: list[tuple[Asker, Reply]] = field(default_factory=list)
    #: Pings: answered by whether the commit succeeds.
    pings: list[Asker] = field(default_factory=list)
    #: Memory in bytes that the inserts and retries may come to need.
    needed: int = 0

    def __bool__(self) -> bool:
        return bool(self.inserts or self.retries or self.cancels or self.pauses or self.answers or self.pings)


@dataclass(slots=True)
class Applied:
    """Changes that are true in memory and not yet in the file."""

    events: bytes = b""
    ended: list[EndedSubmission] = field(default_factory=list)
    outputs: list[DirectOutput] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.events or self.ended or self.outputs)

    @property
    def size(self) -> int:
        """Bytes of events and outputs."""
        return len(self.events) + sum(len(output.content) for output in self.outputs)

    def before(self, later: Applied) -> Applied:
        """These changes followed by later ones."""
        return Applied(self.events + later.events, self.ended + later.ended, self.outputs + later.outputs)


@dataclass(frozen=True, slots=True)
class Commit:
    """A batch on its way through the journal, and what depends on it."""

    batch: Batch
    staged: Staged
    applied: Applied

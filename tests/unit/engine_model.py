"""What the engine promises, written slowly and obviously: sets, sorted lists, nothing kept that can be computed.

Times are milliseconds. The model decides everything that the engine must decide one way; where the engine may choose
(Random, timers of the same moment) it says whether a choice was allowed. It also plays the file: what a restart finds.
"""

from __future__ import annotations

import enum
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from msgspec.structs import replace

from opsqueue.protocol.strategy import (
    Highest,
    Lowest,
    MaxSimultaneous,
    Newest,
    OrElse,
    PreferDistinct,
    Random,
    SelectOnly,
    Strategy,
)
from opsqueue.server.writer.batch import BlockRow, LoadedSubmission, State
from opsqueue.server.writer.log_rows import EventKind, LogEvent, keep_events

BLOCK = 4096
TICK_MS = 4

CLEAN_CLOSE = 1
DROPPED = 4


class Reason(enum.IntEnum):
    CANCELLED = 1
    FAILED = 2
    COMPLETED = 3
    EXPIRED = 4


class Taken(enum.Enum):
    HELD = "held"
    DELAYED = "delayed"
    DOOMED = "doomed"


@dataclass
class Reservation:
    taken: Taken
    due: int
    holder: int | None = None
    working: int = 0

    @property
    def due_tick(self) -> int:
        return -(-self.due // TICK_MS)


@dataclass
class Submission:
    id: int
    total: int
    chunk_size: int
    metadata: dict[str, int]
    direct: bool
    state: State
    cancelling: bool = False
    done: set[int] = field(default_factory=set)
    retries: Counter[int] = field(default_factory=Counter)
    crashes: Counter[int] = field(default_factory=Counter)
    taken: dict[int, Reservation] = field(default_factory=dict)
    changed_batch: int = 0

    @property
    def over(self) -> bool:
        return self.state not in (State.IN_PROGRESS, State.PAUSED)

    @property
    def available(self) -> int:
        if self.state != State.IN_PROGRESS or self.cancelling:
            return 0
        return self.total - len(self.done) - len(self.taken)

    def is_available(self, chunk: int) -> bool:
        return bool(self.available) and chunk not in self.done and chunk not in self.taken

    @property
    def first(self) -> int:
        return next(chunk for chunk in range(self.total) if self.is_available(chunk))

    @property
    def last(self) -> int:
        return next(chunk for chunk in reversed(range(self.total)) if self.is_available(chunk))

    @property
    def held(self) -> int:
        return sum(1 for reservation in self.taken.values() if reservation.taken is Taken.HELD)


Notice = tuple[int, int, int, int]
Ended = tuple[int, int, int, int | None, str | None]


def _alternatives(strategy: Strategy) -> list[Strategy]:
    """Without OrElse: first choice first."""
    if isinstance(strategy, OrElse):
        return _alternatives(strategy.first) + _alternatives(strategy.second)
    if isinstance(strategy, SelectOnly | MaxSimultaneous | PreferDistinct):
        return [replace(strategy, underlying=each) for each in _alternatives(strategy.underlying)]
    return [strategy]


class EngineModel:
    """The same calls as the engine's; `notices`, `events` and `ended` gather what each step should have made."""

    def __init__(self, *, reservation_ms: int, max_retries: int, max_crashes: int, grace_ms: int) -> None:
        self.reservation_ms = reservation_ms
        self.limit = max(1, max_retries)
        self.max_crashes = max_crashes
        self.grace_ms = grace_ms
        self.now = 0
        self.batch = 1
        self.submissions: dict[int, Submission] = {}
        self.holders: dict[int, int] = {}
        self.workings = 0
        self.notices: list[Notice] = []
        self.events: list[LogEvent] = []
        self.ended: list[Ended] = []

    # --- what the engine is asked ---

    @property
    def available(self) -> int:
        return sum(submission.available for submission in self.submissions.values())

    @property
    def unfinished(self) -> list[Submission]:
        return [submission for submission in self.submissions.values() if not submission.over]

    def in_flight(self, key: str, value: int) -> int:
        return sum(s.held for s in self.unfinished if s.metadata.get(key) == value)

    def held_by(self, holder: int, submission: int, chunk: int) -> Reservation | None:
        found = self.submissions.get(submission)
        if found is None or found.over:
            return None
        reservation = found.taken.get(chunk)
        if reservation is None or reservation.taken is not Taken.HELD or reservation.holder != holder:
            return None
        return reservation

    def _takes_part(self, strategy: Strategy, submission: Submission) -> bool:
        """The filters of a strategy without OrElse let the submission through."""
        if isinstance(strategy, SelectOnly):
            if submission.metadata.get(strategy.meta_key) != strategy.value:
                return False
        elif isinstance(strategy, MaxSimultaneous):
            value = submission.metadata.get(strategy.meta_key)
            if value is not None and self.in_flight(strategy.meta_key, value) >= strategy.limit:
                return False
        elif not isinstance(strategy, PreferDistinct):
            return True
        return self._takes_part(strategy.underlying, submission)

    def _rank(self, strategy: Strategy, submission: Submission) -> tuple[int, ...]:
        if isinstance(strategy, SelectOnly | MaxSimultaneous):
            return self._rank(strategy.underlying, submission)
        if isinstance(strategy, PreferDistinct):
            value = submission.metadata.get(strategy.meta_key)
            count = 0 if value is None else self.in_flight(strategy.meta_key, value)
            return (count, *self._rank(strategy.underlying, submission))
        if isinstance(strategy, Highest | Lowest):
            value = submission.metadata.get(strategy.meta_key)
            if value is None:
                return (1, 0, submission.id)
            return (0, -value if isinstance(strategy, Highest) else value, submission.id)
        if isinstance(strategy, Random):
            return ()
        return (-submission.id,) if isinstance(strategy, Newest) else (submission.id,)

    def _first(self, strategy: Strategy) -> tuple[Strategy, list[Submission]]:
        """The alternative that has something, and the submissions that it likes best."""
        for alternative in _alternatives(strategy):
            found = [s for s in self.submissions.values() if s.available and self._takes_part(alternative, s)]
            if found:
                best = min(self._rank(alternative, s) for s in found)
                return alternative, [s for s in found if self._rank(alternative, s) == best]
        return strategy, []

    def has_any(self, strategy: Strategy) -> bool:
        """There is a chunk that it may take."""
        return bool(self._first(strategy)[1])

    def may_pick(self, strategy: Strategy, submission: int, chunk: int) -> bool:
        """The strategy allows this chunk to be the next."""
        picked = self.submissions[submission]
        if not picked.is_available(chunk):
            return False
        leaf, best = self._first(strategy)
        if picked not in best:
            return False
        while isinstance(leaf, PreferDistinct | SelectOnly | MaxSimultaneous):
            leaf = leaf.underlying
        if isinstance(leaf, Random):
            return True
        return chunk == (picked.last if isinstance(leaf, Newest) else picked.first)

    # --- submissions ---

    def add(self, submission: Submission) -> None:
        self.submissions[submission.id] = submission

    def _end(self, s: Submission, state: State, chunk: int | None = None, text: str | None = None) -> None:
        s.state = state
        s.cancelling = False
        for index, reservation in s.taken.items():
            if reservation.taken is Taken.HELD:
                self._notice(
                    reservation.holder, s, index, Reason.CANCELLED if state == State.CANCELLED else Reason.FAILED
                )
        s.taken.clear()
        if state != State.CANCELLED:
            s.changed_batch = self.batch
            self.ended.append((s.id, int(state), len(s.done), chunk, text))

    def set_paused(self, submission: int, paused: bool) -> bool:
        s = self.submissions.get(submission)
        if s is None or s.state != (State.IN_PROGRESS if paused else State.PAUSED):
            return False
        s.state = State.PAUSED if paused else State.IN_PROGRESS
        return True

    def begin_cancel(self, submission: int) -> bool:
        s = self.submissions.get(submission)
        if s is None or s.over or s.cancelling:
            return False
        s.cancelling = True
        return True

    def abort_cancel(self, submission: int) -> None:
        self.submissions[submission].cancelling = False

    def finish_cancel(self, submission: int) -> None:
        s = self.submissions[submission]
        if s.over:
            self.ended = [entry for entry in self.ended if entry[0] != submission]
            s.state = State.CANCELLED
        else:
            self._end(s, State.CANCELLED)

    # --- holders ---

    def _notice(self, holder: int | None, s: Submission, chunk: int, reason: Reason) -> None:
        if holder in self.holders and (reason is Reason.EXPIRED or self.holders[holder] & DROPPED):
            self.notices.append((holder, s.id, chunk, int(reason)))

    def _event(self, kind: EventKind, s: Submission, chunk: int) -> None:
        self.events.append(LogEvent(kind, s.id, chunk))
        s.changed_batch = self.batch

    def open(self, holder: int, features: int) -> None:
        self.holders[holder] = features

    def close(self, holder: int, *, lost: bool) -> None:
        features = self.holders.pop(holder)
        held = [
            (reservation.working, s, chunk)
            for s in self.unfinished
            for chunk, reservation in s.taken.items()
            if reservation.holder == holder
        ]
        for _, s, chunk in held:
            del s.taken[chunk]
        if not held or not lost or not features & CLEAN_CLOSE:
            return
        working, s, chunk = max(held, key=lambda item: item[0])
        if not working:
            return
        s.crashes[chunk] += 1
        self._event(EventKind.CRASH, s, chunk)
        if self.max_crashes and s.crashes[chunk] >= self.max_crashes:
            self._end(s, State.FAILED, chunk, "crashes")

    def hold(self, holder: int, submission: int, chunk: int) -> tuple[int, int, int, int, int]:
        """Take an available chunk; what the engine should hand out."""
        s = self.submissions[submission]
        s.taken[chunk] = Reservation(Taken.HELD, self.now + self.reservation_ms, holder)
        return (submission, chunk, len(s.done), s.retries[chunk], 2 if s.direct else 0)

    # --- messages ---

    def complete(self, holder: int, submission: int, chunk: int) -> bool:
        s = self.submissions.get(submission)
        if s is None or s.over or chunk >= s.total or chunk in s.done:
            return False
        reservation = s.taken.pop(chunk, None)
        if reservation is not None and reservation.taken is Taken.HELD and reservation.holder != holder:
            self._notice(reservation.holder, s, chunk, Reason.COMPLETED)
        s.done.add(chunk)
        self._event(EventKind.COMPLETION, s, chunk)
        if len(s.done) == s.total:
            self._end(s, State.COMPLETED)
        return True

    def _retry(self, s: Submission, chunk: int) -> bool:
        s.retries[chunk] += 1
        self._event(EventKind.RETRY, s, chunk)
        return s.retries[chunk] >= self.limit

    def fail(self, holder: int, submission: int, chunk: int, text: str) -> bool:
        if self.held_by(holder, submission, chunk) is None or text == "Reservation expired":
            return False
        s = self.submissions[submission]
        del s.taken[chunk]
        if text != "Requester disappeared" and self._retry(s, chunk):
            self._end(s, State.FAILED, chunk, text)
        return True

    def release(self, holder: int, submission: int, chunk: int) -> bool:
        if self.held_by(holder, submission, chunk) is None:
            return False
        del self.submissions[submission].taken[chunk]
        return True

    def extend(self, holder: int, submission: int, chunk: int) -> bool:
        reservation = self.held_by(holder, submission, chunk)
        if reservation is None:
            return False
        reservation.due = self.now + self.reservation_ms
        return True

    def retry_later(self, holder: int, submission: int, chunk: int, delay_ms: int) -> bool:
        if self.held_by(holder, submission, chunk) is None:
            return False
        if delay_ms:
            self.submissions[submission].taken[chunk] = Reservation(Taken.DELAYED, self.now + delay_ms)
        else:
            del self.submissions[submission].taken[chunk]
        return True

    def fail_submission(self, holder: int, submission: int, chunk: int, text: str) -> bool:
        if self.held_by(holder, submission, chunk) is None:
            return False
        s = self.submissions[submission]
        del s.taken[chunk]
        self._end(s, State.FAILED, chunk, text)
        return True

    def working_on(self, holder: int, submission: int, chunk: int) -> bool:
        reservation = self.held_by(holder, submission, chunk)
        if reservation is None:
            return False
        self.workings += 1
        reservation.working = self.workings
        return True

    # --- time ---

    def advance(self, now: int, expired: Iterable[tuple[int, int]], failed: Iterable[tuple[int, int | None]]) -> None:
        """Fire what is due, tick by tick; within one the engine's order (what it expired, what failed) counts."""
        self.now = now
        expired, failed = set(expired), set(failed)
        due = [
            (reservation.due_tick, s, chunk, reservation)
            for s in self.unfinished
            for chunk, reservation in s.taken.items()
            if reservation.due_tick <= now // TICK_MS
        ]

        def turn(item: tuple[int, Submission, int, Reservation]) -> tuple[int, int]:
            tick, s, chunk, reservation = item
            if reservation.taken is Taken.HELD and (s.id, chunk) in expired:
                return (tick, 0)
            return (tick, 1 if (s.id, chunk) in failed else 2)

        for _, s, chunk, reservation in sorted(due, key=turn):
            if s.over:
                continue
            if reservation.taken is Taken.DELAYED:
                del s.taken[chunk]
            elif reservation.taken is Taken.DOOMED:
                self._end(s, State.FAILED, chunk, "Reservation expired")
            else:
                self._notice(reservation.holder, s, chunk, Reason.EXPIRED)
                if self._retry(s, chunk):
                    s.taken[chunk] = Reservation(Taken.DOOMED, now + self.grace_ms)
                else:
                    del s.taken[chunk]

    # --- a restart ---

    def restart(self) -> None:
        """Reservations and connections are gone; what stood at its retry limit is as if it had expired now."""
        self.holders.clear()
        for s in self.submissions.values():
            s.taken.clear()
            s.cancelling = False
            s.changed_batch = 0
            if not s.over:
                for chunk, retries in s.retries.items():
                    if retries >= self.limit and chunk not in s.done:
                        s.taken[chunk] = Reservation(Taken.DOOMED, self.now + self.grace_ms)


@dataclass
class StoredBlock:
    batch: int
    row: BlockRow


class FileModel:
    """What the journal keeps: submissions' states, folded blocks with their batch, log rows."""

    def __init__(self) -> None:
        self.submissions: dict[int, LoadedSubmission] = {}
        self.blocks: dict[tuple[int, int], StoredBlock] = {}
        self.log: dict[int, bytes] = {}

    def insert(self, s: Submission) -> None:
        self.submissions[s.id] = LoadedSubmission(s.id, s.state, s.total, s.chunk_size, s.direct, dict(s.metadata))

    def set_state(self, submission: int, state: State) -> None:
        old = self.submissions[submission]
        self.submissions[submission] = LoadedSubmission(
            old.submission, state, old.chunks_total, old.chunk_size, old.direct, old.strategic_metadata
        )

    def commit(
        self, batch: int, events: bytes, blocks: Iterable[tuple[int, int, bytes, bytes]], through: int | None
    ) -> None:
        if events:
            self.log[batch] = events
        for row in blocks:
            self.blocks[row[0], row[1]] = StoredBlock(batch, BlockRow(*row))
        if through is not None:
            self.log = {number: row for number, row in self.log.items() if number > through}

    def mentioned(self) -> set[int]:
        found = set()

        def note(event: LogEvent) -> bool:
            found.add(event.submission)
            return True

        for row in self.log.values():
            keep_events(row, note)
        return found

    def loaded(self) -> tuple[list[LoadedSubmission], list[BlockRow], list[bytes]]:
        """What a start finds: unfinished submissions, and failed and cancelled ones that the log still speaks of."""
        mentioned = self.mentioned()
        submissions = [
            loaded
            for _, loaded in sorted(self.submissions.items())
            if loaded.state in (State.IN_PROGRESS, State.PAUSED)
            or (loaded.state != State.COMPLETED and loaded.submission in mentioned)
        ]
        ids = {loaded.submission for loaded in submissions}
        blocks = [stored.row for (submission, _), stored in sorted(self.blocks.items()) if submission in ids]
        rows = []
        for number, row in sorted(self.log.items()):

            def is_news(event: LogEvent, number: int = number) -> bool:
                stored = self.blocks.get((event.submission, event.chunk // BLOCK))
                return stored is None or stored.batch < number

            rows.append(keep_events(row, is_news))
        return submissions, blocks, rows

"""The engine and its model see the same events in any order and must agree on everything after each of them."""

from __future__ import annotations

import random
from collections import Counter as Multiset
from collections.abc import Sequence

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from opsqueue._speedups.counters import Counter
from opsqueue._speedups.scripted import ScriptedEngine
from opsqueue.protocol.strategy import (
    Highest,
    Lowest,
    MaxSimultaneous,
    Newest,
    Oldest,
    OrElse,
    PreferDistinct,
    Random,
    SelectOnly,
    Strategy,
    canonical,
)
from opsqueue.server.writer.batch import State
from opsqueue.server.writer.log_rows import decode_events
from tests.unit.engine_model import CLEAN_CLOSE, DROPPED, EngineModel, FileModel, Reason, Reservation, Submission, Taken

RESERVATION_MS = 400
GRACE_MS = 200
BUDGET_NS = 10**9

STRATEGIES: list[Strategy] = [
    Oldest(),
    Newest(),
    Random(),
    PreferDistinct("a", Oldest()),
    PreferDistinct("a", Newest()),
    PreferDistinct("b", Random()),
    PreferDistinct("nobody has it", Oldest()),
    PreferDistinct("a", PreferDistinct("b", Oldest())),
    PreferDistinct("b", PreferDistinct("a", Newest())),
    PreferDistinct("a", PreferDistinct("b", Random())),
    PreferDistinct("c", PreferDistinct("b", PreferDistinct("a", Oldest()))),
    Highest("a"),
    Lowest("b"),
    Highest("nobody has it"),
    PreferDistinct("a", Highest("b")),
    PreferDistinct("a", PreferDistinct("b", Lowest("c"))),
    SelectOnly("a", 1, Oldest()),
    SelectOnly("a", 0, Random()),
    SelectOnly("b", 1, Newest()),
    SelectOnly("a", 7, Oldest()),
    SelectOnly("a", 1, SelectOnly("b", -1, Highest("c"))),
    SelectOnly("a", 1, PreferDistinct("b", Oldest())),
    PreferDistinct("b", SelectOnly("a", 0, Random())),
    SelectOnly("a", 1, MaxSimultaneous("b", 2, PreferDistinct("b", Newest()))),
    SelectOnly("b", 1, MaxSimultaneous("b", 3, MaxSimultaneous("a", 2, Oldest()))),
    MaxSimultaneous("a", 1, Oldest()),
    MaxSimultaneous("a", 3, Newest()),
    MaxSimultaneous("b", 2, Random()),
    MaxSimultaneous("b", 4, Highest("a")),
    MaxSimultaneous("a", 2, PreferDistinct("a", PreferDistinct("b", Oldest()))),
    MaxSimultaneous("a", 2, PreferDistinct("a", Lowest("b"))),
    PreferDistinct("b", MaxSimultaneous("b", 3, Random())),
    OrElse(SelectOnly("a", 1, Oldest()), Newest()),
    OrElse(SelectOnly("a", 0, Random()), SelectOnly("b", 1, Highest("c"))),
    SelectOnly("a", 1, OrElse(SelectOnly("b", 1, Oldest()), MaxSimultaneous("b", 1, Newest()))),
    OrElse(MaxSimultaneous("a", 1, Oldest()), OrElse(SelectOnly("c", 1, Oldest()), Random())),
]
TOTAL_CHOICES = [1, 1, 2, 3, 5, 8, 64, 65, 4095, 4096, 4097, 8193]
METADATA_CHOICES: list[dict[str, int]] = [
    {},
    {"a": 0},
    {"a": 1, "b": -1},
    {"a": 1, "b": 1},
    {"b": 0},
    {"a": 0, "b": 1, "c": 1},
]
PICKS = range(2**16)
METADATA = st.dictionaries(st.sampled_from("abc"), st.sampled_from([-1, 0, 1]), max_size=3)
TOTALS = st.sampled_from(TOTAL_CHOICES)
PICK = st.integers(0, 2**16)


class EngineMachine(RuleBasedStateMachine):
    def __init__(self, max_crashes: int = 2) -> None:
        super().__init__()
        self.limits = {
            "reservation_ms": RESERVATION_MS,
            "max_retries": 3,
            "max_crashes": max_crashes,
            "grace_ms": GRACE_MS,
        }
        self.engine = ScriptedEngine(seed=1, **self.limits)
        self.engine.advance(1000)
        self.model = EngineModel(**self.limits)
        self.model.now = 1000
        self.engine.batch = self.model.batch
        self.file = FileModel()
        self.next_id = 100
        self.opened = 0
        self.cancels: set[int] = set()
        self.pending_events = b""
        self.pending_ended: list[tuple[int, int, int, int | None, str | None]] = []
        self.fold_through: int | None = None
        self.completed = self.retried = self.expired = 0

        for frontend in range(3):
            self.open(frontend, CLEAN_CLOSE | DROPPED if frontend else 0)
        self.insert(5, {"a": 0}, 2, False, 1)
        self.insert(4099, {"a": 1, "b": 0}, 3, True, 1)

    # --- what a rule is about ---

    def any_submission(self, pick: int) -> Submission | None:
        known = [s for s in self.model.submissions.values() if self.engine.holds(s.id)]
        return known[pick % len(known)] if known else None

    def any_holder(self, pick: int) -> int | None:
        holders = sorted(self.model.holders)
        return holders[pick % len(holders)] if holders else None

    def any_taken(self, pick: int, taken: set[Taken]) -> tuple[Submission, int, Reservation] | None:
        found = [
            (s, chunk, reservation)
            for s in self.model.unfinished
            for chunk, reservation in sorted(s.taken.items())
            if reservation.taken in taken
        ]
        return found[pick % len(found)] if found else None

    def any_message(self, pick: int, from_holder: bool) -> tuple[int, int, int] | None:
        """(holder, submission, chunk) of a message that its holder, or someone else, sends."""
        found = self.any_taken(pick, {Taken.HELD})
        if found is None:
            return None
        s, chunk, reservation = found
        sender = reservation.holder if from_holder else self.any_holder(pick // 7)
        assert sender is not None
        return sender, s.id, chunk

    # --- submissions ---

    @rule(total=TOTALS, metadata=METADATA, chunk_size=st.integers(1, 9), direct=st.booleans(), paused=st.integers(0, 5))
    def insert(self, total: int, metadata: dict[str, int], chunk_size: int, direct: bool, paused: int) -> None:
        self.next_id += 1
        state = State.PAUSED if paused == 0 else State.IN_PROGRESS
        s = Submission(self.next_id, total, chunk_size, metadata, direct, state)
        self.model.add(s)
        self.file.insert(s)
        self.engine.add_submission(s.id, total, chunk_size, metadata, direct=direct, paused=paused == 0)

    @rule(pick=PICK, paused=st.booleans())
    def pause(self, pick: int, paused: bool) -> None:
        s = self.any_submission(pick)
        if s is not None and s.id not in self.cancels:
            changed = self.model.set_paused(s.id, paused)
            assert self.engine.set_paused(s.id, paused) == changed
            if changed:
                self.file.set_state(s.id, s.state)

    @rule(pick=PICK)
    def begin_cancel(self, pick: int) -> None:
        s = self.any_submission(pick)
        if s is not None and pick % 3 == 0:
            begun = self.model.begin_cancel(s.id)
            assert self.engine.begin_cancel(s.id) == begun
            if begun:
                self.cancels.add(s.id)

    @precondition(lambda self: self.cancels)
    @rule(pick=PICK, succeeds=st.booleans())
    def end_cancel(self, pick: int, succeeds: bool) -> None:
        submission = sorted(self.cancels)[pick % len(self.cancels)]
        self.cancels.discard(submission)
        if not succeeds:
            self.model.abort_cancel(submission)
            self.engine.abort_cancel(submission)
            return
        self.pending_ended = [ended for ended in self.pending_ended if ended[0] != submission]
        self.model.finish_cancel(submission)
        self.engine.finish_cancel(submission)
        self.file.set_state(submission, State.CANCELLED)

    # --- consumers ---

    @rule(frontend=st.integers(0, 2), features=st.sampled_from([0, CLEAN_CLOSE, DROPPED, CLEAN_CLOSE | DROPPED]))
    def open(self, frontend: int, features: int) -> None:
        self.opened += 1
        slot = next(
            slot
            for slot in range(100)
            if not any((h >> 56, h & 0xFFFF) == (frontend, slot) for h in self.model.holders)
        )
        holder = frontend << 56 | self.opened << 32 | slot
        self.model.open(holder, features)
        self.engine.open_connection(holder, features)

    @rule(pick=PICK, lost=st.booleans())
    def close(self, pick: int, lost: bool) -> None:
        holder = self.any_holder(pick)
        if holder is not None:
            self.model.close(holder, lost=lost)
            self.engine.close_connection(holder, lost=lost)

    @rule(frontend=st.integers(0, 2))
    def frontend_dies(self, frontend: int) -> None:
        for holder in [holder for holder in self.model.holders if holder >> 56 == frontend]:
            self.model.close(holder, lost=False)
        self.engine.close_connections_of(frontend)

    @rule(pick=PICK, strategy=st.sampled_from(STRATEGIES), maximum=st.integers(1, 12))
    def reserve(self, pick: int, strategy: Strategy, maximum: int) -> None:
        holder = self.any_holder(pick)
        if holder is None:
            self.open(pick % 3, CLEAN_CLOSE)
            holder = self.any_holder(0)
            assert holder is not None
        got = self.engine.reserve_chunks(holder, canonical(strategy), maximum)
        for chunk in got:
            assert self.model.may_pick(strategy, chunk[0], chunk[1]), (strategy, chunk)
            assert self.model.hold(holder, chunk[0], chunk[1]) == chunk
        assert len(got) == maximum or not self.model.has_any(strategy)

    @rule(pick=PICK, from_holder=st.booleans())
    def complete(self, pick: int, from_holder: bool) -> None:
        message = self.any_message(pick, from_holder)
        if message is not None:
            counts = self.model.complete(*message)
            self.completed += counts
            assert self.engine.complete_chunk(*message) == counts

    @rule(pick=PICK, sender=st.integers(0, 5), chunk=st.integers(0, 9000))
    def complete_late(self, pick: int, sender: int, chunk: int) -> None:
        """From a consumer that lost the chunk long ago: it may be free, done, delayed, doomed, or not exist."""
        s = self.any_submission(pick)
        if s is not None:
            chunk %= s.total + 1
            counts = self.model.complete(sender, s.id, chunk)
            self.completed += counts
            assert self.engine.complete_chunk(sender, s.id, chunk) == counts

    @rule(pick=PICK)
    def complete_doomed(self, pick: int) -> None:
        found = self.any_taken(pick, {Taken.DOOMED, Taken.DELAYED})
        if found is not None:
            assert self.model.complete(1, found[0].id, found[1])
            self.completed += 1
            assert self.engine.complete_chunk(1, found[0].id, found[1])

    @rule(pick=PICK, spare=st.sets(st.integers(0, 9000), max_size=2))
    def complete_most(self, pick: int, spare: set[int]) -> None:
        """Whole blocks at once."""
        s = self.any_submission(pick)
        if s is None or pick % 3:
            return
        spared = {chunk % s.total for chunk in spare}
        for chunk in range(s.total):
            if chunk not in spared and chunk not in s.taken:
                counts = self.model.complete(1, s.id, chunk)
                self.completed += counts
                assert self.engine.complete_chunk(1, s.id, chunk) == counts

    @rule(
        pick=PICK,
        from_holder=st.integers(0, 3),
        text=st.sampled_from(["boom", "", "Reservation expired", "Requester disappeared", "Reservation expired!"]),
    )
    def fail(self, pick: int, from_holder: int, text: str) -> None:
        message = self.any_message(pick, from_holder > 0)
        if message is not None:
            counts = self.model.fail(*message, text)
            assert self.engine.fail_chunk(*message, text.encode()) == counts

    @rule(pick=PICK, from_holder=st.booleans())
    def fail_submission(self, pick: int, from_holder: bool) -> None:
        message = self.any_message(pick, from_holder)
        if message is not None and pick % 3 == 0:
            counts = self.model.fail_submission(*message, "wrong")
            assert self.engine.fail_whole_submission(*message, b"wrong") == counts

    @rule(pick=PICK, from_holder=st.booleans())
    def release(self, pick: int, from_holder: bool) -> None:
        message = self.any_message(pick, from_holder)
        if message is not None:
            assert self.engine.release_held(*message) == self.model.release(*message)

    @rule(pick=PICK, from_holder=st.booleans())
    def extend(self, pick: int, from_holder: bool) -> None:
        message = self.any_message(pick, from_holder)
        if message is not None:
            assert self.engine.extend_held(*message) == self.model.extend(*message)

    @rule(pick=PICK, from_holder=st.booleans(), delay=st.sampled_from([0, 1, 4, 150, 5000, 10**7]))
    def retry_later(self, pick: int, from_holder: bool, delay: int) -> None:
        message = self.any_message(pick, from_holder)
        if message is not None:
            assert self.engine.retry_chunk_later(*message, delay) == self.model.retry_later(*message, delay)

    @rule(pick=PICK, from_holder=st.booleans())
    def working_on(self, pick: int, from_holder: bool) -> None:
        message = self.any_message(pick, from_holder)
        if message is not None:
            assert self.engine.works_on(*message) == self.model.working_on(*message)

    # --- time ---

    @rule(step=st.sampled_from([0, 1, 3, 4, 50, 199, 200, 201, 399, 400, 1500, 70_000]))
    def advance(self, step: int) -> None:
        now = self.model.now + step
        assert not self.engine.advance(now)
        notices = self.engine.take_notices()
        ended = self.engine.taken_ended()
        self.model.advance(
            now,
            [(submission, chunk) for _, submission, chunk, reason in notices if reason == Reason.EXPIRED],
            [(submission, chunk) for submission, _, _, chunk, _ in ended if chunk is not None],
        )
        self.compare_made(notices, ended)

    # --- the journal ---

    @rule(fails=st.integers(0, 3), fold=st.booleans(), blocks=st.integers(1, 4))
    def commit(self, fails: int, fold: bool, blocks: int) -> None:
        number = self.engine.batch
        rows: tuple[tuple[int, int, bytes, bytes], ...] = ()
        through = None
        if fold or self.fold_through is not None:
            if self.fold_through is None:
                self.engine.fold_start()
                self.fold_through = number
            rows = self.engine.fold_take(blocks)
            assert len(rows) <= blocks
            through = None if self.engine.fold_remaining() else self.fold_through
        self.engine.batch = self.model.batch = number + 1
        if fails == 0:
            self.engine.fold_failed(rows)
            return
        self.file.commit(number, self.pending_events, rows, through)
        self.engine.fold_committed(rows)
        if through is not None:
            self.fold_through = None
        for submission, state, _, _, _ in self.pending_ended:
            self.cancels.discard(submission)
            self.file.set_state(submission, State(state))
            self.engine.ended_committed(submission)
        self.pending_events = b""
        self.pending_ended = []

    @rule(fold=st.booleans(), pick=PICK)
    def restart(self, fold: bool, pick: int) -> None:
        """A new engine from what the file has, after a commit; in the middle of a fold if there is one."""
        if pick % 5:
            return
        self.commit(1, fold, 2)
        submissions, blocks, rows = self.file.loaded()
        engine = ScriptedEngine(seed=2, **self.limits)
        engine.advance(self.model.now)
        engine.load_submissions(submissions)
        engine.load_blocks((row.submission, row.block, 0, row.done, row.attempts, 0) for row in blocks)
        for row in rows:
            engine.events(row)
        engine.batch = self.model.batch
        self.engine = engine
        self.model.restart()
        self.cancels.clear()
        self.fold_through = None
        self.completed = self.retried = self.expired = 0
        self.open(pick % 3, CLEAN_CLOSE | DROPPED)
        self.open(0, 0)

    # --- agreement ---

    def compare_made(
        self,
        notices: list[tuple[int, int, int, int]],
        ended: list[tuple[int, int, int, int | None, str | None]],
    ) -> None:
        events = self.engine.taken_events()
        self.pending_events += events
        assert Multiset(decode_events(events)) == Multiset(self.model.events)
        assert Multiset(notices) == Multiset(self.model.notices)
        ended = [
            (*entry[:4], "crashes" if entry[4] and "--max-chunk-crashes" in entry[4] else entry[4]) for entry in ended
        ]
        assert Multiset(ended) == Multiset(self.model.ended)
        self.pending_ended += ended
        self.retried += sum(1 for event in self.model.events if event.kind == 2)
        self.expired += sum(1 for notice in notices if notice[3] == Reason.EXPIRED)
        self.model.events, self.model.notices, self.model.ended = [], [], []

    @invariant()
    def they_agree(self) -> None:
        engine, model = self.engine, self.model
        assert not engine.work(BUDGET_NS)
        self.compare_made(engine.take_notices(), engine.taken_ended())
        assert not engine.changed()
        assert engine.available == model.available
        unfinished = model.unfinished
        for s in model.submissions.values():
            if engine.holds(s.id):
                assert engine.state(s.id) == s.state
                assert engine.chunks_done(s.id) == len(s.done)
                assert engine.chunks_available(s.id) == s.available
                assert engine.changed_batch(s.id) == s.changed_batch
            else:
                assert s.over
        for key in "abc":
            for value in (-1, 0, 1):
                assert engine.in_flight_of(key, value) == model.in_flight(key, value)
        waiting = any(s.taken for s in unfinished)
        assert (engine.next_timer_ms() is not None) == waiting
        gauges = {
            Counter.SUBMISSIONS_IN_PROGRESS: len(unfinished),
            Counter.CHUNKS_BACKLOG: sum(s.total - len(s.done) for s in unfinished),
            Counter.OPERATIONS_BACKLOG: sum((s.total - len(s.done)) * s.chunk_size for s in unfinished),
            Counter.CHUNKS_RESERVED: sum(s.held for s in unfinished),
            Counter.CHUNKS_COMPLETED: self.completed,
            Counter.CHUNKS_RETRIED: self.retried,
            Counter.CHUNKS_EXPIRED: self.expired,
            Counter.MEMORY_PROMISED: engine.promised,
        }
        assert {counter: engine.counter(counter) for counter in gauges} == gauges

    def teardown(self) -> None:
        """Nothing is left of submissions that have ended, once everything is stored and folded."""
        for _ in range(2):  # the round under way, if any, and one that begins after everything has been stored
            self.commit(1, True, 100)
            while self.fold_through is not None:
                self.commit(1, True, 100)
        self.engine.work(BUDGET_NS)
        assert self.engine.submission_count == len(self.model.unfinished)


WALK: list[tuple[int, str, dict[str, Sequence[object]]]] = [
    # weight, rule, the range that each argument is drawn from
    (
        6,
        "insert",
        {
            "total": TOTAL_CHOICES,
            "metadata": METADATA_CHOICES,
            "chunk_size": (1, 7),
            "direct": (False, True),
            "paused": range(6),
        },
    ),
    (1, "pause", {"pick": PICKS, "paused": (False, True)}),
    (5, "begin_cancel", {"pick": PICKS}),
    (2, "end_cancel", {"pick": PICKS, "succeeds": (False, True)}),
    (3, "open", {"frontend": range(3), "features": (0, CLEAN_CLOSE, DROPPED, CLEAN_CLOSE | DROPPED)}),
    (3, "close", {"pick": PICKS, "lost": (False, True, True)}),
    (1, "frontend_dies", {"frontend": range(3)}),
    (30, "reserve", {"pick": PICKS, "strategy": STRATEGIES, "maximum": range(1, 9)}),
    (20, "complete", {"pick": PICKS, "from_holder": (True, True, True, False)}),
    (2, "complete_late", {"pick": PICKS, "sender": range(6), "chunk": range(9000)}),
    (1, "complete_doomed", {"pick": PICKS}),
    (2, "complete_most", {"pick": PICKS, "spare": [set(), {1}, {5, 4098}]}),
    (
        8,
        "fail",
        {
            "pick": PICKS,
            "from_holder": range(4),
            "text": ("boom", "bang", "Reservation expired", "Requester disappeared"),
        },
    ),
    (1, "fail_submission", {"pick": PICKS, "from_holder": (False, True)}),
    (3, "release", {"pick": PICKS, "from_holder": (True, False)}),
    (2, "extend", {"pick": PICKS, "from_holder": (True, False)}),
    (2, "retry_later", {"pick": PICKS, "from_holder": (True, False), "delay": (0, 1, 150, 5000, 10**7)}),
    (10, "working_on", {"pick": PICKS, "from_holder": (True, True, False)}),
    (8, "advance", {"step": (0, 1, 3, 10, 50, 50, 150, 201, 401)}),
    (4, "commit", {"fails": range(4), "fold": (False, False, True), "blocks": range(1, 5)}),
    (2, "restart", {"fold": (False, True), "pick": range(10)}),
]


@pytest.mark.parametrize("seed", range(25))
def test_long_random_walks_find_the_engine_and_its_model_agreeing(seed: int) -> None:
    """Hypothesis tells short stories; these are long, and busy enough to reach every end of a submission."""
    chance = random.Random(seed)
    machine = EngineMachine(max_crashes=seed % 3)
    for _ in range(400):
        _, name, arguments = chance.choices(WALK, [entry[0] for entry in WALK])[0]
        if name != "end_cancel" or machine.cancels:
            getattr(machine, name)(**{key: chance.choice(choices) for key, choices in arguments.items()})
            machine.they_agree()
    machine.teardown()


TestEngineAgreesWithItsModel = EngineMachine.TestCase
TestEngineAgreesWithItsModel.settings = settings(
    max_examples=120, stateful_step_count=60, deadline=None, suppress_health_check=list(HealthCheck)
)

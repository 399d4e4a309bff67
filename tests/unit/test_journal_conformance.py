"""What every journal promises, seen through its interface alone. Another implementation joins by adding its opener."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from opsqueue.server.writer.batch import (
    Batch,
    BlockRow,
    DirectOutput,
    Failure,
    InsertOutcome,
    InsertResult,
    Journal,
    JournalOptions,
    Loaded,
    PauseChange,
    State,
)
from opsqueue.server.writer.journal import SqliteJournal
from opsqueue.server.writer.log_rows import EventKind, LogEvent, encode_events
from tests.support.journals import (
    SECOND_US,
    Collected,
    completions,
    ended,
    insert_one,
    new_submission,
    now_us,
    retries,
)


@dataclass
class Store:
    """One stored state that outlives the journals opened on it."""

    open: Callable[[float], Journal]
    journals: list[Journal] = field(default_factory=list)

    def journal(self, max_submission_age_s: float = 3600.0) -> Journal:
        """Close what is open and open it again."""
        self.close()
        self.journals.append(self.open(max_submission_age_s))
        return self.journals[-1]

    def load(self, max_submission_age_s: float = 3600.0) -> tuple[Collected, Loaded]:
        """What a start would find now."""
        collected = Collected()
        loaded = self.journal(max_submission_age_s).load(collected)
        return collected, loaded

    def close(self) -> None:
        while self.journals:
            self.journals.pop().close()


def sqlite_store(directory: Path) -> Store:
    path = str(directory / "queue.db")
    return Store(lambda age: SqliteJournal(JournalOptions(path, max_submission_age_s=age)))


STORES = {"sqlite": sqlite_store}


@pytest.fixture(params=STORES)
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    made = STORES[request.param](tmp_path)
    yield made
    made.close()


@pytest.fixture
def journal(store: Store) -> Journal:
    return store.journal()


# --- an insert's idempotency, row by row (WIRE section 3) ---

NEW, KNOWN, CONFLICT = InsertResult.NEW, InsertResult.KNOWN, InsertResult.CONFLICT

IDEMPOTENCY = [
    # what the first one is by then, seconds since it ended, the same contents?, what the second one becomes
    (State.IN_PROGRESS, 0, True, KNOWN),
    (State.PAUSED, 0, True, KNOWN),
    (State.COMPLETED, 1, True, KNOWN),
    (State.COMPLETED, 3000, True, KNOWN),
    (State.FAILED, 59, True, KNOWN),
    (State.FAILED, 61, True, NEW),
    (State.CANCELLED, 59, True, KNOWN),
    (State.CANCELLED, 61, True, NEW),
    (State.IN_PROGRESS, 0, False, CONFLICT),
    (State.PAUSED, 0, False, CONFLICT),
    (State.COMPLETED, 1, False, NEW),
    (State.FAILED, 1, False, NEW),
    (State.CANCELLED, 1, False, NEW),
]


@pytest.mark.parametrize("identity", [{"prefix": "p"}, {"key": "k", "contents": (b"a", b"b")}], ids=["prefix", "key"])
@pytest.mark.parametrize(("state", "ago_s", "same", "expected"), IDEMPOTENCY)
def test_a_repeated_insert_is_known_new_or_in_conflict(
    journal: Journal, identity: dict[str, object], state: State, ago_s: int, same: bool, expected: InsertResult
) -> None:
    first = new_submission(1, paused=state is State.PAUSED, **identity)  # type: ignore[arg-type]
    assert insert_one(journal, 1, first).result is NEW
    if state in (State.COMPLETED, State.FAILED):
        assert journal.apply(Batch(2, ended=(ended(1, state, ago_s=ago_s),))).failure is None
    elif state is State.CANCELLED:
        assert journal.apply(Batch(2, cancelled=(ended(1, state, ago_s=ago_s),))).failure is None
    second = new_submission(2, fingerprint=b"same" if same else b"other", **identity)  # type: ignore[arg-type]

    assert insert_one(journal, 3, second) == InsertOutcome(expected, 2 if expected is NEW else 1)


def test_the_newest_submission_of_a_prefix_counts(journal: Journal) -> None:
    insert_one(journal, 1, new_submission(1, prefix="p"))
    journal.apply(Batch(2, ended=(ended(1, State.COMPLETED),)))
    assert insert_one(journal, 3, new_submission(2, prefix="p", fingerprint=b"other")).result is NEW
    # The first one is completed and the same; but the newest is another and in progress.
    assert insert_one(journal, 4, new_submission(3, prefix="p")) == InsertOutcome(CONFLICT, 2)


def test_two_inserts_of_one_prefix_in_one_batch_make_one_submission(journal: Journal) -> None:
    outcome = journal.apply(Batch(1, inserts=(new_submission(1, prefix="p"), new_submission(2, prefix="p"))))
    assert outcome.inserts == (InsertOutcome(NEW, 1), InsertOutcome(KNOWN, 1))


def test_direct_inserts_without_a_key_are_never_the_same(journal: Journal) -> None:
    outcome = journal.apply(Batch(1, inserts=(new_submission(1, contents=[b"a"]), new_submission(2, contents=[b"a"]))))
    assert [one.result for one in outcome.inserts] == [NEW, NEW]


def test_a_prefix_and_a_key_of_the_same_text_have_nothing_to_do_with_each_other(journal: Journal) -> None:
    insert_one(journal, 1, new_submission(1, prefix="same text"))
    assert insert_one(journal, 2, new_submission(2, key="same text", contents=[b"a"])).result is NEW


def test_idempotency_survives_a_restart(store: Store) -> None:
    insert_one(store.journal(), 1, new_submission(1, prefix="p"))
    assert insert_one(store.journal(), 2, new_submission(2, prefix="p")) == InsertOutcome(KNOWN, 1)


# --- what a start finds ---


def test_an_empty_store_loads_nothing(store: Store) -> None:
    collected, loaded = store.load()
    assert collected == Collected()
    assert loaded == Loaded(last_batch=0, id_mark_ms=0, completed=0)


def test_everything_unfinished_is_loaded_in_order(store: Store) -> None:
    journal = store.journal()
    journal.apply(
        Batch(
            1,
            inserts=(
                new_submission(5, count=5000, strategic={"a": -(2**63), "b": 2**63 - 1}, chunk_size=7),
                new_submission(3, contents=[b"x", b""], paused=True),
                new_submission(9, count=2**62),
            ),
            id_mark_ms=77,
        )
    )
    journal.apply(Batch(2, events=completions(5, 0, 4097)))
    journal.apply(Batch(3, events=retries(9, 2**61)))

    collected, loaded = store.load()

    five, three, nine = collected.submissions[1], collected.submissions[0], collected.submissions[2]
    assert (five.submission, three.submission, nine.submission) == (5, 3, 9)
    assert five.state is State.IN_PROGRESS
    assert five.chunk_size == 7
    assert five.strategic_metadata == {"a": -(2**63), "b": 2**63 - 1}
    assert (three.state, three.chunks_total, three.direct) == (State.PAUSED, 2, True)
    assert (nine.chunks_total, nine.direct) == (2**62, False)
    assert collected.rows == [completions(5, 0, 4097), retries(9, 2**61)]
    assert collected.order == ["submission"] * 3 + ["events"] * 2
    assert loaded == Loaded(last_batch=3, id_mark_ms=77, completed=0)


def test_completed_submissions_are_counted_not_loaded(store: Store) -> None:
    journal = store.journal()
    journal.apply(Batch(1, inserts=(new_submission(1), new_submission(2), new_submission(3))))
    journal.apply(Batch(2, events=completions(1, 0), ended=(ended(1, State.COMPLETED), ended(2, State.FAILED))))
    collected, loaded = store.load()
    assert collected.states == {3: State.IN_PROGRESS}
    assert loaded.completed == 1


def test_a_failed_or_cancelled_submission_is_loaded_while_the_log_is_about_it(store: Store) -> None:
    journal = store.journal()
    journal.apply(Batch(1, inserts=tuple(new_submission(i) for i in (1, 2, 3, 4))))
    journal.apply(Batch(2, events=completions(1, 0) + completions(2, 0) + completions(3, 0)))
    journal.apply(
        Batch(
            3,
            ended=(ended(1, State.FAILED), ended(3, State.COMPLETED), ended(4, State.FAILED)),
            cancelled=(ended(2, State.CANCELLED),),
            blocks=(BlockRow(1, 0, b"\1\0", b""),),
        )
    )
    collected, _ = store.load()
    assert collected.states == {1: State.FAILED, 2: State.CANCELLED}
    assert collected.blocks == [BlockRow(1, 0, b"\1\0", b"")]

    store.journals[-1].apply(Batch(4, blocks=(BlockRow(2, 0, b"\1\0", b""),), log_through=3))
    collected, _ = store.load()
    assert collected == Collected()


def test_an_empty_submission_is_completed_at_once(store: Store) -> None:
    insert_one(store.journal(), 1, new_submission(1, count=0, paused=True))
    collected, loaded = store.load()
    assert collected == Collected()
    assert loaded.completed == 1


def test_paused_and_unpaused_is_as_the_last_change_says(store: Store) -> None:
    journal = store.journal()
    journal.apply(Batch(1, inserts=(new_submission(1), new_submission(2, paused=True), new_submission(3))))
    journal.apply(Batch(2, pauses=(PauseChange(1, True), PauseChange(2, False))))
    journal.apply(Batch(3, ended=(ended(3, State.COMPLETED),), pauses=(PauseChange(3, True),)))
    collected, loaded = store.load()
    assert collected.states == {1: State.PAUSED, 2: State.IN_PROGRESS}
    assert loaded.completed == 1, "a pause changes nothing about a submission that has ended"


@pytest.mark.parametrize("first", [State.COMPLETED, State.FAILED, State.CANCELLED])
def test_the_first_end_counts(store: Store, first: State) -> None:
    journal = store.journal()
    insert_one(journal, 1, new_submission(1, prefix="p"))
    journal.apply(Batch(2, ended=(ended(1, first, ago_s=61),)))
    journal.apply(Batch(3, cancelled=(ended(1, State.CANCELLED),)))
    journal.apply(Batch(4, ended=(ended(1, State.COMPLETED),)))
    assert store.load()[1].completed == (first is State.COMPLETED)
    # A failed or cancelled one that ended over 60 s ago is not the answer any more; had the end been moved, it were.
    expected = KNOWN if first is State.COMPLETED else NEW
    assert insert_one(store.journals[-1], 5, new_submission(2, prefix="p")).result is expected


def test_in_one_batch_an_end_comes_before_a_cancel(store: Store) -> None:
    journal = store.journal()
    insert_one(journal, 1, new_submission(1))
    journal.apply(Batch(2, ended=(ended(1, State.COMPLETED),), cancelled=(ended(1, State.CANCELLED),)))
    assert store.load()[1].completed == 1


# --- folding ---


def test_folded_log_rows_are_gone_and_the_blocks_say_it(store: Store) -> None:
    journal = store.journal()
    insert_one(journal, 1, new_submission(1, count=5000))
    for number in range(2, 6):
        journal.apply(Batch(number, events=completions(1, number, 4096 + number)))
    first = bytes([0b00111100]) + bytes(511)
    second = bytes([0b00111100]) + bytes(112)
    journal.apply(Batch(6, blocks=(BlockRow(1, 0, first, b""),)))
    journal.apply(Batch(7, events=completions(1, 9), blocks=(BlockRow(1, 1, second, b""),), log_through=5))

    collected, loaded = store.load()

    assert collected.rows == [completions(1, 9)]
    assert collected.blocks == [BlockRow(1, 0, first, b""), BlockRow(1, 1, second, b"")]
    assert loaded.last_batch == 7


def test_a_block_written_again_replaces_the_old_one(store: Store) -> None:
    journal = store.journal()
    insert_one(journal, 1, new_submission(1, count=8))
    journal.apply(Batch(2, blocks=(BlockRow(1, 0, b"\1", b"\0\1\0"),)))
    journal.apply(Batch(3, blocks=(BlockRow(1, 0, b"", b""),)))
    assert store.load()[0].blocks == [BlockRow(1, 0, b"", b"")]


def test_an_attempt_that_a_block_counts_is_not_loaded_from_the_log_again(store: Store) -> None:
    journal = store.journal()
    insert_one(journal, 1, new_submission(1, count=5000))
    crash = encode_events([LogEvent(EventKind.CRASH, 1, 7)])
    journal.apply(Batch(2, events=retries(1, 7)))
    journal.apply(Batch(3, events=retries(1, 7) + crash + completions(1, 8) + retries(1, 4097)))
    # The block is written while batch 4 closes, so it counts what batches 2, 3 and 4 say of it.
    block = BlockRow(1, 0, b"\0\1" + bytes(510), b"\7\3\1")
    journal.apply(Batch(4, events=retries(1, 7), blocks=(block,)))
    journal.apply(Batch(5, events=retries(1, 7), log_through=2))

    collected, _ = store.load()

    assert collected.blocks == [block]
    assert collected.log == [
        LogEvent(EventKind.COMPLETION, 1, 8),
        LogEvent(EventKind.RETRY, 1, 4097),
        LogEvent(EventKind.RETRY, 1, 7),
    ]


def test_a_number_that_a_block_carries_is_never_used_again(store: Store) -> None:
    journal = store.journal()
    insert_one(journal, 1, new_submission(1, count=8))
    journal.apply(Batch(2, events=retries(1, 0)))
    journal.apply(Batch(9, blocks=(BlockRow(1, 0, b"\0", b"\0\1\0"),)))
    assert store.load()[1].last_batch == 9


def test_blocks_and_outputs_of_what_is_forgotten_leave_nothing(store: Store) -> None:
    journal = store.journal()
    outcome = journal.apply(
        Batch(1, events=completions(1, 0), blocks=(BlockRow(1, 0, b"", b""),), outputs=(DirectOutput(1, 0, b"x"),))
    )
    assert outcome.failure is None
    collected, _ = store.load()
    assert (collected.submissions, collected.blocks) == ([], [])


# --- all or nothing ---


def test_a_batch_that_fails_leaves_nothing_and_the_journal_goes_on(store: Store) -> None:
    journal = store.journal()
    insert_one(journal, 1, new_submission(1))
    bad = Batch(
        2,
        events=completions(1, 0),
        ended=(ended(1, State.FAILED),),
        # the same id again is refused, whatever else the batch holds
        inserts=(new_submission(2), new_submission(1, prefix="other")),
        blocks=(BlockRow(1, 0, b"", b""),),
        id_mark_ms=5,
    )
    outcome = journal.apply(bad)
    assert outcome.failure is Failure.ERROR
    assert outcome.reason
    assert outcome.inserts == ()
    # What was applied is carried into the next batch.
    good = Batch(3, events=bad.events + completions(1, 1), inserts=(new_submission(2),))
    assert journal.apply(good).failure is None

    collected, loaded = store.load()
    assert collected.states == {1: State.IN_PROGRESS, 2: State.IN_PROGRESS}
    assert collected.rows == [completions(1, 0) + completions(1, 1)]
    assert collected.blocks == []
    assert loaded.id_mark_ms == 0


def test_values_that_cannot_be_stored_fail_their_batch_only(journal: Journal) -> None:
    assert journal.apply(Batch(1, inserts=(new_submission(2**63),))).failure is Failure.ERROR
    assert journal.apply(Batch(2, inserts=(new_submission(1, carrier="\ud800"),))).failure is Failure.ERROR
    assert insert_one(journal, 3, new_submission(2**63 - 1)).result is NEW


def test_a_batch_with_nothing_in_it_succeeds(store: Store) -> None:
    assert store.journal().apply(Batch(1)).failure is None
    assert store.load()[1].last_batch == 0


# --- forgetting ---


def forget_all(journal: Journal) -> int:
    """Slices that it took."""
    slices = 1
    while journal.maintain():
        slices += 1
        assert slices < 100_000
    return slices


def test_ended_submissions_are_forgotten_when_they_are_old_enough(store: Store) -> None:
    journal = store.journal(max_submission_age_s=100)
    journal.apply(Batch(1, inserts=tuple(new_submission(i) for i in range(1, 7))))
    journal.apply(
        Batch(
            2,
            events=completions(2, 0),
            ended=(
                ended(1, State.COMPLETED, ago_s=101),
                ended(2, State.FAILED, ago_s=101),
                ended(3, State.COMPLETED, ago_s=90),
            ),
            cancelled=(ended(4, State.CANCELLED, ago_s=5000),),
        )
    )
    forget_all(journal)
    outcome = journal.apply(Batch(3))
    assert (outcome.forgotten, outcome.forgotten_completed) == (3, 1)
    outcome = journal.apply(Batch(4))
    assert (outcome.forgotten, outcome.forgotten_completed) == (0, 0)
    collected, loaded = store.load()
    assert collected.states == {5: State.IN_PROGRESS, 6: State.IN_PROGRESS}
    assert loaded.completed == 1


def test_unfinished_submissions_are_never_forgotten(store: Store) -> None:
    journal = store.journal(max_submission_age_s=0)
    insert_one(journal, 1, new_submission(1, at_us=1))
    insert_one(journal, 2, new_submission(2, at_us=1, paused=True))
    forget_all(journal)
    assert set(store.load()[0].states) == {1, 2}


def test_a_huge_submission_is_forgotten_over_several_slices(store: Store) -> None:
    journal = store.journal(max_submission_age_s=0)
    blocks = 40_000
    insert_one(journal, 1, new_submission(1, count=blocks * 4096))
    for first in range(0, blocks, 4000):
        rows = tuple(BlockRow(1, block, b"\1" + bytes(511), b"") for block in range(first, first + 4000))
        assert journal.apply(Batch(first + 2, blocks=rows)).failure is None
    journal.apply(Batch(blocks + 2, ended=(ended(1, State.FAILED, ago_s=1),)))
    assert journal.maintain(), "one slice is not enough"
    assert journal.apply(Batch(blocks + 3)).forgotten == 0, "its row goes last"
    assert forget_all(journal) > 1
    assert journal.apply(Batch(blocks + 4)).forgotten == 1


def test_a_forgotten_prefix_is_new_again(journal: Journal, store: Store) -> None:
    insert_one(journal, 1, new_submission(1, prefix="p"))
    journal.apply(Batch(2, ended=(ended(1, State.COMPLETED, ago_s=10),)))
    journal = store.journal(max_submission_age_s=5)
    forget_all(journal)
    assert insert_one(journal, 3, new_submission(2, prefix="p")) == InsertOutcome(NEW, 2)


def test_a_clock_that_went_back_does_not_make_an_end_older(journal: Journal) -> None:
    insert_one(journal, 1, new_submission(1, prefix="p"))
    journal.apply(Batch(2, cancelled=(ended(1, State.CANCELLED),)))
    earlier = new_submission(2, prefix="p", at_us=now_us() - 3600 * SECOND_US)
    assert insert_one(journal, 3, earlier) == InsertOutcome(KNOWN, 1)

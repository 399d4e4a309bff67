"""A retry in the journal: decided and stored in one transaction, whole or not at all, and found again by a start."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import apsw
import pytest

from opsqueue.server.sql import migrations
from opsqueue.server.writer.batch import (
    Batch,
    BlockRow,
    DirectOutput,
    JournalOptions,
    NewRetry,
    RetryOutcome,
    RetryResult,
    State,
)
from opsqueue.server.writer.journal import SqliteJournal
from opsqueue.server.writer.migrations import migrate
from tests.support.journals import Collected, completions, ended, insert_one, new_submission, retries

BLOCK = 4_096


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "queue.db")


@pytest.fixture
def journal(path: str) -> Iterator[SqliteJournal]:
    made = SqliteJournal(JournalOptions(path))
    yield made
    made.close()


def retry_one(journal: SqliteJournal, batch: int, new: NewRetry) -> RetryOutcome:
    outcome = journal.apply(Batch(batch, retries=(new,)))
    assert outcome.failure is None, outcome.reason
    return outcome.retries[0]


def failed(journal: SqliteJournal, *blocks: BlockRow, chunks_done: int = 0, count: int = 10) -> None:
    """Submission 1 in the batches 1 and 2, with folded blocks."""
    insert_one(journal, 1, new_submission(1, prefix="p", key="k", count=count, strategic={"a": 1}, metadata=b"m"))
    end = ended(1, State.FAILED, chunks_done=chunks_done, chunk=4)
    assert journal.apply(Batch(2, ended=(end,), blocks=blocks)).failure is None


def loaded(path: str) -> Collected:
    """What a start finds."""
    collected = Collected()
    again = SqliteJournal(JournalOptions(path))
    again.load(collected)
    again.close()
    return collected


def test_folded_blocks_go_over_without_their_attempts(journal: SqliteJournal, path: str) -> None:
    total = 2 * BLOCK + 9
    blocks = (
        BlockRow(1, 0, b"", b""),
        BlockRow(1, 1, b"\x05" + bytes(511), b"\4\3\1"),
        BlockRow(1, 2, b"\1\1", b""),
    )
    failed(journal, *blocks, chunks_done=BLOCK + 4, count=total)
    outcome = retry_one(journal, 3, NewRetry(7, 1, total))
    assert (outcome.result, outcome.submission) == (RetryResult.NEW, 7)
    assert outcome.loaded is not None
    assert (outcome.loaded.chunks_total, outcome.loaded.strategic_metadata) == (total, {"a": 1})
    assert outcome.blocks == tuple((7, row.block, 3, row.done, b"", total) for row in blocks)
    found = loaded(path)
    assert found.states == {7: State.IN_PROGRESS}
    assert found.blocks == [BlockRow(7, row.block, row.done, b"") for row in blocks]
    journal.apply(Batch(4, events=retries(7, 4)))
    assert loaded(path).log, "a retry counted after the blocks were written is not left out"


def test_blocks_that_come_along_are_those_that_count(journal: SqliteJournal, path: str) -> None:
    insert_one(journal, 1, new_submission(1, count=10))
    journal.apply(Batch(2, events=completions(1, 0, 9)))
    end = ended(1, State.FAILED, chunks_done=2, chunk=4)
    outcome = journal.apply(Batch(3, ended=(end,), retries=(NewRetry(7, 1, 10, ((0, b"\1\2"),)),)))
    assert outcome.retries[0].result is RetryResult.NEW, "the end of the same batch counts"
    assert loaded(path).done() >= {(7, 0), (7, 9)}


def test_fewer_blocks_than_were_done_store_nothing(journal: SqliteJournal, path: str) -> None:
    failed(journal, BlockRow(1, 0, b"\1\0", b""), chunks_done=2)
    assert retry_one(journal, 3, NewRetry(7, 1, 10)) == RetryOutcome(RetryResult.INCOMPLETE)
    assert retry_one(journal, 4, NewRetry(8, 1, 10, ((0, b"\7\0"),))) == RetryOutcome(RetryResult.INCOMPLETE)
    assert loaded(path).states == {}


@pytest.mark.parametrize(
    ("state", "same"),
    [
        (State.IN_PROGRESS, True),
        (State.PAUSED, True),
        (State.COMPLETED, True),
        (State.FAILED, False),
        (State.CANCELLED, False),
    ],
)
def test_asked_again_it_is_the_same_unless_it_came_to_nothing(journal: SqliteJournal, state: State, same: bool) -> None:
    failed(journal)
    assert retry_one(journal, 3, NewRetry(7, 1, 10)).result is RetryResult.NEW
    with apsw.Connection(journal._options.path) as connection:
        end = "NULL" if state in (State.IN_PROGRESS, State.PAUSED) else "1"
        connection.execute(f"UPDATE submissions SET state = {int(state)}, ended_us = {end} WHERE id = 7")
    outcome = retry_one(journal, 4, NewRetry(8, 1, 10))
    expected = (RetryResult.KNOWN, 7) if same else (RetryResult.NEW, 8)
    assert (outcome.result, outcome.submission) == expected


def test_two_in_one_batch_are_one(journal: SqliteJournal) -> None:
    failed(journal)
    outcome = journal.apply(Batch(3, retries=(NewRetry(7, 1, 10), NewRetry(8, 1, 10))))
    assert [(each.result, each.submission) for each in outcome.retries] == [
        (RetryResult.NEW, 7),
        (RetryResult.KNOWN, 7),
    ]


@pytest.mark.parametrize("state", [State.IN_PROGRESS, State.PAUSED, State.COMPLETED, State.CANCELLED])
def test_what_has_not_failed_is_said(journal: SqliteJournal, state: State) -> None:
    insert_one(journal, 1, new_submission(1, paused=state is State.PAUSED))
    if state is State.CANCELLED:
        journal.apply(Batch(2, cancelled=(ended(1, state),)))
    elif state is State.COMPLETED:
        journal.apply(Batch(2, ended=(ended(1, state),)))
    assert retry_one(journal, 3, NewRetry(7, 1, 10)) == RetryOutcome(RetryResult.NOT_FAILED, state=state)
    assert retry_one(journal, 4, NewRetry(7, 2, 10)) == RetryOutcome(RetryResult.UNKNOWN)


def test_an_unfinished_insert_of_the_same_prefix_is_in_conflict(journal: SqliteJournal) -> None:
    insert_one(journal, 1, new_submission(1, prefix="p"))
    journal.apply(Batch(2, ended=(ended(1, State.FAILED, ago_s=61),)))
    outcome = journal.apply(Batch(3, inserts=(new_submission(2, prefix="p"),), retries=(NewRetry(7, 1, 10),)))
    assert outcome.retries == (RetryOutcome(RetryResult.CONFLICT, 2),)


def test_direct_inputs_outputs_and_the_key_go_over(journal: SqliteJournal, path: str) -> None:
    insert_one(journal, 1, new_submission(1, key="k", contents=[b"a", b"b"]))
    journal.apply(Batch(2, events=completions(1, 0), outputs=(DirectOutput(1, 0, b"A"),)))
    end = ended(1, State.FAILED, chunks_done=1, chunk=1)
    journal.apply(Batch(3, ended=(end,), blocks=(BlockRow(1, 0, b"\1", b""),), log_through=2))
    assert retry_one(journal, 4, NewRetry(7, 1, 2)).result is RetryResult.NEW
    with apsw.Connection(path) as connection:
        for table, expected in (("direct_inputs", [(0, b"a"), (1, b"b")]), ("direct_outputs", [(0, b"A")])):
            rows = connection.execute(f"SELECT chunk_index, content FROM {table} WHERE submission_id = 7")
            assert rows.fetchall() == expected
    insert_one(journal, 5, new_submission(8, key="k", contents=[b"a", b"b"]))
    assert loaded(path).states == {7: State.IN_PROGRESS}, "an insert with the key finds the retry"


def test_what_is_forgotten_takes_its_note_of_the_retry_along(path: str) -> None:
    journal = SqliteJournal(JournalOptions(path, max_submission_age_s=0))
    failed(journal)
    assert retry_one(journal, 3, NewRetry(7, 1, 10)).result is RetryResult.NEW
    assert journal.maintain()
    journal.close()
    with apsw.Connection(path) as connection:
        assert connection.execute("SELECT id FROM submissions").fetchall() == [(7,)]
        assert connection.execute("SELECT count(*) FROM retries").get == 0


def test_a_file_of_the_first_schema_can_be_retried_from(tmp_path: Path) -> None:
    path = str(tmp_path / "old.db")
    journal = SqliteJournal(JournalOptions(path))
    failed(journal, BlockRow(1, 0, b"\3\0", b""), chunks_done=2)
    journal.close()
    with apsw.Connection(path) as connection:
        connection.execute("DROP TABLE retries; DROP INDEX submissions_by_rare_state")
        connection.execute("ALTER TABLE blocks DROP COLUMN packing; PRAGMA user_version = 1")
    connection.close()
    assert len(migrations()) == 3
    journal = SqliteJournal(JournalOptions(path))
    assert retry_one(journal, 3, NewRetry(7, 1, 10)).result is RetryResult.NEW
    journal.close()
    assert migrate(apsw.Connection(path)) == 0

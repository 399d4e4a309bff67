"""The read side against a file that a journal writes at the same time."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import apsw
import pytest

from opsqueue.server.reader import Description, Reader, ReadError, SubmissionStatus, TooManyError
from opsqueue.server.writer.batch import Batch, DirectOutput, JournalOptions, PauseChange, State
from opsqueue.server.writer.journal import SqliteJournal
from tests.support.journals import completions, ended, insert_one, new_submission


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "queue.db")


@pytest.fixture
def journal(path: str) -> Iterator[SqliteJournal]:
    made = SqliteJournal(JournalOptions(path))
    yield made
    made.close()


@pytest.fixture
def reader(path: str) -> Iterator[Reader]:
    made = Reader(path)
    yield made
    made.close()


def test_a_description_is_what_was_inserted(journal: SqliteJournal, reader: Reader) -> None:
    assert reader.description(1) is None
    pairs = {"größe": -(2**63), 'a "quoted" key': 2**63 - 1}
    insert_one(
        journal,
        1,
        new_submission(
            1, prefix="ein/präfix", count=2**62, metadata=b"\0\xff", strategic=pairs, carrier='{"a":"b"}', chunk_size=99
        ),
    )
    expected = Description("ein/präfix", 2**62, 99, b"\0\xff", pairs, '{"a":"b"}', False)
    assert reader.description(1) == expected
    assert list(reader.description(1).strategic_metadata) == list(pairs)  # type: ignore[union-attr]
    assert reader.status(1) == SubmissionStatus(1, State.IN_PROGRESS, 0, None, None, None, None, expected)


def test_a_direct_submissions_inputs_are_read_by_chunk(journal: SqliteJournal, reader: Reader) -> None:
    contents = [b"", b"one", bytes(100_000)]
    insert_one(journal, 1, new_submission(1, contents=contents))
    for _ in range(2):
        assert [reader.direct_input(1, chunk) for chunk in range(4)] == [*contents, None]
    description = reader.description(1)
    assert description is not None
    assert (description.direct, description.prefix, description.metadata) == (True, None, None)
    assert reader.direct_input(2, 0) is None
    assert reader.direct_input(2**63, -(2**64)) is None, "an integer that no column holds is unknown, not an error"
    assert reader.status(2**64) is None


def test_outputs_are_read_once_they_are_stored(journal: SqliteJournal, reader: Reader) -> None:
    insert_one(journal, 1, new_submission(1, contents=[b"in", b"in"]))
    assert reader.direct_output(1, 0) is None
    journal.apply(Batch(2, events=completions(1, 0), outputs=(DirectOutput(1, 0, b"out"), DirectOutput(1, 1, b""))))
    assert reader.direct_output(1, 0) == b"out"
    assert reader.direct_output(1, 1) == b""
    journal.apply(Batch(3, outputs=(DirectOutput(1, 0, b"another"),)))
    assert reader.direct_output(1, 0) == b"out", "the first output of a chunk counts"


@pytest.mark.parametrize("state", [State.COMPLETED, State.FAILED, State.CANCELLED])
def test_the_status_of_what_has_ended(journal: SqliteJournal, reader: Reader, state: State) -> None:
    insert_one(journal, 1, new_submission(1, contents=[b"zero", b"one"], metadata=b"m"))
    end = ended(1, state, chunks_done=1, chunk=1, text="it broke")
    journal.apply(Batch(2, ended=(end,)))
    status = reader.status(1)
    assert status is not None
    assert (status.state, status.chunks_done, status.ended_us) == (state, 1, end.ended_us)
    failed = (1, "it broke", b"one") if state is State.FAILED else (None, None, None)
    assert (status.failed_chunk, status.failure, status.failed_chunk_input) == failed
    assert status.description == reader.description(1)


def test_a_failed_chunk_in_the_object_store_has_no_input(journal: SqliteJournal, reader: Reader) -> None:
    insert_one(journal, 1, new_submission(1))
    journal.apply(Batch(2, ended=(ended(1, State.FAILED, chunk=3),)))
    status = reader.status(1)
    assert status is not None
    assert (status.failed_chunk, status.failed_chunk_input) == (3, None)


def test_lookup_by_prefix_gives_the_newest_whatever_its_state(journal: SqliteJournal, reader: Reader) -> None:
    assert reader.lookup_by_prefix("p") is None
    for number, state in enumerate((State.COMPLETED, State.CANCELLED, State.FAILED), 1):
        insert_one(journal, 2 * number, new_submission(number, prefix="p", fingerprint=bytes([number])))
        journal.apply(Batch(2 * number + 1, ended=(ended(number, state),)))
        assert reader.lookup_by_prefix("p") == number
    assert reader.lookup_by_prefix("P") is None
    assert reader.lookup_by_prefix("p%") is None


@pytest.fixture
def looked_up(journal: SqliteJournal) -> SqliteJournal:
    journal.apply(
        Batch(
            1,
            inserts=(
                new_submission(5, strategic={"tenant": 1, "kind": 1}),
                new_submission(3, strategic={"tenant": 1, "kind": 2}, paused=True),
                new_submission(4, strategic={"tenant": 2, "kind": 1}),
                new_submission(6, strategic={"tenant": 1, "kind": 1, "more": 7}),
                new_submission(7),
                new_submission(8, strategic={"tenant": 1, "kind": 1}),
                new_submission(9, count=0, strategic={"tenant": 1}),
            ),
        )
    )
    journal.apply(Batch(2, ended=(ended(8, State.COMPLETED),), pauses=(PauseChange(5, True),)))
    return journal


@pytest.mark.usefixtures("looked_up")
@pytest.mark.parametrize(
    ("pairs", "expected"),
    [
        ({}, [3, 4, 5, 6, 7]),
        ({"tenant": 1}, [3, 5, 6]),
        ({"tenant": 1, "kind": 1}, [5, 6]),
        ({"kind": 1, "tenant": 1, "more": 7}, [6]),
        ({"tenant": 3}, []),
        ({"tenant": 1, "nobody has it": 1}, []),
        ({'"': 1, "\\": 1}, []),
        ({"tenant": 2**63}, []),
    ],
)
def test_lookup_by_strategic_metadata(reader: Reader, pairs: dict[str, int], expected: list[int]) -> None:
    assert reader.lookup_by_strategic_metadata(pairs, 5) == expected


@pytest.mark.usefixtures("looked_up")
@pytest.mark.parametrize("pairs", [{}, {"tenant": 1}, {"tenant": 1, "kind": 1}])
def test_more_than_the_limit_is_refused(reader: Reader, pairs: dict[str, int]) -> None:
    matching = len(reader.lookup_by_strategic_metadata(pairs, 100))
    assert len(reader.lookup_by_strategic_metadata(pairs, matching)) == matching
    with pytest.raises(TooManyError, match=f"More than {matching - 1} "):
        reader.lookup_by_strategic_metadata(pairs, matching - 1)


def test_lookups_find_strange_keys(journal: SqliteJournal, reader: Reader) -> None:
    pairs = {'quote"back\\slash': 1, "": -1, "null\0byte": 2**63 - 1, "ключ": 0}
    insert_one(journal, 1, new_submission(1, strategic=pairs))
    assert reader.lookup_by_strategic_metadata(pairs, 5) == [1]
    for key, value in pairs.items():
        assert reader.lookup_by_strategic_metadata({key: value}, 5) == [1]


def test_what_is_forgotten_is_unknown_and_its_lookups_are_empty(path: str, reader: Reader) -> None:
    journal = SqliteJournal(JournalOptions(path, max_submission_age_s=0))
    insert_one(journal, 1, new_submission(1, contents=[b"a"], key="k", strategic={"a": 1}))
    journal.apply(Batch(2, outputs=(DirectOutput(1, 0, b"out"),), ended=(ended(1, State.COMPLETED, ago_s=1),)))
    while journal.maintain():
        pass
    assert reader.status(1) is None
    assert reader.direct_output(1, 0) is None
    assert reader.lookup_by_strategic_metadata({"a": 1}, 5) == []
    tables = ("submissions", "strategic_metadata", "direct_inputs", "direct_outputs", "blocks")
    connection = apsw.Connection(path, flags=apsw.SQLITE_OPEN_READONLY)
    assert [connection.execute(f"SELECT count(*) FROM {table}").fetchall() for table in tables] == [[(0,)]] * 5
    connection.close()
    journal.close()


def test_no_call_keeps_the_wal_from_being_checkpointed(path: str, reader: Reader) -> None:
    journal = SqliteJournal(JournalOptions(path, checkpoint_bytes=1))
    calls: list[Callable[[], object]] = [
        lambda: reader.description(1),
        lambda: reader.status(1),
        lambda: reader.direct_input(1, 0),
        lambda: reader.direct_output(1, 0),
        lambda: reader.lookup_by_prefix("nothing"),
        lambda: reader.lookup_by_strategic_metadata({}, 10),
        lambda: reader.lookup_by_strategic_metadata({"a": 1, "b": 1}, 10),
    ]
    insert_one(journal, 1, new_submission(1, contents=[b"a"], strategic={"a": 1, "b": 1}))
    for number, call in enumerate(calls, 2):
        call()
        assert journal.apply(Batch(number, id_mark_ms=number)).checkpoint_seconds is not None
    journal.close()


def test_a_file_that_is_not_there_or_not_ours_is_a_read_error(tmp_path: Path) -> None:
    missing = Reader(str(tmp_path / "missing.db"))
    with pytest.raises(ReadError, match=r"missing\.db cannot be read: "):
        missing.status(1)
    SqliteJournal(JournalOptions(str(tmp_path / "missing.db"))).close()
    assert missing.status(1) is None, "the next call opens it anew"
    missing.close()
    (tmp_path / "text").write_text("not a database" * 100)
    with pytest.raises(ReadError, match="not a database"):
        Reader(str(tmp_path / "text")).lookup_by_prefix("p")


def test_a_locked_file_is_a_read_error(path: str, reader: Reader) -> None:
    SqliteJournal(JournalOptions(path)).close()
    locker = apsw.Connection(path)
    locker.pragma("locking_mode", "EXCLUSIVE")
    locker.execute("BEGIN EXCLUSIVE")
    code = (
        "import sys\nfrom opsqueue.server import reader\nreader.BUSY_TIMEOUT_MS = 10\n"
        "try: reader.Reader(sys.argv[1]).status(1)\n"
        "except reader.ReadError as error: print(error)"
    )
    said = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, timeout=60, check=True)
    assert f"{path} cannot be read: " in said.stdout
    assert "locked" in said.stdout
    locker.close()


def test_damaged_metadata_is_a_read_error_and_names_the_submission(journal: SqliteJournal, path: str) -> None:
    insert_one(journal, 7, new_submission(7))
    journal._connection.execute("UPDATE submissions SET strategic_metadata = '{' WHERE id = 7")
    reader = Reader(path)
    with pytest.raises(ReadError, match="submission 7"):
        reader.description(7)
    reader.close()


def test_it_never_writes(journal: SqliteJournal, reader: Reader) -> None:
    insert_one(journal, 1, new_submission(1))
    reader.status(1)
    assert reader._connection is not None
    with pytest.raises(apsw.ReadOnlyError):
        reader._connection.execute("DELETE FROM submissions")


def test_the_cache_is_bounded_in_bytes(journal: SqliteJournal, path: str) -> None:
    reader = Reader(path, cache_bytes=1_000_000)
    contents = [os.urandom(20_000) for _ in range(200)]
    insert_one(journal, 1, new_submission(1, contents=contents))
    for _ in range(2):
        assert [reader.direct_input(1, chunk) for chunk in range(200)] == contents
        assert reader._cache.bytes <= 1_000_000
    reader.close()


def test_two_readers_on_two_threads_see_every_commit_while_the_journal_writes(path: str) -> None:
    journal = SqliteJournal(JournalOptions(path, durability="normal", checkpoint_bytes=256 * 1024))
    committed = [0]
    errors: list[BaseException] = []
    done = threading.Event()

    def read() -> None:
        reader = Reader(path)
        try:
            while not done.is_set():
                newest = committed[0]
                if newest:
                    description = reader.description(newest)
                    assert description is not None, newest
                    assert description.prefix == f"prefix-{newest}"
                    assert reader.lookup_by_prefix(f"prefix-{newest}") == newest
                    assert len(reader.lookup_by_strategic_metadata({"a": 1}, 100_000)) >= newest
        except BaseException as error:
            errors.append(error)
        finally:
            reader.close()

    threads = [threading.Thread(target=read) for _ in range(2)]
    for thread in threads:
        thread.start()
    checkpoints = 0
    for number in range(1, 600):
        outcome = journal.apply(Batch(number, inserts=(new_submission(number, strategic={"a": 1}),)))
        assert outcome.failure is None, outcome.reason
        checkpoints += outcome.checkpoint_seconds is not None
        committed[0] = number
    done.set()
    for thread in threads:
        thread.join()
    journal.close()
    assert not errors
    assert checkpoints

"""A disk that is full or fails: a commit is whole or not there, the journal goes on, the WAL stays bounded."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import apsw
import pytest

from opsqueue.server.reader import Reader
from opsqueue.server.writer.batch import Batch, BlockRow, Failure, InsertResult, JournalOptions, State
from opsqueue.server.writer.journal import SqliteJournal
from tests.support.journals import Collected, completions, ended, insert_one, new_submission


@dataclass
class Faults:
    """What the shim does to the operations that SQLite asks for."""

    #: The operations that fail: "write" and "sync" of the WAL, "checkpoint" for any change of the database itself.
    kind: str = ""
    #: So many of them succeed first.
    after: int = 0
    #: All that follow fail too, not only one.
    lasting: bool = False
    error: type[apsw.Error] = apsw.IOError
    seen: list[str] = field(default_factory=list)
    injected: int = 0

    def arm(self, kind: str, after: int = 0, *, lasting: bool = False, error: type[apsw.Error] = apsw.IOError) -> None:
        self.kind, self.after, self.lasting, self.error, self.injected = kind, after, lasting, error, 0

    def disarm(self) -> None:
        self.kind = ""

    def operation(self, kind: str) -> None:
        self.seen.append(kind)
        if kind != self.kind:
            return
        if self.after:
            self.after -= 1
            return
        self.injected += 1
        if not self.lasting:
            self.kind = ""
        raise self.error(f"injected: {kind}")


class FaultyFile(apsw.VFSFile):
    def __init__(self, faults: Faults, name: str | apsw.URIFilename | None, flags: list[int]) -> None:
        super().__init__("", name, flags)
        self._faults = faults
        filename = name if isinstance(name, str) else name.filename() if name else ""
        self._wal = filename.endswith("-wal")

    def xWrite(self, data: bytes, offset: int) -> None:
        self._faults.operation("write" if self._wal else "checkpoint")
        super().xWrite(data, offset)

    def xSync(self, flags: int) -> None:
        self._faults.operation("sync" if self._wal else "checkpoint")
        super().xSync(flags)

    def xTruncate(self, newsize: int) -> None:
        self._faults.operation("write" if self._wal else "checkpoint")
        super().xTruncate(newsize)


class CountingFile(apsw.VFSFile):
    def __init__(self, syncs: list[str], name: str | apsw.URIFilename | None, flags: list[int]) -> None:
        super().__init__("", name, flags)
        self._syncs = syncs
        self._name = name if isinstance(name, str) else name.filename() if name else ""

    def xSync(self, flags: int) -> None:
        self._syncs.append(self._name)
        super().xSync(flags)


class CountingVFS(apsw.VFS):
    """The usual way to the file system; tells of each time that the disk is to keep something."""

    def __init__(self) -> None:
        super().__init__("counting", "")
        self.syncs: list[str] = []

    def xOpen(self, name: str | apsw.URIFilename | None, flags: list[int]) -> CountingFile:
        return CountingFile(self.syncs, name, flags)


class FaultyVFS(apsw.VFS):
    """The usual way to the file system, with faults on the way."""

    def __init__(self, faults: Faults) -> None:
        super().__init__("faulty", "")
        self._faults = faults

    def xOpen(self, name: str | apsw.URIFilename | None, flags: list[int]) -> FaultyFile:
        return FaultyFile(self._faults, name, flags)


@pytest.fixture
def faults() -> Iterator[Faults]:
    made = Faults()
    vfs = FaultyVFS(made)
    yield made
    made.disarm()
    vfs.unregister()


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "queue.db")


def held(journal: SqliteJournal) -> tuple[dict[int, State], list[bytes], list[BlockRow], int]:
    collected = Collected()
    loaded = journal.load(collected)
    return collected.states, collected.rows, collected.blocks, loaded.id_mark_ms


def a_batch(number: int, submission: int) -> Batch:
    """One of everything, over several pages."""
    return Batch(
        number,
        events=completions(1, *range(submission, submission + 3000)),
        ended=(ended(submission - 1, State.FAILED),) if submission > 2 else (),
        inserts=(new_submission(submission, metadata=bytes(10_000), strategic={"a": 1}),),
        blocks=(BlockRow(1, 0, bytes(512), b""),),
        id_mark_ms=number,
    )


@pytest.mark.parametrize("kind", ["write", "sync"])
@pytest.mark.parametrize("lasting", [False, True])
@pytest.mark.parametrize(("error", "failure"), [(apsw.IOError, Failure.ERROR), (apsw.FullError, Failure.STORAGE_FULL)])
def test_a_commit_that_fails_at_any_operation_leaves_memory_and_file_agreeing(
    path: str, faults: Faults, kind: str, lasting: bool, error: type[apsw.Error], failure: Failure
) -> None:
    journal = SqliteJournal(JournalOptions(path, vfs="faulty"))
    insert_one(journal, 1, new_submission(1, count=100_000))
    number, submission, after, failed = 1, 2, 0, 0
    while True:
        before = held(journal)
        number += 1
        faults.arm(kind, after, lasting=lasting, error=error)
        outcome = journal.apply(a_batch(number, submission))
        injected = faults.injected
        faults.disarm()
        if outcome.failure is None:
            assert not injected
            break
        failed += 1
        after += 1
        assert outcome.failure is failure
        assert "injected" in outcome.reason
        assert held(journal) == before
        # The journal goes on: a later commit succeeds, what the failed one held is not in the file.
        number += 1
        assert insert_one(journal, number, new_submission(submission)).result is InsertResult.NEW
        number += 1
        assert journal.apply(Batch(number, ended=(ended(submission, State.CANCELLED),))).failure is None
        submission += 1
    assert failed >= (1 if kind == "sync" else 10)
    expected = held(journal)
    journal.close()
    again = SqliteJournal(JournalOptions(path))
    assert held(again) == expected
    again.close()


@pytest.mark.parametrize("lasting", [False, True])
def test_a_checkpoint_that_fails_costs_no_commit_and_is_tried_again(path: str, faults: Faults, lasting: bool) -> None:
    journal = SqliteJournal(JournalOptions(path, vfs="faulty", checkpoint_bytes=4096))
    insert_one(journal, 1, new_submission(1, count=100_000))
    faults.arm("checkpoint", lasting=lasting)
    outcome = journal.apply(a_batch(2, 2))
    assert outcome.failure is None
    assert outcome.checkpoint_seconds is None
    assert "checkpoint failed" in outcome.warning
    faults.disarm()
    number, finished = 2, None
    while finished is None:
        number += 1
        outcome = journal.apply(a_batch(number, number))
        assert outcome.failure is None
        finished = outcome.checkpoint_seconds
        assert number < 200
    assert not outcome.warning
    expected = held(journal)
    journal.close()
    again = SqliteJournal(JournalOptions(path))
    assert held(again) == expected
    again.close()


def test_a_clean_up_that_fails_is_a_warning_and_is_tried_again(path: str, faults: Faults) -> None:
    journal = SqliteJournal(JournalOptions(path, vfs="faulty", max_submission_age_s=0))
    journal.apply(Batch(1, inserts=tuple(new_submission(i) for i in range(1, 50))))
    journal.apply(Batch(2, ended=tuple(ended(i, State.COMPLETED, ago_s=1) for i in range(1, 50))))
    faults.arm("write")
    assert not journal.maintain()
    outcome = journal.apply(Batch(3, id_mark_ms=1))
    assert "clean-up failed" in outcome.warning
    assert outcome.forgotten == 0
    while journal.maintain():
        pass
    outcome = journal.apply(Batch(4))
    assert (outcome.warning, outcome.forgotten) == ("", 49)
    journal.close()


def test_closing_on_a_disk_that_fails_loses_nothing(path: str, faults: Faults) -> None:
    journal = SqliteJournal(JournalOptions(path, vfs="faulty"))
    insert_one(journal, 1, new_submission(1))
    faults.arm("checkpoint", lasting=True)
    journal.close()
    faults.disarm()
    again = SqliteJournal(JournalOptions(path))
    assert held(again)[0] == {1: State.IN_PROGRESS}
    again.close()


def test_a_full_disk_is_said_so_and_what_fits_still_goes_in(path: str) -> None:
    journal = SqliteJournal(JournalOptions(path, extra_pragmas={"max_page_count": "64"}))
    insert_one(journal, 1, new_submission(1, metadata=bytes(20_000)))
    journal.apply(Batch(2, ended=(ended(1, State.COMPLETED, ago_s=10),)))
    number = 2
    while True:
        number += 1
        before = held(journal)
        outcome = journal.apply(Batch(number, inserts=(new_submission(number, metadata=bytes(20_000)),)))
        if outcome.failure is not None:
            break
    assert outcome.failure is Failure.STORAGE_FULL
    assert "full" in outcome.reason
    assert held(journal) == before
    assert journal.apply(Batch(number + 1, events=completions(3, 1))).failure is None, "there is room for this"
    journal.close()

    # Forgetting makes room.
    journal = SqliteJournal(JournalOptions(path, max_submission_age_s=1, extra_pragmas={"max_page_count": "64"}))
    while journal.maintain():
        pass
    assert insert_one(journal, number + 2, new_submission(number, metadata=bytes(20_000))).result is InsertResult.NEW
    journal.close()


def test_an_empty_batch_after_a_failure_succeeds_only_if_the_disk_does(path: str, faults: Faults) -> None:
    journal = SqliteJournal(JournalOptions(path, vfs="faulty"))
    faults.arm("write", lasting=True, error=apsw.FullError)
    assert journal.apply(Batch(1, id_mark_ms=1)).failure is Failure.STORAGE_FULL
    assert journal.apply(Batch(2)).failure is Failure.STORAGE_FULL
    faults.disarm()
    assert journal.apply(Batch(3)).failure is None
    journal.close()


# --- the WAL stays bounded ---


def wal_file_bytes(path: str) -> int:
    return os.stat(path + "-wal").st_size


def test_the_wal_stays_bounded_while_a_reader_reads(path: str) -> None:
    limit = 512 * 1024
    journal = SqliteJournal(JournalOptions(path, durability="normal", checkpoint_bytes=limit))
    insert_one(journal, 1, new_submission(1, count=1_000_000))
    done = threading.Event()
    reads = [0]

    def read() -> None:
        reader = Reader(path)
        while not done.is_set():
            reader.status(1)
            reader.lookup_by_strategic_metadata({}, 10_000)
            reads[0] += 1
        reader.close()

    thread = threading.Thread(target=read)
    thread.start()
    events = completions(1, *range(2000))
    checkpoints = largest = 0
    for number in range(2, 2500):
        outcome = journal.apply(Batch(number, events=events))
        assert outcome.failure is None
        checkpoints += outcome.checkpoint_seconds is not None
        largest = max(largest, outcome.wal_bytes, wal_file_bytes(path))
    done.set()
    thread.join()
    journal.close()
    assert checkpoints > 5
    assert reads[0] > 0
    # A reader may be in the way of an attempt; the next one comes after another megabyte.
    assert largest < limit + 4 * 1024 * 1024


def test_a_reader_that_holds_a_snapshot_delays_no_commit_and_the_wal_shrinks_after_it(path: str) -> None:
    limit = 64 * 1024
    journal = SqliteJournal(JournalOptions(path, durability="normal", checkpoint_bytes=limit))
    insert_one(journal, 1, new_submission(1, count=1_000_000))
    holder = apsw.Connection(path, flags=apsw.SQLITE_OPEN_READONLY)
    holder.execute("BEGIN")
    holder.execute("SELECT count(*) FROM submissions").fetchall()
    events = completions(1, *range(2000))
    number = 1
    while wal_file_bytes(path) < 40 * limit:
        number += 1
        outcome = journal.apply(Batch(number, events=events))
        assert outcome.failure is None
        assert outcome.checkpoint_seconds is None
    holder.execute("COMMIT")
    holder.close()
    finished = None
    while finished is None:
        number += 1
        finished = journal.apply(Batch(number, events=events)).checkpoint_seconds
    number += 1
    assert journal.apply(Batch(number, events=events)).wal_bytes < limit
    assert wal_file_bytes(path) <= 3 * limit, "the file has shrunk as well"
    journal.close()


@pytest.mark.parametrize("durability", ["full", "normal"])
@pytest.mark.parametrize("checkpoint_bytes", [1, 40_000, 16_000_000])
def test_the_fsyncs_that_are_told_are_those_that_were_made(path: str, durability: str, checkpoint_bytes: int) -> None:
    vfs = CountingVFS()
    journal = SqliteJournal(
        JournalOptions(path, vfs="counting", durability=durability, checkpoint_bytes=checkpoint_bytes)
    )
    journal.load(Collected())
    journal.apply(Batch(1, inserts=(new_submission(1, count=100_000),)))
    vfs.syncs.clear()
    told = 0
    for number in range(2, 40):
        outcome = journal.apply(a_batch(number, number))
        assert outcome.failure is None
        told += outcome.fsyncs
    assert told == len(vfs.syncs)
    assert told >= 38 or durability == "normal"
    journal.close()
    vfs.unregister()

"""The database as a file: what is refused stays as it is, what is ours is opened, migrated, and closed in order."""

from __future__ import annotations

import contextlib
import os
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import apsw
import pytest

from opsqueue.server.errors import (
    DamagedDatabaseError,
    DatabaseAccessError,
    DatabaseInUseError,
    ForeignDatabaseError,
    NewerDatabaseError,
    ReferenceDatabaseError,
    StartupError,
)
from opsqueue.server.sql import Migration, migrations, queries
from opsqueue.server.writer import database_file
from opsqueue.server.writer.batch import Batch, BlockRow, JournalOptions, State
from opsqueue.server.writer.database_file import OldSqliteError, acquire_lock, check_sqlite_version, lock_path
from opsqueue.server.writer.journal import SqliteJournal
from opsqueue.server.writer.migrations import migrate
from tests.support.journals import Collected, completions, ended, insert_one, new_submission

# The first tables of the reference's file, as its own migrations leave them; what is in them does not matter.
REFERENCE_SCHEMA = """
CREATE TABLE _sqlx_migrations (version BIGINT PRIMARY KEY, description TEXT NOT NULL);
CREATE TABLE submissions (id INTEGER PRIMARY KEY, prefix TEXT, chunks_total INTEGER);
CREATE TABLE chunks (submission_id INTEGER, chunk_index INTEGER, input_content BLOB);
"""


@contextlib.contextmanager
def sqlite(path: Path) -> Iterator[apsw.Connection]:
    connection = apsw.Connection(str(path))
    try:
        yield connection
    finally:
        connection.close()


def a_text_file(path: Path) -> None:
    path.write_text("Dear diary,\n" * 50)


def three_bytes(path: Path) -> None:
    path.write_bytes(b"abc")


def another_programs_database(path: Path) -> None:
    with sqlite(path) as connection:
        connection.pragma("application_id", 0x12345)
        connection.execute("CREATE TABLE submissions (id INTEGER)")


def an_unnamed_database(path: Path) -> None:
    with sqlite(path) as connection:
        connection.execute("CREATE TABLE people (name TEXT)")


def an_unnamed_database_with_its_wal(path: Path) -> None:
    with sqlite(path) as connection:
        connection.config(apsw.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, 1)
        connection.pragma("journal_mode", "WAL")
        connection.execute("CREATE TABLE people (name TEXT)")


def the_references_database(path: Path) -> None:
    with sqlite(path) as connection:
        connection.pragma("journal_mode", "WAL")
        connection.execute(REFERENCE_SCHEMA)


def a_newer_database(path: Path) -> None:
    SqliteJournal(JournalOptions(str(path))).close()
    with sqlite(path) as connection:
        connection.pragma("user_version", 99)


def a_newer_database_that_only_its_wal_calls_newer(path: Path) -> None:
    SqliteJournal(JournalOptions(str(path))).close()
    with sqlite(path) as connection:
        connection.config(apsw.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, 1)
        connection.pragma("user_version", 99)


def a_cut_off_database(path: Path) -> None:
    SqliteJournal(JournalOptions(str(path))).close()
    os.truncate(path, 3 * 4096 + 7)


def a_cut_off_header(path: Path) -> None:
    SqliteJournal(JournalOptions(str(path))).close()
    os.truncate(path, 60)


REFUSED = [
    (a_text_file, ForeignDatabaseError, "not an SQLite file"),
    (three_bytes, ForeignDatabaseError, "not an SQLite file"),
    (another_programs_database, ForeignDatabaseError, "application_id 0x12345"),
    (an_unnamed_database, ForeignDatabaseError, "application_id 0x0"),
    (an_unnamed_database_with_its_wal, ForeignDatabaseError, "application_id 0x0"),
    (the_references_database, ReferenceDatabaseError, "reference"),
    (a_newer_database, NewerDatabaseError, "schema version 99"),
    (a_cut_off_database, DamagedDatabaseError, "cut off after 12295 of"),
    (a_cut_off_header, DamagedDatabaseError, "ends after 60 bytes"),
]


def contents(directory: Path) -> dict[str, bytes]:
    return {entry.name: entry.read_bytes() for entry in directory.iterdir()}


@pytest.mark.parametrize(("make", "error", "text"), REFUSED, ids=[make.__name__ for make, *_ in REFUSED])
def test_a_file_that_is_refused_stays_byte_for_byte_with_nothing_beside_it(
    tmp_path: Path, make: Callable[[Path], None], error: type[StartupError], text: str
) -> None:
    path = tmp_path / "queue.db"
    make(path)
    before = contents(tmp_path)
    with pytest.raises(error) as raised:
        SqliteJournal(JournalOptions(str(path)))
    assert contents(tmp_path) == before
    assert text in str(raised.value)
    assert str(path) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_newer_schema_in_the_wal_is_refused_too(tmp_path: Path) -> None:
    path = tmp_path / "queue.db"
    a_newer_database_that_only_its_wal_calls_newer(path)
    before = contents(tmp_path)
    with pytest.raises(NewerDatabaseError):
        SqliteJournal(JournalOptions(str(path)))
    after = contents(tmp_path)
    assert {name: after[name] for name in ("queue.db", "queue.db-wal")} == {
        name: before[name] for name in ("queue.db", "queue.db-wal")
    }


def test_a_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ForeignDatabaseError, match="not a regular file"):
        SqliteJournal(JournalOptions(str(tmp_path)))


def test_a_directory_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(DatabaseAccessError, match="missing"):
        SqliteJournal(JournalOptions(str(tmp_path / "missing" / "queue.db")))


def refusal_without_rights(path: Path) -> str:
    """What a user without rights is told who opens `path`: a fork of this process, which may be root's."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        with contextlib.suppress(OSError):  # not root: there are no rights to give up
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
        try:
            SqliteJournal(JournalOptions(str(path)))
        except StartupError as error:
            os.write(write, f"{type(error).__name__}: {error}".encode())
        os._exit(0)
    os.close(write)
    with open(read, encoding="utf-8") as pipe:
        said = pipe.read()
    os.waitpid(child, 0)
    return said


@pytest.fixture
def open_directory() -> Iterator[Path]:
    """A directory that every user can enter."""
    with tempfile.TemporaryDirectory() as directory:
        os.chmod(directory, 0o777)
        yield Path(directory)
        os.chmod(directory, 0o777)


@pytest.mark.parametrize("mode", [0o444, 0o000])
def test_a_file_without_the_right_to_write_is_refused(open_directory: Path, mode: int) -> None:
    path = open_directory / "queue.db"
    SqliteJournal(JournalOptions(str(path))).close()
    before = path.read_bytes()
    path.chmod(mode)
    said = refusal_without_rights(path)
    assert said.startswith(f"DatabaseAccessError: {path} cannot be opened for writing"), said
    path.chmod(0o600)
    assert path.read_bytes() == before


def test_a_directory_without_the_right_to_write_is_refused(open_directory: Path) -> None:
    open_directory.chmod(0o555)
    assert refusal_without_rights(open_directory / "queue.db").startswith("DatabaseAccessError")


def test_a_file_that_another_program_keeps_locked_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database_file, "BUSY_TIMEOUT_MS", 50)
    path = tmp_path / "queue.db"
    SqliteJournal(JournalOptions(str(path))).close()
    locker = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import apsw, sys\n"
            "c = apsw.Connection(sys.argv[1])\n"
            "c.pragma('locking_mode', 'EXCLUSIVE')\n"
            "c.execute('BEGIN EXCLUSIVE')\n"
            "print('locked', flush=True)\n"
            "sys.stdin.read()",
            str(path),
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert locker.stdout is not None
        assert locker.stdout.readline() == "locked\n"
        with pytest.raises(DatabaseAccessError, match="another program has locked it"):
            SqliteJournal(JournalOptions(str(path)))
    finally:
        locker.communicate("")


def test_an_old_sqlite_is_refused() -> None:
    check_sqlite_version("3.51.3")
    check_sqlite_version("3.60.0")
    with pytest.raises(OldSqliteError, match=r"3\.51\.2"):
        check_sqlite_version("3.51.2")


# --- creation and closing ---


def test_an_absent_or_empty_file_is_created(tmp_path: Path) -> None:
    empty = tmp_path / "empty.db"
    empty.touch(mode=0o600)
    for path in (tmp_path / "absent.db", empty):
        SqliteJournal(JournalOptions(str(path))).close()
        assert [entry.name for entry in tmp_path.glob(path.name + "*")] == [path.name]
        with sqlite(path) as connection:
            assert connection.pragma("application_id") == 0x4F505351
            assert connection.pragma("user_version") == len(migrations())
            assert connection.pragma("auto_vacuum") == 2
            assert connection.pragma("page_size") == 4096
            assert connection.pragma("journal_mode") == "wal"
    assert stat.S_IMODE(empty.stat().st_mode) == 0o600


def test_what_an_interrupted_creation_left_does_not_matter(tmp_path: Path) -> None:
    (tmp_path / "queue.db-new").write_bytes(b"half a database")
    SqliteJournal(JournalOptions(str(tmp_path / "queue.db"))).close()
    assert [entry.name for entry in tmp_path.iterdir()] == ["queue.db"]


@pytest.mark.parametrize(
    ("options", "expected"),
    [({}, 2), ({"durability": "normal"}, 1), ({"temporary": True}, 0), ({"temporary": True, "durability": "full"}, 0)],
)
def test_durability_is_what_the_connection_does(tmp_path: Path, options: dict[str, object], expected: int) -> None:
    journal = SqliteJournal(JournalOptions(str(tmp_path / "queue.db"), **options))  # type: ignore[arg-type]
    assert journal._connection.pragma("synchronous") == expected
    journal.close()


def test_with_external_checkpoints_the_wal_is_left_at_close(tmp_path: Path) -> None:
    path = tmp_path / "queue.db"
    journal = SqliteJournal(JournalOptions(str(path), external_checkpoints=True, checkpoint_bytes=4096))
    before = path.read_bytes()
    for number in range(1, 20):
        outcome = journal.apply(Batch(number, inserts=(new_submission(number),)))
        assert outcome.checkpoint_seconds is None
    assert outcome.wal_bytes > 4096
    journal.close()
    assert path.read_bytes() == before
    assert (tmp_path / "queue.db-wal").stat().st_size > 4096


def test_tables_of_a_replicator_are_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "queue.db"
    SqliteJournal(JournalOptions(str(path))).close()
    with sqlite(path) as connection:
        connection.execute("CREATE TABLE _litestream_seq (id INTEGER PRIMARY KEY, seq INTEGER)")
        connection.execute("INSERT INTO _litestream_seq VALUES (1, 7)")
    journal = SqliteJournal(JournalOptions(str(path)))
    journal.load(Collected())
    insert_one(journal, 1, new_submission(1))
    journal.close()
    with sqlite(path) as connection:
        assert connection.execute("SELECT seq FROM _litestream_seq").fetchall() == [(7,)]


# --- the lock ---


def test_a_second_server_on_the_file_is_refused_with_the_holders_pid(tmp_path: Path) -> None:
    path = tmp_path / "queue.db"
    (tmp_path / "other-name.db").symlink_to(path)
    fd = acquire_lock(str(path))
    for name in (path, tmp_path / "other-name.db"):
        with pytest.raises(DatabaseInUseError, match=f"pid {os.getpid()}"):
            acquire_lock(str(name))
    os.close(fd)
    os.close(acquire_lock(str(path)))
    assert not path.exists(), "the lock is another file"
    assert lock_path(str(path)) == str(path) + "-lock"


def test_the_lock_lives_as_long_as_one_process_that_inherited_it(tmp_path: Path) -> None:
    path = str(tmp_path / "queue.db")
    fd = acquire_lock(path)
    child = subprocess.Popen(
        [sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE, pass_fds=(fd,)
    )
    os.close(fd)
    with pytest.raises(DatabaseInUseError):
        acquire_lock(path)
    child.kill()
    child.communicate()
    os.close(acquire_lock(path))


def test_a_lock_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DatabaseAccessError, match="missing"):
        acquire_lock(str(tmp_path / "missing" / "queue.db"))


# --- migrations and queries ---


def test_migrations_run_once_each_in_order_and_whole() -> None:
    connection = apsw.Connection(":memory:")
    steps = [
        Migration(1, "first", "CREATE TABLE a (x); INSERT INTO a VALUES (1);"),
        Migration(2, "second", "ALTER TABLE a ADD COLUMN y; UPDATE a SET y = x + 1;"),
    ]
    assert migrate(connection, steps[:1]) == 1
    assert migrate(connection, steps) == 1
    assert migrate(connection, steps) == 0
    assert connection.execute("SELECT x, y FROM a").fetchall() == [(1, 2)]

    broken = Migration(3, "broken", "CREATE TABLE b (x); INSERT INTO nowhere VALUES (1);")
    with pytest.raises(apsw.SQLError):
        migrate(connection, [*steps, broken])
    assert connection.pragma("user_version") == 2
    assert connection.execute("SELECT name FROM sqlite_schema").fetchall() == [("a",)]


def test_the_first_schema_is_brought_to_the_newest_with_its_content(tmp_path: Path) -> None:
    path = tmp_path / "queue.db"
    with sqlite(path) as connection:
        connection.pragma("application_id", 0x4F505351)
        migrate(connection, migrations()[:1])
        connection.execute(
            "INSERT INTO submissions (id, state, chunks_total, chunk_size, direct, fingerprint, strategic_metadata,"
            " otel_trace_carrier) VALUES (7, 1, 10, 1, 0, x'00', '{\"a\":1}', '{}')"
        )
        connection.execute("INSERT INTO log VALUES (3, ?)", (completions(7, 1),))
    journal = SqliteJournal(JournalOptions(str(path)))
    collected = Collected()
    assert journal.load(collected).last_batch == 3
    journal.close()
    assert collected.states == {7: State.PAUSED}
    assert collected.rows == [completions(7, 1)]
    with sqlite(path) as connection:
        assert connection.pragma("user_version") == len(migrations())


@pytest.mark.parametrize("file", ["journal", "retrying", "recovery", "cleanup", "reader"])
def test_every_query_compiles_against_the_schema(file: str) -> None:
    connection = apsw.Connection(":memory:")
    migrate(connection)
    for name, text in queries(file).items():
        count = connection.execute(
            "EXPLAIN " + text, (None,) * (text.count("?") - text.count("?1") // 2), can_cache=False
        )
        assert count.fetchall(), name


# --- damage ---


def damaged(path: Path, *statements: str) -> str:
    """Open a small journal after `statements` have been run on it; what the refusal says."""
    journal = SqliteJournal(JournalOptions(str(path)))
    insert_one(journal, 1, new_submission(1, count=5000))
    insert_one(journal, 2, new_submission(2))
    journal.apply(Batch(3, events=completions(1, 3)))
    journal.apply(Batch(4, blocks=(BlockRow(1, 1, bytes(113), b""),)))
    journal.apply(Batch(5, ended=(ended(2, State.FAILED),)))
    journal.close()
    with sqlite(path) as connection:
        connection.pragma("ignore_check_constraints", 1)
        for statement in statements:
            connection.execute(statement)
    journal = SqliteJournal(JournalOptions(str(path)))
    with pytest.raises(DamagedDatabaseError) as raised:
        journal.load(Collected())
    journal.close()
    assert str(path) in str(raised.value)
    return str(raised.value)


DAMAGE = [
    ("UPDATE submissions SET state = 9 WHERE id = 2", "table submissions, row 2: unknown state"),
    ("UPDATE submissions SET state = -1 WHERE id = 1", "table submissions, row 1: -1 is no state"),
    ("UPDATE submissions SET strategic_metadata = '{]' WHERE id = 1", "table submissions, row 1: "),
    ("UPDATE submissions SET chunks_total = 0 WHERE id = 1", "table submissions, row 1: 0 chunks"),
    ("UPDATE submissions SET chunks_total = 4096 WHERE id = 1", "table blocks, row (1, 1): the submission has 4096"),
    ("UPDATE blocks SET block = 2", "table blocks, row (1, 2): the submission has 5000 chunks"),
    ("UPDATE blocks SET block = -1", "table blocks, row (1, -1): "),
    ("UPDATE blocks SET done = x'00'", "table blocks, row (1, 1): 1 bytes for 904 chunks"),
    ("UPDATE blocks SET attempts = x'80'", "table blocks, row (1, 1): a number of the attempts is cut off"),
    ("UPDATE blocks SET attempts = x'ff7f0100'", "table blocks, row (1, 1): attempts of chunk 16383"),
    ("UPDATE log SET events = x'0701'", "table log, row 3: byte 0: unknown tag 0x07"),
    ("UPDATE log SET events = x'1101'", "table log, row 3: byte 0: there is no previous submission"),
    ("UPDATE log SET events = x'01'", "table log, row 3: byte 0: the submission id is cut off"),
    ("UPDATE log SET events = x'010180'", "table log, row 3: byte 0: the chunk index is cut off"),
    ("DROP TABLE blocks", "no such table: blocks"),
]


@pytest.mark.parametrize(("statement", "expected"), DAMAGE)
def test_what_contradicts_itself_is_refused_with_its_table_and_row(
    tmp_path: Path, statement: str, expected: str
) -> None:
    assert expected in damaged(tmp_path / "queue.db", statement)


def test_bits_behind_the_last_chunk_are_damage(tmp_path: Path) -> None:
    path = tmp_path / "queue.db"
    journal = SqliteJournal(JournalOptions(str(path)))
    insert_one(journal, 1, new_submission(1, count=10))
    journal.apply(Batch(2, blocks=(BlockRow(1, 0, b"\0\4", b""),)))
    with pytest.raises(DamagedDatabaseError, match="behind the last one"):
        journal.load(Collected())
    journal.close()


def test_a_sink_that_refuses_what_it_is_given_names_the_row(tmp_path: Path) -> None:
    class Refusing(Collected):
        def events(self, events: bytes) -> None:
            raise ValueError("chunk 3 of 3")

    journal = SqliteJournal(JournalOptions(str(tmp_path / "queue.db")))
    insert_one(journal, 1, new_submission(1, count=3))
    journal.apply(Batch(2, events=completions(1, 3)))
    with pytest.raises(DamagedDatabaseError, match="table log, row 2: chunk 3 of 3"):
        journal.load(Refusing())
    journal.close()


def test_overwritten_pages_are_damage(tmp_path: Path) -> None:
    path = tmp_path / "queue.db"
    journal = SqliteJournal(JournalOptions(str(path)))
    journal.apply(Batch(1, inserts=tuple(new_submission(i) for i in range(1, 500))))
    journal.close()
    with path.open("r+b") as file:
        file.seek(4096)
        file.write(b"\xa5" * (path.stat().st_size - 4096))
    journal = SqliteJournal(JournalOptions(str(path)))
    with pytest.raises(DamagedDatabaseError, match="malformed"):
        journal.load(Collected())
    journal.close()

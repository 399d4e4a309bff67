"""`opsqueue import` with real processes: what a stopped reference server had goes on here, or nothing is imported."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import apsw
import pytest

from opsqueue.common import DEFAULT_SERIALIZATION_FORMAT, decode_chunk, encode_chunk
from opsqueue.consumer import ConsumerClient, Strategy
from opsqueue.exceptions import SubmissionFailedError
from opsqueue.producer import ProducerClient, SubmissionId, SubmissionStatus
from tests.conftest import ServerFactory
from tests.support.raw_producer import RawProducer
from tests.support.reference_database import (
    MIGRATIONS_0_30,
    MIGRATIONS_0_40,
    Old,
    ReferenceDatabase,
    old_id,
)
from tests.support.server import Server, wait_until

ROOT = Path(__file__).parents[2]


def import_old(old: Path, new: Path, *more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "opsqueue", "import", str(old), "--database-filename", str(new), *more]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=ROOT)


def imported(old: Path, new: Path) -> list[str]:
    """The lines of an import that succeeds."""
    done = import_old(old, new)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.splitlines()


def refused(old: Path, new: Path) -> str:
    """The one line of an import that is refused."""
    done = import_old(old, new)
    assert (done.returncode, done.stdout) == (1, ""), done
    [line] = done.stderr.splitlines()
    return line


def everything(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}


def encoded(value: object) -> bytes:
    return encode_chunk([value], DEFAULT_SERIALIZATION_FORMAT)


class Store:
    """An object store in which an old producer and an old consumer have left chunks of one number each."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._directory = Path(urlsplit(url).path)

    def fill(self, prefix: str, count: int, done: set[int]) -> None:
        directory = self._directory / prefix
        directory.mkdir()
        for chunk in range(count):
            (directory / f"{chunk}-in.bin").write_bytes(encoded(chunk))
            if chunk in done:
                (directory / f"{chunk}-out.bin").write_bytes(encoded(chunk * 10))


@pytest.fixture
def store(store_url: str) -> Store:
    return Store(store_url)


@pytest.fixture
def old_directory(tmp_path: Path) -> Path:
    """Where an old server's files are, and nothing else."""
    directory = tmp_path / "old"
    directory.mkdir()
    return directory


@pytest.fixture
def database(tmp_path: Path) -> ReferenceDatabase:
    """An empty one in use by a server; `abandon` it to leave a WAL."""
    directory = tmp_path / "in-use"
    directory.mkdir()
    return ReferenceDatabase(directory / "old.db")


def work(server: Server, store_url: str, chunks: int, fail: set[int] | None = None) -> list[tuple[int, int]]:
    """Multiply the operations of so many chunks by ten, oldest first, or fail them; (submission, chunk) of each."""
    client = ConsumerClient(server.address, store_url)
    seen: list[tuple[int, int]] = []
    while len(seen) < chunks:
        for chunk in client.reserve_chunks(min(64, chunks - len(seen)), Strategy.Oldest()):
            about = (chunk.submission_id, chunk.submission_prefix, chunk.chunk_index)
            seen.append((chunk.submission_id.id, chunk.chunk_index.id))
            if fail and chunk.chunk_index.id in fail:
                client.fail_chunk(*about, "broken")
            else:
                [operation] = decode_chunk(chunk.input_content, DEFAULT_SERIALIZATION_FORMAT)
                client.complete_chunk(*about, encoded(operation * 10))
    return seen


def waiting(server: Server) -> int:
    with RawProducer(server.port) as producer:
        return int(json.loads(producer.ask("GET", "/producer/submissions/count")[1]))


@pytest.mark.parametrize("left_by", ["a stopped server", "a killed server", "a server killed after a checkpoint"])
@pytest.mark.parametrize("count", [3, 4_096, 4_200])
def test_exactly_what_was_not_done_is_handed_out_and_the_results_are_whole_and_in_order(
    left_by: str, count: int, database: ReferenceDatabase, old_directory: Path, tmp_path: Path, store: Store,
    server_factory: ServerFactory,
) -> None:  # fmt: skip
    open_chunks = {1, count - 1, count // 2}
    done = set(range(count)) - open_chunks
    store.fill("first", count, done)
    store.fill("second", 2, set())
    first = Old(old_id(60), count, "first", done=dict.fromkeys(done))
    second = Old(old_id(50), 2, "second")
    database.add(first)
    if left_by == "a server killed after a checkpoint":
        database.checkpoint()
    database.add(second)
    old = database.abandon(old_directory)
    if left_by == "a stopped server":
        with contextlib.closing(apsw.Connection(str(old))) as connection:
            connection.pragma("user_version")  # whoever has read and is the last to close moves the WAL into the file
    assert Path(f"{old}-wal").exists() == (left_by != "a stopped server")
    before = everything(old_directory)

    lines = imported(old, tmp_path / "new.db")
    assert lines[1] == f"unfinished  2 submissions: {len(open_chunks) + 2} chunks waiting (0 with retries), " + (
        f"{len(done):,} done"
    )
    assert everything(old_directory) == before, "the old file, its WAL, and nothing beside them"

    server = server_factory(database_filename=tmp_path / "new.db")
    expected = sorted({(first.id, chunk) for chunk in open_chunks} | {(second.id, 0), (second.id, 1)})
    assert sorted(work(server, store.url, len(expected))) == expected
    producer = ProducerClient(server.address, store.url)
    for inserted in (first, second):
        results = producer.blocking_stream_completed_submission(SubmissionId(inserted.id), timeout=30)
        assert list(results) == [chunk * 10 for chunk in range(inserted.count)]
    assert waiting(server) == 0


def test_retries_go_on_from_their_old_count(
    database: ReferenceDatabase, tmp_path: Path, store: Store, server_factory: ServerFactory
) -> None:
    store.fill("tried", 3, set())
    tried = Old(old_id(5), 3, "tried", retries={1: 2, 2: 1})
    database.add(tried)
    database.close()
    assert "3 chunks waiting (2 with retries)" in imported(database.path, tmp_path / "new.db")[1]

    server = server_factory(database_filename=tmp_path / "new.db", max_chunk_retries=4)
    handed_out = Counter(chunk for _, chunk in work(server, store.url, 4, fail={1, 2}))
    assert handed_out[0] == 1
    producer = ProducerClient(server.address, store.url)
    while isinstance(producer.get_submission_status(SubmissionId(tried.id)), SubmissionStatus.InProgress):
        handed_out.update(chunk for _, chunk in work(server, store.url, 1, fail={1, 2}))
    with pytest.raises(SubmissionFailedError) as raised:
        producer.blocking_stream_completed_submission(SubmissionId(tried.id), timeout=30)
    failed = raised.value.chunk.chunk_index.id
    assert handed_out[failed] == {1: 2, 2: 3}[failed], "four times in all, with those of the old server"


def test_direct_submissions_keep_their_inputs_and_outputs(
    database: ReferenceDatabase, tmp_path: Path, store: Store, server_factory: ServerFactory
) -> None:
    contents = [encoded(number) for number in range(4)]
    direct = Old(old_id(5), 4, contents=contents, done={0: encoded(0), 2: encoded(20)})
    database.add(direct)
    database.close()
    imported(database.path, tmp_path / "new.db")

    server = server_factory(database_filename=tmp_path / "new.db")
    assert sorted(work(server, store.url, 2)) == [(direct.id, 1), (direct.id, 3)]
    results = ProducerClient(server.address, store.url).blocking_stream_completed_submission(
        SubmissionId(direct.id), timeout=30
    )
    assert list(results) == [0, 10, 20, 30]
    with RawProducer(server.port) as producer:
        for chunk in range(4):
            path = f"/producer/submissions/{direct.id}/chunks/{chunk}/output"
            assert producer.ask("GET", path) == (200, encoded(chunk * 10))


def status(server: Server, submission: int) -> dict[str, Any]:
    with RawProducer(server.port) as producer:
        code, body = producer.ask("GET", f"/producer/submissions/{submission}")
    assert code == 200, body
    [(kind, what)] = json.loads(body).items()
    return {"kind": kind, **what}


def test_what_producers_and_consumers_see_of_a_submission_is_kept(
    database: ReferenceDatabase, tmp_path: Path, server_factory: ServerFactory
) -> None:
    carrier = '{"traceparent":"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"}'
    rich = Old(
        old_id(5, 7), 9, "rich", done={4: None}, metadata=b"\x00\xff", strategic={"customer": -3, "kind": 2**62},
        chunk_size=25, carrier=carrier,
    )  # fmt: skip
    plain = Old(old_id(4), 2, "plain", chunk_size=None)
    for old in (rich, plain):
        database.add(old)
    database.forget_outputs()
    database.close()
    imported(database.path, tmp_path / "new.db")

    server = server_factory(database_filename=tmp_path / "new.db")
    found = status(server, rich.id)
    assert found["kind"] == "InProgress"
    expected = {
        "id": rich.id, "prefix": "rich", "chunks_total": 9, "chunks_done": 1, "chunk_size": 25, "metadata": [0, 255],
        "strategic_metadata": rich.strategic, "otel_trace_carrier": carrier,
    }  # fmt: skip
    assert {name: found[name] for name in expected} == expected
    assert status(server, plain.id)["chunk_size"] == 1
    producer = ProducerClient(server.address, tmp_path.as_uri())
    assert producer.lookup_submission_id_by_prefix("rich") == SubmissionId(rich.id)
    [listed] = producer.list_submissions(strategic_metadata={"customer": -3}).submissions
    assert isinstance(listed, SubmissionStatus.InProgress)
    assert listed.submission.id == SubmissionId(rich.id)
    with RawProducer(server.port) as raw:
        assert raw.insert() > max(rich.id, plain.id)
        body = {
            "chunk_contents": {"SeeObjectStorage": {"prefix": "rich", "count": 9}}, "metadata": [0, 255],
            "strategic_metadata": rich.strategic, "chunk_size": 25,
        }  # fmt: skip
        assert json.loads(raw.ask("POST", "/producer/submissions", body)[1]) == rich.id, "a repeated insert is known"


def test_ended_submissions_still_answer_and_failed_ones_are_retried_without_what_was_done(
    database: ReferenceDatabase, tmp_path: Path, store: Store, server_factory: ServerFactory
) -> None:
    for prefix, done in (("completed", {0, 1}), ("failed", {0}), ("cancelled", {0})):
        store.fill(prefix, 2, done)
    completed = Old(old_id(9), 2, "completed", done={0: None, 1: None}, strategic={"customer": 1}, metadata=b"m")
    failed = Old(old_id(8), 2, "failed", done={0: None})
    cancelled = Old(old_id(7), 2, "cancelled", done={0: None})
    empty = Old(old_id(6), 0, "empty")
    for old in (completed, failed, cancelled, empty):
        database.add(old)
    database.complete(completed)
    database.fail(failed, 1, "no such file")
    database.cancel(cancelled)
    database.close()
    lines = imported(database.path, tmp_path / "new.db")
    assert lines[2] == "ended       2 completed, 1 failed, 1 cancelled", "an empty one is complete"

    server = server_factory(database_filename=tmp_path / "new.db")
    producer = ProducerClient(server.address, store.url)
    assert list(producer.blocking_stream_completed_submission(SubmissionId(completed.id), timeout=30)) == [0, 10]
    assert status(server, completed.id)["metadata"] == list(b"m")
    with pytest.raises(SubmissionFailedError, match="no such file"):
        producer.blocking_stream_completed_submission(SubmissionId(failed.id), timeout=30)
    assert isinstance(producer.get_submission_status(SubmissionId(cancelled.id)), SubmissionStatus.Cancelled)
    again = producer.retry_submission(SubmissionId(failed.id))
    assert work(server, store.url, 1) == [(again.id, 1)]
    assert list(producer.blocking_stream_completed_submission(again, timeout=30)) == [0, 10]


def test_a_second_import_brings_nothing_also_when_the_server_has_forgotten_what_came(
    database: ReferenceDatabase, tmp_path: Path, store: Store, server_factory: ServerFactory
) -> None:
    store.fill("first", 2, {0})
    first = Old(old_id(5), 2, "first", done={0: None})
    database.add(first)
    database.close()
    new = tmp_path / "new.db"
    imported(database.path, new)
    assert imported(database.path, new)[1:] == [
        "unfinished  0 submissions: 0 chunks waiting (0 with retries), 0 done",
        "ended       0 completed, 0 failed, 0 cancelled",
        "skipped     1 submission of an earlier import",
    ]
    server = server_factory(database_filename=new, max_submission_age="1ms")
    work(server, store.url, 1)
    with RawProducer(server.port) as producer:
        path = f"/producer/submissions/{first.id}"
        wait_until(lambda: producer.ask("GET", path)[1] == b"null", "the submission is forgotten")
    server.stop()
    assert imported(database.path, new)[3] == "skipped     1 submission of an earlier import"
    assert waiting(server.start()) == 0


def test_a_database_that_has_submissions_of_its_own_takes_the_old_ones_too(
    database: ReferenceDatabase, tmp_path: Path, server_factory: ServerFactory
) -> None:
    first, same = Old(old_id(90), 2, "old"), Old(old_id(80), 3, "same")
    database.add(first)
    database.add(same)
    database.close()
    new = tmp_path / "new.db"
    server = server_factory(database_filename=new)
    with RawProducer(server.port) as producer:
        own = producer.insert(5)
        body = {"chunk_contents": {"SeeObjectStorage": {"prefix": "same", "count": 3}}, "metadata": None}
        twin = json.loads(producer.ask("POST", "/producer/submissions", body)[1])

    assert f"Another opsqueue server (pid {server.process.pid})" in refused(database.path, new)
    server.stop()
    line = refused(database.path, new)
    assert f"Submission {same.id} of {database.path} has the same prefix as submission {twin}" in line

    server.start()
    assert waiting(server) == 2, "what is refused leaves nothing"
    with RawProducer(server.port) as producer:
        producer.cancel(twin)
    server.stop()
    imported(database.path, new)
    server.start()
    assert [status(server, id)["kind"] for id in (own, first.id, same.id)] == ["InProgress"] * 3
    assert waiting(server) == 3


# --- what is refused ---


def not_sqlite(path: Path) -> None:
    path.write_text("no database at all" * 20)


def an_empty_file(path: Path) -> None:
    path.touch()


def nothing(path: Path) -> None:
    assert not path.exists()


def another_program(path: Path) -> None:
    with apsw.Connection(str(path)) as connection:
        connection.execute("CREATE TABLE submissions(id)")
    connection.close()


def with_statement(statement: str) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        database = ReferenceDatabase(path)
        database.add(Old(5 << 22, 3, "first"))
        database.add(Old(6 << 22, 3, contents=[b"a", b"b", b"c"], strategic={"a": 1}))
        database.connection.execute(statement)
        database.close()

    return make


def older(path: Path) -> None:
    ReferenceDatabase(path, MIGRATIONS_0_30[:-1]).close()


def newer(path: Path) -> None:
    ReferenceDatabase(path, (*MIGRATIONS_0_40, 20301231000000)).close()


def truncated(path: Path) -> None:
    database = ReferenceDatabase(path)
    database.add(Old(5 << 22, 3_000, "first"))
    database.close()
    path.write_bytes(path.read_bytes()[:-4096])


def scribbled(path: Path) -> None:
    database = ReferenceDatabase(path)
    database.add(Old(5 << 22, 30_000, "first"))
    database.close()
    content = bytearray(path.read_bytes())
    content[-200_000:] = b"\xaa" * 200_000
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (nothing, "No such file"),
        (Path.mkdir, "not a regular file"),
        (not_sqlite, "not an SQLite file"),
        (an_empty_file, "it is empty"),
        (another_program, "other tables"),
        (older, "lacks migration 20250416081453"),
        (newer, "migration 20301231000000, which this opsqueue does not know"),
        (truncated, "is damaged: it is cut off after"),
        (scribbled, "is damaged: "),
        (with_statement("UPDATE _sqlx_migrations SET success = 0 WHERE version = 20241104104445"), "was not finished"),
        (with_statement("DROP TABLE chunks_failed"), "no table chunks_failed"),
        (with_statement("DELETE FROM chunks WHERE chunk_index = 1"), "1 chunks are neither waiting nor done"),
        (with_statement("INSERT INTO chunks VALUES (5 << 22, 3, NULL, 0)"), "has 4 that wait"),
        (with_statement("UPDATE chunks SET chunk_index = 9 WHERE chunk_index = 2"), "has a chunk 9"),
        (with_statement("UPDATE chunks SET retries = -1 WHERE chunk_index = 2"), "-1 retries"),
        (with_statement("UPDATE submissions SET metadata = 7"), "its metadata are not bytes"),
        (with_statement("UPDATE submissions SET otel_trace_carrier = '{'"), "trace carrier"),
        (
            with_statement("INSERT INTO submissions_completed (id, chunks_total, completed_at) VALUES (5 << 22, 1, 1)"),
            "there twice",
        ),
    ],
)
def test_a_file_that_cannot_be_brought_over_is_one_line_and_nothing_is_written(
    make: Callable[[Path], None], named: str, old_directory: Path, tmp_path: Path
) -> None:
    old = old_directory / "old.db"
    make(old)
    before = everything(old_directory)
    line = refused(old, tmp_path / "new.db")
    assert line.startswith("opsqueue: ")
    assert named in line
    assert str(old) in line
    assert everything(old_directory) == before
    assert [path.name for path in tmp_path.glob("new.db*") if path.name != "new.db-lock"] == []


def test_what_fails_in_the_middle_leaves_an_existing_database_as_it_was(tmp_path: Path) -> None:
    good, bad, new = (tmp_path / name for name in ("good.db", "bad.db", "new.db"))
    database = ReferenceDatabase(good)
    database.add(Old(old_id(5), 3, "good"))
    database.close()
    imported(good, new)
    with_statement("UPDATE chunks SET retries = -1 WHERE submission_id = 6 << 22 AND chunk_index = 2")(bad)
    assert "-1 retries" in refused(bad, new)
    connection = apsw.Connection(str(new))
    assert connection.execute("SELECT prefix FROM submissions").get == "good"
    assert connection.execute("SELECT count(*) FROM direct_inputs").get == 0
    connection.close()


HOLD = "import apsw, sys; c = apsw.Connection(sys.argv[1]); c.execute(sys.argv[2]).get; print('open'); sys.stdin.read()"


@pytest.mark.parametrize("statement", ["SELECT count(*) FROM chunks", "BEGIN IMMEDIATE"])
def test_an_old_server_that_still_runs_is_named(statement: str, old_directory: Path, tmp_path: Path) -> None:
    old = old_directory / "old.db"
    with_statement("SELECT 1")(old)
    command = [sys.executable, "-c", HOLD, str(old), statement]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "open\n"
        assert f"open in another process (pid {holder.pid})" in refused(old, tmp_path / "new.db")
        assert not (tmp_path / "new.db").exists()
        holder.communicate()
    imported(old, tmp_path / "new.db")


def test_the_old_file_as_the_new_one_and_a_database_of_ours_as_the_old_one_are_refused(
    database: ReferenceDatabase, tmp_path: Path
) -> None:
    database.close()
    assert "choose another --database-filename" in refused(database.path, database.path)
    imported(database.path, tmp_path / "new.db")
    assert "is a database of this opsqueue already" in refused(tmp_path / "new.db", tmp_path / "newer.db")
    in_memory = import_old(database.path, Path(":memory:"))
    assert (in_memory.returncode, in_memory.stdout) == (2, "")
    assert "an import needs a file" in in_memory.stderr


# --- while it runs ---


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """An old database that takes a while: 600,000 chunks, every third done."""
    database = ReferenceDatabase(tmp_path / "large.db")
    database.connection.execute(
        "INSERT INTO submissions (id, prefix, chunks_total, chunks_done) VALUES (5 << 22, 'large', 600000, 200000)"
    )
    database.connection.execute(
        "WITH RECURSIVE n (i) AS (SELECT 0 UNION ALL SELECT i + 1 FROM n WHERE i < 599999) "
        "INSERT INTO chunks SELECT 5 << 22, i, NULL, 0 FROM n WHERE i % 3 > 0"
    )
    database.close()
    return tmp_path / "large.db"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)])
def test_an_import_that_is_cut_short_leaves_nothing_and_can_be_run_again(
    number: signal.Signals, code: int, large: Path, tmp_path: Path
) -> None:
    new = tmp_path / "new.db"
    command = [sys.executable, "-m", "opsqueue", "import", str(large), "--database-filename", str(new)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as importing:
        wait_until(Path(f"{new}-wal").exists, "the new database is being written")
        importing.send_signal(number)
        assert importing.communicate(timeout=30) == (b"", b"")
    assert importing.returncode == code
    assert new.exists() == (number == signal.SIGKILL)
    if new.exists():
        with contextlib.closing(apsw.Connection(str(new))) as connection:
            assert connection.execute("SELECT count(*) FROM submissions").get == 0
    assert "400,000 chunks waiting (0 with retries), 200,000 done" in imported(large, new)[1]


def test_progress_is_shown_on_a_terminal_only(large: Path, tmp_path: Path) -> None:
    terminal, end = os.openpty()
    command = [sys.executable, "-m", "opsqueue", "import", str(large)]
    environment = {**os.environ, "OPSQUEUE_DATABASE_FILENAME": str(tmp_path / "new.db"), "TERM": "xterm"}
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=end, timeout=60, cwd=ROOT, env=environment)
        shown = os.read(terminal, 100_000).decode()
    finally:
        os.close(end)
        os.close(terminal)
    assert done.returncode == 0
    assert "600000/600000" in shown
    assert done.stdout.decode().splitlines()[0].startswith(f"imported {large} into {tmp_path / 'new.db'} in ")

"""`opsqueue gc` removes what belongs to forgotten submissions, and nothing else."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice
from pathlib import Path

import pytest

from opsqueue.client.garbage import Looked, ServerGoneError, Verdict, collect
from opsqueue.client.http import HttpClient
from opsqueue.client.producer_calls import ProducerCalls
from opsqueue.client.store import open_store
from opsqueue.client.store_error import StoreError
from opsqueue.client.store_objects import StoredObject, objects_of
from opsqueue.client.urls import parse_address
from opsqueue.consumer import ConsumerClient, Strategy
from tests.support.consumer_threads import consuming
from tests.support.permissions import bound_by_permissions
from tests.support.raw_producer import RawProducer
from tests.support.server import Server, wait_until

DAY_S = 86_400.0


def prefix_made(days_ago: float) -> str:
    """A UUIDv7 of that time."""
    milliseconds = int((time.time() - days_ago * DAY_S) * 1000)
    return str(uuid.UUID(int=milliseconds << 80 | 7 << 76 | 0b10 << 62 | uuid.uuid4().int & (1 << 62) - 1))


class Objects:
    """Files of a store, with their ages."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def put(self, path: str, days_ago: float) -> Path:
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"12345")
        moment = time.time() - days_ago * DAY_S
        os.utime(file, (moment, moment))
        return file

    def submission(self, days_ago: float, chunks: int = 2, prefix: str | None = None) -> str:
        prefix = prefix or prefix_made(days_ago)
        for index in range(chunks):
            self.put(f"{prefix}/{index}-in.bin", days_ago)
            self.put(f"{prefix}/{index}-out.bin", days_ago)
        return prefix

    def paths(self) -> set[str]:
        return {str(file.relative_to(self.root)) for file in self.root.rglob("*") if not file.is_dir()}


@pytest.fixture
def objects(tmp_path: Path) -> Objects:
    root = tmp_path / "objects"
    root.mkdir()
    return Objects(root)


def gc(objects: Objects, server: str, *words: str) -> subprocess.CompletedProcess[str]:
    """The command to its end."""
    return subprocess.run(
        [sys.executable, "-m", "opsqueue", "gc", objects.root.as_uri(), "--server", server, *words],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


def insert(server: Server, prefix: str) -> int:
    with RawProducer(server.port) as producer:
        return producer.insert(2, prefix=prefix)


def test_only_old_objects_of_forgotten_submissions_are_removed(server: Server, objects: Objects) -> None:
    running, gone = objects.submission(9), objects.submission(8)
    insert(server, running)
    young, being_written = objects.submission(6), objects.submission(30)
    late = objects.put(f"{being_written}/7-in.bin", days_ago=1)
    kept = objects.paths() - {path for path in objects.paths() if path.startswith(gone)}
    result = gc(objects, server.address)
    assert (result.returncode, result.stderr) == (0, "")
    assert objects.paths() == kept
    assert not (objects.root / gone).exists()
    assert late.exists()
    assert (objects.root / young).exists()
    assert result.stdout.startswith(
        "4 prefixes seen; removed 4 objects (20 bytes) under 1 of them; left 1 that the server knows, 2 that are"
    )


def test_what_the_server_knows_is_kept_whatever_became_of_it(server: Server, objects: Objects) -> None:
    completed, cancelled, paused = (objects.submission(30, prefix=prefix_made(30)) for _ in range(3))
    with RawProducer(server.port) as producer:
        with consuming(server, objects.root.as_uri(), work):
            done = producer.insert(2, prefix=completed)
            wait_until(lambda: producer.state(done) == "Completed", "the submission is completed")
        producer.pause(producer.insert(2, prefix=paused))
        producer.cancel(producer.insert(2, prefix=cancelled))
    for file in objects.root.rglob("*.bin"):
        os.utime(file, (0, 0))
    before = objects.paths()
    result = gc(objects, server.address, "--verbose")
    assert (result.returncode, result.stderr) == (0, "")
    assert objects.paths() == before
    assert "left 3 that the server knows" in result.stdout
    for prefix in (completed, cancelled, paused):
        assert f"{prefix}: 4 objects, " in result.stdout


def work(client: ConsumerClient) -> None:
    client.run_each_chunk_raw(lambda _chunk: b"54321", strategy=Strategy.Random())


def test_a_directory_that_was_emptied_before_goes_and_one_with_others_in_it_stays(
    server: Server, objects: Objects
) -> None:
    emptied, young, nested, known = prefix_made(9), prefix_made(2), prefix_made(9), prefix_made(9)
    for path in (emptied, young, f"{nested}/deeper", known):
        (objects.root / path).mkdir(parents=True)
    insert(server, known)
    assert gc(objects, server.address, "--dry-run").returncode == 0
    assert (objects.root / emptied).exists()
    result = gc(objects, server.address)
    assert (result.returncode, result.stderr) == (0, "")
    assert {path.name for path in objects.root.iterdir()} == {young, nested, known}
    assert (objects.root / nested / "deeper").exists()


def test_a_dry_run_removes_nothing_and_says_what_it_would(server: Server, objects: Objects) -> None:
    gone = objects.submission(8)
    before = objects.paths()
    result = gc(objects, server.address, "--dry-run", "--verbose")
    assert result.returncode == 0
    assert objects.paths() == before
    assert f"{gone}: 4 objects, 20 bytes: would be removed" in result.stdout
    assert "would remove 4 objects" in result.stdout


def test_what_no_client_has_written_is_never_touched(server: Server, objects: Objects) -> None:
    version_4 = str(uuid.uuid4())
    mixed = objects.submission(20)
    foreign = {
        "0-in.bin", "backup/0-in.bin", f"{version_4}/0-in.bin", f"{prefix_made(20).upper()}/0-in.bin",
        f"{prefix_made(20)}x/0-in.bin", f"{mixed}/notes.txt", f"{mixed}/00-in.bin", f"{mixed}/-1-out.bin",
        f"{mixed}/0-in.bin.gz", f"{mixed}/deeper/0-in.bin", f"{prefix_made(20)}/readme",
    }  # fmt: skip
    for path in foreign:
        objects.put(path, 20)
    link = objects.root / mixed / "5-in.bin"
    link.symlink_to(objects.root / "0-in.bin")
    os.utime(link, (0, 0), follow_symlinks=False)
    result = gc(objects, server.address)
    assert (result.returncode, result.stderr) == (0, "")
    assert objects.paths() == foreign | {f"{mixed}/5-in.bin"}, "a link to a file is no file of a client's"


def test_the_age_can_be_chosen_but_not_below_a_day(server: Server, objects: Objects) -> None:
    objects.submission(2)
    assert gc(objects, server.address).returncode == 0
    assert len(objects.paths()) == 4
    for refused in ("23h", "0s", "soon"):
        result = gc(objects, server.address, "--older-than", refused)
        assert result.returncode == 2
        assert "--older-than" in result.stderr
        assert result.stderr.count("\n") == 1
    assert len(objects.paths()) == 4
    assert gc(objects, server.address, "--older-than", "36 hours").returncode == 0
    assert not objects.paths()


def test_files_that_were_cut_off_are_removed_with_the_others(server: Server, objects: Objects) -> None:
    prefix = objects.submission(10)
    objects.put(f"{prefix}/3-out.bin.4711-0.tmp", 10)
    objects.put(f"{prefix}/{10**30}-in.bin", 10)
    assert gc(objects, server.address).returncode == 0
    assert not (objects.root / prefix).exists()


def test_without_a_server_nothing_is_looked_at(server: Server, objects: Objects) -> None:
    objects.submission(10)
    server.stop()
    result = gc(objects, server.address)
    assert result.returncode == 4
    [told] = result.stderr.splitlines()
    assert told.startswith("opsqueue: gc: ")
    assert server.address in told
    assert len(objects.paths()) == 4


def test_when_the_server_goes_away_the_rest_is_left(server: Server, objects: Objects) -> None:
    for _ in range(3):
        objects.submission(10)
    address = parse_address(server.address)
    calls, http = ProducerCalls(address), HttpClient(address)
    asked: list[str] = []

    def is_known(prefix: str) -> bool:
        if asked:
            server.kill()
        asked.append(prefix)
        return http.run(calls.lookup_submission_id_by_prefix(prefix, deadline=time.monotonic() + 2)) is not None

    looked = collect(objects_of(open_store(objects.root.as_uri())), is_known, older_than_s=7 * DAY_S, dry_run=False)
    assert next(looked).verdict is Verdict.REMOVED
    with pytest.raises(ServerGoneError):
        next(looked)
    assert len({path.partition("/")[0] for path in objects.paths()}) == 2
    assert len(objects.paths()) == 8


@pytest.mark.parametrize(("status", "answer"), [(200, b"<html>Sign in</html>"), (404, b"null"), (403, b"")])
def test_only_an_answer_of_the_protocol_says_that_a_submission_is_forgotten(
    objects: Objects, status: int, answer: bytes
) -> None:
    objects.submission(10)
    with proxy(status, answer) as address:
        result = gc(objects, address)
    assert result.returncode == 1
    [told] = result.stderr.splitlines()
    assert told.startswith("opsqueue: gc: stopped: ")
    assert "removed 0 objects" in result.stdout
    assert len(objects.paths()) == 4


@contextmanager
def proxy(status: int, body: bytes) -> Iterator[str]:
    """Something before a server that lets only the version through; its address."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            is_version = self.path == "/producer/version"
            self.send_response(200 if is_version else status)
            self.end_headers()
            self.wfile.write(b"v0.40.1" if is_version else body)

        def log_message(self, *_: object) -> None:
            """Nobody reads it."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.01,))
        thread.start()
        yield f"127.0.0.1:{running.server_address[1]}"
        running.shutdown()
        thread.join()


def test_what_was_removed_before_an_error_is_told(objects: Objects) -> None:
    prefix = objects.submission(10, chunks=3)
    stored = objects_of(open_store(objects.root.as_uri()))
    remove = stored.remove

    def breaking(prefix: str, found: Iterable[StoredObject]) -> Iterator[StoredObject]:
        yield from islice(remove(prefix, found), 2)
        raise StoreError("the disk is gone")

    stored.remove = breaking  # type: ignore[method-assign]
    looked = list(collect(stored, lambda _prefix: False, older_than_s=7 * DAY_S, dry_run=False))
    assert looked == [Looked(prefix, Verdict.FAILED, 2, 10, "the disk is gone")]
    assert len(objects.paths()) == 4


def test_what_cannot_be_listed_or_removed_is_named_and_the_rest_is_done(server: Server, objects: Objects) -> None:
    closed, gone = objects.submission(12), objects.submission(10)
    (objects.root / closed).chmod(0)
    words = [sys.executable, "-m", "opsqueue", "gc", objects.root.as_uri(), "--server", server.address]
    result = subprocess.run(
        [*bound_by_permissions(), *words],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    (objects.root / closed).chmod(0o755)
    assert result.returncode == 1
    assert closed in result.stderr
    assert "Permission denied" in result.stderr
    assert result.stderr.count("\n") == 1
    assert not (objects.root / gone).exists()
    assert len(objects.paths()) == 4


def test_an_object_that_appears_while_the_server_is_asked_saves_its_prefix(objects: Objects) -> None:
    prefix = objects.submission(10)

    def is_known(_prefix: str) -> bool:
        objects.put(f"{prefix}/9-in.bin", 0)
        return False

    stored = objects_of(open_store(objects.root.as_uri()))
    [looked] = collect(stored, is_known, older_than_s=7 * DAY_S, dry_run=False)
    assert (looked.verdict, looked.objects) == (Verdict.FAILED, 0)
    assert "was written while" in looked.reason
    assert len(objects.paths()) == 5, "and nothing else under it is touched"


def test_a_listing_that_breaks_off_leaves_its_prefix_untouched(objects: Objects) -> None:
    objects.submission(10, chunks=1_500)
    stored = objects_of(open_store(objects.root.as_uri()))
    under, listings = stored.under, 0

    def breaking(prefix: str) -> Iterator[StoredObject]:
        nonlocal listings
        listings += 1
        yield from islice(under(prefix), None if listings == 1 else 2_900)
        if listings > 1:
            raise StoreError("the connection is gone")

    stored.under = breaking  # type: ignore[method-assign]
    [looked] = collect(stored, lambda _prefix: False, older_than_s=7 * DAY_S, dry_run=False)
    assert (looked.verdict, looked.objects, looked.reason) == (Verdict.FAILED, 0, "the connection is gone")
    assert len(objects.paths()) == 3_000


def test_a_bucket_is_cleaned_in_the_same_way() -> None:
    store = open_store("memory://gc-test/below")
    old, known = prefix_made(30), prefix_made(30)
    for prefix in (old, known):
        for index in range(1_500):
            store.put(f"{prefix}/{index}-in.bin", b"1")
    store.put(f"{old}/other", b"1")
    later = time.time() + 1
    # memory keeps the time of writing, which is now: so the time that counts is a moment from now
    found = list(collect(objects_of(store), known.__eq__, older_than_s=time.time() - later, dry_run=False))
    assert sorted(found, key=lambda looked: looked.prefix) == sorted(
        [Looked(old, Verdict.REMOVED, 1_500, 1_500), Looked(known, Verdict.KNOWN, 1_500, 1_500)],
        key=lambda looked: looked.prefix,
    )
    assert store.get(f"{old}/other") == b"1"
    assert [found.name for found in objects_of(store).under(old)] == ["other"]
    assert len(list(objects_of(store).under(known))) == 1_500


def test_a_store_that_is_not_there_and_a_wrong_url_are_one_line_each(server: Server, tmp_path: Path) -> None:
    missing = Objects(tmp_path / "missing")
    result = gc(missing, server.address)
    assert result.returncode == 1
    assert "missing: No such file or directory" in result.stderr
    for wrong in ("objects", "file://other/objects", "memory://"):
        words = [sys.executable, "-m", "opsqueue", "gc", wrong, "--server", server.address]
        refused = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
        assert refused.returncode == 2
        assert refused.stderr.count("\n") == 1

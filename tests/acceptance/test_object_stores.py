"""Every kind of object store: the same promises, against a real server where one can be had."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from opsqueue.client.garbage import Verdict, collect
from opsqueue.client.ids import new_prefix
from opsqueue.client.store import open_store
from opsqueue.client.store_error import StoreError
from opsqueue.client.store_objects import objects_of
from opsqueue.consumer import ConsumerClient
from opsqueue.exceptions import ChunksStorageError, NewObjectStoreClientError
from opsqueue.producer import AsyncProducerClient, ProducerClient
from tests.support import emulators
from tests.support.server import Server, wait_until

Place = tuple[str, list[tuple[str, str]]]


@pytest.fixture(scope="module", params=["file", "memory", "s3", "google", "azure"])
def place(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """A store's URL and options."""
    directory = tmp_path_factory.mktemp("store")
    match request.param:
        case "file":
            yield (directory / "objects").as_uri(), []
        case "memory":
            yield "memory://stores/base", []
        case "s3":
            with emulators.s3(directory) as found:
                yield found
        case "google":
            with emulators.google(directory) as found:
                yield found
        case _:
            with emulators.azure(directory) as found:
                yield found


@contextlib.contextmanager
def squaring(server: Server, place: Place) -> Iterator[None]:
    consumer = ConsumerClient(server.address, place[0], object_store_options=place[1])
    thread = threading.Thread(target=consumer.run_each_op, args=(lambda number: number * number,))
    thread.start()
    try:
        yield
    finally:
        consumer.stop()
        thread.join(30)
        consumer.inner.close()


def test_operations_and_results_travel_through_it(server: Server, place: Place) -> None:
    producer = ProducerClient(server.address, place[0], object_store_options=place[1])
    with squaring(server, place):
        assert list(producer.run_submission(range(50), chunk_size=7)) == [number**2 for number in range(50)]


def test_coroutines_reach_it_too(server: Server, place: Place) -> None:
    async def run() -> list[int]:
        async with AsyncProducerClient(server.address, place[0], object_store_options=place[1]) as producer:
            return [result async for result in await producer.run_submission(range(20), chunk_size=3)]

    with squaring(server, place):
        assert asyncio.run(run()) == [number**2 for number in range(20)]


def test_an_object_is_replaced_whole_read_back_and_missed_by_name(place: Place) -> None:
    store = open_store(*place)
    prefix = new_prefix()
    for content in (b"", b"first", bytes(range(256)) * 10_000):
        store.put(f"{prefix}/0-in.bin", content)
        assert store.get(f"{prefix}/0-in.bin") == content
    with pytest.raises(StoreError, match=f"cannot read .*{prefix}/1-in.bin"):
        store.get(f"{prefix}/1-in.bin")


def test_garbage_is_found_and_removed(place: Place) -> None:
    store = open_store(*place)
    prefix = new_prefix()
    store.put(f"{prefix}/0-in.bin", b"12345")
    objects = objects_of(store)
    assert [(found.name, found.size) for found in objects.under(prefix)] == [("0-in.bin", 5)]
    # as if it were tomorrow
    verdicts = {
        looked.prefix: looked.verdict
        for looked in collect(objects, lambda _: False, older_than_s=-86_400, dry_run=False)
    }
    assert verdicts[prefix] is Verdict.REMOVED
    assert list(objects.under(prefix)) == [] if not place[0].startswith("file") else True
    with pytest.raises(StoreError):
        store.get(f"{prefix}/0-in.bin")


def test_a_store_that_does_not_answer_is_named_with_its_timeouts_kept(server: Server) -> None:
    port = emulators.free_port()
    producer = ProducerClient(
        server.address,
        "s3://bucket/base",
        object_store_options=[
            ("AWS_ENDPOINT", f"http://127.0.0.1:{port}"), ("AWS_ALLOW_HTTP", "true"), ("aws_timeout", "2s"),
            ("connect_timeout", "1s"), ("max_retries", "1"), ("init_backoff", "10 ms"), ("retry_timeout", "5s"),
            ("access_key_id", "key"), ("secret_access_key", "secret"),
        ],
    )  # fmt: skip
    with pytest.raises(ChunksStorageError, match=r"s3://bucket/base/.*-in\.bin"):
        producer.insert_submission([1], chunk_size=1)
    assert producer.count_submissions() == 0


@pytest.mark.parametrize(
    ("url", "option", "told"),
    [
        ("s3://bucket", ("nonsense", "1"), "nonsense"),
        ("s3://bucket", ("timeout", "soon"), "soon"),
        ("gs://bucket", ("max_retries", "many"), "max_retries must be a number"),
        ("az://container", ("retry_timeout", "soon"), "retry_timeout"),
        ("file:///tmp", ("durable", "perhaps"), "durable must be true or false"),
    ],
)
def test_an_option_that_cannot_be_is_named(url: str, option: tuple[str, str], told: str) -> None:
    with pytest.raises(NewObjectStoreClientError, match=told):
        open_store(url, [option])


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What a store asks of the system, in order: "sync" with the file, "link" and "rename"."""
    made: list[str] = []
    fsync, replace, link = os.fsync, os.replace, os.link

    def noting_fsync(file: int) -> None:
        target = Path(f"/proc/self/fd/{file}").readlink()
        unnamed = target.name.startswith("#")
        made.append("sync" if unnamed else f"sync {target.relative_to(tmp_path)}".split(".bin")[0])
        fsync(file)

    def noting_replace(source: str, target: str) -> None:
        made.append("rename")
        replace(source, target)

    def noting_link(source: str, target: str, **options: Any) -> None:
        made.append("link")
        link(source, target, **options)

    monkeypatch.setattr(os, "fsync", noting_fsync)
    monkeypatch.setattr(os, "replace", noting_replace)
    monkeypatch.setattr(os, "link", noting_link)
    return made


def test_what_is_durable_is_synced_before_it_has_its_name(tmp_path: Path, calls: list[str]) -> None:
    store = open_store((tmp_path / "objects").as_uri(), [("durable", "true")])
    store.put("p/0-in.bin", b"1")
    assert calls == ["sync objects", "sync .", "sync", "link", "sync objects/p"]
    calls.clear()
    store.put("p/0-in.bin", b"2")
    assert calls == ["sync", "link", "sync objects/p/0-in", "rename", "sync objects/p"]
    calls.clear()
    open_store((tmp_path / "objects").as_uri()).put("p/1-in.bin", b"1")
    assert calls == ["link"]


def _no_unnamed_files(monkeypatch: pytest.MonkeyPatch) -> None:
    system_open = os.open

    def refusing(path: str, flags: int, *rest: Any, **options: Any) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(errno.EOPNOTSUPP, "Operation not supported", path)
        return system_open(path, flags, *rest, **options)

    monkeypatch.setattr(os, "open", refusing)


def _no_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    def refusing(source: str, *_: Any, **__: Any) -> None:
        raise FileNotFoundError(errno.ENOENT, "No such file or directory", source)

    monkeypatch.setattr(os, "link", refusing)


@pytest.mark.parametrize("lacking", [_no_unnamed_files, _no_proc])
def test_where_no_file_can_be_without_a_name_it_is_renamed(
    tmp_path: Path, calls: list[str], monkeypatch: pytest.MonkeyPatch, lacking: Callable[[pytest.MonkeyPatch], None]
) -> None:
    lacking(monkeypatch)
    store = open_store((tmp_path / "objects").as_uri(), [("durable", "true")])
    for number in range(2):
        content = bytes([number])
        store.put(f"p/{number}-in.bin", content)
        assert calls[-3:] == [f"sync objects/p/{number}-in", "rename", "sync objects/p"]
        assert store.get(f"p/{number}-in.bin") == content
    assert sorted(file.name for file in (tmp_path / "objects/p").iterdir()) == ["0-in.bin", "1-in.bin"]


WRITING = """
import os, sys
from opsqueue.client.store import open_store
from opsqueue.client.store_error import StoreError
store = open_store(sys.argv[1], [("durable", sys.argv[2])])
number = 0
while True:
    store.put(f"p/{number % 5}-in.bin", bytes([number % 256]) * 1_000_000)
    store.put(f"new-{os.getpid()}/{number}-in.bin", bytes([number % 256]) * 1_000_000)
    number += 1
"""


@pytest.mark.parametrize("durable", ["true", "false"])
def test_a_writer_that_is_killed_leaves_no_half_object(tmp_path: Path, durable: str) -> None:
    for _ in range(5):
        process = subprocess.Popen([sys.executable, "-c", WRITING, tmp_path.as_uri(), durable])
        try:
            place = tmp_path / f"new-{process.pid}"
            wait_until(lambda place=place: any(place.glob("*.bin")), "one has been written")  # type: ignore[misc]
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait(10)
        # new ones have no name before they are whole; one that replaces another has a temporary name
        assert list(tmp_path.glob("new-*/*.tmp")) == []
        for file in tmp_path.glob("*/*.bin"):
            content = file.read_bytes()
            assert len(content) == 1_000_000
            assert len(set(content)) == 1


FILLING = """
import resource, sys
from opsqueue.client.store import open_store
from opsqueue.client.store_error import StoreError
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
import signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
try:
    open_store(sys.argv[1]).put("p/0-in.bin", bytes(200_000))
except StoreError as error:
    print(error)
"""


def test_a_disk_that_takes_no_more_is_an_error_that_leaves_nothing(tmp_path: Path) -> None:
    told = subprocess.run(
        [sys.executable, "-c", FILLING, tmp_path.as_uri()], check=True, capture_output=True, text=True, timeout=60
    ).stdout
    assert "cannot write" in told
    assert "p/0-in.bin: File too large" in told
    assert list((tmp_path / "p").iterdir()) == []
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 100_000

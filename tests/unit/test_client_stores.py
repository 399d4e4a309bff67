"""Addresses and object stores: what is accepted, what is refused with a reason, and what is written where."""

from __future__ import annotations

import os
import threading
import uuid
from pathlib import Path
from typing import Any

import pytest

from opsqueue.client.ids import new_prefix
from opsqueue.client.pool import Pool
from opsqueue.client.store import input_path, open_store, output_path
from opsqueue.client.store_error import StoreError
from opsqueue.client.urls import parse_address
from opsqueue.consumer import ConsumerClient
from opsqueue.exceptions import IncorrectUsageError, NewObjectStoreClientError
from opsqueue.producer import ProducerClient

ADDRESSES = {
    "localhost:4000": ("http://localhost:4000", "ws://localhost:4000/consumer"),
    "localhost": ("http://localhost:3999", "ws://localhost:3999/consumer"),
    "http://h": ("http://h:80", "ws://h:80/consumer"),
    "https://h/opsqueue": ("https://h:443/opsqueue", "wss://h:443/opsqueue/consumer"),
    "https://h/opsqueue/": ("https://h:443/opsqueue", "wss://h:443/opsqueue/consumer"),
    "ws://h:1/": ("http://h:1", "ws://h:1/consumer"),
    "wss://h:1/a/b": ("https://h:1/a/b", "wss://h:1/a/b/consumer"),
    "[::1]:5": ("http://[::1]:5", "ws://[::1]:5/consumer"),
}


@pytest.mark.parametrize("url", ADDRESSES)
def test_addresses_are_read(url: str) -> None:
    address = parse_address(url)
    assert (address.http, address.consumer) == ADDRESSES[url]


@pytest.mark.parametrize("url", ["", "ftp://h", "h:99999", "h:x", "http://", "h?x=1", "http://u:p@h", "a b:1"])
def test_a_wrong_address_is_refused_and_shown(url: str, tmp_path: Path) -> None:
    for client in (ProducerClient, ConsumerClient):
        with pytest.raises(IncorrectUsageError, match="opsqueue_url"):
            client(url, tmp_path.as_uri())


@pytest.mark.parametrize(
    ("url", "options"),
    [
        ("ftp://a/b", []),
        ("http://a/b", []),
        ("/tmp/x", []),
        ("file://relative/x", []),
        ("gs://b/p", [("google_service_account", "/does/not/exist.json")]),
        ("gs://b/p", [("GOOGLE_SERVICE_ACCOUNT", "/does/not/exist.json")]),
        ("az://c/p", []),
    ],
)
def test_a_wrong_store_is_refused_at_construction(url: str, options: Any) -> None:
    for client in (ProducerClient, ConsumerClient):
        with pytest.raises(NewObjectStoreClientError):
            client("localhost:1", url, object_store_options=options)


@pytest.mark.parametrize("options", [{"a": "b"}, [("a",)], [("a", 1)], "ab", [["a", "b"]]])
def test_options_must_be_pairs_of_strings(options: Any, tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        ProducerClient("localhost:1", tmp_path.as_uri(), object_store_options=options)


@pytest.mark.parametrize("url", ["s3://bucket/path", "gs://bucket/path"])
def test_buckets_need_no_network_at_construction(url: str) -> None:
    ProducerClient("localhost:1", url)


def test_a_directory_is_made_on_demand_and_laid_out_as_documented(tmp_path: Path) -> None:
    store = open_store((tmp_path / "a b" / "deep").as_uri())
    assert not (tmp_path / "a b").exists()
    store.put(input_path("prefix", 12), b"in")
    store.put(output_path("prefix", 12), b"first")
    store.put(output_path("prefix", 12), b"out")
    assert sorted(path.name for path in (tmp_path / "a b" / "deep" / "prefix").iterdir()) == ["12-in.bin", "12-out.bin"]
    assert store.get(input_path("prefix", 12)) == b"in"
    assert store.get(output_path("prefix", 12)) == b"out"


@pytest.mark.parametrize("prefix", ["..", "a/../../b", "/etc", "", "a//b", "a\0b"])
def test_no_prefix_leads_out_of_the_directory(prefix: str, tmp_path: Path) -> None:
    store = open_store((tmp_path / "inside").as_uri())
    with pytest.raises(StoreError):
        store.put(input_path(prefix, 0), b"x")
    with pytest.raises(StoreError):
        store.get(input_path(prefix, 0))
    assert list(tmp_path.iterdir()) == []


def test_a_store_that_refuses_is_named_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    store = open_store((tmp_path / "file").as_uri())
    with pytest.raises(StoreError, match=r"file/p/0-in\.bin"):
        store.put(input_path("p", 0), b"x")
    with pytest.raises(StoreError, match=r"nothing/0-in\.bin: No such file"):
        open_store(tmp_path.as_uri()).get(input_path("nothing", 0))


def test_memory_is_shared_within_the_process() -> None:
    open_store("memory://").put(input_path("shared", 0), b"x")
    assert open_store("memory://").get(input_path("shared", 0)) == b"x"
    assert open_store("memory:///elsewhere") is not None
    with pytest.raises(StoreError):
        open_store("memory:///elsewhere").get(input_path("shared", 0))


def test_a_bucket_store_says_that_it_does_not_survive_a_fork() -> None:
    store = open_store("memory://")
    store.put(input_path("fork", 0), b"x")
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            store.get(input_path("fork", 0))
        except StoreError as error:
            os.write(writer, str(error).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        assert b"spawn" in pipe.read()
    os.waitpid(child, 0)


def test_prefixes_are_uuids_of_version_7_that_sort_by_time() -> None:
    made = [uuid.UUID(new_prefix()) for _ in range(100)]
    assert {number.version for number in made} == {7}
    assert {number.variant for number in made} == {uuid.RFC_4122}
    assert len(set(made)) == 100
    times = [number.int >> 80 for number in made]
    assert times == sorted(times)


def test_a_pool_runs_no_more_threads_than_its_size_and_reuses_them() -> None:
    pool = Pool(2, "test-pool")
    names = [pool.submit(lambda: threading.current_thread().name) for _ in range(50)]
    assert len({future.result(10) for future in names}) <= 2
    failing = pool.submit(lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        failing.result(10)


def test_the_threads_of_a_forgotten_pool_end() -> None:
    pool = Pool(2, "test-forgotten")
    thread = pool.submit(threading.current_thread).result(10)
    del pool
    thread.join(10)
    assert not thread.is_alive()


def test_importing_the_clients_does_not_import_what_they_rarely_need() -> None:
    import subprocess
    import sys

    code = "import sys, opsqueue.producer, opsqueue.consumer; print([m for m in ('aiohttp', 'obstore', 'apsw') if m in sys.modules])"  # noqa: E501
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

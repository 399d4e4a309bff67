"""The reference's own published client, unmodified, against our server, alone and mixed with our client."""

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from load_tests.reference_client import VERSION, ReferenceClient, find_python312
from opsqueue.consumer import ConsumerClient, Strategy
from opsqueue.producer import ProducerClient
from tests.conftest import ServerFactory
from tests.support.processes import python_process
from tests.support.server import Server


@pytest.fixture(scope="module")
def reference() -> ReferenceClient:
    python = find_python312()
    if python is None:
        pytest.skip(f"no python3.12 on this machine: the reference's client {VERSION} is a wheel for CPython 3.12")
    return ReferenceClient(python)


@pytest.fixture
def store(tmp_path: Path) -> Path:
    directory = tmp_path / "objects"
    directory.mkdir()
    return directory


@contextlib.contextmanager
def running(client: ReferenceClient, program: str, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """A consumer program of the reference's client, ready."""
    process = client.start(program, *arguments)
    try:
        assert process.stdout is not None
        assert process.stdout.readline().strip() == "ready"
        yield process
    finally:
        process.kill()
        process.communicate()


def output_of(process: subprocess.Popen[str]) -> str:
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    return output


@pytest.mark.parametrize("strategy", ["Oldest", "Newest", "Random", "PreferDistinct", None])
def test_a_submission_comes_back_in_order_with_every_strategy(
    server: Server, reference: ReferenceClient, store: Path, strategy: str | None
) -> None:
    url = store.as_uri()
    arguments = (server.address, url) if strategy is None else (server.address, url, strategy)
    with running(reference, "consumer", *arguments), running(reference, "consumer", *arguments):
        assert "seconds" in output_of(reference.start("producer", server.address, url, "300", "10"))


def test_an_operation_that_raises_fails_the_submission_with_its_text(
    server_factory: ServerFactory, reference: ReferenceClient, store: Path
) -> None:
    server = server_factory(max_chunk_retries=3)
    url = store.as_uri()
    with running(reference, "failing_consumer", server.address, url):
        told = output_of(reference.start("failing_producer", server.address, url))
    assert "failed:" in told
    assert "cannot do -3" in told


def test_inserts_statuses_counts_and_the_version_are_understood(
    server: Server, reference: ReferenceClient, store: Path
) -> None:
    told = output_of(reference.start("lookups", server.address, store.as_uri()))
    assert "count 1\n" in told
    assert "metadata [0, 255, 109, 101, 116, 97] total 2\n" in told
    assert "version v" in told


def test_a_consumer_reconnects_when_the_server_restarts_and_the_work_goes_on(
    server: Server, reference: ReferenceClient, store: Path
) -> None:
    url = store.as_uri()
    with running(reference, "consumer", server.address, url):
        output_of(reference.start("producer", server.address, url, "20", "10"))
        server.restart()
        output_of(reference.start("producer", server.address, url, "20", "10"))


def test_its_producer_works_with_our_consumer(server: Server, reference: ReferenceClient, store: Path) -> None:
    url = store.as_uri()
    with python_process("echo_consumer", server.address, url):
        output_of(reference.start("producer", server.address, url, "300", "10"))


def test_our_producer_works_with_its_consumer(server: Server, reference: ReferenceClient, store: Path) -> None:
    url = store.as_uri()
    with running(reference, "consumer", server.address, url):
        assert list(ProducerClient(server.address, url).run_submission(range(300), chunk_size=10)) == list(range(300))


def test_both_kinds_of_consumer_share_a_submission(server: Server, reference: ReferenceClient, store: Path) -> None:
    url = store.as_uri()
    producer = ProducerClient(server.address, url)
    submission = producer.insert_submission(range(200), chunk_size=10)
    ours = ConsumerClient(server.address, url)
    taken = ours.reserve_chunks(max=3, strategy=Strategy.Oldest())
    with running(reference, "consumer", server.address, url):
        for chunk in taken:
            stored = (store / str(chunk.submission_prefix) / f"{chunk.chunk_index.id}-in.bin").read_bytes()
            assert chunk.input_content == stored
            ours.complete_chunk(chunk.submission_id, chunk.submission_prefix, chunk.chunk_index, stored)
        assert list(producer.blocking_stream_completed_submission(submission)) == list(range(200))

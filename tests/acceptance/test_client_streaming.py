"""Results while a submission runs, progress, and one submission for one key."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from opsqueue.consumer import Strategy
from opsqueue.exceptions import ServerLacksFeatureError, SubmissionConflictError, SubmissionNotFoundError
from opsqueue.producer import AsyncProducerClient, ProducerClient, SubmissionFailedError, SubmissionId, SubmissionStatus
from tests.conftest import ServerFactory
from tests.integration.client_fakes import FakeServer, running
from tests.support.consumer_threads import consuming, of_each_op
from tests.support.server import Server, wait_until


@pytest.fixture
def producer(server: Server, store_url: str) -> ProducerClient:
    return ProducerClient(server.address, store_url)


@pytest.mark.parametrize("ordered", [False, True])
def test_results_come_while_the_submission_runs(
    server: Server, producer: ProducerClient, store_url: str, ordered: bool
) -> None:
    first_read = threading.Event()

    def work(number: int) -> int:
        if number >= 50:
            assert first_read.wait(30), "no result came while the submission ran"
        return number + 1

    with consuming(server, store_url, of_each_op(work, strategy=Strategy.Oldest())):
        submission = producer.insert_submission(range(100), chunk_size=10)
        seen: dict[int, list[int]] = {}
        for index, results in producer.stream_submission(submission, ordered=ordered):
            first_read.set()
            assert index not in seen
            seen[index] = list(results)
    assert seen == {chunk: list(range(10 * chunk + 1, 10 * chunk + 11)) for chunk in range(10)}
    if ordered:
        assert list(seen) == list(range(10))


def test_what_was_done_before_is_streamed_too(server: Server, producer: ProducerClient, store_url: str) -> None:
    with consuming(server, store_url, of_each_op(abs)):
        submission = producer.insert_submission(range(9_000), chunk_size=1)
        producer.wait(submission)
    streamed = dict(producer.stream_submission(submission))
    assert streamed == {number: [number] for number in range(9_000)}


def test_a_failing_submission_gives_what_is_done_and_then_says_so(
    server_factory: ServerFactory, store_url: str
) -> None:
    server = server_factory(max_chunk_retries=1)
    producer = ProducerClient(server.address, store_url)

    def work(number: int) -> float:
        return 1 / (3 - number)

    with consuming(server, store_url, of_each_op(work, strategy=Strategy.Oldest(), prefetch=0)):
        submission = producer.insert_submission(range(6), chunk_size=1)
        seen = []
        results = producer.stream_submission(submission)
        with pytest.raises(SubmissionFailedError, match="ZeroDivisionError"):
            seen.extend(index for index, _ in results)
    assert seen == [0, 1, 2]


def test_an_unknown_submission_is_said_to_be_unknown(producer: ProducerClient) -> None:
    with pytest.raises(SubmissionNotFoundError):
        list(producer.stream_submission(SubmissionId(17)))
    with pytest.raises(SubmissionNotFoundError):
        producer.progress(SubmissionId(17))


def test_progress_tells_how_fast_it_goes_on(server: Server, producer: ProducerClient, store_url: str) -> None:
    step = threading.Semaphore(0)

    def work(number: int) -> int:
        assert step.acquire(timeout=30)
        return number

    submission = producer.insert_submission(range(10), chunk_size=1)
    first = producer.progress(submission)
    assert (first.state, first.done, first.total, first.failed, first.rate, first.estimate) == (
        "InProgress", 0, 10, 0, None, None,
    )  # fmt: skip
    with consuming(server, store_url, of_each_op(work)):
        for _ in range(5):
            step.release()
        view = producer.done_chunks(submission)
        while view.chunks_done < 5:
            view.refresh(wait=20)
        half = producer.progress(submission)
        assert half.done == 5
        assert half.rate is not None
        assert half.rate > 0
        assert half.estimate == pytest.approx(5 / half.rate)
        for _ in range(5):
            step.release()
        assert isinstance(producer.wait(submission, timeout=30), SubmissionStatus.Completed)
    assert producer.progress(submission).ended


def test_a_key_makes_one_submission_and_its_operations_are_not_touched_again(
    server: Server, producer: ProducerClient, store_url: str
) -> None:
    def never() -> Iterator[int]:
        raise AssertionError("the operations were touched")
        yield 0

    submission = producer.find_or_insert(range(5), chunk_size=2, key="2026-11-23/invoices")
    assert producer.find_or_insert(never(), chunk_size=2, key="2026-11-23/invoices") == submission
    assert producer.find_or_insert(range(5), chunk_size=2, key="another") != submission
    with consuming(server, store_url, of_each_op(abs)):
        producer.wait(submission)
    assert producer.find_or_insert(never(), chunk_size=2, key="2026-11-23/invoices") == submission


def test_many_at_once_with_one_key_make_one_submission(server: Server, store_url: str) -> None:
    together = threading.Barrier(8)
    found: list[SubmissionId] = []

    def operations() -> Iterator[int]:
        # all have looked for it and have not found it
        together.wait(20)
        yield from range(3)

    def insert() -> None:
        client = ProducerClient(server.address, store_url)
        found.append(client.find_or_insert(operations(), chunk_size=1, key="race"))

    threads = [threading.Thread(target=insert) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(found) == 8
    assert len(set(found)) == 1
    assert ProducerClient(server.address, store_url).count_submissions() == 1


def test_a_key_whose_submission_was_cancelled_makes_a_new_one_after_a_while(producer: ProducerClient) -> None:
    first = producer.find_or_insert(range(3), chunk_size=1, key="again", metadata=b"one")
    producer.cancel_submission(first)
    # other contents: the server does not take this for a repeated request
    assert producer.find_or_insert(range(3), chunk_size=1, key="again", metadata=b"two") != first


def test_other_contents_under_a_key_in_progress_are_refused(server: Server, store_url: str) -> None:
    client = ProducerClient(server.address, store_url)

    def while_another_inserts() -> Iterator[int]:
        client.find_or_insert(range(7), chunk_size=1, key="taken")
        yield from range(2)

    with pytest.raises(SubmissionConflictError, match="Idempotency-Key"):
        client.find_or_insert(while_another_inserts(), chunk_size=1, key="taken")


def test_a_prefix_makes_one_submission(producer: ProducerClient, tmp_path: Path) -> None:
    submission = producer.find_or_insert(range(5), chunk_size=2, prefix="reports/2026")
    assert producer.find_or_insert(iter(()), chunk_size=2, prefix="reports/2026") == submission
    assert sorted(path.name for path in (tmp_path / "store/reports/2026").iterdir()) == [
        "0-in.bin", "1-in.bin", "2-in.bin",
    ]  # fmt: skip


def test_either_a_key_or_a_prefix_has_to_be_given(producer: ProducerClient) -> None:
    with pytest.raises(TypeError, match="either key or prefix"):
        producer.find_or_insert([1], chunk_size=1)
    with pytest.raises(TypeError, match="either key or prefix"):
        producer.find_or_insert([1], chunk_size=1, key="a", prefix="b")


def test_a_server_that_keeps_no_keys_is_told_apart(store_url: str) -> None:
    with running(FakeServer(features=None)) as fake:
        client = ProducerClient(f"127.0.0.1:{fake.server.port}", store_url)
        with pytest.raises(ServerLacksFeatureError, match="does not offer find_or_insert by key"):
            client.find_or_insert([1], chunk_size=1, key="a")


def test_a_reader_slower_than_the_server_remembers_gets_every_result(
    server_factory: ServerFactory, store_url: str
) -> None:
    server = server_factory(max_submission_age="1 second")
    producer = ProducerClient(server.address, store_url)
    with consuming(server, store_url, of_each_op(abs)):
        submission = producer.insert_submission(range(3), chunk_size=1)
        seen = []
        for index, _ in producer.stream_submission(submission):
            seen.append(index)
            if len(seen) == 3:
                wait_until(lambda: producer.get_submission_status(submission) is None, "it is forgotten", within=30)
    assert sorted(seen) == [0, 1, 2]


async def test_the_async_client_makes_one_submission_of_a_key_or_a_prefix(server: Server, store_url: str) -> None:
    async def never() -> AsyncIterator[int]:
        raise AssertionError("the operations were touched")
        yield 0

    async with AsyncProducerClient(server.address, store_url) as producer:
        submission = await producer.find_or_insert(range(5), chunk_size=2, key="once")
        assert await producer.find_or_insert(never(), chunk_size=2, key="once") == submission
        assert await producer.find_or_insert(range(5), chunk_size=2, key="another") != submission
        placed = await producer.find_or_insert(range(5), chunk_size=2, prefix="reports/2027")
        assert await producer.find_or_insert(never(), chunk_size=2, prefix="reports/2027") == placed
        with pytest.raises(TypeError, match="either key or prefix"):
            await producer.find_or_insert([1], chunk_size=1)
        together = asyncio.Barrier(4)

        async def after_all_have_looked() -> AsyncIterator[int]:
            await together.wait()
            for number in range(3):
                yield number

        calls = [producer.find_or_insert(after_all_have_looked(), chunk_size=1, key="race") for _ in range(4)]
        found = await asyncio.gather(*calls)
        assert len(set(found)) == 1

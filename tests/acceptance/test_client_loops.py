"""The consumer's loops: what overlaps, what is never hoarded, what a callback may say."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest

from opsqueue.consumer import Chunk, ConsumerClient, FailSubmission, RetryLater, Strategy, chunk_context
from opsqueue.exceptions import SubmissionFailedError
from opsqueue.producer import ProducerClient, SubmissionStatus
from tests.conftest import ServerFactory
from tests.support.consumer_threads import consuming, of_each_op
from tests.support.server import Server, wait_until


@pytest.fixture
def producer(server: Server, store_url: str) -> ProducerClient:
    return a_producer(server, store_url)


def a_producer(server: Server, store_url: str) -> ProducerClient:
    return ProducerClient(f"127.0.0.1:{server.port}", store_url)


@pytest.mark.parametrize("prefetch", [0, 1, 7, None])
def test_every_operation_is_done_once_and_in_its_place(
    server: Server, producer: ProducerClient, store_url: str, prefetch: int | None
) -> None:
    seen: Counter[int] = Counter()
    lock = threading.Lock()

    def double(number: int) -> int:
        with lock:
            seen[number] += 1
        return 2 * number

    with consuming(server, store_url, of_each_op(double, prefetch=prefetch), count=3):
        assert list(producer.run_submission(range(1_000), chunk_size=2)) == [2 * number for number in range(1_000)]
    assert seen == Counter(range(1_000))
    assert server.metric("opsqueue_chunks_retried_total") == 0


def test_the_next_chunk_is_reserved_while_the_callback_runs(
    server: Server, producer: ProducerClient, store_url: str
) -> None:
    reserved_meanwhile: list[int] = []

    def slow(number: int) -> int:
        deadline = time.monotonic() + 0.15
        most = 0
        while time.monotonic() < deadline:
            most = max(most, server.metric("opsqueue_chunks_reserved"))
        reserved_meanwhile.append(most)
        return number

    with consuming(server, store_url, of_each_op(slow, strategy=Strategy.Oldest())):
        list(producer.run_submission(range(8), chunk_size=1))
    # the first has no idea how long a chunk takes, the last has no next
    assert max(reserved_meanwhile[2:-1]) == 2
    assert reserved_meanwhile[0] == 1


def test_with_prefetch_zero_one_chunk_is_held_at_a_time(
    server: Server, producer: ProducerClient, store_url: str
) -> None:
    held: list[int] = []

    def look(number: int) -> int:
        held.append(server.metric("opsqueue_chunks_reserved"))
        return number

    with consuming(server, store_url, of_each_op(look, prefetch=0)):
        list(producer.run_submission(range(30), chunk_size=1))
    assert held == [1] * 30


def test_chunks_ahead_go_to_an_idle_consumer_when_the_callback_takes_longer_than_before(
    server: Server, producer: ProducerClient, store_url: str
) -> None:
    """One operation blocks; everything else is done by the other consumer while it does."""
    release = threading.Event()
    blocked = threading.Event()
    done: list[int] = []

    def work(number: int) -> int:
        if number == 50:
            blocked.set()
            assert release.wait(30)
        else:
            done.append(number)
        return number

    with consuming(server, store_url, of_each_op(work, strategy=Strategy.Oldest()), count=2):
        submission = producer.insert_submission(range(400), chunk_size=1)
        assert blocked.wait(20)
        wait_until(lambda: len(done) == 399, "all operations but the blocked one are done", within=20)
        release.set()
        assert list(producer.blocking_stream_completed_submission(submission)) == list(range(400))
    assert server.metric("opsqueue_chunks_retried_total") == 0


def test_a_reservation_is_extended_while_the_callback_runs(server_factory: ServerFactory, store_url: str) -> None:
    server = server_factory(reservation_expiration="600ms")
    producer = a_producer(server, store_url)
    calls: list[int] = []

    def slow(number: int) -> int:
        calls.append(number)
        deadline = time.monotonic() + 2.0
        while time.monotonic() < deadline:
            assert not chunk_context().cancelled
            time.sleep(0.05)  # what a callback does: it takes its time
        return number

    with consuming(server, store_url, of_each_op(slow), count=2):
        assert list(producer.run_submission([7], chunk_size=1)) == [7]
    assert calls == [7]
    assert server.metric("opsqueue_chunks_retried_total") == 0


def test_stop_ends_the_loop_after_the_chunk_in_hand_and_gives_the_rest_back(
    server: Server, producer: ProducerClient, store_url: str
) -> None:
    begun, go_on = threading.Event(), threading.Event()
    done: list[int] = []

    def work(number: int) -> int:
        if number == 20:
            begun.set()
            assert go_on.wait(20)
        done.append(number)
        return number

    submission = producer.insert_submission(range(100), chunk_size=1)
    with consuming(server, store_url, of_each_op(work, strategy=Strategy.Oldest())) as (client,):
        assert begun.wait(20)
        client.stop()
        go_on.set()
        wait_until(lambda: server.metric("opsqueue_consumers_connected") == 0, "the connection is closed")
    assert done == list(range(21))
    status = producer.get_submission_status(submission)
    assert isinstance(status, SubmissionStatus.InProgress)
    assert status.submission.chunks_done == 21
    assert server.metric("opsqueue_chunks_reserved") == 0
    assert server.metric("opsqueue_chunks_retried_total") == 0


def test_stop_ends_a_loop_that_waits_for_work_or_for_a_server(
    server: Server, store_url: str, unused_tcp_port: int
) -> None:
    with consuming(server, store_url, of_each_op(len)):
        wait_until(lambda: server.metric("opsqueue_requests_parked") == 1, "the consumer waits")
    client = ConsumerClient(f"127.0.0.1:{unused_tcp_port}", store_url)
    thread = threading.Thread(target=lambda: client.run_each_op(len))
    thread.start()
    client.stop()
    thread.join(10)
    assert not thread.is_alive()


def test_a_callback_learns_that_its_submission_was_cancelled(
    server: Server, producer: ProducerClient, store_url: str
) -> None:
    begun = threading.Event()
    reasons: list[str | None] = []

    def wait_for_the_end(_ops: Sequence[Any], _chunk: Chunk) -> list[Any]:
        context = chunk_context()
        assert not context.cancelled
        begun.set()
        wait_until(lambda: context.cancelled, "the chunk is no longer wanted")
        reasons.append(context.reason)
        return []

    with consuming(server, store_url, lambda client: client.run_each_chunk(wait_for_the_end)):
        submission = producer.insert_submission([1], chunk_size=1)
        assert begun.wait(20)
        producer.cancel_submission(submission)
        wait_until(lambda: bool(reasons), "the callback has ended")
    assert reasons == ["cancelled"]


def test_outside_a_callback_there_is_no_context() -> None:
    with pytest.raises(LookupError, match="outside a callback"):
        chunk_context()


def test_retry_later_hands_the_chunk_out_again_without_a_retry(
    server: Server, producer: ProducerClient, store_url: str
) -> None:
    times: list[float] = []

    def later(number: int) -> int:
        times.append(time.monotonic())
        if len(times) < 3:
            raise RetryLater(0.2)
        return number

    with consuming(server, store_url, of_each_op(later)):
        assert list(producer.run_submission([5], chunk_size=1)) == [5]
    assert len(times) == 3
    assert min(times[1] - times[0], times[2] - times[1]) >= 0.19
    assert server.metric("opsqueue_chunks_retried_total") == 0


def test_fail_submission_ends_the_submission_with_its_reason(
    server: Server, producer: ProducerClient, store_url: str
) -> None:
    def refuse(_number: int) -> int:
        raise FailSubmission("the customer has left")

    with consuming(server, store_url, of_each_op(refuse)), pytest.raises(SubmissionFailedError) as caught:
        producer.run_submission(range(10), chunk_size=1)
    assert caught.value.failure == "the customer has left"
    assert server.metric("opsqueue_chunks_retried_total") == 0


def test_a_server_that_is_restarted_in_the_middle_costs_nothing(
    server: Server, producer: ProducerClient, store_url: str
) -> None:
    begun = threading.Event()

    def work(number: int) -> int:
        if number == 100:
            begun.set()
        return number

    with consuming(server, store_url, of_each_op(work, strategy=Strategy.Oldest()), count=2):
        submission = producer.insert_submission(range(2_000), chunk_size=1)
        assert begun.wait(20)
        server.restart()
        assert list(producer.blocking_stream_completed_submission(submission, timeout=60)) == list(range(2_000))

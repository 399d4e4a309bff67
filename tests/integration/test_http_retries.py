"""Retries of failed submissions over HTTP: what was done stays done, asking again is harmless, kills change nothing."""

from __future__ import annotations

import itertools
import json
import threading
from functools import partial
from typing import Any

import pytest

from tests.conftest import ServerFactory
from tests.integration.test_http_done_chunks import Follower
from tests.support.raw_consumer import RawConsumer
from tests.support.raw_producer import RawProducer
from tests.support.server import Server, wait_until

BLOCK = 4_096
#: How often the writer is killed under a load of retries.
KILLS = 4


@pytest.fixture
def server(server_factory: ServerFactory) -> Server:
    """A server on which the first failure of a chunk is the last."""
    return server_factory(max_chunk_retries=1)


def retry(producer: RawProducer, submission: int) -> int:
    status, body = producer.ask("POST", f"/producer/submissions/retry/{submission}")
    assert status == 200, (status, body)
    return int(body)


def refusal(producer: RawProducer, submission: int) -> dict[str, Any]:
    status, body = producer.ask("POST", f"/producer/submissions/retry/{submission}")
    assert status == 409, (status, body)
    found: dict[str, Any] = json.loads(body)
    assert found["id"] == submission
    return found


def fail(producer: RawProducer, consumer: RawConsumer, submission: int, done: set[int], output: Any = None) -> int:
    """Complete these chunks and fail the first one that is not; the failed chunk."""
    consumer.complete(*((submission, chunk) for chunk in done), output=output)
    while True:
        [held] = consumer.reserve_ids()
        if held[0] == submission and held[1] not in done:
            break
    consumer.fail(held, "no")
    producer.wait_for_state(submission, "Failed")
    return held[1]


def done_chunks(producer: RawProducer, submission: int) -> set[int]:
    follower = Follower(producer, submission)
    follower.refresh()
    return follower.done


def test_a_retry_hands_out_only_what_was_not_done_and_is_completed_with_it(server: Server) -> None:
    with RawProducer(server.port) as producer, RawConsumer(server.port) as consumer:
        submission = producer.insert(6, metadata=[1, 2], strategic_metadata={"customer": 7}, chunk_size=5, paused=False)
        assert fail(producer, consumer, submission, {0, 3, 4}) == 1
        before = producer.status(submission)
        again = retry(producer, submission)
        assert again > submission
        state, about = producer.status(again)
        assert (state, about["chunks_done"]) == ("InProgress", 3)
        of_failed = before[1][0]
        for field in ("prefix", "chunks_total", "chunk_size", "metadata", "strategic_metadata", "otel_trace_carrier"):
            assert about[field] == of_failed[field], field
        assert done_chunks(producer, again) == {0, 3, 4}
        reserved = consumer.reserve(10)
        assert [each.id for each in reserved] == [(again, 1), (again, 2), (again, 5)]
        assert [each.chunk["retries"] for each in reserved] == [0, 0, 0]
        assert reserved[0].submission["chunks_done"] == 3
        consumer.complete(*(each.id for each in reserved))
        producer.wait_for_state(again, "Completed")
        assert producer.status(submission) == before
        producer.wait_for_metric("chunks_in_backlog_count", 0)
        producer.wait_for_metric("operations_in_backlog_count", 0)
        assert producer.metric("chunks_total_count") == 9, "carried chunks are not inserted again"


def test_a_retry_of_a_direct_submission_has_its_inputs_and_the_outputs_of_what_is_done(server: Server) -> None:
    with RawProducer(server.port) as producer, RawConsumer(server.port) as consumer:
        submission = producer.insert_direct([b"a", b"b", b"c"])
        fail(producer, consumer, submission, {0}, output=b"A")
        again = retry(producer, submission)
        reserved = consumer.reserve(10)
        assert [(each.id, each.chunk["input_content"]) for each in reserved] == [((again, 1), b"b"), ((again, 2), b"c")]
        consumer.complete(*(each.id for each in reserved), output=b"X")
        producer.wait_for_state(again, "Completed")
        assert [producer.output(again, chunk) for chunk in range(3)] == [(200, b"A"), (200, b"X"), (200, b"X")]
        assert producer.output(submission, 0) == (200, b"A")


def test_asked_again_the_retry_is_the_same_until_it_has_failed_or_is_cancelled(server: Server) -> None:
    with RawProducer(server.port) as producer, RawConsumer(server.port) as consumer:
        submission = producer.insert(3)
        fail(producer, consumer, submission, {2})
        first = retry(producer, submission)
        assert retry(producer, submission) == first
        producer.pause(first)
        assert retry(producer, submission) == first
        assert producer.state(first) == "Paused"
        producer.cancel(first)
        second = retry(producer, submission)
        assert second > first
        fail(producer, consumer, second, {1})
        third = retry(producer, submission)
        assert third > second
        assert done_chunks(producer, third) == {2}, "a retry of the first one has what the first one had"
        producer.cancel(third)
        fourth = retry(producer, second)
        assert done_chunks(producer, fourth) == {1, 2}
        consumer.complete((fourth, 0))
        producer.wait_for_state(fourth, "Completed")
        assert retry(producer, second) == fourth


def test_an_insert_with_the_same_prefix_finds_the_retry(server: Server) -> None:
    contents = {"SeeObjectStorage": {"prefix": "the same", "count": 2}}
    with RawProducer(server.port) as producer, RawConsumer(server.port) as consumer:
        status, body = producer.ask("POST", "/producer/submissions", {"chunk_contents": contents})
        assert status == 200
        submission = int(body)
        fail(producer, consumer, submission, set())
        again = retry(producer, submission)
        assert producer.ask("GET", "/producer/submissions/lookup_id_by_prefix/the%20same") == (200, b"%d" % again)
        assert producer.ask("POST", "/producer/submissions", {"chunk_contents": contents}) == (200, b"%d" % again)
        third = int(producer.ask("POST", f"/producer/submissions/retry/{submission}")[1])
        assert third == again


def test_what_has_not_failed_cannot_be_retried_and_the_answer_says_why(server: Server) -> None:
    with RawProducer(server.port) as producer, RawConsumer(server.port) as consumer:
        assert producer.ask("POST", "/producer/submissions/retry/12345") == (404, b"12345")
        submission = producer.insert(1)
        assert refusal(producer, submission)["state"] == "InProgress"
        producer.pause(submission)
        found = refusal(producer, submission)
        assert found["state"] == "Paused"
        assert "only a failed one can be retried" in found["reason"]
        producer.unpause(submission)
        consumer.complete((submission, 0))
        producer.wait_for_state(submission, "Completed")
        assert refusal(producer, submission)["state"] == "Completed"
        cancelled = producer.insert(1)
        producer.cancel(cancelled)
        assert refusal(producer, cancelled)["state"] == "Cancelled"
        assert producer.ask("GET", f"/producer/submissions/retry/{submission}")[0] == 405
        assert producer.ask("POST", "/producer/submissions/retry/x")[0] == 400


def test_two_submissions_never_work_on_the_same_prefix(server: Server) -> None:
    with RawProducer(server.port) as producer, RawConsumer(server.port) as consumer:
        submission = producer.insert(3)
        fail(producer, consumer, submission, set())
        second = retry(producer, submission)
        fail(producer, consumer, second, {0})
        third = retry(producer, second)
        found = refusal(producer, submission)  # whose own retry has failed
        assert found["state"] == "Failed"
        assert str(third) in found["reason"]


@pytest.mark.parametrize("how", ["restart", "kill", "kill-writer"])
def test_what_was_done_is_known_after_a_restart_before_and_after_the_retry(server: Server, how: str) -> None:
    def interrupt() -> None:
        if how == "kill-writer":
            server.wait_for_replacement("writer", server.kill_child("writer"))
        else:
            server.restart(kill=how == "kill")
        server.wait_until_healthy()

    total = 3 * BLOCK + 7
    done = {1, 5_000, *range(2 * BLOCK, 3 * BLOCK), total - 1}
    with RawProducer(server.port) as producer, RawConsumer(server.port) as consumer:
        submission = producer.insert(total)
        fail(producer, consumer, submission, done)
    interrupt()
    with RawProducer(server.port) as producer:
        again = retry(producer, submission)
        assert done_chunks(producer, again) == done
    interrupt()
    with RawProducer(server.port) as producer, RawConsumer(server.port) as consumer:
        assert retry(producer, submission) == again
        assert done_chunks(producer, again) == done
        assert producer.chunks_done(again) == len(done)
        left = [(again, chunk) for chunk in range(total) if chunk not in done]
        given: list[tuple[int, int]] = []
        while len(given) < len(left):
            given += consumer.reserve_ids(4_096)
        assert given == left
        consumer.complete(*given)
        producer.wait_for_state(again, "Completed")


class RetryLoop(threading.Thread):
    """Asks for the retry of every failed submission, again and again; a 503 is tried again."""

    def __init__(self, port: int, submissions: list[int], stop: threading.Event) -> None:
        super().__init__()
        self._port = port
        self._submissions = submissions
        self._stop_event = stop
        #: Every id that was answered, by the failed submission.
        self.answers: dict[int, set[int]] = {submission: set() for submission in submissions}
        self.count = 0
        self.unexpected: list[tuple[int, bytes]] = []

    def is_beyond(self, count: int) -> bool:
        return bool(self.unexpected) or self.count > count

    def run(self) -> None:
        with RawProducer(self._port) as producer:
            for submission in itertools.cycle(self._submissions):
                if self._stop_event.is_set() and all(self.answers.values()):
                    return
                status, body = producer.ask("POST", f"/producer/submissions/retry/{submission}")
                if status == 200:
                    self.answers[submission].add(int(body))
                    self.count += 1
                elif status != 503:
                    self.unexpected.append((status, body))
                    return


def test_a_killed_writer_makes_no_second_retry_and_loses_none(server_factory: ServerFactory) -> None:
    server = server_factory(max_chunk_retries=1, frontends=2)
    with RawProducer(server.port) as producer, RawConsumer(server.port) as consumer:
        submissions = []
        for _ in range(40):
            submissions.append(producer.insert(9))
            fail(producer, consumer, submissions[-1], {3, 8})
    stop = threading.Event()
    loops = [RetryLoop(server.port, submissions[at:] + submissions[:at], stop) for at in (0, 13, 26)]
    server.kill_child("writer")  # most first retries wait for its replacement
    for loop in loops:
        loop.start()
    try:
        for _ in range(KILLS):
            before = [loop.count for loop in loops]
            for loop, count in zip(loops, before, strict=True):
                wait_until(partial(loop.is_beyond, count + 5), "retries go on")
            server.wait_for_replacement("writer", server.kill_child("writer"))
    finally:
        stop.set()
        for loop in loops:
            loop.join()
    assert [loop.unexpected for loop in loops] == [[], [], []]
    server.wait_until_healthy()
    with RawProducer(server.port) as producer:
        retries = {number: set.union(*(loop.answers[number] for loop in loops)) for number in submissions}
        assert {len(found) for found in retries.values()} == {1}
        for [again] in retries.values():
            assert producer.chunks_done(again) == 2
            assert done_chunks(producer, again) == {3, 8}
        assert producer.ask("GET", "/producer/submissions/count") == (200, b"%d" % len(submissions))


def test_a_retry_is_kept_when_the_failed_one_is_forgotten(server_factory: ServerFactory) -> None:
    server = server_factory(max_chunk_retries=1, max_submission_age="1s")
    with RawProducer(server.port) as producer, RawConsumer(server.port) as consumer:
        submission = producer.insert(3)
        fail(producer, consumer, submission, {1})
        again = retry(producer, submission)
        wait_until(lambda: producer.ask("GET", f"/producer/submissions/{submission}")[1] == b"null", "it is forgotten")
        assert producer.ask("POST", f"/producer/submissions/retry/{submission}") == (404, b"%d" % submission)
        assert producer.chunks_done(again) == 1


def test_a_retry_beyond_the_memory_limit_is_refused_like_an_insert(server_factory: ServerFactory) -> None:
    server = server_factory(max_chunk_retries=1, memory_limit="64MiB")
    with RawProducer(server.port) as producer, RawConsumer(server.port) as consumer:
        submission = producer.insert(200_000_000)
        fail(producer, consumer, submission, {5})
        other = producer.insert(200_000_000)
        status, body = producer.ask("POST", f"/producer/submissions/retry/{submission}")
        assert status == 503
        assert b"--memory-limit" in body
        producer.cancel(other)
        assert done_chunks(producer, retry(producer, submission)) == {5}

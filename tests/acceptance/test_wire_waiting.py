"""A producer that waits (?wait=) is answered when its submission has ended, when time is over, and whatever dies."""

from __future__ import annotations

import json
import os
import signal
import time

import pytest

from tests.acceptance.conftest import Serve, Wire
from tests.conftest import ServerFactory
from tests.support.raw_consumer import RawConsumer
from tests.support.raw_producer import RawProducer
from tests.support.server import Server
from tests.support.waits import ParkedWait

PARKED = "opsqueue_waits_parked"
MANY = 2_000


def status_path(submission: int, wait: str = "60s") -> str:
    return f"/producer/submissions/{submission}?wait={wait}"


def done_path(submission: int, since: str = "0", wait: str = "60s") -> str:
    return f"/producer/submissions/{submission}/done?since={since}&wait={wait}"


def parked(server: Server, producer: RawProducer, path: str) -> ParkedWait:
    """A wait that has arrived and found nothing to answer with."""
    before = producer.metric(PARKED)
    wait = ParkedWait(server.port, path)
    producer.wait_for_metric(PARKED, before + 1)
    return wait


def state(answer: bytes) -> str:
    [name] = json.loads(answer)
    return str(name)


def test_a_wait_is_answered_when_the_last_chunk_completes(wire: Wire) -> None:
    submission = wire.producer.insert(2)
    consumer = wire.consumer()
    first, last = consumer.reserve_ids(2)
    with parked(wire.server, wire.producer, status_path(submission)) as wait:
        consumer.complete(first)
        consumer.settle()
        assert wire.producer.chunks_done(submission) == 1
        assert wire.producer.metric(PARKED) == 1
        consumer.complete(last)
        answer = wait.answer()
    assert (answer.status, state(answer.body)) == (200, "Completed")
    assert answer.headers["opsqueue-wait-ms"] == "60000"
    wire.producer.wait_for_metric(PARKED, 0)


def test_a_wait_is_answered_when_the_submission_is_cancelled(wire: Wire) -> None:
    submission = wire.producer.insert(2)
    with parked(wire.server, wire.producer, status_path(submission)) as wait:
        wire.producer.cancel(submission)
        assert state(wait.answer().body) == "Cancelled"


def test_a_wait_is_answered_when_the_submission_fails(serve: Serve) -> None:
    wire = serve(max_chunk_retries=1)
    submission = wire.producer.insert(2)
    consumer = wire.consumer()
    [chunk] = consumer.reserve_ids()
    with parked(wire.server, wire.producer, status_path(submission)) as wait:
        consumer.fail(chunk, "broken")
        [[about, failed]] = wait.answer().json.values()
    assert (about["id"], failed["failure"]) == (submission, "broken")


def test_a_wait_whose_time_is_over_is_answered_with_the_status(wire: Wire) -> None:
    submission = wire.producer.insert(2)
    begun = time.monotonic()
    with ParkedWait(wire.server.port, status_path(submission, "300ms")) as wait:
        answer = wait.answer()
    assert state(answer.body) == "InProgress"
    assert answer.headers["opsqueue-wait-ms"] == "300"
    assert time.monotonic() - begun >= 0.29  # it did wait
    wire.producer.wait_for_metric(PARKED, 0)


def test_what_has_ended_or_is_unknown_is_answered_at_once(wire: Wire) -> None:
    submission = wire.producer.insert(1)
    wire.producer.cancel(submission)
    with ParkedWait(wire.server.port, status_path(submission)) as wait:
        assert state(wait.answer().body) == "Cancelled"
    for path in (status_path(1), done_path(1)):
        with ParkedWait(wire.server.port, path) as wait:
            assert wait.answer().body == b"null"


def test_a_paused_submission_is_waited_for_until_it_ends(wire: Wire) -> None:
    submission = wire.producer.insert(1, paused=True)
    with parked(wire.server, wire.producer, status_path(submission)) as wait:
        wire.producer.unpause(submission)
        consumer = wire.consumer()
        consumer.complete(*consumer.reserve_ids())
        assert state(wait.answer().body) == "Completed"


@pytest.mark.parametrize("value", ["-1s", "30", "soon", "", "1s&wait=2s", "nan", "1e3s", "%00", "%ff"])
def test_a_wait_that_cannot_be_read_is_422_and_says_what_is_expected(wire: Wire, value: str) -> None:
    submission = wire.producer.insert(1)
    for path in (status_path(submission, value), done_path(submission, "0", value)):
        status, text = wire.producer.ask("GET", path)
        assert status == 422, text
        assert b"wait" in text


def test_a_wait_longer_than_the_longest_is_cut(serve: Serve) -> None:
    wire = serve(max_wait="200ms")
    submission = wire.producer.insert(1)
    with ParkedWait(wire.server.port, status_path(submission, "9999h")) as wait:
        answer = wait.answer()
    assert (answer.status, answer.headers["opsqueue-wait-ms"]) == (200, "200")


def test_without_a_wait_nothing_is_said_of_waits(wire: Wire) -> None:
    submission = wire.producer.insert(1)
    with ParkedWait(wire.server.port, f"/producer/submissions/{submission}?other=1") as plain:
        assert "opsqueue-wait-ms" not in plain.answer().headers


@pytest.mark.parametrize("path", [status_path, done_path])
def test_a_wait_ends_when_its_client_disconnects(wire: Wire, path: object) -> None:
    assert callable(path)
    submission = wire.producer.insert(1)
    wait = parked(wire.server, wire.producer, path(submission))
    wait.drop()
    wire.producer.wait_for_metric(PARKED, 0)
    consumer = wire.consumer()
    consumer.complete(*consumer.reserve_ids())
    wire.producer.wait_for_state(submission, "Completed")
    assert "Traceback" not in wire.server.log()


def test_more_waits_than_allowed_are_503_with_retry_after_and_what_can_be_answered_is(serve: Serve) -> None:
    wire = serve(max_parked_waits=2)
    submission, ended = wire.producer.insert(1), wire.producer.insert(1)
    wire.producer.cancel(ended)
    with (
        parked(wire.server, wire.producer, status_path(submission)) as first,
        parked(wire.server, wire.producer, done_path(submission)) as second,
        ParkedWait(wire.server.port, status_path(submission)) as third,
    ):
        refused = third.answer()
        assert refused.status == 503
        assert b"--max-parked-waits" in refused.body
        assert int(refused.headers["retry-after"]) >= 1
        with ParkedWait(wire.server.port, status_path(ended)) as at_once:
            assert at_once.answer().status == 200
        wire.producer.cancel(submission)
        assert state(first.answer().body) == "Cancelled"
        assert second.answer().json["state"] == "Cancelled"


def test_two_thousand_waits_park_and_are_all_answered(wire: Wire) -> None:
    submissions = [wire.producer.insert(1) for _ in range(10)]
    consumer = wire.consumer()
    chunks = consumer.reserve_ids(10)
    waits = [
        ParkedWait(wire.server.port, (status_path if at % 2 else done_path)(submissions[at % 10])) for at in range(MANY)
    ]
    try:
        wire.producer.wait_for_metric(PARKED, MANY)
        consumer.complete(*chunks)
        for at, wait in enumerate(waits):
            answer = wait.answer()
            assert answer.status == 200
            if at % 2:
                assert state(answer.body) == "Completed"
            else:
                assert answer.json["chunks_done"] == 1
    finally:
        for wait in waits:
            wait.drop()
    wire.producer.wait_for_metric(PARKED, 0)


def test_a_draining_server_answers_what_waits_with_the_status_of_that_moment(server_factory: ServerFactory) -> None:
    server = server_factory(frontends=2)
    with RawProducer(server.port) as producer:
        submission = producer.insert(3)
        waits = [parked(server, producer, path(submission)) for path in (status_path, done_path) * 20]
        server.process.send_signal(signal.SIGTERM)
        answers = [wait.answer() for wait in waits]
    assert [answer.status for answer in answers] == [200] * 40
    assert [state(answer.body) for answer in answers[::2]] == ["InProgress"] * 20
    assert [answer.json["chunks_done"] for answer in answers[1::2]] == [0] * 20
    assert server.process.wait(10) == 0


@pytest.mark.parametrize("path", [status_path, done_path])
def test_a_replaced_writer_ends_the_waits_with_the_status_that_it_recovered(
    server_factory: ServerFactory, path: object
) -> None:
    assert callable(path)
    server = server_factory()
    with RawProducer(server.port) as producer:
        submission = producer.insert(2)
        with parked(server, producer, path(submission)) as wait:
            server.kill_child("writer")
            answer = wait.answer()
        assert answer.status in (200, 503)
        if answer.status == 503:
            assert "retry-after" in answer.headers
        else:
            assert b'"chunks_total":2' in answer.body
        server.wait_until_healthy()
        with parked(server, producer, path(submission)) as again, RawConsumer(server.port) as consumer:
            consumer.complete(*consumer.reserve_ids(2))
            assert again.answer().status == 200


def test_a_draining_server_answers_every_one_of_thousands_of_waits(server_factory: ServerFactory) -> None:
    """With the status as far as there is time, with 503 beyond: no connection just ends."""
    server = server_factory()
    with RawProducer(server.port) as producer:
        submission = producer.insert(3)
        waits = [ParkedWait(server.port, (status_path, done_path)[at % 2](submission)) for at in range(MANY)]
        producer.wait_for_metric(PARKED, MANY)
        server.process.send_signal(signal.SIGTERM)
        answers = [wait.answer() for wait in waits]
        for wait in waits:
            wait.drop()
    assert {answer.status for answer in answers} <= {200, 503}
    assert answers[0].status == 200
    for answer in answers:
        assert answer.headers["connection"] == "close"
        assert answer.status == 200 or int(answer.headers["retry-after"]) >= 1
    assert server.process.wait(10) == 0
    assert "Traceback" not in server.log()


def test_a_killed_front_ends_waits_are_forgotten_and_its_successors_work(server_factory: ServerFactory) -> None:
    server = server_factory()
    with RawProducer(server.port) as producer:
        submission = producer.insert(1)
        lost = parked(server, producer, status_path(submission))
        server.wait_for_replacement("frontend", server.kill_child("frontend"))
        lost.drop()
    server.wait_until_healthy()
    with RawProducer(server.port) as producer:
        assert producer.metric(PARKED) == 0
        with parked(server, producer, status_path(submission)) as wait, RawConsumer(server.port) as consumer:
            consumer.complete(*consumer.reserve_ids())
            assert state(wait.answer().body) == "Completed"


def test_what_a_wait_has_said_survives_a_writer_that_is_killed_at_once(server_factory: ServerFactory) -> None:
    server = server_factory()
    with RawProducer(server.port) as producer, RawConsumer(server.port) as consumer:
        submission = producer.insert(1)
        chunks = consumer.reserve_ids()
        with parked(server, producer, status_path(submission)) as wait:
            consumer.complete(*chunks)
            answer = wait.answer()
        os.kill(server.pids()["writer"][0], signal.SIGKILL)
        assert state(answer.body) == "Completed"
        server.wait_until_healthy()
        assert producer.state(submission) == "Completed"

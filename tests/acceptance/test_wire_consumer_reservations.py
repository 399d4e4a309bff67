"""WIRE section 4 over raw sockets: completions, failures, retries, expiry, disconnects and ended submissions."""

from __future__ import annotations

import time
from contextlib import ExitStack

import pytest

from tests.acceptance.conftest import Serve, Wire
from tests.conftest import ServerFactory
from tests.support.raw_consumer import RawConsumer, chunk_id
from tests.support.raw_producer import RawProducer
from tests.support.server import Server, wait_until

#: Long enough that a chunk is not lost before a test has done what it means to do while holding it.
EXPIRATION_S = 0.3
SHORT = {"reservation_expiration": "300ms"}
GRACE_S = 2.0
COUNTED = {"opsqueue_chunks_retried_total", "opsqueue_chunks_expired_total", "opsqueue_failures_ignored_total"}


class Counters:
    """How much each metric has grown since this was made."""

    def __init__(self, wire: Wire) -> None:
        self._wire = wire
        self._before: dict[str, float] = {}
        for name in (*COUNTED, "opsqueue_chunks_completed_total", "opsqueue_completions_ignored_total"):
            self._before[name] = wire.producer.metric(name)

    def __getitem__(self, name: str) -> float:
        name = f"opsqueue_{name}_total"
        return self._wire.producer.metric(name) - self._before[name]


# --- completions ---


def test_a_submission_is_completed_with_its_last_chunk(wire: Wire) -> None:
    submission = wire.producer.insert(3)
    consumer = wire.consumer()
    ids = consumer.reserve_ids(3)
    for done, chunk in enumerate(ids):
        assert wire.producer.status(submission)[1]["chunks_done"] == done
        consumer.complete(chunk)
        consumer.settle()
    assert wire.producer.state(submission) == "Completed"


def test_a_second_completion_is_ignored_and_counted(wire: Wire) -> None:
    submission = wire.producer.insert(2)
    counters = Counters(wire)
    consumer = wire.consumer()
    first, _ = consumer.reserve_ids(2)
    consumer.complete(first, first, first)
    consumer.settle()
    assert wire.producer.chunks_done(submission) == 1
    assert counters["chunks_completed"] == 1
    assert counters["completions_ignored"] == 2


def test_the_first_completion_counts_whoever_sends_it(wire: Wire) -> None:
    submission = wire.producer.insert(3)
    counters = Counters(wire)
    holder, stranger = wire.consumer(), wire.consumer()
    [held] = holder.reserve_ids()
    # Held by another, and held by nobody.
    stranger.complete(held, (submission, 2))
    stranger.settle()
    assert wire.producer.chunks_done(submission) == 2
    # What the holder says later of it is late.
    holder.complete(held)
    holder.fail(held, "too late")
    holder.settle()
    assert wire.producer.chunks_done(submission) == 2
    assert counters["completions_ignored"] == 1
    assert counters["failures_ignored"] == 1
    assert stranger.reserve_ids(5) == [(submission, 1)]


def test_a_chunk_that_a_stranger_completed_does_not_expire(serve: Serve) -> None:
    wire = serve(**SHORT)
    submission = wire.producer.insert(2)
    counters = Counters(wire)
    holder, stranger = wire.consumer(), wire.consumer()
    done, held = holder.reserve_ids(2)
    stranger.complete(done)
    assert holder.notice() == {"ChunkReservationExpired": chunk_id(held)}
    assert counters["chunks_expired"] == 1
    assert stranger.reserve_ids(5) == [(submission, 1)]


def test_what_is_said_of_unknown_chunks_is_ignored(wire: Wire) -> None:
    submission = wire.producer.insert(2)
    counters = Counters(wire)
    consumer = wire.consumer()
    strange = [(submission, 2), (submission, 2**63 - 1), (1, 0), (2**63 - 1, 2**63 - 1)]
    consumer.complete(*strange)
    for chunk in strange:
        consumer.fail(chunk, "no")
    consumer.settle()
    assert wire.producer.chunks_done(submission) == 0
    assert counters["chunks_completed"] == 0
    assert counters["chunks_retried"] == 0


def test_a_direct_output_of_an_ignored_completion_is_not_kept(wire: Wire) -> None:
    submission = wire.producer.insert_direct([b"in", b"in"])
    consumer = wire.consumer()
    [held] = consumer.reserve_ids()
    consumer.complete(held, output=b"first")
    consumer.complete(held, output=b"second")
    consumer.settle()
    wait_until(lambda: wire.producer.output(submission, 0) == (200, b"first"), "the output is there")
    assert wire.producer.output(submission, 1)[0] == 404


# --- failures ---


def test_a_failure_counts_one_retry_and_the_chunk_is_handed_out_again(serve: Serve) -> None:
    wire = serve(max_chunk_retries=3)
    submission = wire.producer.insert(2)
    counters = Counters(wire)
    consumer = wire.consumer()
    for retries in range(3):
        [reserved] = consumer.reserve()
        assert (reserved.id, reserved.chunk["retries"]) == ((submission, 0), retries)
        consumer.fail(reserved.id, f"failure {retries} ü")
    consumer.settle()
    failure = wire.producer.failure(submission)
    assert failure["chunk_index"] == 0
    assert failure["failure"] == "failure 2 ü"
    assert wire.producer.status(submission)[1][0]["failed_chunk_id"] == 0
    # The last one made the submission fail.
    assert counters["chunks_retried"] in (2, 3)


@pytest.mark.parametrize("limit", [0, 1])
def test_with_a_limit_of_0_or_1_the_first_failure_fails_the_submission(serve: Serve, limit: int) -> None:
    wire = serve(max_chunk_retries=limit)
    submission = wire.producer.insert(3)
    consumer = wire.consumer()
    consumer.reserve_ids()
    [held] = consumer.reserve_ids()
    consumer.fail(held, "at once")
    consumer.settle()
    failure = wire.producer.failure(submission)
    assert (failure["chunk_index"], failure["failure"]) == (1, "at once")


def test_a_failure_counts_only_from_the_connection_that_holds_the_chunk_now(serve: Serve) -> None:
    wire = serve(max_chunk_retries=1)
    submission = wire.producer.insert(2)
    counters = Counters(wire)
    holder, stranger = wire.consumer(), wire.consumer()
    [held] = holder.reserve_ids()
    stranger.fail(held, "not mine")
    stranger.fail((submission, 1), "nobody's")
    stranger.settle()
    assert wire.producer.state(submission) == "InProgress"
    assert counters["failures_ignored"] == 2
    assert counters["chunks_retried"] == 0
    holder.fail(held, "mine")
    holder.settle()
    assert wire.producer.state(submission) == "Failed"


def test_the_text_reservation_expired_is_ignored_even_from_the_holder(serve: Serve) -> None:
    wire = serve(max_chunk_retries=1)
    submission = wire.producer.insert(1)
    counters = Counters(wire)
    consumer = wire.consumer()
    [held] = consumer.reserve_ids()
    consumer.fail(held, "Reservation expired")
    consumer.settle()
    assert wire.producer.state(submission) == "InProgress"
    assert counters["chunks_retried"] == 0
    # It still holds the chunk.
    assert wire.producer.metric("opsqueue_chunks_reserved") == 1
    consumer.complete(held)
    consumer.settle()
    assert wire.producer.state(submission) == "Completed"


def test_the_text_requester_disappeared_frees_the_chunk_without_a_retry_and_only_from_the_holder(serve: Serve) -> None:
    wire = serve(max_chunk_retries=1)
    submission = wire.producer.insert(1)
    holder, stranger = wire.consumer(), wire.consumer()
    [held] = holder.reserve_ids()
    stranger.fail(held, "Requester disappeared")
    stranger.settle()
    assert wire.producer.metric("opsqueue_chunks_reserved") == 1
    holder.fail(held, "Requester disappeared")
    [reserved] = stranger.reserve()
    assert (reserved.id, reserved.chunk["retries"]) == ((submission, 0), 0)
    assert wire.producer.state(submission) == "InProgress"


def test_a_failure_text_is_cut_at_the_limit_between_characters(serve: Serve) -> None:
    wire = serve(max_chunk_retries=1, max_failure_size="1 KiB")
    submission = wire.producer.insert(1)
    consumer = wire.consumer()
    [held] = consumer.reserve_ids()
    consumer.fail(held, "x" + "ü" * 1000)
    consumer.settle()
    assert wire.producer.failure(submission)["failure"] == "x" + "ü" * 511


def test_a_failure_text_may_be_as_long_as_the_setting_says(serve: Serve) -> None:
    wire = serve(max_chunk_retries=1, max_failure_size="300 KiB")
    submission = wire.producer.insert(1)
    consumer = wire.consumer()
    [held] = consumer.reserve_ids()
    consumer.fail(held, "x" * 400_000)
    consumer.settle()
    assert wire.producer.failure(submission)["failure"] == "x" * 300 * 1024


def test_all_chunks_of_a_failed_submission_that_are_not_done_are_skipped(serve: Serve) -> None:
    wire = serve(max_chunk_retries=1)
    submission = wire.producer.insert(10)
    skipped = wire.producer.metric("chunks_skipped_count")
    failed = wire.producer.metric("chunks_failed_count")
    consumer, other = wire.consumer(), wire.consumer()
    ids = consumer.reserve_ids(4)
    consumer.complete(ids[0])
    consumer.fail(ids[1], "no")
    nonce = other.ask(10)
    wire.producer.wait_for_state(submission, "Failed")
    assert wire.producer.status(submission)[1][0]["chunks_done"] == 1
    assert wire.producer.metric("chunks_failed_count") - failed == 1
    assert wire.producer.metric("chunks_skipped_count") - skipped == 8
    later = wire.producer.insert(1)
    # The request may have come before the failure, and have its chunks of the failed submission.
    if {reserved.id[0] for reserved in other.chunks(nonce)} == {submission}:
        assert other.reserve_ids() == [(later, 0)]


# --- ended submissions ---


def test_chunks_of_a_cancelled_submission_are_dropped_and_later_messages_about_them_ignored(wire: Wire) -> None:
    submission = wire.producer.insert(5)
    counters = Counters(wire)
    consumer = wire.consumer()
    ids = consumer.reserve_ids(3)
    wire.producer.cancel(submission)
    wire.producer.wait_for_metric("opsqueue_chunks_reserved", 0)
    consumer.complete(ids[0])
    consumer.fail(ids[1], "no")
    consumer.settle()
    state, about = wire.producer.status(submission)
    assert (state, about["chunks_done"]) == ("Cancelled", 0)
    assert counters["chunks_completed"] == 0
    assert counters["chunks_retried"] == 0
    # A reference peer is told nothing.
    assert consumer.has_nothing()
    later = wire.producer.insert(1)
    assert consumer.reserve_ids(5) == [(later, 0)]


def test_chunks_of_a_failed_submission_are_dropped_and_later_messages_about_them_ignored(serve: Serve) -> None:
    wire = serve(max_chunk_retries=1)
    submission = wire.producer.insert(3)
    consumer, other = wire.consumer(), wire.consumer()
    [held] = other.reserve_ids()
    [failing] = consumer.reserve_ids()
    consumer.fail(failing, "first")
    consumer.settle()
    wire.producer.wait_for_metric("opsqueue_chunks_reserved", 0)
    other.fail(held, "second")
    other.complete(held)
    other.settle()
    assert wire.producer.failure(submission)["failure"] == "first"
    assert wire.producer.status(submission)[1][0]["chunks_done"] == 0


def test_dropped_chunks_do_not_expire(serve: Serve) -> None:
    wire = serve(**SHORT)
    counters = Counters(wire)
    dropped = wire.producer.insert(3)
    consumer = wire.consumer()
    consumer.reserve_ids(3)
    wire.producer.cancel(dropped)
    wire.producer.insert(1)
    [held] = consumer.reserve_ids()
    # Reserved last, expired first and only.
    assert consumer.notice() == {"ChunkReservationExpired": chunk_id(held)}
    assert counters["chunks_expired"] == 1
    assert consumer.notices == []


# --- expiry ---


def test_an_expired_reservation_is_freed_told_to_its_holder_and_counted_as_one_retry(serve: Serve) -> None:
    wire = serve(**SHORT)
    submission = wire.producer.insert(1)
    counters = Counters(wire)
    holder = wire.consumer()
    begun = time.monotonic()
    [reserved] = holder.reserve()
    assert reserved.chunk["retries"] == 0
    assert holder.notice() == {"ChunkReservationExpired": chunk_id(reserved.id)}
    assert time.monotonic() - begun > EXPIRATION_S - 0.005
    assert wire.producer.metric("opsqueue_chunks_reserved") == 0
    assert counters["chunks_expired"] == 1
    # Counted at that moment: what 0.40 answers is ignored, and 0.30.3 answers nothing.
    assert counters["chunks_retried"] == 1
    holder.fail(reserved.id, "Reservation expired")
    holder.settle()
    assert counters["chunks_retried"] == 1
    [again] = wire.consumer().reserve()
    assert (again.id, again.chunk["retries"]) == ((submission, 0), 1)


def test_an_expired_chunk_that_another_holds_by_now_is_not_touched_by_its_former_holder(serve: Serve) -> None:
    wire = serve(**SHORT)
    submission = wire.producer.insert(1)
    counters = Counters(wire)
    slow, quick = wire.consumer(), wire.consumer()
    [held] = slow.reserve_ids()
    # Parked until the expiry.
    [reserved] = quick.reserve()
    assert (reserved.id, reserved.chunk["retries"]) == (held, 1)
    assert slow.notice() == {"ChunkReservationExpired": chunk_id(held)}
    for text in ("Reservation expired", "Requester disappeared", "an exception"):
        slow.fail(held, text)
    slow.settle()
    slow.drop()
    wire.producer.wait_for_metric("opsqueue_consumers_connected", 1)
    assert counters["chunks_retried"] == 1
    assert wire.producer.metric("opsqueue_chunks_reserved") == 1
    quick.complete(held)
    quick.settle()
    assert wire.producer.state(submission) == "Completed"


def test_a_late_completion_counts_although_the_reservation_has_expired(serve: Serve) -> None:
    wire = serve(**SHORT)
    submission = wire.producer.insert(1)
    consumer = wire.consumer()
    [held] = consumer.reserve_ids()
    consumer.notice()
    consumer.complete(held)
    consumer.settle()
    assert wire.producer.state(submission) == "Completed"


def test_an_expiry_is_never_told_for_a_chunk_that_is_done(serve: Serve) -> None:
    wire = serve(**SHORT)
    wire.producer.insert(2)
    consumer = wire.consumer()
    done, held = consumer.reserve_ids(2)
    consumer.complete(done)
    assert consumer.notice() == {"ChunkReservationExpired": chunk_id(held)}
    [again] = consumer.reserve_ids()
    assert consumer.notice() == {"ChunkReservationExpired": chunk_id(again)}


def test_every_expiry_is_one_retry_also_on_the_same_connection(serve: Serve) -> None:
    wire = serve(**SHORT)
    submission = wire.producer.insert(1)
    consumer = wire.consumer()
    for retries in range(4):
        [reserved] = consumer.reserve()
        assert (reserved.id, reserved.chunk["retries"]) == ((submission, 0), retries)
        assert consumer.notice() == {"ChunkReservationExpired": chunk_id(reserved.id)}


def test_failures_and_expiries_count_together(serve: Serve) -> None:
    wire = serve(**SHORT, max_chunk_retries=2)
    submission = wire.producer.insert(1)
    consumer = wire.consumer()
    [held] = consumer.reserve_ids()
    consumer.notice()
    [held] = consumer.reserve_ids()
    consumer.fail(held, "second")
    consumer.settle()
    assert wire.producer.failure(submission)["failure"] == "second"


def test_the_time_of_a_reservation_begins_when_it_is_made_however_long_the_queue_was_idle(serve: Serve) -> None:
    wire = serve(reservation_expiration="700ms")
    wire.producer.insert(1)
    consumer = wire.consumer()
    # Idle, the writer wakes once a second: right before it would, it has slept for longer than 700 ms.
    idle_since = wire.producer.metric("opsqueue_writer_wakeups_total")
    wait_until(lambda: wire.producer.metric("opsqueue_writer_wakeups_total") > idle_since, "the writer has woken")
    woken = time.monotonic()
    wait_until(lambda: time.monotonic() > woken + 0.8, "it has slept since")
    begun = time.monotonic()
    consumer.reserve()
    consumer.notice()
    assert time.monotonic() - begun > 0.7 - 0.005


@pytest.mark.parametrize("limit", [0, 1])
def test_an_expiry_at_the_limit_fails_the_submission_after_two_seconds(serve: Serve, limit: int) -> None:
    wire = serve(**SHORT, max_chunk_retries=limit)
    submission = wire.producer.insert(2)
    consumer = wire.consumer()
    [held] = consumer.reserve_ids()
    assert consumer.notice() == {"ChunkReservationExpired": chunk_id(held)}
    expired = time.monotonic()
    # The chunk is not handed out again; the others are, until then.
    assert consumer.reserve_ids(5) == [(submission, 1)]
    consumer.complete((submission, 1))
    consumer.settle()
    assert wire.producer.state(submission) == "InProgress"
    wire.producer.wait_for_state(submission, "Failed")
    assert GRACE_S - 0.1 < time.monotonic() - expired < GRACE_S + 5
    failure = wire.producer.failure(submission)
    assert (failure["chunk_index"], failure["failure"]) == (0, "Reservation expired")


@pytest.mark.parametrize("who", ["holder", "stranger"])
def test_a_completion_within_the_two_seconds_saves_the_submission(serve: Serve, who: str) -> None:
    wire = serve(**SHORT, max_chunk_retries=1)
    submission = wire.producer.insert(2)
    holder = wire.consumer()
    [held] = holder.reserve_ids()
    holder.notice()
    sender = holder if who == "holder" else wire.consumer()
    sender.complete(held)
    sender.settle()
    assert wire.producer.chunks_done(submission) == 1
    # Other chunks of other submissions still expire and fail them: the saved one is not among those.
    doomed = wire.producer.insert(1)
    assert sender.reserve_ids(1) == [(submission, 1)]
    sender.complete((submission, 1))
    assert sender.reserve_ids(1) == [(doomed, 0)]
    wire.producer.wait_for_state(doomed, "Failed")
    assert wire.producer.state(submission) == "Completed"


def test_a_failure_of_the_former_holder_within_the_two_seconds_changes_nothing(serve: Serve) -> None:
    wire = serve(**SHORT, max_chunk_retries=1)
    submission = wire.producer.insert(1)
    consumer = wire.consumer()
    [held] = consumer.reserve_ids()
    consumer.notice()
    consumer.fail(held, "Reservation expired")
    consumer.fail(held, "an exception that came too late")
    consumer.drop()
    wire.producer.wait_for_state(submission, "Failed")
    assert wire.producer.failure(submission)["failure"] == "Reservation expired"


# --- disconnects and restarts ---


def test_a_connection_that_closes_frees_what_it_holds_without_a_retry_and_nothing_of_others(wire: Wire) -> None:
    submission = wire.producer.insert(4)
    gone, stays, waiting = wire.consumer(), wire.consumer(), wire.consumer()
    freed = gone.reserve_ids(2)
    kept = stays.reserve_ids(2)
    nonce = waiting.ask(5)
    wire.producer.wait_for_parked(1)
    gone.drop()
    got = waiting.chunks(nonce)
    assert [reserved.id for reserved in got] == freed
    assert [reserved.chunk["retries"] for reserved in got] == [0, 0]
    assert wire.producer.metric("opsqueue_chunks_reserved") == 4
    stays.complete(*kept)
    stays.settle()
    assert wire.producer.chunks_done(submission) == 2


def test_what_was_said_right_before_a_connection_ends_counts(wire: Wire) -> None:
    submission = wire.producer.insert(100)
    consumer = wire.consumer()
    consumer.complete(*consumer.reserve_ids(100))
    consumer.drop()
    wire.producer.wait_for_state(submission, "Completed")


def test_a_restart_forgets_reservations_and_keeps_what_is_done(server_factory: ServerFactory) -> None:
    server = server_factory(max_chunk_retries=2)
    with RawProducer(server.port) as producer, RawConsumer(server.port) as consumer:
        submission = producer.insert(3)
        ids = consumer.reserve_ids(3)
        consumer.complete(ids[0])
        consumer.fail(ids[1], "once")
        consumer.settle()
        # A status waits for the commit that covers it.
        assert producer.chunks_done(submission) == 1
    server.restart(kill=True)
    with RawConsumer(server.port) as consumer:
        again = consumer.reserve(5)
        assert [(reserved.id, reserved.chunk["retries"]) for reserved in again] == [(ids[1], 1), (ids[2], 0)]
        assert again[0].submission["chunks_done"] == 1


def test_a_writer_that_is_replaced_closes_consumers_with_1012_and_their_chunks_are_free(server: Server) -> None:
    with RawProducer(server.port) as producer, RawConsumer(server.port) as consumer:
        submission = producer.insert(2)
        held = consumer.reserve_ids(2)
        pid = server.kill_child("writer")
        assert consumer.end()[0] == 1012
        server.wait_for_replacement("writer", pid)
        with RawConsumer(server.port) as again:
            assert again.reserve_ids(2) == held
            again.complete(*held)
            again.settle()
            assert producer.state(submission) == "Completed"


def test_a_front_end_that_is_replaced_frees_what_its_consumers_held(server_factory: ServerFactory) -> None:
    server = server_factory(frontends=2)
    with ExitStack() as stack:
        with RawProducer(server.port) as producer:
            producer.insert(8)
        consumers = [stack.enter_context(RawConsumer(server.port)) for _ in range(4)]
        held = [consumer.reserve_ids(2) for consumer in consumers]
        pid = server.kill_child("frontend", 0)
        server.wait_for_replacement("frontend", pid)
        # One of them waits for what the killed front-end's consumers had: it need not ask again.
        waiting = stack.enter_context(RawConsumer(server.port))
        freed = waiting.reserve_ids(8)
        lost = [chunks for chunks in held if chunks[0] in freed]
        assert sorted(freed) == sorted(chunk for chunks in lost for chunk in chunks)
        assert 0 < len(lost) < 4
        # The others' consumers do not notice.
        for consumer, chunks in zip(consumers, held, strict=True):
            if chunks not in lost:
                consumer.settle()

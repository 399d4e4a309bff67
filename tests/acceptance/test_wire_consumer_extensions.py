"""WIRE section 4 over raw sockets: what only a consumer that asked for it sends and is sent."""

from __future__ import annotations

import time
from typing import Any

import cbor2
import pytest

from tests.acceptance.conftest import Serve, Wire
from tests.conftest import ServerFactory
from tests.support.raw_consumer import RawConsumer, chunk_id, frame
from tests.support.raw_producer import RawProducer

SHORT = {"reservation_expiration": "300ms"}


def deep(levels: int) -> Any:
    strategy: Any = "Oldest"
    for level in range(levels):
        strategy = {"PreferDistinct": {"meta_key": f"k{level}", "underlying": strategy}}
    return strategy


UNSERVABLE: dict[str, Any] = {
    "an unknown name": "Fastest",
    "an unknown variant": {"PreferSimilar": {"meta_key": "a", "underlying": "Oldest"}},
    "an unknown underlying": {"PreferDistinct": {"meta_key": "a", "underlying": "Fastest"}},
    "too deep": deep(9),
    "far too deep": deep(40),
}


# --- only when agreed ---


@pytest.mark.parametrize(
    ("contents", "feature"),
    [
        ({"WorkingOn": {"id": chunk_id((1, 1))}}, "clean-close"),
        ({"ReleaseChunk": {"id": chunk_id((1, 1))}}, "release"),
        ({"ExtendReservation": {"id": chunk_id((1, 1))}}, "extend"),
        ({"RetryLater": {"id": chunk_id((1, 1)), "delay_ms": 5}}, "retry-later"),
        ({"FailSubmission": {"id": chunk_id((1, 1)), "reason": "no"}}, "fail-submission"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_message_of_an_extension_is_for_those_who_agreed_on_it(wire: Wire, contents: Any, feature: str) -> None:
    agreed = wire.consumer(feature)
    agreed.say(contents)
    # About a chunk that it does not hold: ignored.
    agreed.settle()
    for other in (wire.consumer(), wire.consumer("refusal, dropped")):
        other.say(contents)
        code, reason = other.end()
        assert code == 1008
        assert feature in reason


# --- refusal ---


@pytest.mark.parametrize("strategy", UNSERVABLE.values(), ids=UNSERVABLE.keys())
def test_a_strategy_that_cannot_be_served_is_refused_with_the_reason_and_the_connection_lives_on(
    wire: Wire, strategy: Any
) -> None:
    consumer = wire.consumer("refusal")
    contents = consumer.answer(consumer.ask(1, strategy))
    assert list(contents) == ["ReservationRefused"]
    assert list(contents["ReservationRefused"]) == ["reason"]
    assert "strategy" in contents["ReservationRefused"]["reason"]
    submission = wire.producer.insert(1)
    assert consumer.reserve_ids() == [(submission, 0)]


@pytest.mark.parametrize("strategy", UNSERVABLE.values(), ids=UNSERVABLE.keys())
def test_a_peer_without_refusal_is_closed_with_1008_and_the_reason(wire: Wire, strategy: Any) -> None:
    wire.producer.insert(1)
    consumer, waiting = wire.consumer(), wire.consumer()
    [held] = consumer.reserve_ids()
    nonce = waiting.ask()
    wire.producer.wait_for_parked(1)
    consumer.ask(1, strategy)
    code, reason = consumer.end()
    assert code == 1008
    assert "strategy" in reason
    assert [reserved.id for reserved in waiting.chunks(nonce)] == [held]


def test_eight_levels_are_served(wire: Wire) -> None:
    submission = wire.producer.insert(1)
    assert wire.consumer().reserve_ids(1, deep(8)) == [(submission, 0)]


# --- dropped ---


def test_a_holder_is_told_of_chunks_of_a_cancelled_submission(wire: Wire) -> None:
    submission = wire.producer.insert(3)
    consumer = wire.consumer("dropped")
    ids = consumer.reserve_ids(2)
    wire.producer.cancel(submission)
    told = [consumer.notice() for _ in ids]
    for chunk in ids:
        assert {"ChunkDropped": {**chunk_id(chunk), "reason": "cancelled"}} in told


def test_a_holder_is_told_of_chunks_of_a_failed_submission(serve: Serve) -> None:
    wire = serve(max_chunk_retries=1)
    wire.producer.insert(2)
    holder, other = wire.consumer("dropped"), wire.consumer("dropped")
    [held] = holder.reserve_ids()
    [failing] = other.reserve_ids()
    other.fail(failing, "no")
    assert holder.notice() == {"ChunkDropped": {**chunk_id(held), "reason": "failed"}}
    other.settle()
    # Who failed it knows.
    assert other.notices == []


def test_a_holder_is_told_when_another_has_completed_its_chunk(wire: Wire) -> None:
    wire.producer.insert(2)
    holder, other = wire.consumer("dropped"), wire.consumer("dropped")
    held, _ = holder.reserve_ids(2)
    other.complete(held)
    assert holder.notice() == {"ChunkDropped": {**chunk_id(held), "reason": "completed"}}


def test_a_holder_is_told_of_an_expiry_once_and_in_the_newer_form(serve: Serve) -> None:
    wire = serve(**SHORT)
    wire.producer.insert(1)
    consumer = wire.consumer("dropped")
    for _ in range(2):
        [held] = consumer.reserve_ids()
        assert consumer.notice() == {"ChunkDropped": {**chunk_id(held), "reason": "expired"}}
    assert consumer.notices == []


# --- release ---


def test_a_released_chunk_is_free_at_once_without_a_retry(serve: Serve) -> None:
    wire = serve(max_chunk_retries=1)
    submission = wire.producer.insert(1)
    consumer = wire.consumer("release")
    for _ in range(3):
        [reserved] = consumer.reserve()
        assert (reserved.id, reserved.chunk["retries"]) == ((submission, 0), 0)
        consumer.about("ReleaseChunk", reserved.id)
    consumer.settle()
    assert wire.producer.state(submission) == "InProgress"
    assert wire.producer.metric("opsqueue_chunks_reserved") == 0


def test_a_chunk_is_released_by_its_holder_only(wire: Wire) -> None:
    wire.producer.insert(1)
    holder, other = wire.consumer("release"), wire.consumer("release")
    [held] = holder.reserve_ids()
    other.about("ReleaseChunk", held)
    other.settle()
    wire.producer.ask("GET", "/producer/submissions/count")
    assert wire.producer.metric("opsqueue_chunks_reserved") == 1


# --- extend ---


def test_an_extended_reservation_starts_its_time_again(serve: Serve) -> None:
    # The pings are the clock.
    wire = serve(reservation_expiration="700ms", heartbeat_interval="100ms")
    wire.producer.insert(2)
    holder, other = wire.consumer("extend"), wire.consumer("extend")
    kept, left = holder.reserve_ids(2)
    for _ in range(16):
        holder.ping()
        holder.about("ExtendReservation", kept)
        other.about("ExtendReservation", left)  # not its own
    extended = time.monotonic()
    assert holder.notices == [{"ChunkReservationExpired": chunk_id(left)}]
    holder.notices.clear()
    assert holder.notice() == {"ChunkReservationExpired": chunk_id(kept)}
    assert time.monotonic() - extended > 0.5


# --- retry later ---


def test_a_chunk_for_later_comes_back_after_its_delay_without_a_retry(serve: Serve) -> None:
    wire = serve(max_chunk_retries=1)
    submission = wire.producer.insert(2)
    consumer = wire.consumer("retry-later")
    first, second = consumer.reserve_ids(2)
    begun = time.monotonic()
    consumer.about("RetryLater", second, delay_ms=400)
    consumer.about("RetryLater", first, delay_ms=200)
    [reserved] = consumer.reserve(2)
    assert (reserved.id, reserved.chunk["retries"]) == (first, 0)
    assert time.monotonic() - begun > 0.195
    [reserved] = consumer.reserve(2)
    assert (reserved.id, reserved.chunk["retries"]) == (second, 0)
    assert time.monotonic() - begun > 0.395
    assert wire.producer.state(submission) == "InProgress"


def test_retry_later_counts_from_the_holder_only_and_the_largest_delay_is_accepted(wire: Wire) -> None:
    wire.producer.insert(2)
    holder, other = wire.consumer("retry-later"), wire.consumer("retry-later")
    delayed, held = holder.reserve_ids(2)
    holder.about("RetryLater", delayed, delay_ms=2**63 - 1)
    other.about("RetryLater", held, delay_ms=0)
    holder.settle()
    other.settle()
    wire.producer.ask("GET", "/producer/submissions/count")
    assert wire.producer.metric("opsqueue_chunks_reserved") == 1
    # It can still be completed, as by anyone.
    holder.complete(delayed, held)
    holder.settle()
    wire.producer.wait_for_state(held[0], "Completed")


def test_a_restart_makes_delayed_chunks_available(server_factory: ServerFactory) -> None:
    server = server_factory()
    with RawProducer(server.port) as producer, RawConsumer(server.port, "retry-later") as consumer:
        submission = producer.insert(1)
        [held] = consumer.reserve_ids()
        consumer.about("RetryLater", held, delay_ms=3_600_000)
        consumer.settle()
        assert producer.state(submission) == "InProgress"
    server.restart()
    with RawConsumer(server.port) as consumer:
        assert consumer.reserve_ids() == [held]


# --- fail submission ---


def test_the_holder_can_fail_the_whole_submission_whatever_retries_are_left(wire: Wire) -> None:
    submission = wire.producer.insert(3)
    holder, other = wire.consumer("fail-submission"), wire.consumer("fail-submission")
    [held] = holder.reserve_ids()
    other.about("FailSubmission", held, reason="not mine")
    other.about("FailSubmission", (submission, 2), reason="nobody's")
    other.settle()
    assert wire.producer.state(submission) == "InProgress"
    holder.about("FailSubmission", held, reason="the input is nonsense ü")
    holder.settle()
    failure = wire.producer.failure(submission)
    assert (failure["chunk_index"], failure["failure"]) == (0, "the input is nonsense ü")


# --- clean close: chunks that kill their consumers ---

CRASHES = {"max_chunk_crashes": 2, "max_chunk_retries": 1}


def test_a_chunk_whose_consumers_keep_dying_fails_its_submission_with_a_text_that_says_so(serve: Serve) -> None:
    wire = serve(**CRASHES)
    submission = wire.producer.insert(2)
    crashed = wire.producer.metric("opsqueue_chunks_crashed_total")
    for death in (1, 2):
        consumer = wire.consumer("clean-close")
        other, poison = consumer.reserve_ids(2)
        consumer.about("WorkingOn", other)
        consumer.about("WorkingOn", poison)
        consumer.drop()
        wire.producer.wait_for_metric("opsqueue_chunks_crashed_total", crashed + death)
    wire.producer.wait_for_state(submission, "Failed")
    failure = wire.producer.failure(submission)
    assert failure["chunk_index"] == 1
    assert "crash" in failure["failure"]
    assert "2" in failure["failure"]


def test_of_the_chunks_in_work_the_last_one_still_held_has_crashed(serve: Serve) -> None:
    wire = serve(**CRASHES)
    submission = wire.producer.insert(4)
    for _ in range(2):
        consumer = wire.consumer("clean-close")
        ids = consumer.reserve_ids(4)
        for chunk in ids[:3]:
            consumer.about("WorkingOn", chunk)
        if len(ids) == 4:
            consumer.complete((submission, 2))
        consumer.drop()
        wire.producer.wait_for_metric("opsqueue_consumers_connected", 0)
    wire.producer.wait_for_metric("opsqueue_chunks_reserved", 0)
    # First 1, as 2 was done; then 3, the last of 0, 1, 3.
    again = wire.consumer("clean-close")
    again.reserve_ids(4)
    again.about("WorkingOn", (submission, 1))
    again.drop()
    wire.producer.wait_for_state(submission, "Failed")
    assert wire.producer.failure(submission)["chunk_index"] == 1


def test_a_crash_counts_no_retry(serve: Serve) -> None:
    wire = serve(**CRASHES)
    wire.producer.insert(1)
    dying, waiting = wire.consumer("clean-close"), wire.consumer()
    [held] = dying.reserve_ids()
    dying.about("WorkingOn", held)
    nonce = waiting.ask()
    wire.producer.wait_for_parked(1)
    dying.reset()
    [reserved] = waiting.chunks(nonce)
    assert (reserved.id, reserved.chunk["retries"]) == (held, 0)


@pytest.mark.parametrize(
    "end",
    [
        "a reference peer",
        "a close frame",
        "closed by the server",
        "nothing in work",
        "the last one done",
        "the last one released",
    ],
)
def test_an_end_that_is_no_crash_counts_none(serve: Serve, end: str) -> None:
    wire = serve(**CRASHES)
    submission = wire.producer.insert(3)
    crashed = wire.producer.metric("opsqueue_chunks_crashed_total")
    for _ in range(2):
        consumer = wire.consumer(None if end == "a reference peer" else "clean-close, release")
        ids = consumer.reserve_ids(2)
        if end not in ("a reference peer", "nothing in work"):
            consumer.about("WorkingOn", ids[1])
        if end == "a close frame":
            consumer.close()
        elif end == "closed by the server":
            consumer.send(frame(b"\xff"))
            assert consumer.end()[0] == 1007
        else:
            if end == "the last one done":
                consumer.complete(ids[1])
            elif end == "the last one released":
                consumer.about("ReleaseChunk", ids[1])
            consumer.drop()
        wire.producer.wait_for_metric("opsqueue_consumers_connected", 0)
        if end == "the last one done":
            break
    wire.producer.wait_for_metric("opsqueue_chunks_reserved", 0)
    assert wire.producer.state(submission) == "InProgress"
    assert wire.producer.metric("opsqueue_chunks_crashed_total") == crashed


def test_a_death_of_a_process_of_ours_is_no_crash_of_a_chunk(server_factory: ServerFactory) -> None:
    server = server_factory(max_chunk_crashes=1, frontends=1)
    with RawProducer(server.port) as producer:
        submission = producer.insert(1)
    for role in ("frontend", "writer", "frontend"):
        with RawConsumer(server.port, "clean-close") as consumer:
            [held] = consumer.reserve_ids()
            consumer.about("WorkingOn", held)
            consumer.settle()
            server.wait_for_replacement(role, server.kill_child(role))
            consumer.end()
    with RawProducer(server.port) as producer, RawConsumer(server.port) as consumer:
        assert consumer.reserve_ids() == [(submission, 0)]
        assert producer.state(submission) == "InProgress"


def test_by_default_no_number_of_crashes_fails_a_submission(wire: Wire) -> None:
    submission = wire.producer.insert(1)
    for _ in range(12):
        consumer = wire.consumer("clean-close")
        [held] = consumer.reserve_ids()
        consumer.about("WorkingOn", held)
        consumer.drop()
    [reserved] = wire.consumer().reserve()
    assert reserved.chunk["retries"] == 0
    assert wire.producer.state(submission) == "InProgress"


def test_crashes_are_remembered_over_a_restart(server_factory: ServerFactory) -> None:
    server = server_factory(max_chunk_crashes=2)
    with RawProducer(server.port) as producer:
        submission = producer.insert(1)
        for restarted in (False, True):
            if restarted:
                server.restart(kill=True)
            with RawConsumer(server.port, "clean-close") as consumer, RawProducer(server.port) as now:
                [held] = consumer.reserve_ids()
                consumer.about("WorkingOn", held)
                consumer.drop()
                now.wait_for_metric("opsqueue_consumers_connected", 0)
                wanted = "Failed" if restarted else "InProgress"
                now.wait_for_state(submission, wanted)


def test_an_unknown_message_closes_with_1007_even_with_every_feature(wire: Wire) -> None:
    consumer = wire.consumer("clean-close, refusal, dropped, release, extend, retry-later, fail-submission")
    consumer.send(frame(cbor2.dumps({"nonce": 0, "contents": {"Telepathy": {}}})))
    assert consumer.end()[0] == 1007

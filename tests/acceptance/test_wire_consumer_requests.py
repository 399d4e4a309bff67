"""WIRE section 4 over raw sockets: requests for chunks, their answers, who waits and what wakes him."""

from __future__ import annotations

import itertools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cbor2
import pytest

from tests.acceptance.conftest import Serve, Wire
from tests.support.raw_consumer import BINARY, CONTINUATION, ChunkId, RawConsumer, chunk_id, frame

VECTORS = [
    json.loads(line) for line in (Path(__file__).parents[1] / "vectors" / "websocket.jsonl").read_text().splitlines()
]
NOTHING: dict[str, Any] = {"ChunksReserved": {"Err": []}}
MIB = 1024 * 1024


def shape(value: Any) -> Any:
    """Names and types; byte strings are the reference's arrays of integers."""
    if isinstance(value, dict):
        return {key: shape(each) for key, each in value.items()}
    if isinstance(value, bytes) or (isinstance(value, list) and all(isinstance(each, int) for each in value)):
        return bytes
    if isinstance(value, list):
        return [shape(each) for each in value]
    return type(value)


def want(maximum: int, strategy: Any = "Oldest") -> dict[str, Any]:
    return {"WantToReserveChunks": {"max": maximum, "strategy": strategy}}


# --- answers ---


@pytest.mark.parametrize(
    "vector", [v for v in VECTORS if v["direction"] == "consumer to server"], ids=lambda v: v["name"]
)
def test_the_references_own_frames_are_understood(wire: Wire, vector: dict[str, Any]) -> None:
    wire.producer.insert(2, strategic_metadata={"company": 1})
    consumer = wire.consumer()
    consumer.send(frame(bytes.fromhex(vector["hex"])))
    asked = vector["value"]["contents"].get("WantToReserveChunks")
    if asked:
        assert len(consumer.chunks(vector["value"]["nonce"])) == asked["max"]
    # What it says of chunks that do not exist here is ignored.
    consumer.send(consumer.message(want(0), nonce=1000))
    assert consumer.answer(1000) == NOTHING


@pytest.mark.parametrize("name", ["chunks_reserved_1", "chunks_reserved_2"])
def test_an_answer_has_exactly_the_fields_of_the_references(wire: Wire, name: str) -> None:
    [expected] = [v["value"] for v in VECTORS if v["name"] == name]
    pairs = expected["Sync"]["contents"]["ChunksReserved"]["Ok"]
    wire.producer.insert(3, metadata=[0, 255, 109], strategic_metadata={"company": 7, "priority": -3}, chunk_size=2)
    consumer = wire.consumer()
    consumer.send(consumer.message(want(len(pairs)), nonce=expected["Sync"]["nonce"]))
    got = consumer.receive()
    assert shape(got) == shape(expected)
    # Bytes are sent as byte strings, which the reference's client reads too.
    assert got["Sync"]["contents"]["ChunksReserved"]["Ok"][0][1]["metadata"] == b"\x00\xffm"


def test_the_whole_submission_comes_with_every_chunk(wire: Wire) -> None:
    fields: dict[str, Any] = {
        "metadata": [1, 2],
        "strategic_metadata": {"a": 2**63 - 1, "b": -(2**63), "ü": 0},
        "chunk_size": 2**62,
    }
    submission = wire.producer.insert(10**9, **fields)
    consumer = wire.consumer()
    for reserved in consumer.reserve(3):
        about = dict(reserved.submission)
        assert about.pop("prefix").startswith("prefix-")
        assert json.loads(about.pop("otel_trace_carrier")) == {}
        assert about == {
            "id": submission,
            "chunks_total": 10**9,
            "chunks_done": 0,
            "chunk_size": 2**62,
            "metadata": b"\x01\x02",
            "strategic_metadata": fields["strategic_metadata"],
        }
    assert [reserved.chunk["chunk_index"] for reserved in consumer.reserve(2, "Newest")] == [10**9 - 1, 10**9 - 2]


@pytest.mark.parametrize("nonce", [0, 23, 24, 2**32, 2**63, 2**64 - 1])
def test_an_answer_has_the_nonce_of_its_request_whatever_it_is(wire: Wire, nonce: int) -> None:
    submission = wire.producer.insert(1)
    consumer = wire.consumer()
    consumer.send(consumer.message(want(2**64 - 1), nonce))
    assert [reserved.id for reserved in consumer.chunks(nonce)] == [(submission, 0)]


def test_chunks_done_is_the_count_of_the_moment(wire: Wire) -> None:
    wire.producer.insert(3)
    consumer = wire.consumer()
    for done in range(3):
        [reserved] = consumer.reserve()
        assert reserved.submission["chunks_done"] == done
        consumer.complete(reserved.id)


def test_max_0_is_answered_with_an_empty_err_at_once(wire: Wire) -> None:
    wire.producer.insert(1)
    consumer = wire.consumer()
    assert consumer.answer(consumer.ask(0)) == NOTHING
    assert consumer.answer(consumer.ask(0, {"PreferDistinct": {"meta_key": "a", "underlying": "Random"}})) == NOTHING


def test_fewer_than_max_is_given_at_once(wire: Wire) -> None:
    first, second = wire.producer.insert(2), wire.producer.insert(1)
    assert wire.consumer().reserve_ids(100) == [(first, 0), (first, 1), (second, 0)]


def test_only_requests_are_answered_and_each_once(wire: Wire) -> None:
    submission = wire.producer.insert(4)
    consumer = wire.consumer("release, extend, retry-later, clean-close")
    ids = consumer.reserve_ids(4)
    consumer.complete(ids[0])
    consumer.fail(ids[1], "no")
    consumer.about("WorkingOn", ids[2])
    consumer.about("ExtendReservation", ids[2])
    consumer.about("ReleaseChunk", ids[2])
    consumer.about("RetryLater", ids[3], delay_ms=1)
    # `answer` refuses a second answer to a nonce; a nonce that was not asked would stand among the answers.
    last = consumer.ask(0)
    consumer.answer(last)
    assert wire.producer.chunks_done(submission) == 1
    assert consumer.answers.keys() == {0, last}
    assert consumer.has_nothing()


# --- who waits ---


def test_a_request_without_work_waits_and_others_of_its_connection_are_answered_meanwhile(wire: Wire) -> None:
    consumer = wire.consumer()
    waiting = consumer.ask()
    wire.producer.wait_for_parked(1)
    consumer.settle()
    assert waiting not in consumer.answers
    submission = wire.producer.insert(1)
    assert [reserved.id for reserved in consumer.chunks(waiting)] == [(submission, 0)]


Cause = Callable[[Wire, RawConsumer, ChunkId], None]


def _by_retry(_wire: Wire, holder: RawConsumer, held: ChunkId) -> None:
    holder.fail(held, "no")


def _by_disconnect(_wire: Wire, holder: RawConsumer, _held: ChunkId) -> None:
    holder.drop()


def _by_clean_close(_wire: Wire, holder: RawConsumer, _held: ChunkId) -> None:
    holder.close()


def _by_reset(_wire: Wire, holder: RawConsumer, _held: ChunkId) -> None:
    holder.reset()


def _by_release(_wire: Wire, holder: RawConsumer, held: ChunkId) -> None:
    holder.about("ReleaseChunk", held)


def _by_retry_later(_wire: Wire, holder: RawConsumer, held: ChunkId) -> None:
    holder.about("RetryLater", held, delay_ms=50)


def _by_requester_disappeared(_wire: Wire, holder: RawConsumer, held: ChunkId) -> None:
    holder.fail(held, "Requester disappeared")


@pytest.mark.parametrize(
    "cause",
    [
        _by_retry,
        _by_disconnect,
        _by_clean_close,
        _by_reset,
        _by_release,
        _by_retry_later,
        _by_requester_disappeared,
    ],
    ids=lambda cause: cause.__name__.removeprefix("_by_"),
)
@pytest.mark.parametrize("strategy", ["Newest", {"PreferDistinct": {"meta_key": "k", "underlying": "Random"}}])
def test_a_chunk_that_becomes_available_wakes_a_waiting_request(wire: Wire, cause: Cause, strategy: Any) -> None:
    wire.producer.insert(1, strategic_metadata={"k": 1})
    holder, waiting = wire.consumer("release, retry-later"), wire.consumer()
    [held] = holder.reserve_ids()
    nonce = waiting.ask(5, strategy)
    wire.producer.wait_for_parked(1)
    cause(wire, holder, held)
    assert [reserved.id for reserved in waiting.chunks(nonce)] == [held]


def test_an_expiry_wakes_a_waiting_request(serve: Serve) -> None:
    wire = serve(reservation_expiration="300ms")
    wire.producer.insert(1)
    holder, waiting = wire.consumer(), wire.consumer()
    [held] = holder.reserve_ids()
    assert waiting.reserve_ids() == [held]


def test_an_unpause_wakes_a_waiting_request(wire: Wire) -> None:
    submission = wire.producer.insert(2, paused=True)
    consumer = wire.consumer()
    nonce = consumer.ask(2)
    wire.producer.wait_for_parked(1)
    assert wire.producer.state(submission) == "Paused"
    assert consumer.has_nothing()
    wire.producer.unpause(submission)
    assert [reserved.id for reserved in consumer.chunks(nonce)] == [(submission, 0), (submission, 1)]


def test_a_paused_submission_hands_out_nothing_and_what_is_held_may_be_completed(wire: Wire) -> None:
    submission = wire.producer.insert(2)
    consumer = wire.consumer()
    [held] = consumer.reserve_ids()
    wire.producer.pause(submission)
    nonce = consumer.ask()
    wire.producer.wait_for_parked(1)
    consumer.complete(held)
    consumer.settle()
    assert wire.producer.chunks_done(submission) == 1
    wire.producer.unpause(submission)
    assert [reserved.id for reserved in consumer.chunks(nonce)] == [(submission, 1)]


def test_waiting_requests_are_served_in_the_order_of_their_arrival(wire: Wire) -> None:
    consumers = [wire.consumer() for _ in range(6)]
    nonces = []
    for count, consumer in enumerate([*consumers, *reversed(consumers)], start=1):
        nonces.append((consumer, consumer.ask()))
        wire.producer.wait_for_parked(count)
    submission = wire.producer.insert(5)
    got = [consumer.chunks(nonce)[0].id for consumer, nonce in nonces[:5]]
    assert got == [(submission, chunk) for chunk in range(5)]
    later = wire.producer.insert(7)
    got = [consumer.chunks(nonce)[0].id for consumer, nonce in nonces[5:]]
    assert got == [(later, chunk) for chunk in range(7)]


def test_the_order_of_arrival_holds_over_front_ends_and_strategies(serve: Serve) -> None:
    wire = serve(frontends=2)
    strategies = ["Oldest", {"PreferDistinct": {"meta_key": "k", "underlying": "Oldest"}}]
    nonces = []
    for count in range(1, 9):
        consumer = wire.consumer()
        nonces.append((consumer, consumer.ask(2, strategies[count % 2])))
        wire.producer.wait_for_parked(count)
    submission = wire.producer.insert(16)
    for place, (consumer, nonce) in enumerate(nonces):
        assert [reserved.id[1] for reserved in consumer.chunks(nonce)] == [2 * place, 2 * place + 1], place
    assert wire.producer.chunks_done(submission) == 0


def test_a_request_with_a_large_max_takes_all_that_is_there(wire: Wire) -> None:
    first, second = wire.consumer(), wire.consumer()
    greedy = first.ask(100)
    wire.producer.wait_for_parked(1)
    later = second.ask(1)
    wire.producer.wait_for_parked(2)
    wire.producer.insert(3)
    assert len(first.chunks(greedy)) == 3
    submission = wire.producer.insert(1)
    assert [reserved.id for reserved in second.chunks(later)] == [(submission, 0)]


def test_a_request_that_waits_ends_with_its_connection(wire: Wire) -> None:
    gone, stays = wire.consumer(), wire.consumer()
    for _ in range(10):
        gone.ask()
    wire.producer.wait_for_parked(10)
    nonce = stays.ask()
    wire.producer.wait_for_parked(11)
    gone.drop()
    wire.producer.wait_for_parked(1)
    submission = wire.producer.insert(1)
    assert [reserved.id for reserved in stays.chunks(nonce)] == [(submission, 0)]


def test_thousands_of_requests_of_one_connection_are_all_answered(wire: Wire) -> None:
    consumer = wire.consumer()
    consumer.say(*[want(1)] * 5000)
    wire.producer.wait_for_parked(1024)
    wire.producer.insert(5000)
    assert {consumer.chunks(nonce)[0].id[1] for nonce in range(5000)} == set(range(5000))


def test_more_strategies_than_have_an_index_wait_side_by_side(wire: Wire) -> None:
    consumer = wire.consumer()
    for key in range(100):
        consumer.ask(1, {"PreferDistinct": {"meta_key": f"key {key}", "underlying": "Oldest"}})
    wire.producer.wait_for_parked(100)
    for chunk in range(0, 100, 20):
        wire.producer.insert(20, strategic_metadata={f"key {chunk}": 1})
    for nonce in range(100):
        assert len(consumer.chunks(nonce)) == 1


# --- order ---


def test_a_completion_is_applied_before_the_request_after_it(wire: Wire) -> None:
    wire.producer.insert(200)
    consumer = wire.consumer()
    [held] = consumer.reserve_ids()
    for done in range(1, 200):
        nonce = consumer._nonce + 1
        consumer.say({"CompleteChunk": {"id": chunk_id(held), "output_content": None}}, want(1))
        [reserved] = consumer.chunks(nonce)
        assert reserved.submission["chunks_done"] == done
        held = reserved.id


def test_a_failure_is_applied_before_the_request_after_it(wire: Wire) -> None:
    submission = wire.producer.insert(1)
    consumer = wire.consumer()
    [held] = consumer.reserve_ids()
    for retries in range(1, 9):
        nonce = consumer._nonce + 1
        consumer.say({"FailChunk": {"id": chunk_id(held), "failure": "no"}}, want(1))
        [reserved] = consumer.chunks(nonce)
        assert (reserved.id, reserved.chunk["retries"]) == ((submission, 0), retries)


def test_a_client_with_nagles_algorithm_does_not_wait_for_a_delayed_ack(wire: Wire) -> None:
    wire.producer.insert(60)
    consumer = wire.consumer(nodelay=False)
    [held] = consumer.reserve_ids()
    took = []
    for _ in range(59):
        begun = time.perf_counter()
        consumer.complete(held)
        [held] = consumer.reserve_ids()
        took.append(time.perf_counter() - begun)
    # A delayed ACK takes 40 ms; the median is a fraction of one millisecond on an idle machine.
    print(f"median {statistics.median(took) * 1000:.3f} ms")
    assert statistics.median(took) < 0.02


# --- large answers ---


def test_an_answer_holds_at_most_4096_chunks(wire: Wire) -> None:
    submission = wire.producer.insert(5000)
    consumer = wire.consumer()
    assert consumer.reserve_ids(2**64 - 1) == [(submission, chunk) for chunk in range(4096)]
    assert consumer.reserve_ids(5000) == [(submission, chunk) for chunk in range(4096, 5000)]


def test_an_answer_holds_at_most_8_mib_of_inputs_and_the_rest_is_free_for_others(wire: Wire) -> None:
    made = [wire.producer.insert_direct([bytes([chunk]) * (3 * MIB // 2)] * 2) for chunk in range(4)]
    consumer, other = wire.consumer(), wire.consumer()
    first = consumer.reserve(8)
    assert sum(len(part.payload) for part in consumer.last_frames) <= 8 * MIB
    assert [reserved.id for reserved in first] == [(made[0], 0), (made[0], 1), (made[1], 0), (made[1], 1), (made[2], 0)]
    assert all(len(reserved.chunk["input_content"]) == 3 * MIB // 2 for reserved in first)
    assert other.reserve_ids(8) == [(made[2], 1), (made[3], 0), (made[3], 1)]


def test_a_chunk_of_8_mib_comes_alone_in_frames_of_at_most_8_mib(serve: Serve) -> None:
    wire = serve(max_body_size="20 MiB")
    large = wire.producer.insert_direct([b"\x07" * (8 * MIB), b"small"])
    consumer = wire.consumer()
    [reserved] = consumer.reserve(2)
    assert reserved.id == (large, 0)
    assert reserved.chunk["input_content"] == b"\x07" * (8 * MIB)
    assert [part.opcode for part in consumer.last_frames] == [BINARY, CONTINUATION]
    assert max(len(part.payload) for part in consumer.last_frames) == 8 * MIB
    [reserved] = consumer.reserve(2)
    assert reserved.chunk["input_content"] == b"small"


def test_a_null_input_is_handed_out_as_an_empty_byte_string(wire: Wire) -> None:
    wire.producer.insert_direct([None, b"", b"\x00\xff"])
    assert [reserved.chunk["input_content"] for reserved in wire.consumer().reserve(3)] == [b"", b"", b"\x00\xff"]


def test_a_chunk_has_either_content_or_a_prefix(wire: Wire) -> None:
    wire.producer.insert_direct([b"x"])
    wire.producer.insert(1)
    for reserved in wire.consumer().reserve(2):
        assert (reserved.chunk["input_content"] is None) == (reserved.submission["prefix"] is not None)


@pytest.mark.parametrize(
    ("output", "stored"),
    [
        (b"", b""),
        (b"\x00\xff", b"\x00\xff"),
        ([0, 23, 24, 255], bytes([0, 23, 24, 255])),
        ([], b""),
        (list(b"\xab" * 100_000), b"\xab" * 100_000),
        (b"z" * (8 * MIB), b"z" * (8 * MIB)),
    ],
    ids=["no bytes", "bytes", "integers", "no integers", "many integers", "8 MiB"],
)
def test_an_output_in_bytes_or_integers_can_be_read_back(wire: Wire, output: Any, stored: bytes) -> None:
    submission = wire.producer.insert_direct([b"in", b"in"])
    consumer = wire.consumer()
    first, second = consumer.reserve_ids(2)
    consumer.complete(first, output=output)
    consumer.complete(second, output=b"")
    consumer.settle()
    wire.producer.wait_for_state(submission, "Completed")
    assert wire.producer.output(submission, 0) == (200, stored)


def test_an_output_in_fragments_of_any_size_is_one_output(wire: Wire) -> None:
    submission = wire.producer.insert_direct([b"in"])
    consumer = wire.consumer()
    [held] = consumer.reserve_ids()
    output = bytes(range(256)) * (12 * MIB // 256)
    contents = {"CompleteChunk": {"id": chunk_id(held), "output_content": output}}
    message = cbor2.dumps({"nonce": 1, "contents": contents})
    cuts = [0, 1, 1, 5 * MIB, len(message)]
    for at, (begin, end) in enumerate(itertools.pairwise(cuts)):
        consumer.send(frame(message[begin:end], CONTINUATION if at else BINARY, fin=end == len(message)))
    wire.producer.wait_for_state(submission, "Completed")
    assert wire.producer.output(submission, 0) == (200, output)


def test_an_integer_that_is_no_byte_closes_with_1007(wire: Wire) -> None:
    wire.producer.insert_direct([b"in"])
    consumer = wire.consumer()
    [held] = consumer.reserve_ids()
    consumer.complete(held, output=[0, 256])
    assert consumer.end()[0] == 1007

"""Consumers' messages on their way into ring records: the hot decoder and the general one give the same."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cbor2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opsqueue._speedups.consumer import (
    COMPLETE,
    EXTEND,
    FAIL,
    FAIL_SUBMISSION,
    RELEASE,
    RESERVE,
    RETRY_LATER,
    WORKING_ON,
)
from opsqueue._speedups.counters import Counter
from opsqueue.protocol import strategy as strategies
from opsqueue.protocol.consumer import ClientMessage, Submission, decode_client, decode_server
from opsqueue.server.frontend.consumers import decode
from tests.integration.standin_writer import CHUNK_HAS_OUTPUT, CLOSE, Record, a_submission, description_of, reserved
from tests.unit.consumer_feed import Feed, frame, server_frames

VECTORS = [
    json.loads(line) for line in (Path(__file__).parent.parent / "vectors" / "websocket.jsonl").read_text().splitlines()
]
FROM_CONSUMERS = [vector for vector in VECTORS if vector["direction"] == "consumer to server"]

KINDS = {
    "WantToReserveChunks": RESERVE,
    "CompleteChunk": COMPLETE,
    "FailChunk": FAIL,
    "WorkingOn": WORKING_ON,
    "ReleaseChunk": RELEASE,
    "ExtendReservation": EXTEND,
    "RetryLater": RETRY_LATER,
    "FailSubmission": FAIL_SUBMISSION,
}


@pytest.fixture(scope="module")
def feed() -> Iterator[Feed]:
    feed = Feed()
    yield feed
    feed.close()


def expected(message: ClientMessage, connection: int) -> Record:
    """The record that stands for a message that the general decoder read."""
    contents: Any = message.contents
    kind = KINDS[type(contents).__name__]
    if kind == RESERVE:
        canonical = strategies.canonical(contents.strategy)
        return Record(kind, connection, nonce=message.nonce, max=min(contents.max, 4096), tail=canonical)
    output = getattr(contents, "output_content", None)
    text = getattr(contents, "failure", getattr(contents, "reason", ""))
    return Record(
        kind,
        connection,
        submission=contents.id.submission_id,
        chunk=contents.id.chunk_index,
        argument=getattr(contents, "delay_ms", 0),
        flags=CHUNK_HAS_OUTPUT if output is not None else 0,
        tail=output if output is not None else text.encode(),
    )


class Refusing:
    """In place of the general decoder, where the hot one must do."""

    def __call__(self, message: bytes) -> Any:
        raise AssertionError(f"went to the general decoder: {message.hex()}")


@pytest.fixture(scope="module")
def hot() -> Iterator[Feed]:
    feed = Feed(decode=Refusing())
    yield feed
    feed.close()


@pytest.mark.parametrize("vector", FROM_CONSUMERS, ids=lambda vector: vector["name"])
def test_every_captured_message_takes_the_hot_path(hot: Feed, vector: dict[str, Any]) -> None:
    data = bytes.fromhex(vector["hex"])
    hot.receive(frame(data))
    assert hot.records() == [expected(decode_client(data), hot.connection.number)]


def test_a_captured_reply_is_built_byte_for_byte_but_for_byte_strings(feed: Feed) -> None:
    for vector in VECTORS:
        if not vector["name"].startswith("chunks_reserved"):
            continue
        message: Any = decode_server(bytes.fromhex(vector["hex"]))
        submissions = {submission.id: submission for _, submission in message.chunks}
        hub_feed = Feed(describe=describing(submissions))
        ask(hub_feed, message.nonce)
        chunks = [
            (chunk.submission_id, chunk.chunk_index, submission.chunks_done, chunk.retries, 0)
            for chunk, submission in message.chunks
        ]
        hub_feed.hub.handle_record(64, reserved(hub_feed.connection.number, message.nonce, *chunks))
        (written,) = hub_feed.frames()
        assert written.payload == with_byte_strings(bytes.fromhex(vector["hex"]))
        assert decode_server(written.payload) == message
        hub_feed.close()


def describing(known: dict[int, Submission]) -> Callable[[int], tuple[bytes, bytes]]:
    return lambda number: description_of(known[number])


def with_byte_strings(data: bytes) -> bytes:
    def convert(value: Any) -> Any:
        if isinstance(value, dict):
            return {
                key: bytes(item) if key == "metadata" and item is not None else convert(item)
                for key, item in value.items()
            }
        return [convert(item) for item in value] if isinstance(value, list) else value

    return cbor2.dumps(convert(cbor2.loads(data)))


def ask(feed: Feed, nonce: int) -> None:
    contents = {"WantToReserveChunks": {"max": 4096, "strategy": "Oldest"}}
    feed.receive(frame(cbor2.dumps({"nonce": nonce, "contents": contents})))
    assert feed.records()[-1].kind == RESERVE


# --- any valid message, in any key order, in any pieces ---

u63 = st.integers(0, 2**63 - 1) | st.integers(0, 300)
u64 = st.integers(0, 2**64 - 1) | st.integers(0, 300)
texts = st.text(max_size=40) | st.text(alphabet="aé€😀", max_size=300)
plain = st.sampled_from(["Oldest", "Newest", "Random"])


def shuffled(**fields: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    """A map with these fields in any order."""
    return st.fixed_dictionaries(dict(fields)).flatmap(lambda made: st.permutations(list(made.items())).map(dict))


@st.composite
def any_strategy(draw: st.DrawFn) -> Any:
    made: Any = draw(plain)
    for _ in range(draw(st.integers(0, strategies.MAX_DEPTH))):
        body = [("meta_key", draw(texts.filter(lambda text: len(text.encode()) <= 256))), ("underlying", made)]
        made = {"PreferDistinct": dict(draw(st.permutations(body)))}
    return made


ids = shuffled(submission_id=u63, chunk_index=u63)
outputs = st.none() | st.binary(max_size=400) | st.binary(max_size=60).map(list)
contents = st.one_of(
    shuffled(max=st.integers(1, 2**64 - 1), strategy=any_strategy()).map(lambda body: {"WantToReserveChunks": body}),
    shuffled(id=ids, output_content=outputs).map(lambda body: {"CompleteChunk": body}),
    shuffled(id=ids, failure=texts).map(lambda body: {"FailChunk": body}),
    shuffled(id=ids).map(lambda body: {"WorkingOn": body}),
    shuffled(id=ids).map(lambda body: {"ReleaseChunk": body}),
    shuffled(id=ids).map(lambda body: {"ExtendReservation": body}),
    shuffled(id=ids, delay_ms=u63).map(lambda body: {"RetryLater": body}),
    shuffled(id=ids, reason=texts).map(lambda body: {"FailSubmission": body}),
)
messages = shuffled(nonce=u64, contents=contents)
masks = st.binary(min_size=4, max_size=4)


@settings(max_examples=300, deadline=None)
@given(
    made=st.lists(messages, min_size=1, max_size=5), pieces=st.integers(1, 400), mask=st.binary(min_size=4, max_size=4)
)
def test_any_valid_message_takes_the_hot_path_and_gives_the_general_decoders_record(
    hot: Feed, made: list[Any], pieces: int, mask: bytes
) -> None:
    feed = hot
    feed.reconnect()
    encoded = [cbor2.dumps(message) for message in made]
    feed.receive(b"".join(frame(data, mask=mask) for data in encoded), pieces=pieces)
    assert feed.records() == [expected(decode_client(data), feed.connection.number) for data in encoded]
    assert feed.frames() == []


def spelled_otherwise(value: Any, choose: random.Random) -> bytes:
    """The same item in another of CBOR's forms: longer heads, indefinite lengths."""

    def head(major: int, number: int) -> bytes:
        widths = [width for width in (1, 2, 4, 8) if number < 1 << 8 * width]
        width = choose.choice(widths)
        return bytes([major << 5 | {1: 24, 2: 25, 4: 26, 8: 27}[width]]) + number.to_bytes(width, "big")

    if value is None:
        return b"\xf6"
    if isinstance(value, int):
        return head(0, value)
    if isinstance(value, bytes | str):
        major, data = (2, value) if isinstance(value, bytes) else (3, value.encode())
        if choose.random() < 0.5 or major == 3:
            return head(major, len(data)) + data
        cut = choose.randint(0, len(data))
        return bytes([major << 5 | 31]) + b"".join(head(major, len(d)) + d for d in (data[:cut], data[cut:])) + b"\xff"
    items = list(value.items()) if isinstance(value, dict) else [(item,) for item in value]
    major = 5 if isinstance(value, dict) else 4
    body = b"".join(spelled_otherwise(part, choose) for item in items for part in item)
    if choose.random() < 0.5:
        return bytes([major << 5 | 31]) + body + b"\xff"
    return head(major, len(items)) + body


@settings(max_examples=200, deadline=None)
@given(messages, st.randoms(use_true_random=False))
def test_unusual_forms_and_unknown_fields_give_the_same_records(message: Any, choose: random.Random) -> None:
    feed = Feed()
    usual = cbor2.dumps(message)
    feed.receive(frame(spelled_otherwise(message, choose)))
    feed.receive(frame(cbor2.dumps(message | {"from_the_future": [1, {"a": None}]})))
    record = expected(decode_client(usual), feed.connection.number)
    assert feed.records() == [record, record]
    assert feed.frames() == []
    feed.close()


# --- garbage ---


def corrupted(choose: random.Random) -> bytes:
    """A message with a few bytes changed, cut, repeated, or just noise."""
    data = bytearray(bytes.fromhex(choose.choice(FROM_CONSUMERS)["hex"]))
    kind = choose.randrange(5)
    if kind == 0:
        return choose.randbytes(choose.randrange(40))
    if kind == 1:
        return bytes(data[: choose.randrange(len(data))])
    if kind == 2:
        at = choose.randrange(len(data))
        return bytes(data[:at] + choose.randbytes(choose.randrange(1, 9)) + data[at:])
    for _ in range(choose.randrange(1, 4)):
        data[choose.randrange(len(data))] = choose.randrange(256)
    return bytes(data)


def test_garbage_in_messages_ends_its_connection_with_1007_or_1008_and_nothing_else(feed: Feed) -> None:
    choose = random.Random(20240607)
    codes = {1007: 0, 1008: 0}
    refusals = accepted = 0
    for _ in range(50_000):
        data = corrupted(choose)
        feed.receive(frame(data))
        try:
            wanted = decode(data)
        except ValueError:
            wanted = None
        records, frames = feed.records(), feed.frames()
        if wanted is None:
            assert frames[-1].close_code == 1007, data.hex()
            assert [record.kind for record in records] == [CLOSE]
            codes[1007] += 1
            feed.connect()
        elif wanted[0] == 0:
            assert records == []
            refusals += 1
            assert b"ReservationRefused" in frames[0].payload
        elif wanted[0] == RESERVE and wanted[4] == 0:
            assert frames[0].payload.endswith(b"\xa1\x63Err\x80")
        else:
            accepted += 1
            assert records == [expected(decode_client(data), feed.connection.number)]
            assert frames == []
        if feed.connection.parked > 500:
            feed.reconnect()
    assert codes[1007] > 10_000
    assert refusals > 100
    assert accepted > 300


def test_garbage_on_the_socket_never_does_more_than_end_its_connection(feed: Feed) -> None:
    choose = random.Random(7)
    ended = 0
    for _ in range(50_000):
        data = bytearray(frame(corrupted(choose)) + frame(corrupted(choose), choose.choice([0, 2, 8, 9, 10])))
        for _ in range(choose.randrange(4)):
            data[choose.randrange(min(len(data), 16))] = choose.randrange(256)
        feed.receive(bytes(data), pieces=choose.choice([1 << 20, 5, 1 << 20]))
        written = server_frames(bytes(feed.transport.written))
        if feed.transport.ended or feed.transport.closed:
            assert written[-1].opcode == 8
            assert feed.records()[-1].kind == CLOSE
            ended += 1
            feed.connect()
        elif choose.random() < 0.5:
            feed.connection.connection_lost(None)
            assert feed.records()[-1].kind == CLOSE
            feed.connect()
        else:
            feed.records()
    assert ended > 10_000
    assert feed.count(Counter.CONSUMERS_CONNECTED) == 1


# --- limits and refusals ---


def want(strategy: Any, nonce: int = 9, maximum: int = 1) -> bytes:
    contents = {"WantToReserveChunks": {"max": maximum, "strategy": strategy}}
    return frame(cbor2.dumps({"nonce": nonce, "contents": contents}))


def nested(depth: int) -> Any:
    made: Any = "Random"
    for level in range(depth):
        made = {"PreferDistinct": {"meta_key": str(level), "underlying": made}}
    return made


@pytest.mark.parametrize("strategy", ["Fastest", nested(9), nested(30), {"PreferDistinct": {"meta_key": "x"}}, 5])
def test_a_strategy_that_cannot_be_served_is_refused_or_closes_with_1008(strategy: Any) -> None:
    feed = Feed()
    feed.receive(want(strategy))
    (reply,) = feed.frames()
    refusal: Any = decode_server(reply.payload)
    assert refusal.nonce == 9
    assert "strategy" in refusal.reason
    assert feed.records() == []
    feed.connect(features=0)
    feed.receive(want(strategy))
    (closing,) = feed.frames()
    assert closing.close_code == 1008
    assert "strategy" in closing.close_reason
    feed.close()


@pytest.mark.parametrize("name", ["WorkingOn", "ReleaseChunk", "ExtendReservation", "RetryLater", "FailSubmission"])
def test_a_message_of_a_feature_that_was_not_agreed_closes_with_1008(name: str) -> None:
    more: dict[str, dict[str, Any]] = {"RetryLater": {"delay_ms": 5}, "FailSubmission": {"reason": "no"}}
    body = {"id": {"submission_id": 1, "chunk_index": 2}, **more.get(name, {})}
    feed = Feed(features=0)
    feed.receive(frame(cbor2.dumps({"nonce": 1, "contents": {name: body}})))
    (closing,) = feed.frames()
    assert closing.close_code == 1008
    assert name in closing.close_reason
    feed.close()


def test_max_0_is_answered_at_once_and_never_reaches_the_writer() -> None:
    feed = Feed()
    feed.receive(want("Oldest", nonce=77, maximum=0))
    (reply,) = feed.frames()
    assert cbor2.loads(reply.payload) == {"Sync": {"nonce": 77, "contents": {"ChunksReserved": {"Err": []}}}}
    assert feed.records() == []
    assert feed.count(Counter.RESERVATIONS_FAILED) == 1
    feed.close()


@pytest.mark.parametrize("shift", [0, 1, 2, 3])
def test_a_failures_text_is_cut_between_characters(shift: int) -> None:
    feed = Feed(failure_limit=100)
    text = "x" * shift + "😀" * 60
    contents = {"FailChunk": {"id": {"submission_id": 1, "chunk_index": 2}, "failure": text}}
    feed.receive(frame(cbor2.dumps({"nonce": 1, "contents": contents})))
    (record,) = feed.records()
    assert record.tail == text[: shift + (100 - shift) // 4].encode()
    feed.close()


def test_requests_above_the_limit_wait_here_and_many_of_them_pause_reading_until_answers_come() -> None:
    feed = Feed(describe=lambda submission: description_of(a_submission(submission)))
    messages = [want("Oldest", nonce=nonce) for nonce in range(9000)]
    feed.receive(b"".join(messages[:3000]))
    assert len(feed.records()) == feed.connection.parked == 1024
    # Still read: the end of the connection would be seen.
    assert feed.transport.reading
    for message in messages[3000:]:
        feed.receive(message)
        if not feed.transport.reading:
            break
    assert not feed.transport.reading
    sent = messages.index(message) + 1
    assert 256 * 1024 <= sum(map(len, messages[1024:sent])) < 257 * 1024
    asked = []
    for nonce in range(sent):
        feed.hub.handle_record(64, reserved(feed.connection.number, nonce, (1, nonce, 0, 0, 0)))
        asked += [record.nonce for record in feed.records()]
    assert asked == list(range(1024, sent))
    assert feed.transport.reading
    assert feed.connection.parked == 0
    feed.close()

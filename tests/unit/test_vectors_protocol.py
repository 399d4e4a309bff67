"""What the reference's server and client sent reads here as it was meant, and what is written here is the same."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import cbor2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opsqueue.protocol import consumer, producer, strategy
from opsqueue.protocol.errors import (
    BadJsonError,
    MessageError,
    StrategyError,
    UnservableRequestError,
    WrongShapeError,
)
from opsqueue.protocol.version import own_version

_VECTORS = Path(__file__).parent.parent / "vectors"
WEBSOCKET = [json.loads(line) for line in (_VECTORS / "websocket.jsonl").read_text().splitlines()]
HTTP = [json.loads(line) for line in (_VECTORS / "http.jsonl").read_text().splitlines()]

FROM_CLIENT = [vector for vector in WEBSOCKET if vector["direction"] == "consumer to server"]
FROM_SERVER = [vector for vector in WEBSOCKET if vector["direction"] == "server to consumer" and vector["value"]]
INSERTS = [vector for vector in HTTP if vector["path"] == "/producer/submissions"]
STATUSES = [vector for vector in HTTP if (vector["body"] or "").startswith("{")]


def _named(vectors: list[dict[str, Any]]) -> Any:
    return pytest.mark.parametrize("vector", vectors, ids=[vector["name"] for vector in vectors])


@_named(FROM_CLIENT)
def test_client_messages_are_read_and_written_byte_for_byte(vector: dict[str, Any]) -> None:
    data = bytes.fromhex(vector["hex"])
    message = consumer.decode_client(data)
    assert message.nonce == vector["value"]["nonce"]
    assert consumer.encode_client(message) == data


def _with_byte_strings(message: Any) -> Any:
    for _, submission in message["Sync"]["contents"]["ChunksReserved"]["Ok"]:
        submission["metadata"] = bytes(submission["metadata"])
    return message


@_named(FROM_SERVER)
def test_server_messages_are_written_with_the_fields_and_order_of_the_reference(vector: dict[str, Any]) -> None:
    data = bytes.fromhex(vector["hex"])
    message = consumer.decode_server(data)
    expected = cbor2.loads(data)
    if "Sync" in expected:
        expected = _with_byte_strings(expected)
    assert consumer.encode_server(message) == cbor2.dumps(expected)


def test_byte_strings_and_arrays_of_integers_read_the_same() -> None:
    vector = next(vector for vector in FROM_SERVER if vector["name"] == "chunks_reserved_2")
    as_arrays = bytes.fromhex(vector["hex"])
    message = consumer.decode_server(as_arrays)
    assert isinstance(message, consumer.ChunksReserved)
    assert message.chunks is not None
    assert message.chunks[0][1].metadata == bytes([0, 255]) + b"meta"
    assert consumer.decode_server(consumer.encode_server(message)) == message


def _reversed(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _reversed(value[key]) for key in reversed(value)}
    return [_reversed(item) for item in value] if isinstance(value, list) else value


@_named(FROM_SERVER)
def test_maps_may_come_in_any_order(vector: dict[str, Any]) -> None:
    data = bytes.fromhex(vector["hex"])
    assert consumer.decode_server(cbor2.dumps(_reversed(cbor2.loads(data)))) == consumer.decode_server(data)


def test_the_heartbeat_payload_is_the_captured_one() -> None:
    ping = next(vector for vector in WEBSOCKET if vector["name"] == "ping")
    assert bytes.fromhex(ping["hex"]) == consumer.HEARTBEAT


ID = consumer.ChunkId(2**63 - 1, 0)
EXTENSIONS: list[consumer.ClientContents] = [
    consumer.WorkingOn(ID),
    consumer.ReleaseChunk(ID),
    consumer.ExtendReservation(ID),
    consumer.RetryLater(ID, 1500),
    consumer.FailSubmission(ID, "no use"),
    consumer.CompleteChunk(ID, b"\x00\xff"),
    consumer.FailChunk(ID, "no"),
]


@pytest.mark.parametrize("contents", EXTENSIONS, ids=lambda contents: type(contents).__name__)
def test_every_client_message_reads_back_equal(contents: consumer.ClientContents) -> None:
    message = consumer.ClientMessage(2**64 - 1, contents)
    assert consumer.decode_client(consumer.encode_client(message)) == message


SERVER_MESSAGES: list[consumer.ServerMessage] = [
    consumer.Init(3, 1_500_000_000, "v1.2.3", "conn", ("release",), 600_000_000_000),
    consumer.Init(3, 1_500_000_000, "v1.2.3", "conn"),
    consumer.ChunksReserved(7, None),
    consumer.ChunksReserved(
        7, [(consumer.Chunk(5, 1, b"in", 2), consumer.Submission(5, None, 3, 0, 1, None, {"a": -(2**63)}, "{}"))]
    ),
    consumer.ReservationRefused(7, "too deep"),
    consumer.ChunkReservationExpired(ID),
    consumer.ChunkDropped(ID, "cancelled"),
]


@pytest.mark.parametrize("message", SERVER_MESSAGES, ids=lambda message: type(message).__name__)
def test_every_server_message_reads_back_equal(message: consumer.ServerMessage) -> None:
    assert consumer.decode_server(consumer.encode_server(message)) == message


def test_extra_fields_are_ignored() -> None:
    value = {
        "later": 1,
        "nonce": 1,
        "contents": {"FailChunk": {"id": {"submission_id": 1, "chunk_index": 2, "x": 0}, "failure": "f", "x": None}},
    }
    assert consumer.decode_client(cbor2.dumps(value)) == consumer.ClientMessage(
        1, consumer.FailChunk(consumer.ChunkId(1, 2), "f")
    )


@_named(FROM_CLIENT)
def test_every_truncation_is_an_error(vector: dict[str, Any]) -> None:
    data = bytes.fromhex(vector["hex"])
    for end in range(len(data)):
        with pytest.raises(MessageError):
            consumer.decode_client(data[:end])


def _fail(submission_id: Any, index: Any = 0, failure: Any = "f", nonce: Any = 0) -> bytes:
    body = {"id": {"submission_id": submission_id, "chunk_index": index}, "failure": failure}
    return cbor2.dumps({"nonce": nonce, "contents": {"FailChunk": body}})


WRONG = {
    "trailing bytes": (_fail(1) + b"\x00", "1 bytes after"),
    "a huge byte string": (b"\x5b\x7f" + b"\xff" * 7, "ends inside"),
    "a huge array": (b"\x9b\x7f" + b"\xff" * 7, "ends inside"),
    "a huge map": (b"\xbb\x7f" + b"\xff" * 7, "ends inside"),
    "deep nesting": (b"\x81" * 100_000 + b"\x00", "depth"),
    "bad UTF-8": (b"\x61\xff", "not a CBOR item"),
    "a tag": (b"\xc1\x00", "tag"),
    "a bignum": (_fail(2**70), "tag"),
    "an id above 2^63-1": (_fail(2**63), "may be 0 to"),
    "a negative id": (_fail(-1), "may be 0 to"),
    "a boolean id": (_fail(True), "integer"),
    "a float id": (_fail(1.0), "integer"),
    "a failure of bytes": (_fail(1, failure=b"f"), "FailChunk.failure must be a text"),
    "a negative nonce": (_fail(1, nonce=-1), "nonce"),
    "no map": (cbor2.dumps([1]), "must be a map"),
    "no contents": (cbor2.dumps({"nonce": 1}), "lacks contents"),
    "an unknown variant": (cbor2.dumps({"nonce": 1, "contents": {"Nope": {}}}), "known are"),
    "a variant with two keys": (cbor2.dumps({"nonce": 1, "contents": {"A": 1, "B": 2}}), "one key"),
    "a missing body": (cbor2.dumps({"nonce": 1, "contents": "FailChunk"}), "must be a map"),
    "a duplicate key": (b"\xa2\x61a\x00\x61a\x00", "CBOR item"),
    "an array with 256": (
        cbor2.dumps({"nonce": 0, "contents": {"CompleteChunk": {"id": {"submission_id": 1, "chunk_index": 0}, "output_content": [256]}}}),  # noqa: E501
        "0 to 255",
    ),
    "an empty frame": (b"", "ends inside"),
}  # fmt: skip


@pytest.mark.parametrize(("data", "says"), WRONG.values(), ids=WRONG)
def test_a_frame_that_is_no_message_is_refused_and_the_error_says_why(data: bytes, says: str) -> None:
    with pytest.raises(MessageError, match=says):
        consumer.decode_client(data)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=60), st.integers(0, len(FROM_CLIENT) - 1), st.integers(0, 80))
def test_no_bytes_make_the_decoder_fail_otherwise(noise: bytes, which: int, at: int) -> None:
    data = bytearray(bytes.fromhex(FROM_CLIENT[which]["hex"]))
    data[at : at + len(noise)] = noise
    for decode in (consumer.decode_client, consumer.decode_server):
        with contextlib.suppress(MessageError):
            decode(bytes(data))


def test_a_reserve_request_that_can_never_be_served_keeps_its_nonce() -> None:
    body = {"nonce": 9, "contents": {"WantToReserveChunks": {"max": 1, "strategy": "Fastest"}}}
    with pytest.raises(UnservableRequestError, match="Fastest") as caught:
        consumer.decode_client(cbor2.dumps(body))
    assert caught.value.nonce == 9


def _nested(depth: int) -> strategy.Strategy:
    result: strategy.Strategy = strategy.Random()
    for level in range(depth):
        result = strategy.PreferDistinct(f"key{level}ü", result)
    return result


@pytest.mark.parametrize("value", [strategy.Oldest(), strategy.Newest(), strategy.Random(), _nested(1), _nested(8)])
def test_strategies_read_back_equal_from_both_forms(value: strategy.Strategy) -> None:
    assert strategy.parse(json.loads(json.dumps(strategy.to_wire(value)))) == value
    assert strategy.from_canonical(strategy.canonical(value)) == value


def test_canonical_bytes_are_as_documented() -> None:
    value = strategy.PreferDistinct("ab", strategy.PreferDistinct("", strategy.Newest()))
    assert strategy.canonical(value) == b"P\x02\x00abP\x00\x00N"


BAD_STRATEGIES = {
    "unknown": ("Fastest", "Fastest"),
    "unknown with fields": ({"Prefer": {}}, "Prefer"),
    "a number": (5, "5"),
    "null": (None, "None"),
    "lacks underlying": ({"PreferDistinct": {"meta_key": "a"}}, "lacks underlying"),
    "lacks meta_key": ({"PreferDistinct": {"underlying": "Oldest"}}, "lacks meta_key"),
    "meta_key of bytes": ({"PreferDistinct": {"meta_key": b"a", "underlying": "Oldest"}}, "must be a text"),
    "long meta_key": ({"PreferDistinct": {"meta_key": "a" * 257, "underlying": "Oldest"}}, "257 bytes"),
    "a wrong inner one": (
        {"PreferDistinct": {"meta_key": "a", "underlying": "Old"}},
        "strategy.PreferDistinct.underlying is 'Old'",
    ),
    "too deep": (strategy.to_wire(strategy.PreferDistinct("a", _nested(8))), "more than 8 deep"),
}


@pytest.mark.parametrize(("wire", "says"), BAD_STRATEGIES.values(), ids=BAD_STRATEGIES)
def test_a_bad_strategy_is_refused_and_the_error_says_where(wire: object, says: str) -> None:
    with pytest.raises(StrategyError, match=says):
        strategy.parse(wire)


@pytest.mark.parametrize("data", [b"", b"X", b"OO", b"P", b"P\x05\x00ab", b"P\x01\x00\xffO", b"P\x00\x00" * 9 + b"O"])
def test_bad_canonical_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(StrategyError):
        strategy.from_canonical(data)


@pytest.mark.parametrize("vector", [vector for vector in INSERTS if vector["status"] == 200])
def test_inserts_of_the_reference_are_read(vector: dict[str, Any]) -> None:
    body = producer.decode_insert(vector["request_body"].encode())
    given_body = json.loads(vector["request_body"])
    written = json.loads(producer.encode(body))
    assert written == {"metadata": None, "strategic_metadata": {}, "chunk_size": None, **given_body}
    assert not body.paused


def test_an_insert_is_written_as_the_reference_writes_it() -> None:
    vector = INSERTS[0]
    body = producer.InsertSubmission.of(
        producer.SeeObjectStorage("01a204de-ec37-7573-afd5-19f912899b2f", 3),
        metadata=b"\x00\xffmeta",
        strategic_metadata={"company": 7, "priority": -3},
        chunk_size=2,
    )
    assert producer.encode(body).decode() == vector["request_body"]


@pytest.mark.parametrize("vector", [vector for vector in INSERTS if vector["status"] in (400, 422)])
def test_wrong_inserts_are_told_apart_as_the_reference_does(vector: dict[str, Any]) -> None:
    with pytest.raises(BadJsonError if vector["status"] == 400 else WrongShapeError):
        producer.decode_insert(vector["request_body"].encode())


@pytest.mark.parametrize(
    "body",
    [
        '{"chunk_contents":{"SeeObjectStorage":{"prefix":"x","count":9223372036854775808}}}',
        '{"chunk_contents":{"SeeObjectStorage":{"prefix":"x","count":1},"Direct":{"contents":[]}}}',
        '{"chunk_contents":{}}',
        '{"chunk_contents":{"Direct":{"contents":[[256]]}}}',
        '{"chunk_contents":{"Direct":{"contents":["a"]}}}',
        '{"chunk_contents":{"Direct":{"contents":[]}},"strategic_metadata":null}',
        '{"chunk_contents":{"Direct":{"contents":[]}},"strategic_metadata":{"a":9223372036854775808}}',
        '{"chunk_contents":{"Direct":{"contents":[]}},"strategic_metadata":{"a":1.5}}',
        '{"chunk_contents":{"Direct":{"contents":[]}},"paused":null}',
        "null",
    ],
)
def test_inserts_of_the_wrong_shape_are_refused(body: str) -> None:
    with pytest.raises(WrongShapeError):
        producer.decode_insert(body.encode())


def test_paused_is_read_and_written_only_when_asked_for() -> None:
    body = producer.InsertSubmission.of(producer.Direct([[1]]), paused=True)
    assert json.loads(producer.encode(body))["paused"] is True
    assert producer.decode_insert(producer.encode(body)).paused


@pytest.mark.parametrize("vector", STATUSES)
def test_statuses_of_the_reference_are_read_and_written_to_the_microsecond(vector: dict[str, Any]) -> None:
    status = producer.decode_status(vector["body"].encode())
    assert status is not None
    written = producer.encode_status(status)
    assert producer.decode_status(written) == status
    assert _without_times(json.loads(written)) == _without_times(json.loads(vector["body"]))
    assert list(json.loads(written)) == list(json.loads(vector["body"]))
    if vector["status"] == 409:
        assert producer.decode_not_cancellable(written) == status


def _without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return [(key, _without_times(item)) for key, item in value.items() if not key.endswith("_at")]
    return [_without_times(item) for item in value] if isinstance(value, list) else value


def test_an_unknown_submission_has_no_status() -> None:
    assert producer.decode_status(b"null") is None


def test_a_status_in_progress_is_no_reason_not_to_cancel() -> None:
    vector = next(vector for vector in STATUSES if "InProgress" in vector["body"])
    with pytest.raises(WrongShapeError):
        producer.decode_not_cancellable(vector["body"].encode())


def test_the_version_is_v_and_a_semantic_version() -> None:
    parts = own_version().removeprefix("v").split(".")
    assert own_version().startswith("v")
    assert len(parts) == 3

"""WIRE section 4 over raw sockets: handshake, Init, heartbeats, frames and what is refused of them."""

from __future__ import annotations

import re
import struct
import time

import cbor2
import pytest

from tests.acceptance.conftest import Serve, Wire
from tests.support.raw_consumer import (
    BINARY,
    CLOSE,
    CONTINUATION,
    HEARTBEAT,
    PING,
    PONG,
    TEXT,
    chunk_id,
    frame,
)

UUID7 = re.compile(r"^[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}$")
ALL_FEATURES = ["clean-close", "refusal", "dropped", "release", "extend", "retry-later", "fail-submission"]
#: Each of its settings is short enough to be seen by a test.
QUICK = {"heartbeat_interval": "100ms", "max_missable_heartbeats": 2}
#: For peers that are alive: on a busy machine a test may pause for some heartbeats.
LENIENT = QUICK | {"max_missable_heartbeats": 9}
#: More of them than may be missed.
MANY = 20


# --- handshake and Init ---


def test_a_plain_get_without_upgrade_is_400(wire: Wire) -> None:
    assert wire.producer.ask("GET", "/consumer")[0] == 400


def test_no_extension_is_agreed_to_even_if_compression_is_offered(wire: Wire) -> None:
    assert "sec-websocket-extensions" not in wire.consumer().handshake_head.lower()


def test_init_comes_first_with_exactly_the_references_fields_for_a_reference_peer(serve: Serve) -> None:
    wire = serve(heartbeat_interval="1500ms", max_missable_heartbeats=7)
    init = wire.consumer().init
    assert UUID7.match(init.pop("conn_id"))
    assert init == {
        "max_missable_heartbeats": 7,
        "heartbeat_interval": {"secs": 1, "nanos": 500_000_000},
        "version_info": wire.producer.ask("GET", "/version")[1].decode(),
    }


def test_init_lists_the_features_that_both_know(wire: Wire) -> None:
    init = wire.consumer("telepathy, release,dropped").init
    assert sorted(init["features"]) == ["dropped", "release"]
    assert "reservation_expiration" not in init
    assert wire.consumer("telepathy").init["features"] == []
    assert wire.consumer(", ".join(ALL_FEATURES)).init["features"] == ALL_FEATURES


def test_init_tells_the_reservation_expiration_to_who_can_extend(serve: Serve) -> None:
    init = serve(reservation_expiration="1h 500ms").consumer("extend").init
    assert init["reservation_expiration"] == {"secs": 3600, "nanos": 500_000_000}


def test_every_connection_has_an_id_of_its_own(wire: Wire) -> None:
    assert len({wire.consumer().init["conn_id"] for _ in range(5)}) == 5


# --- heartbeats ---


def test_a_ping_follows_init_right_away(wire: Wire) -> None:
    # The interval is ten seconds: this one is not a tick's.
    got = wire.consumer().next_frame()
    assert (got.opcode, got.fin, got.payload) == (PING, True, HEARTBEAT)


def test_a_ping_comes_at_every_tick_whatever_else_is_sent(serve: Serve) -> None:
    consumer = serve(**LENIENT).consumer()
    begun = time.monotonic()
    answered = 0
    while len(consumer.pings) < 8:
        # Traffic in both directions all the time: the reference's server pings only those that are quiet.
        consumer.settle()
        answered += 1
    took = time.monotonic() - begun
    assert answered > 20
    # The first comes with Init. Late ones are a busy machine's; early ones would be a wrong interval.
    assert took > 0.55
    assert took < 7
    assert set(consumer.pings) == {HEARTBEAT}


def test_a_silent_peer_is_closed_when_it_has_missed_more_than_the_maximum(serve: Serve) -> None:
    wire = serve(**QUICK)
    consumer = wire.consumer()
    consumer.answers_pings = False
    begun = time.monotonic()
    code, reason = consumer.end()
    assert code == 1008
    assert "heartbeat" in reason
    # One with Init, then one for each tick with missed 0, 1, 2; the tick that finds 3 closes.
    assert consumer.pings == [HEARTBEAT] * 4
    assert time.monotonic() - begun > 0.35


def test_what_a_silent_peer_held_is_handed_to_another_at_once(serve: Serve) -> None:
    wire = serve(**QUICK)
    wire.producer.insert(1)
    silent, waiting = wire.consumer(), wire.consumer()
    silent.answers_pings = False
    [held] = silent.reserve_ids()
    assert waiting.reserve_ids() == [held]


def test_a_peer_that_only_answers_pings_stays_for_many_ticks(serve: Serve) -> None:
    consumer = serve(**LENIENT).consumer()
    for _ in range(MANY):
        assert consumer.ping() == HEARTBEAT
    consumer.settle()


@pytest.mark.parametrize("kind", ["pong", "ping", "message"])
def test_any_frame_counts_as_a_sign_of_life(serve: Serve, kind: str) -> None:
    consumer = serve(**LENIENT).consumer()
    consumer.answers_pings = False
    signs = {"pong": frame(b"", PONG), "ping": frame(b"hi", PING)}
    for _ in range(MANY):
        while (got := consumer.next_frame()).opcode != PING:
            assert got.opcode in (PONG, BINARY)
        consumer.send(signs.get(kind) or consumer.message({"WantToReserveChunks": {"max": 0, "strategy": "Oldest"}}))


def test_a_ping_is_answered_with_its_payload(wire: Wire) -> None:
    consumer = wire.consumer()
    consumer.send(frame(b"how are you", PING))
    while (got := consumer.next_frame()).opcode != PONG:
        assert got.opcode == PING
    assert got.payload == b"how are you"


# --- what closes a connection ---

NULL_MESSAGE = {"nonce": 0, "contents": {"WantToReserveChunks": {"max": 0, "strategy": "Oldest"}}}


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (frame(b"hello", TEXT), 1003),
        (frame(cbor2.dumps(NULL_MESSAGE), TEXT), 1003),
        (frame(b"\xff garbage"), 1007),
        (frame(b""), 1007),
        (frame(cbor2.dumps(NULL_MESSAGE) + b"\0"), 1007),
        (frame(cbor2.dumps(NULL_MESSAGE)[:-1]), 1007),
        (frame(cbor2.dumps({"nonce": 0})), 1007),
        (frame(cbor2.dumps({"nonce": -1, "contents": NULL_MESSAGE["contents"]})), 1007),
        (frame(cbor2.dumps({"nonce": 0, "contents": {"DoTheDishes": {}}})), 1007),
        (
            frame(cbor2.dumps({"nonce": 0, "contents": {"WantToReserveChunks": {"max": "1", "strategy": "Oldest"}}})),
            1007,
        ),
        (
            frame(
                cbor2.dumps(
                    {"nonce": 0, "contents": {"CompleteChunk": {"id": chunk_id((-1, 0)), "output_content": None}}}
                )
            ),
            1007,
        ),
        (
            frame(cbor2.dumps({"nonce": 0, "contents": {"FailChunk": {"id": chunk_id((2**63, 0)), "failure": ""}}})),
            1007,
        ),
        (frame(cbor2.dumps(NULL_MESSAGE), masked=False), 1002),
        (frame(b"", CONTINUATION), 1002),
        (frame(b"", 3), 1002),
        (bytes([0xC2, 0x80, 0, 0, 0, 0]), 1002),
        (frame(b"x" * 126, PING), 1002),
        (struct.pack(">BBQI", 0x82, 0x80 | 127, 16 * 1024 * 1024 + 1, 0), 1009),
        (struct.pack(">BBQI", 0x82, 0x80 | 127, 1 << 63, 0), 1002),
    ],
    ids=[
        "text",
        "cbor as text",
        "no cbor",
        "an empty frame",
        "two items",
        "half an item",
        "no contents",
        "a negative nonce",
        "an unknown variant",
        "a text for a number",
        "a negative id",
        "an id of 64 bits",
        "unmasked",
        "a continuation of nothing",
        "an unknown opcode",
        "a reserved bit",
        "a long ping",
        "a frame above 16 MiB",
        "a length of 64 bits",
    ],
)
def test_what_cannot_be_read_closes_with_a_code_and_a_reason_and_leaves_others_alone(
    wire: Wire, data: bytes, code: int
) -> None:
    bad, other = wire.consumer(), wire.consumer()
    bad.send(data)
    got, reason = bad.end()
    assert got == code
    assert reason
    other.settle()


def test_a_message_above_64_mib_closes_with_1009(wire: Wire) -> None:
    consumer = wire.consumer()
    part = bytes(16 * 1024 * 1024)
    opcode = BINARY
    for _ in range(4):
        consumer.send(frame(part, opcode, fin=False))
        opcode = CONTINUATION
    consumer.send(frame(b"\0", CONTINUATION))
    assert consumer.end()[0] == 1009


def test_a_close_frame_is_answered_and_the_server_closes_the_connection(wire: Wire) -> None:
    consumer = wire.consumer()
    consumer.send(frame(struct.pack(">H", 1001) + b"bye", CLOSE))
    assert consumer.end()[0] == 1001


def test_the_chunks_of_who_is_closed_for_garbage_are_free_at_once(wire: Wire) -> None:
    wire.producer.insert(1)
    bad, waiting = wire.consumer(), wire.consumer()
    [held] = bad.reserve_ids()
    nonce = waiting.ask()
    wire.producer.wait_for_parked(1)
    bad.send(frame(b"hello", TEXT))
    assert [reserved.id for reserved in waiting.chunks(nonce)] == [held]


# --- forms that are accepted ---


def test_fields_come_in_any_order_and_unknown_ones_are_ignored(wire: Wire) -> None:
    submission = wire.producer.insert(1)
    consumer = wire.consumer()
    want = {"strategy": "Oldest", "future": [1, {"x": b""}], "max": 1}
    consumer.send(frame(cbor2.dumps({"contents": {"WantToReserveChunks": want}, "later": None, "nonce": 77})))
    assert [reserved.id for reserved in consumer.chunks(77)] == [(submission, 0)]
    done = {"output_content": None, "id": {"chunk_index": 0, "more": 1.5, "submission_id": submission}}
    consumer.send(frame(cbor2.dumps({"contents": {"CompleteChunk": done}, "nonce": 78})))
    consumer.settle()
    wire.producer.wait_for_state(submission, "Completed")


def test_integers_and_lengths_are_read_in_any_size(wire: Wire) -> None:
    # {"nonce": 5, "contents": {"WantToReserveChunks": {"max": 0, "strategy": "Oldest"}}}, each head one form larger;
    # the outer map, the strategy and a name of indefinite length.
    message = (
        b"\xbf\x78\x05nonce\x1b\0\0\0\0\0\0\0\x05\x79\0\x08contents\xb8\x01\x7f\x6aWantToRese\x69rveChunks\xff"
        b"\xb9\0\x02\x63max\x19\0\0\x68strategy\x7f\x66Oldest\xff\xff"
    )
    consumer = wire.consumer()
    consumer.send(frame(message))
    assert consumer.answer(5) == {"ChunksReserved": {"Err": []}}


def test_a_message_in_fragments_with_a_ping_between_them_is_one_message(wire: Wire) -> None:
    consumer = wire.consumer()
    message = cbor2.dumps({**NULL_MESSAGE, "nonce": 9})
    consumer.send(frame(message[:10], fin=False) + frame(b"", PING) + frame(message[10:20], CONTINUATION, fin=False))
    consumer.send(frame(b"", CONTINUATION, fin=False) + frame(message[20:], CONTINUATION))
    while (got := consumer.next_frame()).opcode != PONG:
        assert got.opcode == PING
    assert consumer.answer(9) == {"ChunksReserved": {"Err": []}}


def test_frames_that_come_byte_by_byte_or_many_in_one_segment_are_read(wire: Wire) -> None:
    consumer = wire.consumer()
    for byte in consumer.message({"WantToReserveChunks": {"max": 0, "strategy": "Oldest"}}):
        consumer.send(bytes([byte]))
    assert consumer.answer(0)
    asked = [{"WantToReserveChunks": {"max": 0, "strategy": "Oldest"}}] * 500
    consumer.say(*asked)
    for nonce in range(1, 501):
        consumer.answer(nonce)


def test_a_masked_payload_is_unmasked(wire: Wire) -> None:
    consumer = wire.consumer()
    message = cbor2.dumps({**NULL_MESSAGE, "nonce": 3})
    mask = b"\x12\x34\x56\x78"
    masked = bytes(byte ^ mask[at % 4] for at, byte in enumerate(message))
    consumer.send(bytes([0x82, 0x80 | len(message)]) + mask + masked)
    assert consumer.answer(3) == {"ChunksReserved": {"Err": []}}

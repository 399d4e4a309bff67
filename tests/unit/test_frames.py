"""WebSocket framing, as a consumer's connection does it: what is read, what is refused, and with which close code."""

from __future__ import annotations

import random
from collections.abc import Iterator

import cbor2
import pytest

from opsqueue._speedups.consumer import HEARTBEAT, LARGEST_FRAME
from opsqueue._speedups.counters import Counter
from opsqueue.protocol.consumer import ChunkId, ClientMessage, FailChunk, encode_client
from tests.integration.standin_writer import CLEAN, CLOSE, FAIL, LOST
from tests.unit.consumer_feed import Feed, frame

CONTINUATION, TEXT, BINARY, CLOSING, PING, PONG = 0, 1, 2, 8, 9, 10


@pytest.fixture
def feed() -> Iterator[Feed]:
    feed = Feed()
    yield feed
    feed.close()


def failing(chunk: int, text: str = "why") -> bytes:
    return encode_client(ClientMessage(1, FailChunk(ChunkId(7, chunk), text)))


def closing(feed: Feed) -> tuple[int, str]:
    """The close frame that was written last, after which everything has ended."""
    last = feed.frames()[-1]
    assert feed.records()[-1].kind == CLOSE
    return last.close_code, last.close_reason


@pytest.mark.parametrize("size", [0, 1, 3, 7, 8, 9, 15, 16, 17, 125, 126, 127, 1000, 65535, 65536, 70000])
def test_every_size_and_mask_is_unmasked(feed: Feed, size: int) -> None:
    text = "".join(random.Random(size).choices("abcdefgh", k=size))
    for mask in (b"\0\0\0\0", b"\xff\x01\x80\x7f", random.Random(size).randbytes(4)):
        feed.receive(frame(failing(3, text), mask=mask))
        assert feed.records()[0].tail == text.encode()[: 64 * 1024]


def test_several_frames_in_one_receive_are_applied_in_order(feed: Feed) -> None:
    feed.receive(b"".join(frame(failing(chunk)) for chunk in range(50)))
    assert [record.chunk for record in feed.records()] == list(range(50))
    assert feed.count(Counter.FRAMES_RECEIVED) == 50


def test_a_message_in_fragments_with_control_frames_between_is_one_message(feed: Feed) -> None:
    message = failing(4, "a text in three parts")
    feed.receive(frame(message[:10], fin=False))
    feed.receive(frame(b"are you there", PING))
    feed.receive(frame(message[10:11], CONTINUATION, fin=False) + frame(b"", PONG))
    assert feed.records() == []
    feed.receive(frame(message[11:], CONTINUATION))
    assert [record.tail for record in feed.records()] == [b"a text in three parts"]
    assert [(one.opcode, one.payload) for one in feed.frames()] == [(PONG, b"are you there")]


def test_pongs_leave_in_one_write(feed: Feed) -> None:
    writes = feed.transport.writes
    feed.receive(frame(b"1", PING) + frame(b"2", PING) + frame(b"", PING))
    assert feed.transport.writes == writes + 1
    assert [one.payload for one in feed.frames()] == [b"1", b"2", b""]


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (frame(b"x", mask=None), 1002),
        (frame(b"x", reserved=4), 1002),
        (frame(b"x", reserved=1), 1002),
        (frame(b"x", 3), 1002),
        (frame(b"x", 11), 1002),
        (frame(b"x", 15), 1002),
        (frame(b"x", PING, fin=False), 1002),
        (frame(b"x" * 126, PING), 1002),
        (frame(b"x", CONTINUATION), 1002),
        (frame(b"x", fin=False) + frame(b"y"), 1002),
        (b"\x82\xfe\x00\x7d" + b"\0" * 4 + b"x" * 125, 1002),
        (b"\x82\xff" + (1000).to_bytes(8, "big") + b"\0" * 4, 1002),
        (b"\x82\xff" + (1 << 63).to_bytes(8, "big") + b"\0" * 4, 1002),
        (frame(b"\x03", CLOSING), 1002),
        (frame((1005).to_bytes(2, "big"), CLOSING), 1002),
        (frame((999).to_bytes(2, "big"), CLOSING), 1002),
        (frame((1000).to_bytes(2, "big") + b"\xff\xfe", CLOSING), 1007),
        (frame(b"hello", TEXT), 1003),
        (frame(b"\xff\xff\xff"), 1007),
        (frame(b""), 1007),
        (b"\x82\xff" + (LARGEST_FRAME + 1).to_bytes(8, "big") + b"\0" * 4, 1009),
    ],
)
def test_a_violation_is_answered_with_its_code_and_the_connection_ends(feed: Feed, data: bytes, code: int) -> None:
    feed.receive(frame(failing(1)) + data + frame(failing(2)))
    records = feed.records()
    assert [record.kind for record in records] == [FAIL, CLOSE]
    assert records[-1].argument == CLEAN
    last = feed.frames()[-1]
    assert last.close_code == code
    assert last.close_reason
    assert feed.transport.ended
    assert feed.count(Counter.CONSUMERS_REJECTED) == 1
    assert feed.count(Counter.CONSUMERS_CONNECTED) == 0
    assert feed.count(Counter.CONSUMERS_LOST) == 0


def test_a_message_above_64_mib_is_refused_with_1009(feed: Feed) -> None:
    part = frame(bytes(LARGEST_FRAME), CONTINUATION, fin=False, mask=b"\0\0\0\0")
    feed.receive(frame(bytes(LARGEST_FRAME), fin=False, mask=b"\0\0\0\0"))
    for _ in range(3):
        feed.receive(part)
    assert feed.frames() == []
    feed.receive(frame(b"x", CONTINUATION))
    assert closing(feed)[0] == 1009


@pytest.mark.parametrize("code", [1000, 1001, 1011, 3000, 4999])
def test_a_close_frame_is_answered_and_the_connection_closed(feed: Feed, code: int) -> None:
    feed.receive(frame(code.to_bytes(2, "big") + "tschüß".encode(), CLOSING) + frame(failing(1)))
    assert [one.payload for one in feed.frames()] == [code.to_bytes(2, "big")]
    assert feed.transport.closed
    (record,) = feed.records()
    assert (record.kind, record.argument) == (CLOSE, CLEAN)
    assert feed.count(Counter.CONSUMERS_REJECTED) == 0


def test_a_close_frame_without_a_code_is_answered_without_one(feed: Feed) -> None:
    feed.receive(frame(b"", CLOSING))
    assert [(one.opcode, one.payload) for one in feed.frames()] == [(CLOSING, b"")]


def test_a_connection_that_ends_without_a_close_frame_is_lost_and_its_messages_count(feed: Feed) -> None:
    feed.receive(frame(failing(1)) + frame(failing(2))[:-1])
    feed.connection.connection_lost(None)
    records = feed.records()
    assert [(record.kind, record.argument) for record in records] == [(FAIL, 0), (CLOSE, LOST)]
    assert feed.count(Counter.CONSUMERS_LOST) == 1
    assert feed.count(Counter.CONSUMERS_CONNECTED) == 0


def test_a_long_reason_is_cut_between_characters(feed: Feed) -> None:
    for shift in range(4):
        feed.connect(0)
        strategy = "x" * shift + "é€😀" * 40
        contents = {"WantToReserveChunks": {"max": 1, "strategy": strategy}}
        feed.receive(frame(cbor2.dumps({"nonce": 1, "contents": contents})))
        code, reason = closing(feed)
        assert code == 1008
        assert 100 < len(reason.encode()) <= 123


def test_a_new_connection_begins_with_a_heartbeat(feed: Feed) -> None:
    assert [(one.opcode, one.payload) for one in feed.greeting] == [(PING, HEARTBEAT)]


@pytest.mark.parametrize("pieces", [1, 2, 3, 7, 64])
def test_frames_may_arrive_in_any_pieces(feed: Feed, pieces: int) -> None:
    texts = ["", "x" * 124, "y" * 300, "z" * 3000]
    feed.receive(b"".join(frame(failing(1, text)) for text in texts), pieces=pieces)
    assert [record.tail.decode() for record in feed.records()] == texts

"""Drives one consumer's connection byte by byte, with real rings behind it and a transport that records."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from opsqueue._speedups.board import Board
from opsqueue._speedups.consumer import ConsumerConnection, ConsumerHub
from opsqueue._speedups.ring import Channel
from opsqueue.server.frontend.consumers import decode
from tests.integration.standin_writer import OPEN, SLOT, Record, parse_record

if TYPE_CHECKING:
    from opsqueue._speedups.consumer import Decoded

ALL_FEATURES = 127
MASK = b"\x37\xfa\x21\x3d"


def frame(payload: bytes, opcode: int = 2, *, fin: bool = True, reserved: int = 0, mask: bytes | None = MASK) -> bytes:
    """A client's frame; `mask` None leaves it unmasked."""
    first = (0x80 if fin else 0) | reserved << 4 | opcode
    bit = 0x80 if mask is not None else 0
    if len(payload) < 126:
        head = bytes([first, bit | len(payload)])
    elif len(payload) < 65536:
        head = bytes([first, bit | 126]) + struct.pack(">H", len(payload))
    else:
        head = bytes([first, bit | 127]) + struct.pack(">Q", len(payload))
    if mask is None:
        return head + payload
    repeated = (mask * (len(payload) // 4 + 1))[: len(payload)]
    masked = (int.from_bytes(payload, "big") ^ int.from_bytes(repeated, "big")).to_bytes(len(payload), "big")
    return head + mask + masked


@dataclass
class Frame:
    """A frame that the server wrote."""

    opcode: int
    fin: bool
    payload: bytes

    @property
    def close_code(self) -> int:
        assert self.opcode == 8
        return int(struct.unpack_from(">H", self.payload)[0])

    @property
    def close_reason(self) -> str:
        return self.payload[2:].decode()


def server_frames(data: bytes) -> list[Frame]:
    """Every frame in `data`, which must hold whole ones; a server masks nothing."""
    frames = []
    at = 0
    while at < len(data):
        assert not data[at + 1] & 0x80
        assert not data[at] & 0x70
        size, start = data[at + 1], at + 2
        if size == 126:
            size, start = struct.unpack_from(">H", data, at + 2)[0], at + 4
        elif size == 127:
            size, start = struct.unpack_from(">Q", data, at + 2)[0], at + 10
        assert start + size <= len(data)
        frames.append(Frame(data[at] & 15, data[at] >> 7 == 1, data[start : start + size]))
        at = start + size
    return frames


@dataclass
class RecordedTransport:
    """What a connection does to its transport."""

    written: bytearray = field(default_factory=bytearray)
    writes: int = 0
    reading: bool = False
    ended: bool = False
    closed: bool = False

    def get_extra_info(self, name: str) -> None:
        return None

    def write(self, data: bytes) -> None:
        self.written += data
        self.writes += 1

    def write_eof(self) -> None:
        self.ended = True

    def close(self) -> None:
        self.closed = True

    def is_closing(self) -> bool:
        return self.closed

    def pause_reading(self) -> None:
        self.reading = False

    def resume_reading(self) -> None:
        self.reading = True


class Feed:
    """A hub and one connection of it."""

    def __init__(
        self,
        *,
        features: int = ALL_FEATURES,
        capacity: int = 1 << 20,
        failure_limit: int = 64 * 1024,
        decode: Callable[[bytes], Decoded] = decode,
        describe: Callable[[int], tuple[bytes, bytes] | None] = lambda submission: None,
        direct_input: Callable[[int, int], bytes | None] = lambda submission, chunk: None,
    ) -> None:
        self.loop = asyncio.new_event_loop()
        self.channel = Channel(capacity)
        self.board = Board(SLOT + 1)
        front = self.channel.frontend_end()
        self.writer = self.channel.writer_end()
        for end in (front, self.writer, front):
            end.poll()
        self.hub = ConsumerHub(
            front,
            self.board,
            SLOT,
            self.loop,
            describe,
            direct_input,
            decode,
            heartbeat_interval=10.0,
            max_missable=3,
            failure_limit=failure_limit,
        )
        self.connect(features)

    def connect(self, features: int = ALL_FEATURES) -> None:
        """Begin a connection; what the one before it left to be read is forgotten."""
        self.transport = RecordedTransport()
        self.connection = ConsumerConnection(self.hub, features, None)
        self.connection.start(self.transport, b"", b"")  # type: ignore[arg-type]
        self.greeting = self.frames()
        opened = self.records()[-1]
        assert opened == Record(OPEN, self.connection.number, argument=features)

    def reconnect(self, features: int = ALL_FEATURES) -> None:
        """End the connection and begin another."""
        self.connection.connection_lost(None)
        self.connect(features)

    def receive(self, data: bytes, *, pieces: int = 1 << 30) -> None:
        """Bytes arrive, at most `pieces` of them at a time."""
        at = 0
        while at < len(data) and self.transport.reading:
            view = self.connection.get_buffer(-1)
            piece = data[at : at + min(pieces, len(view))]
            view[: len(piece)] = piece
            self.connection.buffer_updated(len(piece))
            at += len(piece)

    def records(self) -> list[Record]:
        """What has come out of the ring since the last call."""
        got = []
        while (record := self.writer.get()) is not None:
            got.append(parse_record(*record))
        self.writer.release()
        return got

    def frames(self) -> list[Frame]:
        """What was written since the last call."""
        frames = server_frames(bytes(self.transport.written))
        self.transport.written.clear()
        return frames

    def count(self, counter: int) -> int:
        return self.board.get(SLOT, counter)

    def close(self) -> None:
        self.hub.stop()
        self.channel.close()
        self.loop.close()

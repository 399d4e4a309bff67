"""Consumers' way in: the WebSocket handshake on GET /consumer, and the hand-over of its socket to the Cython side.

After the hand-over nothing of a consumer's traffic passes here, but for messages in unusual forms.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import os
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from aiohttp import web
from aiohttp.abc import AbstractStreamWriter

from opsqueue._speedups import consumer as speedups
from opsqueue._speedups.consumer import ConsumerConnection
from opsqueue._speedups.consumer_texts import FEATURE_BITS
from opsqueue._speedups.pump import FrontendPump
from opsqueue.protocol import consumer as protocol
from opsqueue.protocol import strategy
from opsqueue.protocol.errors import UnservableRequestError
from opsqueue.server.frontend import errors
from opsqueue.server.logs import logger

if TYPE_CHECKING:
    from opsqueue._speedups.board import Board
    from opsqueue._speedups.ring import Channel

log = logger("frontend")

#: RFC 6455 section 1.3: what a server appends to the client's key to prove that it speaks WebSocket.
_KEY_SUFFIX: Final = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
_KEY_BYTES: Final = 16
#: Seconds that consumers get to read their close frame before their connections are closed, when the server stops.
DRAIN_S: Final = 0.05


@dataclass(frozen=True, slots=True)
class ConsumerSettings:
    """What consumers are told, and held to. Times in seconds, sizes in bytes."""

    heartbeat_interval: float
    max_missable_heartbeats: int
    reservation_expiration: float
    max_failure_size: int
    #: As GET /version tells it.
    version: str


class _Connection(ConsumerConnection, asyncio.BufferedProtocol):
    """The connection, as asyncio's own event loop recognizes a protocol with buffers."""

    __slots__ = ()


class _HandedOver(web.StreamResponse):
    """What aiohttp gets for a request whose connection it no longer has: writes nothing."""

    def __init__(self) -> None:
        super().__init__(status=101)
        self.force_close()

    async def prepare(self, request: web.BaseRequest) -> AbstractStreamWriter | None:
        return None

    async def write_eof(self, data: bytes = b"") -> None:
        return None


class Consumers:
    """All consumers of one front-end. Made in the process that serves, after the fork: its side of `channel` starts.

    `describe` and `direct_input`: see opsqueue._speedups.consumer.ConsumerHub. `on_reply` and `on_writer_restart` are
    the cold requests' (WriterClient); `on_broken` is called when the ring from the writer cannot be trusted any more:
    this process must end then, and be replaced.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        channel: Channel,
        board: Board,
        slot: int,
        settings: ConsumerSettings,
        describe: Callable[[int], tuple[bytes, bytes] | None],
        direct_input: Callable[[int, int], bytes | None],
        on_reply: Callable[[int, bytes], None],
        on_writer_restart: Callable[[], None],
        on_broken: Callable[[str], None],
    ) -> None:
        self._settings = settings
        self._describe = describe
        self._direct_input = direct_input
        self._draining = False
        endpoint = channel.frontend_end()
        self.hub = speedups.ConsumerHub(
            endpoint,
            board,
            slot,
            loop,
            self._described,
            self._input,
            decode,
            heartbeat_interval=settings.heartbeat_interval,
            max_missable=settings.max_missable_heartbeats,
            failure_limit=settings.max_failure_size,
        )
        #: Where the cold requests go; `start` it before it is used.
        self.pump = FrontendPump(endpoint, self.hub, board, slot, loop, on_reply, on_writer_restart, on_broken)

    def start(self) -> None:
        """Take records from the writer from now on."""
        self.pump.start()

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        """GET /consumer: hand the connection over; returns when it has ended. Raises HttpError for no handshake."""
        accept = _accept_key(request)
        if self._draining:
            raise errors.unavailable("the server is stopping; connect again", close=True)
        transport = request.transport
        handler = request.protocol
        if transport is None:
            return _HandedOver()
        features = _agreed_features(request)
        ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def on_end(exc: BaseException | None) -> None:
            handler.connection_lost(exc)
            if not ended.done():
                ended.set_result(None)

        # No byte may arrive between the protocols: one of them would get what is the other's.
        transport.pause_reading()
        received = handler._message_tail
        handler._message_tail = b""
        bits = 0
        for feature in features or ():
            bits |= FEATURE_BITS[feature]
        connection = _Connection(self.hub, bits, on_end)
        transport.set_protocol(connection)
        connection.start(transport, _handshake(accept) + _binary_frame(self._init(features)), received)
        await ended
        return _HandedOver()

    async def drain(self) -> None:
        """Close every consumer: a close frame, then the TCP connection, whatever the peer does; at most DRAIN_S."""
        self._draining = True
        self.hub.shut_all(1001, b"the server is stopping")
        deadline = time.monotonic() + DRAIN_S
        while self.hub.open_transports and time.monotonic() < deadline:
            await asyncio.sleep(DRAIN_S / 10)
        self.hub.stop()

    def stop(self) -> None:
        """No more records, no more heartbeats."""
        self.hub.stop()
        self.pump.stop()

    def _init(self, features: tuple[str, ...] | None) -> bytes:
        settings = self._settings
        extends = features is not None and protocol.EXTEND in features
        return protocol.encode_server(
            protocol.Init(
                max_missable_heartbeats=settings.max_missable_heartbeats,
                heartbeat_interval_ns=_nanoseconds(settings.heartbeat_interval),
                version_info=settings.version,
                conn_id=str(_uuid7()),
                features=features,
                reservation_expiration_ns=_nanoseconds(settings.reservation_expiration) if extends else None,
            )
        )

    def _described(self, submission: int) -> tuple[bytes, bytes] | None:
        try:
            return self._describe(submission)
        except Exception:  # whatever the file's reader meets: the chunk is given back and asked for again
            log.exception("a reserved chunk's submission cannot be read", submission=submission)
            return None

    def _input(self, submission: int, chunk: int) -> bytes | None:
        try:
            return self._direct_input(submission, chunk)
        except Exception:  # as above
            log.exception("a reserved chunk's input cannot be read", submission=submission, chunk=chunk)
            return None


_KINDS: Final[dict[type[protocol.ClientContents], int]] = {
    protocol.CompleteChunk: speedups.COMPLETE,
    protocol.FailChunk: speedups.FAIL,
    protocol.WorkingOn: speedups.WORKING_ON,
    protocol.ReleaseChunk: speedups.RELEASE,
    protocol.ExtendReservation: speedups.EXTEND,
    protocol.RetryLater: speedups.RETRY_LATER,
    protocol.FailSubmission: speedups.FAIL_SUBMISSION,
}


def decode(message: bytes) -> speedups.Decoded:
    """A message that the hot decoder left alone, in the hub's terms. Raises ValueError that says what is wrong."""
    try:
        decoded = protocol.decode_client(message)
    except UnservableRequestError as error:
        return (0, error.nonce, 0, 0, 0, error.reason)
    contents = decoded.contents
    if isinstance(contents, protocol.WantToReserveChunks):
        return (speedups.RESERVE, decoded.nonce, 0, 0, contents.max, strategy.canonical(contents.strategy))
    if isinstance(contents, protocol.ReportChunks):
        return (speedups.REPORT, decoded.nonce, 0, 0, 0, protocol.encode_client(decoded))
    if isinstance(contents, protocol.OpenCredit):
        canonical = strategy.canonical(contents.strategy)
        return (speedups.OPEN_CREDIT, decoded.nonce, 0, 0, contents.chunks, canonical)
    if isinstance(contents, protocol.AddCredit):
        return (speedups.ADD_CREDIT, decoded.nonce, 0, contents.credit, contents.chunks, None)
    if isinstance(contents, protocol.WithdrawCredit):
        return (speedups.WITHDRAW_CREDIT, decoded.nonce, 0, contents.credit, 0, None)
    argument = 0
    tail: bytes | None = None
    match contents:
        case protocol.CompleteChunk():
            tail = contents.output_content
        case protocol.FailChunk():
            tail = _utf8(contents.failure)
        case protocol.FailSubmission():
            tail = _utf8(contents.reason)
        case protocol.RetryLater():
            argument = contents.delay_ms
        case _:
            pass
    chunk = contents.id
    return (_KINDS[type(contents)], decoded.nonce, chunk.submission_id, chunk.chunk_index, argument, tail)


def _utf8(text: str) -> bytes:
    return text.encode("utf-8", "replace")


def _accept_key(request: web.BaseRequest) -> str:
    """The answer to the client's key. Raises HttpError for what is no WebSocket handshake."""
    headers = request.headers
    upgrade = headers.get("Upgrade", "").strip().lower()
    tokens = {token.strip().lower() for line in headers.getall("Connection", []) for token in line.split(",")}
    if upgrade != "websocket" or "upgrade" not in tokens or request.method != "GET" or request.version < (1, 1):
        raise errors.malformed("GET /consumer is for WebSocket clients: no Upgrade: websocket was asked for")
    version = headers.get("Sec-WebSocket-Version", "")
    if version != "13":
        raise errors.HttpError(
            426,
            f"Sec-WebSocket-Version is {version!r}; only 13 is spoken here".encode(),
            errors.TEXT,
            headers={"Sec-WebSocket-Version": "13"},
        )
    key = headers.get("Sec-WebSocket-Key", "")
    try:
        valid = len(base64.b64decode(key, validate=True)) == _KEY_BYTES
    except (binascii.Error, ValueError):
        valid = False
    if not valid:
        raise errors.malformed(f"Sec-WebSocket-Key is {key!r}; it must be 16 bytes in base64")
    return base64.b64encode(hashlib.sha1(key.encode() + _KEY_SUFFIX, usedforsecurity=False).digest()).decode()


def _handshake(accept: str) -> bytes:
    return (
        "HTTP/1.1 101 Switching Protocols\r\n"
        "Upgrade: websocket\r\n"
        "Connection: Upgrade\r\n"
        f"Sec-WebSocket-Accept: {accept}\r\n\r\n"
    ).encode()


def _binary_frame(message: bytes) -> bytes:
    """One unfragmented frame; for Init, which is small."""
    size = len(message)
    header = bytes([0x82, size]) if size < 126 else b"\x82\x7e" + size.to_bytes(2, "big")
    return header + message


def _agreed_features(request: web.BaseRequest) -> tuple[str, ...] | None:
    """The extensions that both know, in our order; None for a peer that knows nothing of extensions."""
    lines = request.headers.getall(protocol.FEATURES_HEADER, None)
    if lines is None:
        return None
    asked = {name.strip().lower() for line in lines for name in line.split(",")}
    return tuple(name for name in protocol.FEATURES if name in asked)


def _nanoseconds(seconds: float) -> int:
    return round(seconds * 1e9)


def _uuid7() -> uuid.UUID:
    """RFC 9562: 48 bits of Unix milliseconds, the rest random."""
    value = (time.time_ns() // 1_000_000) << 80 | int.from_bytes(os.urandom(10), "big")
    value = value & ~(0xF << 76) | 7 << 76
    return uuid.UUID(int=value & ~(0x3 << 62) | 2 << 62)

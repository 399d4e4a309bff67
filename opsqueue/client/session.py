"""What a consumer and a server say to each other on one connection: handshake, frames, nonces, and what is held.

Moves no bytes: a transport (a thread with a socket, or asyncio) gives it what arrived and writes what it has queued.
"""

from __future__ import annotations

import logging
import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future

import msgspec
from websockets.client import ClientProtocol
from websockets.exceptions import InvalidMessage, InvalidStatus
from websockets.frames import Frame, Opcode
from websockets.protocol import State
from websockets.uri import parse_uri

from opsqueue.client.compact import Descriptions, grouped
from opsqueue.client.urls import ServerAddress
from opsqueue.exceptions import (
    IncorrectUsageError,
    InternalConsumerClientError,
    UnexpectedOpsqueueConsumerServerResponseError,
)
from opsqueue.protocol import consumer as wire
from opsqueue.protocol.errors import MessageError
from opsqueue.protocol.strategy import Strategy, beyond_reference
from opsqueue.protocol.version import own_version

logger = logging.getLogger("opsqueue.consumer")
_frames_logger = logging.getLogger("opsqueue.frames")

#: Handshake answers of a server that is starting, stopping or overloaded, or of a proxy before one.
_RETRIED_STATUSES = frozenset((502, 503, 504))
_POLICY_VIOLATION = 1008
#: Messages after which a chunk is no longer held.
_ENDING = (wire.CompleteChunk, wire.FailChunk, wire.ReleaseChunk, wire.RetryLater, wire.FailSubmission)
#: Chunks whose loss is remembered for who works on them.
_REMEMBERED_DROPS = 10_000


class ConnectError(Exception):
    """No connection could be made, but a later try may succeed."""


class ConnectionLostError(Exception):
    """The connection has ended; what it held is with the server again."""


Fetch = Callable[[wire.Chunk, wire.Submission], Future[bytes]]


class Arrival(msgspec.Struct, frozen=True):
    """A reserved chunk, its submission, and its input, which is on its way."""

    id: wire.ChunkId
    chunk: wire.Chunk
    submission: wire.Submission
    content: Future[bytes]
    #: Of the request that reserved it: a chunk that expires may be reserved again on the same connection.
    nonce: int


class Reservation(msgspec.Struct, eq=False):
    """A request for chunks. `arrived` gives them, or raises what became of the connection.

    Made before it is sent, so that an interrupted caller can always give it back.
    """

    #: Called with each chunk as it comes, on the connection's thread.
    fetch: Fetch
    arrived: Future[list[Arrival]] = msgspec.field(default_factory=Future)
    ids: list[wire.ChunkId] = msgspec.field(default_factory=list)
    abandoned: bool = False


class Session(ABC):
    """One connection's state. Any thread may call; what is queued is written by the transport."""

    def __init__(self, address: ServerAddress) -> None:
        self._address = address
        #: Gives the server's Init; raises ConnectError, or InternalConsumerClientError when trying again is no use.
        self.opened: Future[wire.Init] = Future()
        self._lock = threading.RLock()
        #: What is to be written, in order; an empty one ends our direction.
        self._out: deque[memoryview] = deque()
        self._protocol = ClientProtocol(
            parse_uri(address.consumer), max_size=wire.MAX_MESSAGE_BYTES, logger=_frames_logger
        )
        # under the lock
        self._error: Exception | None = None
        self._closing = False
        self._nonce = 0
        self._pending: dict[int, Reservation] = {}
        #: The nonce of the request that reserved it, of each chunk.
        self._held: dict[wire.ChunkId, int] = {}
        self._dropped: dict[wire.ChunkId, str] = {}
        # of the receiving side
        self._parts: list[bytes] = []
        self._features: frozenset[str] = frozenset()
        self._is_reference = False
        self._descriptions = Descriptions()
        #: Seconds that a chunk may be held without being extended; None where the server does not say.
        self.reservation_s: float | None = None

    @abstractmethod
    def _write(self) -> None:
        """Writes what was passed on, not under the lock. Raises ConnectionLostError."""

    @abstractmethod
    def _abort(self) -> None:
        """Ends both directions at once."""

    @abstractmethod
    def _limit_silence(self, seconds: float) -> None:
        """From now on the connection is lost when nothing comes for `seconds`."""

    def knows(self, feature: str) -> bool:
        """Whether the server agreed to `feature`."""
        return feature in self._features

    @property
    def alive(self) -> bool:
        """Whether the connection is of use, as far as is known."""
        return self._error is None and not self._closing and not self._is_ending

    @property
    def _is_ending(self) -> bool:
        """The server's close frame has come, and the receiving thread has not dealt with it yet."""
        return self._protocol.state in (State.CLOSING, State.CLOSED)

    @property
    def lost(self) -> bool:
        """Whether it ended without being closed here."""
        return self._error is not None and not self._closing

    def send(self, messages: Iterable[wire.ClientContents]) -> None:
        """Sends `messages` in order, in one go. Raises ConnectionLostError or why the connection ended."""
        with self._lock:
            self._check()
            self._queue_all(messages)
        self._write()

    def reserve(
        self, reservation: Reservation, maximum: int, strategy: Strategy, before: Sequence[wire.ClientContents] = ()
    ) -> None:
        """Asks for chunks, after sending `before` in the same go; `reservation` must be new.

        Raises IncorrectUsageError when the server does not know the strategy.
        """
        unknown = None if self.knows(wire.STRATEGIES) else beyond_reference(strategy)
        with self._lock:
            self._check()
            if unknown is not None:
                raise IncorrectUsageError(
                    f"the server does not offer Strategy.{unknown}: it knows Oldest, Newest, Random and PreferDistinct"
                )
            self._queue_each(before)
            self._pending[self._nonce] = reservation
            self._queue(wire.WantToReserveChunks(maximum, strategy))
            self._pass_on()
        self._write()

    def give_back(self, reservation: Reservation) -> None:
        """Returns what came of `reservation` and was not reported on; also what is yet to come of it."""
        with self._lock:
            reservation.abandoned = True
            ids = [chunk_id for chunk_id in reservation.ids if chunk_id in self._held]
            if ids and self.alive:
                self._give_back(ids)
        self._write_if_open()

    def release(self, ids: Iterable[wire.ChunkId]) -> None:
        """Returns chunks that are held, without a retry, so that others may work on them."""
        with self._lock:
            held = [chunk_id for chunk_id in ids if chunk_id in self._held]
            if held and self.alive:
                self._give_back(held)
        self._write_if_open()

    def dropped(self, arrival: Arrival) -> str | None:
        """Why the server no longer counts on us for a chunk: cancelled, failed, completed or expired; None: it does."""
        reason = self._dropped.get(arrival.id)
        if reason is None and self.alive and self._held.get(arrival.id) != arrival.nonce:
            # and it was reserved again since, here
            return "expired"
        return reason

    def holds(self, chunk_id: wire.ChunkId) -> bool:
        """Whether the server counts on us for a chunk: nothing was sent that ends it."""
        return chunk_id in self._held

    @property
    def idle(self) -> bool:
        """Nobody waits for chunks, and none is held."""
        with self._lock:
            return not self._held and all(reservation.abandoned for reservation in self._pending.values())

    def _check(self) -> None:
        if self._error is not None:
            raise self._error
        if self._closing or self._is_ending:
            raise ConnectionLostError("the connection was closed")

    def _queue_each(self, messages: Iterable[wire.ClientContents]) -> None:
        messages = list(messages)
        for message in grouped(messages) if self.knows(wire.COMPACT) else messages:
            self._queue(message)
        for message in messages:
            if isinstance(message, _ENDING):
                self._held.pop(message.id, None)
                self._dropped.pop(message.id, None)

    def _queue(self, message: wire.ClientContents) -> None:
        data = wire.encode_client(wire.ClientMessage(self._nonce, message))
        self._nonce += 1
        first, rest = data[: wire.MAX_FRAME_BYTES], data[wire.MAX_FRAME_BYTES :]
        self._protocol.send_binary(first, fin=not rest)
        while rest:
            first, rest = rest[: wire.MAX_FRAME_BYTES], rest[wire.MAX_FRAME_BYTES :]
            self._protocol.send_continuation(first, fin=not rest)

    def _pass_on(self) -> None:
        """Under the lock: what is queued is to be written next, in one go."""
        parts = self._protocol.data_to_send()
        if data := b"".join(parts):
            self._out.append(memoryview(data))
        if b"" in parts:
            self._out.append(memoryview(b""))

    def _lost(self, text: str, cause: BaseException | None = None) -> ConnectionLostError:
        error = ConnectionLostError(f"the connection to {self._address.consumer} was lost: {text}")
        error.__cause__ = cause
        # `alive` would not do: at an end without a close frame it is ending already.
        if self._error is None and not self._closing and self.opened.done():
            logger.warning("%s", error)
        self._fail(error)
        return error

    def _fail(self, error: Exception) -> None:
        with self._lock:
            if self._error is None:
                self._error = error
            pending = list(self._pending.values())
            self._pending.clear()
            self._held.clear()
            self._abort()
        if not self.opened.done():
            self.opened.set_exception(error)
        for reservation in pending:
            reservation.arrived.set_exception(error)

    def _give_back(self, ids: list[wire.ChunkId]) -> None:
        """Under the lock; to be written after it."""
        if self.knows(wire.RELEASE):
            self._queue_all([wire.ReleaseChunk(chunk_id) for chunk_id in ids])
            return
        for chunk_id in ids:
            self._held.pop(chunk_id, None)
        # a reference server frees chunks without counting a retry only when their connection ends
        if not self._held and not any(not reservation.abandoned for reservation in self._pending.values()):
            self._closing = True
            self._protocol.send_close(1000)
            self._pass_on()
        else:
            self._queue_all([wire.FailChunk(chunk_id, "Requester disappeared") for chunk_id in ids])

    def _queue_all(self, messages: Iterable[wire.ClientContents]) -> None:
        self._queue_each(messages)
        self._pass_on()

    def _write_if_open(self) -> None:
        try:
            self._write()
        except ConnectionLostError as error:
            # which gives everything back, too
            logger.debug("%s", error)

    def _begin_handshake(self) -> None:
        """Queues the request."""
        with self._lock:
            request = self._protocol.connect()
            request.headers[wire.FEATURES_HEADER] = ", ".join(wire.FEATURES)
            request.headers["User-Agent"] = f"opsqueue/{own_version().removeprefix('v')}"
            self._protocol.send_request(request)
            self._pass_on()

    def _begin_close(self) -> None:
        """Queues the close frame, once."""
        with self._lock:
            if not self._closing:
                self._closing = True
                if self._error is None and self._protocol.state is State.OPEN:
                    self._protocol.send_close(1000)
                    self._pass_on()

    def _take(self, data: bytes) -> None:
        """Deals with what was received, nothing at the end. Raises what ended the connection."""
        with self._lock:
            if data:
                self._protocol.receive_data(data)
            else:
                self._protocol.receive_eof()
            events = self._protocol.events_received()
            self._pass_on()
        self._write()
        self._check_handshake()
        for event in events:
            if isinstance(event, Frame):
                self._frame(event)
        broken = self._protocol.parser_exc
        if broken is not None and not isinstance(broken, EOFError):
            raise UnexpectedOpsqueueConsumerServerResponseError(
                f"{self._address.consumer} does not speak WebSocket: {broken!r}"
            ) from broken
        if self._protocol.close_rcvd is not None:
            self._closed(self._protocol.close_rcvd.code, self._protocol.close_rcvd.reason)
        if not data:
            raise EOFError("the server ended it without a close frame")

    def _check_handshake(self) -> None:
        error = self._protocol.handshake_exc
        if error is None:
            return
        if isinstance(error, InvalidStatus):
            status = error.response.status_code
            text = bytes(error.response.body or b"")[:500].decode(errors="replace").strip()
            explained = f"{self._address.consumer} answered the handshake with status {status} {text}".rstrip()
            if status in _RETRIED_STATUSES:
                raise ConnectError(explained)
            raise InternalConsumerClientError(explained) from error
        if isinstance(error, InvalidMessage) and isinstance(error.__cause__, EOFError):
            raise ConnectError("the connection ended during the handshake")
        cause = error.__cause__ or error
        if isinstance(error, EOFError):
            raise ConnectError("the connection ended during the handshake")
        raise InternalConsumerClientError(
            f"{self._address.consumer} did not answer the handshake as a WebSocket server: {cause}"
        ) from error

    def _closed(self, code: int, reason: str) -> None:
        text = f"the server closed it with code {code}{': ' + reason if reason else ''}"
        # A server that knows refusals sends them as messages: then it means missed heartbeats, as after SIGSTOP.
        if code == _POLICY_VIOLATION and not self.knows(wire.REFUSAL):
            raise InternalConsumerClientError(f"{self._address.consumer}: {text}")
        raise EOFError(text)

    def _frame(self, frame: Frame) -> None:
        if frame.opcode in (Opcode.PING, Opcode.PONG, Opcode.CLOSE):
            return
        if frame.opcode not in (Opcode.BINARY, Opcode.CONT):
            raise self._unexpected("a text frame, where only binary ones are allowed")
        self._parts.append(bytes(frame.data))
        if not frame.fin:
            return
        data = b"".join(self._parts)
        self._parts.clear()
        try:
            self._message(wire.decode_server(data))
        except MessageError as error:
            raise self._unexpected(str(error)) from error

    def _unexpected(self, text: str) -> Exception:
        if not self.opened.done():
            return InternalConsumerClientError(f"{self._address.consumer} sent no Init first, but {text}")
        return UnexpectedOpsqueueConsumerServerResponseError(f"{self._address.consumer} sent {text}")

    def _message(self, message: wire.ServerMessage) -> None:
        if isinstance(message, wire.Init):
            if self.opened.done():
                raise self._unexpected("a second Init")
            self._init(message)
            return
        if not self.opened.done():
            raise self._unexpected(f"a {type(message).__name__}")
        match message:
            case wire.ChunksReserved(nonce=nonce, chunks=chunks):
                self._reserved(nonce, chunks)
            case wire.PackedChunks(nonce=nonce, groups=groups):
                self._reserved(nonce, self._descriptions.unpacked(groups))
            case wire.CreditWithdrawn(nonce=nonce):
                raise self._unexpected(f"the end of the credit {nonce}, which was never opened")
            case wire.ReservationRefused(nonce=nonce, reason=reason):
                self._answered(nonce).arrived.set_exception(IncorrectUsageError(reason))
            case wire.ChunkReservationExpired(id=chunk_id):
                self._expired(chunk_id)
            case wire.ChunkDropped(id=chunk_id, reason=reason):
                with self._lock:
                    self._drop(chunk_id, reason)

    def _init(self, init: wire.Init) -> None:
        self._features = frozenset(init.features or ())
        self._is_reference = init.features is None
        if init.reservation_expiration_ns is not None:
            self.reservation_s = init.reservation_expiration_ns / 1e9
        silence = (init.max_missable_heartbeats + 2) * init.heartbeat_interval_ns / 1e9
        # a week is for ever
        self._limit_silence(min(max(silence, 1.0), 604_800.0))
        self.opened.set_result(init)

    def _answered(self, nonce: int) -> Reservation:
        with self._lock:
            reservation = self._pending.pop(nonce, None)
        if reservation is None:
            raise self._unexpected(f"an answer to the nonce {nonce}, which waits for none")
        return reservation

    def _reserved(self, nonce: int, chunks: list[tuple[wire.Chunk, wire.Submission]] | None) -> None:
        reservation = self._answered(nonce)
        if chunks is None:
            reservation.arrived.set_exception(IncorrectUsageError("the server refused to reserve chunks: max was 0"))
            return
        with self._lock:
            ids = reservation.ids = [wire.ChunkId(chunk.submission_id, chunk.chunk_index) for chunk, _ in chunks]
            self._held.update(dict.fromkeys(ids, nonce))
            for chunk_id in ids:
                self._dropped.pop(chunk_id, None)  # an earlier reservation of it was
            abandoned = reservation.abandoned
            # after our close frame they go back by themselves
            if abandoned and self.alive:
                self._give_back(ids)
        if abandoned:
            self._write_if_open()
            reservation.arrived.set_result([])
            return
        reservation.arrived.set_result(
            [
                Arrival(chunk_id, chunk, submission, reservation.fetch(chunk, submission), nonce)
                for chunk_id, (chunk, submission) in zip(ids, chunks, strict=True)
            ]
        )

    def _expired(self, chunk_id: wire.ChunkId) -> None:
        logger.warning("the reservation of chunk %d of %d expired", chunk_id.chunk_index, chunk_id.submission_id)
        with self._lock:
            self._drop(chunk_id, "expired")
            if self._is_reference and self.alive:
                # a reference server counts the expiry when it is told
                self._queue_all([wire.FailChunk(chunk_id, "Reservation expired")])
        self._write_if_open()

    def _drop(self, chunk_id: wire.ChunkId, reason: str) -> None:
        """Under the lock."""
        if chunk_id in self._held:
            del self._held[chunk_id]
            self._dropped[chunk_id] = reason
            if len(self._dropped) > _REMEMBERED_DROPS:
                del self._dropped[next(iter(self._dropped))]

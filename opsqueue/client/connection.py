"""One connection of a consumer: handshake, frames, nonces, and what the server thinks that it holds.

Never reconnects and touches no store. One daemon thread does all that may block on the way in (name lookup, connect,
handshake, receive), so callers only ever wait for a future, which signals can interrupt. Any thread may send.
"""

from __future__ import annotations

import logging
import select
import socket
import ssl
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

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

#: Seconds for each step until the first frame.
_OPEN_TIMEOUT_S = 10.0
#: Seconds to wait for the server's close frame, so that what was sent before ours is not lost to a reset.
_CLOSE_TIMEOUT_S = 0.5
#: Handshake answers of a server that is starting, stopping or overloaded, or of a proxy before one.
_RETRIED_STATUSES = frozenset((502, 503, 504))
_RECEIVE_BYTES = 256 * 1024
_POLICY_VIOLATION = 1008
#: Messages after which a chunk is no longer held.
_ENDING = (wire.CompleteChunk, wire.FailChunk, wire.ReleaseChunk, wire.RetryLater, wire.FailSubmission)


class ConnectError(Exception):
    """No connection could be made, but a later try may succeed."""


class ConnectionLostError(Exception):
    """The connection has ended; what it held is with the server again."""


Fetch = Callable[[wire.Chunk, wire.Submission], Future[bytes]]


@dataclass(frozen=True, slots=True)
class Arrival:
    """A reserved chunk, its submission, and its input, which is on its way."""

    chunk: wire.Chunk
    submission: wire.Submission
    content: Future[bytes]

    @property
    def id(self) -> wire.ChunkId:
        """Which chunk it is."""
        return wire.ChunkId(self.chunk.submission_id, self.chunk.chunk_index)


@dataclass(slots=True, eq=False)
class Reservation:
    """A request for chunks. `arrived` gives them, or raises what became of the connection.

    Made before it is sent, so that an interrupted caller can always give it back.
    """

    #: Called with each chunk as it comes, on the connection's thread.
    fetch: Fetch
    arrived: Future[list[Arrival]] = field(default_factory=Future)
    ids: list[wire.ChunkId] = field(default_factory=list)
    abandoned: bool = False


class Connection:
    """A connection that is being opened, open, or lost for good."""

    def __init__(self, address: ServerAddress) -> None:
        self._address = address
        #: Gives the server's Init; raises ConnectError, or InternalConsumerClientError when trying again is no use.
        self.opened: Future[wire.Init] = Future()
        self._lock = threading.RLock()
        #: Held while bytes are written, never together with the lock: who receives must not wait for who sends, because
        #: a server may read no more until what it has sent is received.
        self._writing = threading.Lock()
        #: What is to be written, in order; an empty one ends our direction.
        self._out: deque[memoryview] = deque()
        self._ended = threading.Event()
        self._socket: socket.socket | None = None
        self._protocol = ClientProtocol(
            parse_uri(address.consumer), max_size=wire.MAX_MESSAGE_BYTES, logger=_frames_logger
        )
        # under the lock
        self._error: Exception | None = None
        self._closing = False
        self._nonce = 0
        self._pending: dict[int, Reservation] = {}
        self._held: dict[wire.ChunkId, None] = {}
        # of the thread
        self._parts: list[bytes] = []
        self._features: frozenset[str] = frozenset()
        self._is_reference = False
        self._descriptions = Descriptions()
        self._thread = threading.Thread(target=self._run, name="opsqueue-connection", daemon=True)
        self._thread.start()

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

    def close_if_idle(self) -> None:
        """Closes properly unless somebody waits for chunks or holds some."""
        with self._lock:
            if self._held or any(not reservation.abandoned for reservation in self._pending.values()):
                return
        self.close()

    def close(self) -> None:
        """Closes with a close frame; waits for the server's a moment."""
        with self._lock:
            if not self._closing:
                self._closing = True
                if self._error is None and self._protocol.state is State.OPEN:
                    self._protocol.send_close(1000)
                    self._pass_on()
            sock = self._socket
        self._write_if_open()
        if sock is None:
            return
        self._ended.wait(_CLOSE_TIMEOUT_S)
        _shut(sock)

    def _check(self) -> None:
        if self._error is not None:
            raise self._error
        if self._closing or self._is_ending:
            raise ConnectionLostError("the connection was closed")

    def _queue_each(self, messages: Iterable[wire.ClientContents]) -> None:
        messages = list(messages)
        for message in messages:
            if isinstance(message, _ENDING):
                self._held.pop(message.id, None)
        for message in grouped(messages) if self.knows(wire.COMPACT) else messages:
            self._queue(message)

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

    def _write(self) -> None:
        """Writes what was passed on, not under the lock. Raises ConnectionLostError.

        A signal's exception waits until all is written: half a frame would end everything.
        """
        if threading.current_thread() is self._thread:
            self._write_without_waiting()
            return
        interruption: BaseException | None = None
        # again, for what the receiving thread left to us when we were about to end
        while self._out:
            with self._writing:
                while self._out:
                    sock = self._socket
                    if sock is None:
                        raise ConnectionLostError(str(self._error or "the connection has ended"))
                    try:
                        self._write_part(sock)
                    except OSError as error:
                        raise self._lost(f"sending failed: {error}", error) from error
                    except BaseException as error:
                        if interruption is not None:
                            raise
                        interruption = error
        if interruption is not None:
            raise interruption

    def _write_without_waiting(self) -> None:
        """On the receiving thread. What finds no room is written after the next receive, or by who sends next."""
        while self._out and self._writing.acquire(blocking=False):
            try:
                sock = self._socket
                if sock is None or not _has_room(sock):
                    return
                if self._out:
                    self._write_part(sock)
            finally:
                self._writing.release()

    def _write_part(self, sock: socket.socket) -> None:
        part = self._out[0]
        if part:
            part = part[sock.send(part) :]
            if part:
                self._out[0] = part
                return
        else:
            try:
                sock.shutdown(socket.SHUT_WR)
            except OSError as error:
                logger.debug("the connection had ended already: %s", error)
        self._out.popleft()

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
            if self._socket is not None:
                _shut(self._socket)
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

    def _run(self) -> None:
        try:
            self._open()
            while self._receive():
                pass
        except (InternalConsumerClientError, UnexpectedOpsqueueConsumerServerResponseError, ConnectError) as error:
            self._fail(error)
        except Exception as error:
            if self.opened.done():
                self._lost(f"{type(error).__name__}: {error}", error)
            else:
                failed = ConnectError(f"{type(error).__name__}: {error}")
                failed.__cause__ = error
                self._fail(failed)
        finally:
            with self._lock:
                sock, self._socket = self._socket, None
            if sock is not None:
                sock.close()
            self._ended.set()

    def _open(self) -> None:
        sock = socket.create_connection((self._address.host, self._address.port), timeout=_OPEN_TIMEOUT_S)
        with self._lock:
            self._socket = sock
            if self._closing:
                raise ConnectError("it is no longer wanted")
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if self._address.secure:
            try:
                sock = ssl.create_default_context().wrap_socket(sock, server_hostname=self._address.host)
            except ssl.SSLCertVerificationError as error:
                raise InternalConsumerClientError(f"{self._address.consumer} is not trusted: {error}") from error
            with self._lock:
                self._socket = sock
        with self._lock:
            request = self._protocol.connect()
            request.headers[wire.FEATURES_HEADER] = ", ".join(wire.FEATURES)
            request.headers["User-Agent"] = f"opsqueue/{own_version().removeprefix('v')}"
            self._protocol.send_request(request)
            self._pass_on()
        self._write()

    def _receive(self) -> bool:
        sock = self._socket
        if sock is None:
            return False
        try:
            data = sock.recv(_RECEIVE_BYTES)
        except TimeoutError as error:
            raise TimeoutError(f"the server sent nothing for {sock.gettimeout():g} s") from error
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
        return True

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
            case wire.ChunkDropped(id=chunk_id):
                with self._lock:
                    self._held.pop(chunk_id, None)

    def _init(self, init: wire.Init) -> None:
        self._features = frozenset(init.features or ())
        self._is_reference = init.features is None
        silence = (init.max_missable_heartbeats + 2) * init.heartbeat_interval_ns / 1e9
        sock = self._socket
        if sock is not None:
            # zero would mean not to wait at all; a week is for ever
            sock.settimeout(min(max(silence, 1.0), 604_800.0))
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
            reservation.ids = [wire.ChunkId(chunk.submission_id, chunk.chunk_index) for chunk, _ in chunks]
            self._held.update(dict.fromkeys(reservation.ids))
            abandoned = reservation.abandoned
            if abandoned:
                self._give_back(reservation.ids)
        if abandoned:
            self._write_if_open()
            reservation.arrived.set_result([])
            return
        reservation.arrived.set_result(
            [Arrival(chunk, submission, reservation.fetch(chunk, submission)) for chunk, submission in chunks]
        )

    def _expired(self, chunk_id: wire.ChunkId) -> None:
        logger.warning("the reservation of chunk %d of %d expired", chunk_id.chunk_index, chunk_id.submission_id)
        with self._lock:
            self._held.pop(chunk_id, None)
            if self._is_reference and self.alive:
                # a reference server counts the expiry when it is told
                self._queue_all([wire.FailChunk(chunk_id, "Reservation expired")])
        self._write_if_open()


def _has_room(sock: socket.socket) -> bool:
    poll = select.poll()
    poll.register(sock, select.POLLOUT)
    return bool(poll.poll(0))


def _shut(sock: socket.socket) -> None:
    """Ends both directions, which wakes the thread that receives."""
    try:
        sock.shutdown(socket.SHUT_RDWR)
    except OSError as error:
        logger.debug("the connection had ended already: %s", error)

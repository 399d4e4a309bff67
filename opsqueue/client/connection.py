"""A consumer's connection on a thread of its own. Never reconnects and touches no store.

One daemon thread does all that may block on the way in (name lookup, connect, handshake, receive), so callers only ever
wait for a future, which signals can interrupt. Any thread may send.
"""

from __future__ import annotations

import logging
import select
import socket
import ssl
import threading

from opsqueue.client.session import (
    Arrival,
    ConnectError,
    ConnectionLostError,
    Reservation,
    Session,
)
from opsqueue.client.urls import ServerAddress
from opsqueue.exceptions import (
    InternalConsumerClientError,
    UnexpectedOpsqueueConsumerServerResponseError,
)

__all__ = ["Arrival", "ConnectError", "Connection", "ConnectionLostError", "Reservation"]

logger = logging.getLogger("opsqueue.consumer")

#: Seconds for each step until the first frame.
_OPEN_TIMEOUT_S = 10.0
#: Seconds to wait for the server's close frame, so that what was sent before ours is not lost to a reset.
_CLOSE_TIMEOUT_S = 0.5
_RECEIVE_BYTES = 256 * 1024


class Connection(Session):
    """A connection that is being opened, open, or lost for good."""

    def __init__(self, address: ServerAddress) -> None:
        super().__init__(address)
        #: Held while bytes are written, never together with the lock: who receives must not wait for who sends, because
        #: a server may read no more until what it has sent is received.
        self._writing = threading.Lock()
        #: While writing: the part that is being written, and how many bytes of it each call has sent.
        self._progress: tuple[memoryview, list[int]] = memoryview(b""), []
        self._ended = threading.Event()
        self._socket: socket.socket | None = None
        self._thread = threading.Thread(target=self._run, name="opsqueue-connection", daemon=True)
        self._thread.start()

    def close_if_idle(self) -> None:
        """Closes properly unless somebody waits for chunks or holds some."""
        if self.idle:
            self.close()

    def close(self) -> None:
        """Closes with a close frame; waits for the server's a moment."""
        self._begin_close()
        sock = self._socket
        self._write_if_open()
        if sock is None:
            return
        self._ended.wait(_CLOSE_TIMEOUT_S)
        _shut(sock)

    def _abort(self) -> None:
        if self._socket is not None:
            _shut(self._socket)

    def _limit_silence(self, seconds: float) -> None:
        if self._socket is not None:
            self._socket.settimeout(seconds)

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
                        if isinstance(sock, ssl.SSLSocket):
                            # whose send is no single step: nobody knows how much of the part was sent
                            self._lost(f"interrupted while sending: {error!r}", error)
                            raise
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
        head = self._out[0]
        part, sent = self._progress
        if part is not head:
            part, sent = self._progress = head, []
        if head:
            # one step for the interpreter: no signal's exception comes between the sending and its count
            sent.extend(map(sock.send, (head[sum(sent) :],)))
            if sum(sent) < len(head):
                return
        else:
            try:
                sock.shutdown(socket.SHUT_WR)
            except OSError as error:
                logger.debug("the connection had ended already: %s", error)
        self._out.popleft()

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
        self._begin_handshake()
        self._write()

    def _receive(self) -> bool:
        sock = self._socket
        if sock is None:
            return False
        try:
            data = sock.recv(_RECEIVE_BYTES)
        except TimeoutError as error:
            raise TimeoutError(f"the server sent nothing for {sock.gettimeout():g} s") from error
        self._take(data)
        return True


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

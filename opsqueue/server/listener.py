"""The one listening socket, and the report of its port. Accepts nothing: that is the front-ends' work."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable
from typing import Final

from opsqueue.server.errors import BindError, StartupError

#: Connections that may wait to be accepted; the kernel lowers it to net.core.somaxconn.
BACKLOG: Final = 4_096

#: What a predecessor that is still closing causes, and what therefore is tried again.
_PASSING: Final = frozenset({errno.EADDRINUSE, errno.EADDRNOTAVAIL})


def bind(host: str, port: int, *, wait: Callable[[], bool]) -> socket.socket:
    """A listening, non-blocking socket. `wait` pauses between two tries, and is False when there is to be no other.

    No SO_REUSEPORT: with it a second server would bind the same port without an error.
    """
    family, address = _resolve(host, port)
    while True:
        try:
            return _listen(family, address)
        except OSError as error:
            if error.errno not in _PASSING or not wait():
                raise BindError(host=host, port=port, reason=_reason(error)) from error


def _resolve(host: str, port: int) -> tuple[int, tuple[object, ...]]:
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise BindError(host=host, port=port, reason=_reason(error)) from error
    family, _, _, _, address = found[0]
    return family, address


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def _listen(family: int, address: tuple[object, ...]) -> socket.socket:
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # Accepted connections inherit it: no answer waits for an acknowledgement of the one before.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        listener.bind(address)
        listener.listen(BACKLOG)
        listener.setblocking(False)
    except BaseException:
        listener.close()
        raise
    return listener


def url(listener: socket.socket) -> str:
    """The address that it listens on, as a URL."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if listener.family == socket.AF_INET6 else f"http://{host}:{port}"


class PortReport:
    """The inherited descriptor that the port is reported on, 2 bytes big-endian; only closed if there is none."""

    def __init__(self, fd: int) -> None:
        """-1: nobody asked for a report."""
        self._fd = fd
        if fd >= 0:
            try:
                os.fstat(fd)
            except OSError as error:
                raise StartupError(
                    reason=f"--report-bound-port-pipe {fd} is not an open file descriptor; "
                    "pass one that the server inherits"
                ) from error

    def send(self, port: int) -> OSError | None:
        """Report `port` and close; the error if nobody could be told."""
        if self._fd < 0:
            return None
        try:
            os.write(self._fd, port.to_bytes(2, "big"))
        except OSError as error:
            return error
        finally:
            self.close()
        return None

    def close(self) -> None:
        """Close without a report, if none was made. In a child: forget the descriptor."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

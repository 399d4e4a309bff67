"""Accepts from the shared listener, one connection per wake-up, and evens them out over the front-ends."""

from __future__ import annotations

import asyncio
import errno
import socket
from collections.abc import Callable

import structlog

from opsqueue._speedups.board import Board, SlotState

log = structlog.get_logger("opsqueue.server.accepting")

#: A front-end with this many connections more than the least loaded one pauses accepting.
IMBALANCE = 2
#: One that has not moved its progress word for this many seconds is left out of the comparison.
STALE_S = 1.0
#: While paused, look at the others this often (seconds).
RECHECK_S = 0.02
#: After running out of descriptors or memory, try again after this many seconds.
EXHAUSTED_S = 0.1
#: Connections taken from the listener's queue at most when draining.
LAST_ACCEPTS = 1024

_EXHAUSTED = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})


def overloaded(board: Board, own_slot: int, first_slot: int) -> bool:
    """Whether `own_slot` has IMBALANCE connections more than the least loaded live front-end from `first_slot` on."""
    own = board.connections(own_slot)
    if own < IMBALANCE:
        return False
    for slot in range(first_slot, board.size):
        if slot == own_slot or own - board.connections(slot) < IMBALANCE:
            continue
        if board.state(slot) == SlotState.SERVING and board.seconds_since_progress(slot) <= STALE_S:
            return True
    return False


class Acceptor:
    """Watches the listener and counts connections on the board.

    `serve` makes the protocol of each connection; when one has ended, its owner calls `connection_ended`.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        listener: socket.socket,
        board: Board,
        own_slot: int,
        first_slot: int,
        serve: Callable[[], asyncio.Protocol],
    ) -> None:
        self._loop = loop
        self._listener = listener
        self._board = board
        self._own_slot = own_slot
        self._first_slot = first_slot
        self._serve = serve
        self._open = 0
        self._watching = False
        self._stopped = False
        self._recheck: asyncio.TimerHandle | None = None
        self._starting: set[asyncio.Task[None]] = set()
        listener.setblocking(False)

    def start(self) -> None:
        """Accept from now on."""
        self._watch()

    def stop(self) -> None:
        """Take what is queued by now, accept no more, and close this process's copy of the listener."""
        if self._stopped:
            return
        self._pause()
        for _ in range(LAST_ACCEPTS):
            if not self._accept():
                break
        self._stopped = True
        self._listener.close()
        if self._recheck is not None:
            self._recheck.cancel()
            self._recheck = None

    @property
    def open_connections(self) -> int:
        """Connections accepted and not ended."""
        return self._open

    def connection_ended(self) -> None:
        """One connection less: perhaps we may accept again."""
        self._open -= 1
        self._board.set_connections(self._own_slot, self._open)
        if self._recheck is not None and not self._stopped:
            self._recheck.cancel()
            self._resume_if_even()

    def _watch(self) -> None:
        if not self._watching and not self._stopped:
            self._loop.add_reader(self._listener.fileno(), self._on_readable)
            self._watching = True

    def _pause(self) -> None:
        if self._watching:
            self._loop.remove_reader(self._listener.fileno())
            self._watching = False

    def _resume_if_even(self) -> None:
        self._recheck = None
        if overloaded(self._board, self._own_slot, self._first_slot):
            self._recheck = self._loop.call_later(RECHECK_S, self._resume_if_even)
        else:
            self._watch()

    def _on_readable(self) -> None:
        if overloaded(self._board, self._own_slot, self._first_slot):
            self._pause()
            self._recheck = self._loop.call_later(RECHECK_S, self._resume_if_even)
            return
        self._accept()

    def _accept(self) -> bool:
        """Take one connection. False: there was none."""
        try:
            connection, _ = self._listener.accept()
        except (BlockingIOError, InterruptedError, ConnectionAbortedError):
            return False
        except OSError as error:
            if error.errno not in _EXHAUSTED:  # a network error of that one connection, see accept(2)
                log.warning("connection not accepted", reason=str(error))
                return False
            log.error("no connection accepted", reason=str(error), hint="raise the limit of open files (ulimit -n)")
            self._pause()
            if not self._stopped and self._recheck is None:
                self._recheck = self._loop.call_later(EXHAUSTED_S, self._resume_if_even)
            return False
        connection.setblocking(False)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._open += 1
        self._board.set_connections(self._own_slot, self._open)
        task = self._loop.create_task(self._connect(connection))
        self._starting.add(task)
        task.add_done_callback(self._starting.discard)
        return True

    async def _connect(self, connection: socket.socket) -> None:
        try:
            await self._loop.connect_accepted_socket(self._serve, connection)
        except OSError as error:  # it was reset before we came to it
            connection.close()
            self.connection_ended()
            log.debug("connection lost before it was served", reason=str(error))

"""What every server process inherits from the supervisor: settings, listener, board, channels. Opens nothing itself."""

from __future__ import annotations

import socket
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from opsqueue._speedups.board import Board
    from opsqueue._speedups.ring import Channel
    from opsqueue.server.settings import Settings

#: Slots of the board.
SUPERVISOR_SLOT = 0
WRITER_SLOT = 1


def frontend_slot(index: int) -> int:
    """The board's slot of front-end `index`."""
    return 2 + index


@dataclass(frozen=True)
class ServerContext:
    """Made once by the supervisor, before it forks; children use their copies of the same mappings and descriptors."""

    settings: Settings
    #: The database file (for an in-memory database: a file in a private directory on tmpfs).
    database_path: str
    #: True: the database is removed at the end and written with synchronous=OFF.
    database_is_temporary: bool
    #: The one listening socket; front-ends accept on it.
    listener: socket.socket
    board: Board
    #: One per front-end, by its index.
    channels: tuple[Channel, ...]


@dataclass(frozen=True)
class Control:
    """A child's end of its control channel to the supervisor (a stream socket pair).

    The supervisor sends one byte: b"D" drain (front-ends: stop accepting, answer what was accepted, close consumers,
    exit 0) or b"S" stop (the writer: commit what is there, exit 0). End of stream: the supervisor is gone, leave at
    once.
    The child sends b"R" once it serves. A fatal start-up error goes to stderr as one line and ends with exit code 1.
    """

    channel: socket.socket

"""A server whose children are a few lines each, under the real supervisor.

`python -m tests.support.small_server ORDERS [flags]`. The children answer every connection with their index and pid, so
that a test sees who serves. ORDERS, separated by commas, say how they misbehave: `writer-refuses`, `writer-crashes`,
`frontend-crashes`, `frontend-hangs`, `frontend-ignores-drain`, `writer-ignores-stop`.
"""

from __future__ import annotations

import fcntl
import os
import select
import signal
import socket
import sys
import time

from opsqueue._speedups.board import SlotState
from opsqueue.cli import serve
from opsqueue.server import logs
from opsqueue.server.context import WRITER_SLOT, Control, ServerContext, frontend_slot
from opsqueue.server.errors import DatabaseInUseError, StartupError
from opsqueue.server.settings_sources import OneLineParser, load
from opsqueue.server.supervisor import EntryPoints, Supervisor

ORDERS = frozenset(sys.argv[1].split(",")) if __name__ == "__main__" else frozenset()


def lock(path: str) -> int:
    fd = os.open(f"{path}-lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(fd)
        raise DatabaseInUseError(pid="unknown", path=path) from error
    return fd


def writer(context: ServerContext, control: Control, lock_fd: int) -> int:
    context.board.start(WRITER_SLOT, SlotState.STARTING)
    os.fstat(lock_fd)
    if "writer-refuses" in ORDERS:
        print("opsqueue: the writer refuses", file=sys.stderr, flush=True)
        return 1
    if "writer-crashes" in ORDERS:
        os.kill(os.getpid(), signal.SIGKILL)
    control.channel.sendall(b"R")
    while True:
        context.board.progress(WRITER_SLOT)
        if select.select([control.channel], [], [], 0.1)[0]:
            if "writer-ignores-stop" not in ORDERS:
                return 0
            time.sleep(0.1)  # paces a loop that ignores its orders


def frontend(context: ServerContext, control: Control, index: int) -> int:
    slot = frontend_slot(index)
    context.board.start(slot, SlotState.STARTING)
    if "frontend-crashes" in ORDERS:
        return 7
    control.channel.sendall(b"R")
    while True:
        if "frontend-hangs" not in ORDERS:
            context.board.progress(slot)
        ready, _, _ = select.select([context.listener, control.channel], [], [], 0.1)
        if control.channel in ready:
            if "frontend-ignores-drain" not in ORDERS:
                return 0
            time.sleep(0.1)  # paces a loop that ignores its orders
        if context.listener in ready:
            answer(context.listener, index)


def answer(listener: socket.socket, index: int) -> None:
    try:
        connection, _ = listener.accept()
    except BlockingIOError:  # another front-end was faster
        return
    with connection:
        connection.sendall(f"{index} {os.getpid()}".encode())


def main() -> int:
    parser = OneLineParser(prog="small_server", allow_abbrev=False)
    serve.add_arguments(parser)
    settings = load(vars(parser.parse_args(sys.argv[2:])), {}).settings
    logs.configure(settings.log_level, settings.log_format)
    try:
        return Supervisor(settings, EntryPoints(lock, writer, frontend), os.environ).run()
    except StartupError as error:
        print(f"opsqueue: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())

"""A server of our own in a directory, and processes that consume from it: for commands that need no running queue.

Everything is under one process and gone when that ends, however it ends.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from opsqueue.server.processes import STOP_SIGNALS

START_WITHIN_S: Final = 10.0
#: For each of the two.
STOP_WITHIN_S: Final = 2.0


class LocalQueueError(Exception):
    """The server does not start; the text says why."""


@contextmanager
def local_server(home: Path, *flags: str) -> Iterator[str]:
    """A server on a free port, its database in `home`; its address. Raises LocalQueueError."""
    reading, writing = os.pipe()
    words = ["--port", "0", "--report-bound-port-pipe", str(writing), "--database-filename", str(home / "opsqueue.db")]
    with child(home, "server", [*words, *flags], pass_fds=(writing,)) as process:
        os.close(writing)
        with os.fdopen(reading, "rb") as pipe:
            ready, _, _ = select.select([pipe], [], [], START_WITHIN_S)
            port = int.from_bytes(pipe.read(2), "big") if ready else 0
        if not port:
            process.kill()
            raise LocalQueueError(f"the server did not start:\n{log_text(home, 'server')}")
        yield f"127.0.0.1:{port}"


@contextmanager
def child(
    home: Path,
    role: str,
    words: list[str],
    pass_fds: tuple[int, ...] = (),
    environment: dict[str, str] | None = None,
    name: str | None = None,
) -> Iterator[subprocess.Popen[bytes]]:
    """A process of ours, which logs into `home`. Ctrl-C does not reach it: we stop it, in our order."""
    with log_path(home, name or role).open("ab") as output:
        # No preexec_fn: an interrupt that arrives while Python forks with one is lost.
        process = subprocess.Popen(
            [sys.executable, "-m", "opsqueue.cli.demo_process", str(os.getpid()), role, *words],
            pass_fds=pass_fds,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            process_group=0,
            env=None if environment is None else {**os.environ, **environment},
        )
    try:
        yield process
    finally:
        _stop(process)


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Ask it to stop, to stop at once, and kill it if it does not. A second Ctrl-C does not keep us from it."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in STOP_SIGNALS}
    try:
        for _ in range(2):
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(STOP_WITHIN_S)
                return
        process.kill()
        process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def log_path(home: Path, name: str) -> Path:
    """Where a child's output goes."""
    return home / f"{name}.log"


def log_text(home: Path, name: str) -> str:
    """What a child has written."""
    return log_path(home, name).read_text(errors="replace").strip()

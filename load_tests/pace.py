"""How fast the machine is at the moment: the host of a virtual one is busy at times, and its figures differ threefold.

Three things that every row consists of: computing, waking another process, and syncing a file.
"""

from __future__ import annotations

import os
import socket
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

_ROUNDS = 9
_ADDITIONS = 100_000
_WAKE_UPS = 200


@dataclass(frozen=True)
class Pace:
    """Medians: nanoseconds of a Python addition, microseconds to another process and back, milliseconds of a sync."""

    addition_ns: float
    wake_up_us: float
    fdatasync_ms: float

    @classmethod
    def now(cls, directory: str | None = None) -> Pace:
        """Measured here, in a fifth of a second; `directory`: the disk that is synced, by default the temporary one."""
        return cls(
            _median(_additions) / _ADDITIONS * 1e9,
            _with_echo(lambda near: _median(lambda: _wake_up(near))) / _WAKE_UPS * 1e6,
            _fdatasync(directory) * 1e3,
        )

    def __str__(self) -> str:
        return f"{self.addition_ns:.0f} ns, {self.wake_up_us:.0f} us, {self.fdatasync_ms:.2f} ms"


def _median(act: Callable[[], None]) -> float:
    return statistics.median(_seconds(act) for _ in range(_ROUNDS))


def _seconds(act: Callable[[], None]) -> float:
    begun = time.perf_counter()
    act()
    return time.perf_counter() - begun


def _additions() -> None:
    total = 0
    for number in range(_ADDITIONS):
        total += number


def _wake_up(near: socket.socket) -> None:
    for _ in range(_WAKE_UPS):
        near.send(b"x")
        near.recv(1)


def _with_echo(measure: Callable[[socket.socket], float]) -> float:
    near, far = socket.socketpair()
    child = os.fork()
    if child == 0:
        near.close()
        while said := far.recv(1):
            far.send(said)
        os._exit(0)
    far.close()
    with near:
        seconds = measure(near)
    os.waitpid(child, 0)
    return seconds


def _fdatasync(directory: str | None) -> float:
    with tempfile.TemporaryDirectory(dir=directory) as home, (Path(home) / "probe").open("wb", buffering=0) as file:

        def sync() -> None:
            file.write(bytes(4096))
            os.fdatasync(file.fileno())

        sync()
        return _median(sync)

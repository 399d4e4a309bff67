"""Functions that the commands under test are told to run."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any


def double(number: int) -> int:
    return 2 * number


def pid(_operation: Any) -> int:
    time.sleep(0.01)  # so that every process gets some
    return os.getpid()


def shout(line: str) -> str:
    return line.upper()


def size(path: str) -> list[Any]:
    return [os.path.basename(path), os.path.getsize(path)]


def reciprocal(number: int) -> float:
    return 1 / number


def die_once(marker: str) -> str:
    """Kills its process when it is called first."""
    try:
        Path(marker).touch(exist_ok=False)
    except FileExistsError:
        return "alive"
    os.kill(os.getpid(), signal.SIGKILL)
    return "dead"


def until_removed(marker: str) -> str:
    """Says that it has begun, and returns when its file is gone."""
    Path(marker + ".begun").touch()
    deadline = time.monotonic() + 60
    while Path(marker).exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    return "done"


def slowly(number: int) -> int:
    """Notes each call in the file that the environment names."""
    with open(os.environ["OPSQUEUE_TEST_CALLS"], "a") as calls:
        calls.write(f"{number}\n")
    time.sleep(0.02)
    return -number


def exits(number: int) -> int:
    """Ends its process as far as it can."""
    sys.exit(number)


def interrupts(name: str) -> None:
    """Raises what ends loops elsewhere."""
    raise {"KeyboardInterrupt": KeyboardInterrupt, "CancelledError": asyncio.CancelledError}[name]


def leaves_a_child(path: str) -> int:
    """Is killed the first time, and a process that it started lives on."""
    if not os.path.exists(path):
        with open(path, "w") as file:
            child = os.fork()
            if child == 0:
                time.sleep(60)
                os._exit(0)
            file.write(str(child))
        os.kill(os.getpid(), signal.SIGKILL)
    return os.getpid()


def deaf(marker: str) -> int:
    """Hears no signal for half a minute, and says when that begins."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    Path(marker).touch()
    time.sleep(30)
    return 0


def exits_on_two(number: int) -> int:
    """Ends its process as far as it can, once."""
    if number == 2:
        sys.exit(3)
    return number


def dies_on_two(number: int) -> int:
    """Is killed, every time."""
    if number == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def unwritable_on_two(number: int) -> Any:
    """A result that no line can show."""
    return {1, 2} if number == 2 else number

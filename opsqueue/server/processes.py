"""Child processes and signals, as the supervisor needs them: fork, watch, tell, kill. Decides no restart."""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import gc
import os
import select
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, NoReturn, Self

from opsqueue.server.context import Control

#: What stops the server; children ignore them, because a terminal and a service manager send them to the whole group.
STOP_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

#: A child's exit code for an exception that it did not handle (sysexits.h: EX_SOFTWARE).
EXIT_UNHANDLED: Final = 70

_PR_SET_PDEATHSIG: Final = 1
_PR_SET_NAME: Final = 15

# Loaded once, before any fork: a child has nothing left to load.
_libc: Final = ctypes.CDLL(None, use_errno=True)


def set_process_name(name: str) -> None:
    """Name this process in `ps -e` and `top`; the kernel keeps the first 15 bytes."""
    _libc.prctl(_PR_SET_NAME, name.encode()[:15], 0, 0, 0)


def end_with_parent(parent: int) -> None:
    """In a child of the process `parent`: be killed when that ends."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it ended before it could take us along
        os._exit(EXIT_UNHANDLED)


class Signals:
    """Stop signals as bytes on a socket that can be polled. One at a time in a process."""

    def __init__(self) -> None:
        self._reading, self._writing = socket.socketpair()
        self._reading.setblocking(False)
        self._writing.setblocking(False)
        self._before: dict[int, signal._HANDLER] = {}

    def __enter__(self) -> Self:
        signal.set_wakeup_fd(self._writing.fileno(), warn_on_full_buffer=False)
        for number in STOP_SIGNALS:
            if number == signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN:
                continue  # nohup stays in force
            self._before[number] = signal.signal(number, lambda *_: None)
        return self

    def __exit__(self, *_: object) -> None:
        signal.set_wakeup_fd(-1)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self.close()

    def fileno(self) -> int:
        return self._reading.fileno()

    def take(self) -> list[signal.Signals]:
        """The stop signals that arrived since the last call."""
        try:
            received = self._reading.recv(64)
        except BlockingIOError:
            return []
        return [signal.Signals(number) for number in received if number in STOP_SIGNALS]

    def arrives_within(self, seconds: float) -> bool:
        """Wait for a signal, without taking it."""
        poll = select.poll()
        poll.register(self._reading, select.POLLIN)
        return bool(poll.poll(seconds * 1000))

    def close(self) -> None:
        self._reading.close()
        self._writing.close()


@dataclass
class Child:
    """One running child. Its pidfd is readable when it has ended; its channel when it has something to say."""

    name: str
    pid: int
    pidfd: int
    channel: socket.socket
    forked_at: float
    #: When it said that it serves, on the monotonic clock.
    serving_since: float | None = None
    #: Checks in a row that found its progress word too old.
    stale_checks: int = 0

    def tell(self, order: bytes) -> None:
        """Send an order; one that has ended meanwhile needs none."""
        with contextlib.suppress(OSError):
            self.channel.send(order, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)

    def reap(self) -> int:
        """Wait for its end and close what belongs to it; the exit code, negative for a signal, as subprocess has it."""
        _, status = os.waitpid(self.pid, 0)
        os.close(self.pidfd)
        self.channel.close()
        return os.waitstatus_to_exitcode(status)

    def forget(self) -> None:
        """In another child: close what the supervisor holds of this one."""
        os.close(self.pidfd)
        self.channel.close()


def describe_exit(code: int) -> str:
    """`exit code 1`, `SIGKILL`."""
    if code >= 0:
        return f"exit code {code}"
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"signal {-code}"


def fork_child(name: str, now: float, in_child: Callable[[Control], int]) -> Child:
    """Fork a child that runs `in_child` and exits with its result. Stop signals are ignored in it; it dies with us."""
    ours, theirs = socket.socketpair()
    supervisor = os.getpid()
    sys.stdout.flush()
    sys.stderr.flush()
    # Blocked, so that the child never runs our handlers, which write to our socket.
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        pid = os.fork()
        if pid == 0:
            _run_child(name, supervisor, ours, theirs, in_child)
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    theirs.close()
    ours.setblocking(False)
    return Child(name, pid, os.pidfd_open(pid), ours, now)


def _run_child(
    name: str, supervisor: int, ours: socket.socket, theirs: socket.socket, in_child: Callable[[Control], int]
) -> NoReturn:
    code = EXIT_UNHANDLED
    try:
        end_with_parent(supervisor)
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        signal.set_wakeup_fd(-1)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        set_process_name(name)
        ours.close()
        code = in_child(Control(theirs))
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else EXIT_UNHANDLED
    except BaseException:
        traceback.print_exc()
    finally:
        # Not sys.exit: the supervisor's own clean-up must not run a second time here.
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def prepare_to_fork() -> None:
    """Once, when everything is imported: the heap so far stays shared, and a crash in C says where it was."""
    threads = len(os.listdir("/proc/self/task"))
    if threads != 1:
        raise RuntimeError(f"the supervisor has {threads} threads; forking would leave locks that nobody releases")
    faulthandler.enable()
    gc.freeze()
    gc.enable()

"""Tells systemd how the server fares, if systemd asked to be told (sd_notify's protocol). Decides nothing."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Mapping


class Notifier:
    """Messages to the socket in NOTIFY_SOCKET; without one, it says nothing."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        path = environment.get("NOTIFY_SOCKET", "")
        # An address that starts with @ is in the abstract namespace, where it starts with a zero byte.
        self._address = "\0" + path[1:] if path.startswith("@") else path
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) if path else None
        #: Seconds between two signs of life; None: systemd wants none.
        self.watchdog_interval = _watchdog_interval(environment) if path else None

    def ready(self, port: int) -> None:
        self._send(f"READY=1\nSTATUS=Serving on port {port}")

    def stopping(self) -> None:
        self._send("STOPPING=1\nSTATUS=Stopping")

    def alive(self) -> None:
        self._send("WATCHDOG=1")

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()

    def _send(self, message: str) -> None:
        # A service manager that does not listen is no reason to stop serving.
        with contextlib.suppress(OSError):
            if self._socket is not None:
                self._socket.sendto(message.encode(), socket.MSG_DONTWAIT, self._address)


def _watchdog_interval(environment: Mapping[str, str]) -> float | None:
    """Half of the time that systemd waits for a sign of life, as its documentation advises."""
    microseconds = environment.get("WATCHDOG_USEC", "")
    if not microseconds.isdigit() or int(microseconds) == 0:
        return None
    if environment.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return None
    return int(microseconds) / 2e6

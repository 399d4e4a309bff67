"""A request whose answer is not read until a test wants it: for waits that park. Shares no code with the product."""

from __future__ import annotations

import http.client
import json
import socket
from dataclasses import dataclass
from typing import Any, Self

WITHIN_S = 20.0


@dataclass(frozen=True)
class WaitAnswer:
    """What came."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class ParkedWait:
    """GET `path` on a connection of its own, sent at once."""

    def __init__(self, port: int, path: str) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), WITHIN_S)
        self.socket.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.drop()

    def answer(self) -> WaitAnswer:
        """Wait for the answer."""
        response = http.client.HTTPResponse(self.socket)
        response.begin()
        body = response.read()
        return WaitAnswer(response.status, {name.lower(): text for name, text in response.getheaders()}, body)

    def drop(self) -> None:
        """The client goes away."""
        self.socket.close()

"""The answers that our endpoints give, as values, and how they go over the wire. Decides nothing.

An answer is a plain value because aiohttp's response object takes as long to make and to write as the rest of an insert
does in this process; only a connection that aiohttp reads gets one.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Final

from aiohttp import web
from aiohttp.helpers import rfc822_formatted_time
from aiohttp.http import SERVER_SOFTWARE

from opsqueue.server import requests
from opsqueue.server.frontend import errors
from opsqueue.server.frontend.errors import JSON, TEXT, HttpError

_STATUS_LINES: Final = {status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\n" for status in HTTPStatus}
#: What ends a head, by whether the connection ends too.
_END: Final = {False: "\r\n", True: "Connection: close\r\n\r\n"}


@dataclass(slots=True)
class Answer:
    """One answer, whole. `close`: the connection ends after it."""

    status: int = 200
    body: bytes = b""
    content_type: str | None = None
    headers: dict[str, str] = field(default_factory=dict)
    close: bool = False

    def to_aiohttp(self) -> web.Response:
        """The same for a connection that aiohttp reads."""
        headers = dict(self.headers)
        if self.content_type is not None:
            headers["Content-Type"] = self.content_type
        response = web.Response(status=self.status, body=self.body or None, headers=headers)
        if self.close:
            response.force_close()
        return response

    def rendered(self) -> bytes:
        """As it goes over the wire."""
        kind = "" if self.content_type is None else f"Content-Type: {self.content_type}\r\n"
        more = "".join([f"{name}: {value}\r\n" for name, value in self.headers.items()]) if self.headers else ""
        head = (
            f"{_STATUS_LINES[self.status]}{kind}Content-Length: {len(self.body)}\r\n{more}"
            f"Date: {rfc822_formatted_time()}\r\nServer: {SERVER_SOFTWARE}\r\n"
            f"{_END[self.close]}"
        )
        return head.encode("ascii", "replace") + self.body


def json_answer(body: bytes) -> Answer:
    """200 with JSON."""
    return Answer(200, body, JSON)


def text_answer(text: str) -> Answer:
    """200 with text."""
    return Answer(200, text.encode(), TEXT)


def bytes_answer(body: bytes) -> Answer:
    """200 with bytes as they are."""
    return Answer(200, body, "application/octet-stream")


def empty_answer() -> Answer:
    """200 without a body."""
    return Answer()


def error_answer(error: HttpError) -> Answer:
    """The answer that `error` stands for."""
    return Answer(error.status, error.body, error.content_type, dict(error.headers), error.close)


def refused(reply: requests.Reply) -> Exception:
    """What to raise for a reply of the writer's that is not the one that was asked for."""
    if isinstance(reply, requests.Unavailable):
        if reply.storage_full:
            return errors.storage_full(reply.reason, reply.retry_after_s)
        return errors.unavailable(reply.reason, reply.retry_after_s)
    return TypeError(f"the writer answered with {type(reply).__name__}, which this request has no use for")

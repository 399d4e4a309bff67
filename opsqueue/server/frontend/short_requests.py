"""Reads the requests that nearly all producers' requests are: whole in one segment, with nothing unusual about them.

Recognises such a request or says that it is none; it refuses nothing and answers nothing: what it does not recognise,
aiohttp reads, and says what is wrong with it. So it may be as strict as it likes.
"""

from __future__ import annotations

import asyncio
import functools
import re
from dataclasses import dataclass
from typing import Final

from aiohttp import HttpVersion11
from multidict import CIMultiDict, CIMultiDictProxy
from yarl import URL

#: Bytes of a request's head that are looked at here.
MAX_HEAD = 4096
#: Bytes of a body that are expected to come in the same segment.
MAX_BODY = 192 * 1024
#: Heads that are remembered: a producer sends the same one again and again.
_KNOWN_HEADS = 512

_HEAD = re.compile(
    rb"(GET|POST) (/[!-\"$-~]*) HTTP/1\.1\r\n((?:[-!#$%&'*+.^_`|~0-9A-Za-z]+:[ \t]*(?:[!-~][!-~ \t]*)?\r\n)*)"
)
#: A request with one of these asks for more than to be read and answered.
_UNUSUAL: Final = frozenset(
    {"transfer-encoding", "content-encoding", "upgrade", "expect", "trailer", "te", "http2-settings"}
)


@dataclass(frozen=True, slots=True)
class Head:
    """A request's first part. `length`: bytes of the body."""

    method: str
    target: str
    headers: CIMultiDictProxy[str]
    length: int


class ShortRequest:
    """What our handlers use of aiohttp's request, for one that has come whole."""

    __slots__ = ("_body", "_head", "protocol")
    version = HttpVersion11

    def __init__(self, head: Head, body: bytes, protocol: asyncio.Protocol) -> None:
        self._head = head
        self._body = body
        self.protocol = protocol

    @property
    def method(self) -> str:
        return self._head.method

    @property
    def raw_path(self) -> str:
        return self._head.target

    @property
    def rel_url(self) -> URL:
        path, _, query = self._head.target.partition("?")
        return URL.build(path=path, query_string=query, encoded=True)

    @property
    def headers(self) -> CIMultiDictProxy[str]:
        return self._head.headers

    @property
    def content_length(self) -> int:
        return self._head.length

    @property
    def transport(self) -> asyncio.Transport | None:
        """None once the connection has ended."""
        return self.protocol.transport  # type: ignore[attr-defined,no-any-return]

    @property
    def content(self) -> ShortRequest:
        """The body's reader, as far as a body needs one that is all there."""
        return self

    def is_eof(self) -> bool:
        return True

    def read_nowait(self) -> bytes:
        return self._body


def recognise(data: bytes) -> tuple[Head, bytes] | None:
    """The head and body when `data` is exactly one request of the usual kind; None when it is anything else."""
    end = data.find(b"\r\n\r\n", 0, MAX_HEAD)
    if end < 0:
        return None
    head = _read(data[: end + 2])
    if head is None or len(data) != end + 4 + head.length:
        return None
    return head, data[end + 4 :]


@functools.lru_cache(maxsize=_KNOWN_HEADS)
def _read(data: bytes) -> Head | None:
    matched = _HEAD.fullmatch(data)
    if matched is None:
        return None
    method, target, lines = matched.groups()
    headers: CIMultiDict[str] = CIMultiDict()
    for line in lines.decode("ascii").split("\r\n")[:-1]:
        name, _, value = line.partition(":")
        if name.lower() in _UNUSUAL:
            return None
        headers.add(name, value.strip(" \t"))
    lengths = headers.getall("Content-Length", [])
    if len(lengths) > 1 or len(headers.getall("Host", [])) != 1:
        return None
    if any(value.lower() != "keep-alive" for value in headers.getall("Connection", [])):
        return None
    length = 0
    if lengths:
        if not lengths[0].isdigit() or len(lengths[0]) > len(str(MAX_BODY)):
            return None
        length = int(lengths[0])
    if length and method == b"GET":
        return None
    return Head(method.decode(), target.decode(), CIMultiDictProxy(headers), length)

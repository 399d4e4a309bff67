"""Reads request bodies within limits of size and time. Knows JSON's two kinds of failure, no endpoint's types."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

from aiohttp import ClientConnectionError, HttpVersion11, StreamReader, web

from opsqueue.protocol.errors import BadJsonError, WrongShapeError
from opsqueue.server.frontend import errors

#: Seconds until a body must have come whole.
BODY_TIMEOUT_S = 60.0
#: Bytes of bodies that one front-end holds at a time; more are answered 503, unless it is a single one.
BODIES_IN_MEMORY = 256 * 1024 * 1024

T = TypeVar("T")


class ClientGoneError(ConnectionError):
    """The client went away in mid-request; there is nobody to answer."""


def _is_json(content_type: str) -> bool:
    kind = content_type.partition(";")[0].strip().lower()
    return kind == "application/json" or (kind.startswith("application/") and kind.endswith("+json"))


class BodyReader:
    """Bodies of one front-end's requests."""

    def __init__(
        self, max_body_size: int, *, timeout_s: float = BODY_TIMEOUT_S, in_memory: int = BODIES_IN_MEMORY
    ) -> None:
        self._max = max_body_size
        self._timeout_s = timeout_s
        self._in_memory = in_memory
        self._held = 0
        self._draining = False
        self._deadlines: set[asyncio.Timeout] = set()

    def drain(self) -> None:
        """Bodies that have not come whole by now are answered 503."""
        self._draining = True
        now = asyncio.get_running_loop().time()
        for deadline in self._deadlines:
            deadline.reschedule(now)

    async def read_json(
        self, request: web.BaseRequest, decode: Callable[[bytes], T], *, bad_json_is_wrong_shape: bool = False
    ) -> T:
        """The body through `decode`. Raises HttpError: 415, 413, 422, and 400 (or 422 too) for what is not JSON."""
        content_type = request.headers.get("Content-Type")
        if content_type is None or not _is_json(content_type):
            raise errors.not_json(content_type)
        body = await self.read(request)
        try:
            return decode(body)
        except BadJsonError as error:
            raise (errors.wrong_shape if bad_json_is_wrong_shape else errors.malformed)(str(error)) from None
        except WrongShapeError as error:
            raise errors.wrong_shape(str(error)) from None

    async def read(self, request: web.BaseRequest) -> bytes:
        """The whole body. Raises HttpError: 413 above the limit (early with Content-Length), 503 when late."""
        encoding = request.headers.get("Content-Encoding", "identity")
        if encoding.lower() != "identity":
            raise errors.encoded_body(encoding)
        length = request.content_length
        if length is not None and length > self._max:
            raise self._too_large(f"{length} bytes")
        expected = length if length is not None else self._max
        await _continue_if_expected(request)
        content = request.content
        if content.is_eof():
            whole = content.read_nowait()
            if len(whole) > self._max:
                raise self._too_large(f"{len(whole)} bytes")
            return whole
        # one may always: its own limit is --max-body-size
        if self._held and self._held + expected > self._in_memory:
            raise errors.unavailable("too many large requests at once; try again", close=True)
        self._held += expected
        try:
            return await self._collect(content)
        except TimeoutError:
            if self._draining:
                raise errors.unavailable("the server is stopping; try again", close=True) from None
            raise errors.unavailable(
                f"the request's body did not come within {self._timeout_s:g} s; try again", close=True
            ) from None
        except (web.RequestPayloadError, ClientConnectionError, ConnectionError) as error:
            raise ClientGoneError(str(error)) from error
        finally:
            self._held -= expected

    async def _collect(self, content: StreamReader) -> bytes:
        parts: list[bytes] = []
        size = 0
        async with asyncio.timeout(0 if self._draining else self._timeout_s) as deadline:
            self._deadlines.add(deadline)
            try:
                while part := await content.readany():
                    size += len(part)
                    if size > self._max:
                        raise self._too_large("larger than that")
                    parts.append(part)
            finally:
                self._deadlines.discard(deadline)
        return b"".join(parts)

    def _too_large(self, size: str) -> errors.HttpError:
        return errors.too_large(
            f"the body may have {self._max} bytes (--max-body-size), this one is {size}; "
            "send less, or upload chunks to the object store",
            close=True,
        )


async def _continue_if_expected(request: web.BaseRequest) -> None:
    expectation = request.headers.get("Expect")
    if expectation is None or request.version < HttpVersion11:
        return
    if expectation.lower() != "100-continue":
        raise errors.wrong_expectation(expectation)
    await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    # aiohttp refuses to answer a request whose output has begun; an interim answer does not count
    request.writer.output_size = 0

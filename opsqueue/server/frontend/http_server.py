"""The front-end's HTTP connections: who reads a connection's requests, in which order they are answered, when it ends.

A connection begins as one of ours, which reads requests of the usual kind (see `short_requests`) and answers them one
after the other. With the first segment that is anything else it becomes aiohttp's for good. Knows no endpoint.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Protocol, cast

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError
from aiohttp.web_protocol import RequestHandler

from opsqueue.server.frontend.answers import Answer
from opsqueue.server.frontend.short_requests import Head, ShortRequest, recognise
from opsqueue.server.logs import logger

log = logger("frontend")

#: Seconds that a connection may be idle, or take to send a request's head.
KEEPALIVE_S = 75.0
#: A connection that has a request under way when it would be idle otherwise is looked at again after so long (seconds).
LOOK_AGAIN_S = 1.0
#: Seconds that the rest of a request is read and thrown away after an early answer, so that the client can read it.
LINGERING_S = 5.0
#: Bytes of a request line, and of one header.
MAX_LINE = 16 * 1024
MAX_HEADER = 16 * 1024
#: Bytes that a client may send ahead while its request is being answered; then its connection is not read.
MAX_AHEAD = 64 * 1024

_Handler = Callable[[web.BaseRequest], Awaitable[Answer | web.StreamResponse]]


class HttpConnection(Protocol):
    """A request's `protocol`, ours or aiohttp's; without a transport once it has ended."""

    @property
    def transport(self) -> asyncio.Transport | None: ...


class _NoGarbage(logging.Filter):
    """aiohttp logs a traceback for every malformed request; what strangers send is no error of ours."""

    def filter(self, record: logging.LogRecord) -> bool:
        return not (record.exc_info and isinstance(record.exc_info[1], HttpProcessingError))


def _aiohttp_logger() -> logging.Logger:
    named = logging.getLogger("opsqueue.server.http")
    if not any(isinstance(known, _NoGarbage) for known in named.filters):
        named.addFilter(_NoGarbage())
    return named


class _AiohttpServer(web.Server):
    """aiohttp's connections, with a word to us when one has ended."""

    def __init__(self, handler: _Handler, ended: Callable[[HttpConnection], None]) -> None:
        async def handle(request: web.BaseRequest) -> web.StreamResponse:
            answer = await handler(request)
            return answer.to_aiohttp() if isinstance(answer, Answer) else answer

        super().__init__(
            handle,
            access_log=None,
            logger=_aiohttp_logger(),
            keepalive_timeout=KEEPALIVE_S,
            lingering_time=LINGERING_S,
            max_line_size=MAX_LINE,
            max_field_size=MAX_HEADER,
            auto_decompress=False,
        )
        self._ended = ended

    def connection_lost(self, handler: RequestHandler, exc: BaseException | None = None) -> None:
        super().connection_lost(handler, exc)
        self._ended(handler)


class HttpServer:
    """Makes the protocol of each connection. `handler` answers a request; `ended` is told of each connection's end."""

    def __init__(self, handler: _Handler, ended: Callable[[HttpConnection], None]) -> None:
        self.handler = handler
        self.ended = ended
        self.aiohttp = _AiohttpServer(handler, ended)
        self.own: set[_Connection] = set()

    def __call__(self) -> asyncio.Protocol:
        return _Connection(self)

    def pre_shutdown(self) -> None:
        """End the connections that are idle; the others end with their answer."""
        for connection in list(self.own):
            connection.finish()
        self.aiohttp.pre_shutdown()

    async def shutdown(self, timeout_s: float) -> None:
        """End every connection, after `timeout_s` at the latest."""
        await self.aiohttp.shutdown(timeout_s)
        for connection in list(self.own):
            connection.end()


class _Connection(asyncio.Protocol):
    """A connection that has sent nothing unusual so far."""

    def __init__(self, server: HttpServer) -> None:
        self._server = server
        self._loop = asyncio.get_running_loop()
        self.transport: asyncio.Transport | None = None
        self._answering: asyncio.Task[None] | None = None
        #: What came while a request was being answered, or while the client does not read.
        self._ahead = b""
        self._writable = True
        self._last_answer = False
        self._idle_since = 0.0
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self._server.own.add(self)
        self._idle_since = self._loop.time()
        self._timer = self._loop.call_later(KEEPALIVE_S, self._look)

    def connection_lost(self, exc: BaseException | None) -> None:
        self._leave()
        self.transport = None
        self._server.ended(self)

    def pause_writing(self) -> None:
        self._writable = False

    def resume_writing(self) -> None:
        self._writable = True
        self._go_on()

    def data_received(self, data: bytes) -> None:
        if self._answering is not None or not self._writable:
            self._ahead += data
            if len(self._ahead) > MAX_AHEAD and self.transport is not None:
                self.transport.pause_reading()
            return
        request = recognise(data)
        if request is None:
            self._hand_over(data)
        else:
            self._answering = self._loop.create_task(self._answer(*request))

    def finish(self) -> None:
        """End it now when it is idle, else with the answer that is under way."""
        if self._answering is None:
            self.end()
        else:
            self._last_answer = True

    def end(self) -> None:
        """End it; what has been written still goes out."""
        if self.transport is not None:
            self.transport.close()

    async def _answer(self, head: Head, body: bytes) -> None:
        request = cast(web.BaseRequest, ShortRequest(head, body, self))
        try:
            answer = await self._server.handler(request)
            if not isinstance(answer, Answer):
                raise TypeError(f"an endpoint answered an ordinary request with {type(answer).__name__}")
            if self.transport is not None and not self.transport.is_closing():
                answer.close |= self._last_answer
                self.transport.write(answer.rendered())
                if answer.close:
                    self.transport.close()
        except ConnectionError as error:
            log.debug("a client went away before its answer", reason=str(error))
            self.end()
        except Exception:
            log.exception("an answer was not given; its connection is ended", path=head.target)
            self.end()
        finally:
            self._answering = None
            self._idle_since = self._loop.time()
        self._go_on()

    def _go_on(self) -> None:
        """With what came meanwhile."""
        if self._answering is not None or not self._writable or not self._ahead or self.transport is None:
            return
        if self.transport.is_closing():
            return
        data, self._ahead = self._ahead, b""
        if len(data) > MAX_AHEAD:
            self.transport.resume_reading()
        self.data_received(data)

    def _hand_over(self, data: bytes) -> None:
        transport = self.transport
        if transport is None:
            return
        self._leave()
        self.transport = None
        handler = self._server.aiohttp()
        transport.set_protocol(handler)
        handler.connection_made(transport)
        handler.data_received(data)

    def _leave(self) -> None:
        self._server.own.discard(self)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _look(self) -> None:
        """End it when it has been idle for too long."""
        left = self._idle_since + KEEPALIVE_S - self._loop.time()
        if self._answering is None and left <= 0:
            self.end()
        else:
            self._timer = self._loop.call_later(max(left, LOOK_AGAIN_S), self._look)

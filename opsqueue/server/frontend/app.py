"""The HTTP application of one front-end: endpoints, dispatch, counting, and what becomes of an exception.

One handler under the connections of `http_server`, our own path table, no middleware.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable

from aiohttp import web

from opsqueue._speedups.board import Board
from opsqueue._speedups.counters import Counter
from opsqueue.server.frontend import errors
from opsqueue.server.frontend.answers import Answer, error_answer
from opsqueue.server.frontend.body import BodyReader, ClientGoneError
from opsqueue.server.frontend.routing import Endpoint, Router
from opsqueue.server.frontend.writer_client import WriterUnavailableError
from opsqueue.server.logs import logger
from opsqueue.server.reader import ReadError

log = logger("frontend")


class FrontendApp:
    """Dispatches requests to `endpoints`; `consumer` takes over what asks for /consumer."""

    def __init__(
        self,
        board: Board,
        slot: int,
        bodies: BodyReader,
        endpoints: Iterable[Endpoint],
        consumer: Callable[[web.BaseRequest], Awaitable[web.StreamResponse]],
    ) -> None:
        self._board = board
        self._slot = slot
        self._bodies = bodies
        self._consumer = consumer
        self._router = Router((*endpoints, Endpoint("GET", "/consumer", consumer)))
        self._in_flight = 0
        self._draining = False
        self._idle: asyncio.Event = asyncio.Event()
        self._idle.set()

    async def handle(self, request: web.BaseRequest) -> Answer | web.StreamResponse:
        """Answer one request; raises only ConnectionError, when there is nobody to answer."""
        self._board.add(self._slot, Counter.HTTP_REQUESTS, 1)
        try:
            endpoint, parameters = self._router.match(request.method, _raw_path(request))
        except errors.HttpError as error:
            return self._finish(error_answer(error))
        if endpoint.handler is self._consumer:  # lasts as long as the connection: not a request in flight
            return self._finish(await self._answer(request, endpoint, ()))
        self._in_flight += 1
        self._idle.clear()
        try:
            return self._finish(await self._answer(request, endpoint, parameters))
        finally:
            self._in_flight -= 1
            if self._in_flight == 0:
                self._idle.set()

    async def _answer(
        self, request: web.BaseRequest, endpoint: Endpoint, parameters: tuple[int | str, ...]
    ) -> Answer | web.StreamResponse:
        try:
            return await endpoint.handler(request, *parameters)
        except errors.HttpError as error:
            return error_answer(error)
        except WriterUnavailableError as error:
            return error_answer(errors.unavailable(error.reason, error.retry_after_s))
        except ReadError as error:
            log.error("the database cannot be read", path=endpoint.path, reason=str(error))
            return error_answer(errors.unavailable("the server cannot read its database now; try again"))
        except ClientGoneError:
            raise
        except Exception:
            log.exception("request failed", method=request.method, path=endpoint.path)
            return error_answer(errors.internal())

    def _finish(self, answer: Answer | web.StreamResponse) -> Answer | web.StreamResponse:
        if answer.status >= 400:
            server_side = answer.status >= 500
            self._board.add(self._slot, Counter.HTTP_ERRORS_5XX if server_side else Counter.HTTP_ERRORS_4XX, 1)
        if self._draining and isinstance(answer, Answer):
            answer.close = True
        return answer

    def begin_draining(self) -> None:
        """From now on every answer closes its connection, and bodies that have not come are not waited for."""
        self._draining = True
        self._bodies.drain()

    async def wait_until_idle(self, timeout_s: float) -> bool:
        """Wait until no request is being answered; False when that took longer."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True


def _raw_path(request: web.BaseRequest) -> str:
    target = request.raw_path
    if not target.startswith("/"):  # the absolute form, as proxies send it
        return request.rel_url.raw_path
    return target.partition("?")[0]

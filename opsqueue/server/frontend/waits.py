"""Producers' requests that wait for a submission: how long, how many, and what ends them early. Asks no status.

A wait costs a future, a timer of the loop's and an entry at the writer, no thread and nothing per chunk. It ends when
the writer says that what it waits for is so, when its time is over, when its client has gone, when the front-end
drains, and when the writer is replaced; all but the third are then answered with what is so at that moment.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from aiohttp import web
from aiohttp.web_protocol import RequestHandler

from opsqueue._speedups.board import Board
from opsqueue._speedups.counters import Counter
from opsqueue.server import requests
from opsqueue.server.frontend import errors
from opsqueue.server.frontend.body import ClientGoneError
from opsqueue.server.frontend.writer_client import WriterClient
from opsqueue.server.values import BadValueError, parse_duration

#: Says for how many milliseconds the server was ready to wait. A server that does not know waits does not send it.
WAIT_HEADER = "Opsqueue-Wait-Ms"


def single_query(request: web.BaseRequest, name: str) -> str | None:
    """The value of a query parameter. Raises HttpError when it is given twice."""
    if "?" not in request.raw_path:
        return None
    found = request.rel_url.query.getall(name, [])
    if len(found) > 1:
        raise errors.bad_query(name, found[1], "allowed a second time; give it once")
    return found[0] if found else None


@dataclass(slots=True)
class Wait:
    """What one request asked for: until when (the loop's clock), and how long that was to be at most."""

    asked: bool
    seconds: float
    until: float

    def mark(self, response: web.Response) -> web.Response:
        """Say in the answer that the wait was understood."""
        if self.asked:
            response.headers[WAIT_HEADER] = str(int(self.seconds * 1000))
        return response


class Waits:
    """The parked requests of this front-end, by their connection."""

    def __init__(self, writer: WriterClient, board: Board, slot: int, limit: int, longest_s: float) -> None:
        self._writer = writer
        self._board = board
        self._slot = slot
        self._limit = limit
        self._longest_s = longest_s
        self._parked: dict[RequestHandler, asyncio.Future[None]] = {}
        self._gone: set[RequestHandler] = set()
        self._draining = False

    def of(self, request: web.BaseRequest) -> Wait:
        """The wait that the request's query asks for. Raises HttpError 422 when it cannot be read."""
        text = single_query(request, "wait")
        if text is None:
            return Wait(False, 0.0, 0.0)
        try:
            seconds = min(parse_duration(text), self._longest_s)
        except BadValueError:
            raise errors.bad_query("wait", text, 'a duration such as "30s" or "500ms", from 0 on') from None
        return Wait(True, seconds, asyncio.get_running_loop().time() + seconds)

    async def park(self, request: web.BaseRequest, wait: Wait, watch: requests.Watch) -> bool:
        """Wait; False: there is no time left, or no reason to wait any longer, and the answer is what is so now.

        Raises HttpError 503 when too many wait, ClientGoneError when nobody waits for the answer any more.
        """
        loop = asyncio.get_running_loop()
        left = wait.until - loop.time()
        if left <= 0 or self._draining:
            return False
        if len(self._parked) >= self._limit:
            raise errors.too_many_waits(self._limit)
        connection = request.protocol
        leave: asyncio.Future[None] = loop.create_future()
        self._parked[connection] = leave
        self._board.put(self._slot, Counter.WAITS_PARKED, len(self._parked))
        try:
            if request.transport is None:
                raise ClientGoneError
            woken = await self._writer.watch(watch, left, leave)
        finally:
            del self._parked[connection]
            self._board.put(self._slot, Counter.WAITS_PARKED, len(self._parked))
        if connection in self._gone:
            self._gone.discard(connection)
            raise ClientGoneError
        return woken

    def connection_ended(self, connection: RequestHandler) -> None:
        """Its parked request, if there is one, has nobody to answer."""
        leave = self._parked.get(connection)
        if leave is not None and not leave.done():
            self._gone.add(connection)
            leave.set_result(None)

    def drain(self) -> None:
        """Answer all that wait with what is so now, and let nobody wait any more."""
        self._draining = True
        for leave in self._parked.values():
            if not leave.done():
                leave.set_result(None)

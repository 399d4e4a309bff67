"""Producers' requests that wait for a submission: how long, how many, and what ends them early. Asks no status.

A wait costs a future, a timer of the loop's and an entry at the writer, no thread and nothing per chunk. It ends when
the writer says that what it waits for is so, when its time is over, when its client has gone, when the front-end
drains, and when the writer is replaced; all but the third are then answered with what is so at that moment.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from aiohttp import web

from opsqueue._speedups.board import Board
from opsqueue._speedups.counters import Counter
from opsqueue.server import requests
from opsqueue.server.frontend import errors
from opsqueue.server.frontend.answers import Answer, error_answer
from opsqueue.server.frontend.http_server import HttpConnection
from opsqueue.server.frontend.writer_client import WriterClient
from opsqueue.server.values import BadValueError, parse_duration

#: Says for how many milliseconds the server was ready to wait. A server that does not know waits does not send it.
WAIT_HEADER = "Opsqueue-Wait-Ms"
#: So many parked requests are being answered at a time when the front-end drains; looked at this often (seconds).
DRAIN_AT_A_TIME = 64
DRAIN_PACE_S = 0.001


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

    def mark(self, answer: Answer) -> Answer:
        """Say in the answer that the wait was understood."""
        if self.asked:
            answer.headers[WAIT_HEADER] = str(int(self.seconds * 1000))
        return answer


class Waits:
    """The parked requests of this front-end, by their connection."""

    def __init__(self, writer: WriterClient, board: Board, slot: int, limit: int, longest_s: float) -> None:
        self._writer = writer
        self._board = board
        self._slot = slot
        self._limit = limit
        self._longest_s = longest_s
        self._parked: dict[HttpConnection, asyncio.Future[None]] = {}
        self._gone: set[HttpConnection] = set()
        self._leaving: set[HttpConnection] = set()
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

        Raises HttpError: 503 when too many wait, or when nobody waits for the answer any more.
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
                raise errors.client_gone()
            woken = await self._writer.watch(watch, left, leave)
        finally:
            del self._parked[connection]
            self._board.put(self._slot, Counter.WAITS_PARKED, len(self._parked))
            gone = connection in self._gone
            self._gone.discard(connection)
        if gone:
            raise errors.client_gone()
        return woken

    def connection_ended(self, connection: HttpConnection) -> None:
        """Its parked request, if there is one, has nobody to answer."""
        self._leaving.discard(connection)
        leave = self._parked.get(connection)
        if leave is not None and not leave.done():
            self._gone.add(connection)
            leave.set_result(None)

    async def drain(self, within_s: float) -> None:
        """Answer all that wait with what is so now, and let nobody wait any more.

        A few at a time, so that the first are answered while the last still wait: what is left after `within_s` seconds
        gets 503 straight into its socket, which is quick whatever their number. Nobody's connection just ends.
        """
        self._draining = True
        self._writer.stop_unwatching()
        loop = asyncio.get_running_loop()
        until = loop.time() + within_s
        waiting = list(self._parked.items())
        waiting.reverse()  # who came first is answered first
        while waiting and loop.time() < until:
            while waiting and len(self._leaving) < DRAIN_AT_A_TIME:
                connection, leave = waiting.pop()
                if not leave.done():
                    self._leaving.add(connection)  # an answer ends its connection from now on
                    leave.set_result(None)
            await asyncio.sleep(DRAIN_PACE_S)
        refusal = error_answer(errors.unavailable("the server is stopping; try again", close=True)).rendered()
        for connection, leave in waiting:
            if not leave.done() and connection.transport is not None:
                connection.transport.write(refusal)
                connection.transport.close()
                self.connection_ended(connection)

"""The endpoints that are neither a producer's nor a consumer's: ping, version, metrics."""

from __future__ import annotations

from collections.abc import Iterator

from aiohttp import web

from opsqueue._speedups.board import Board
from opsqueue.server import metrics, requests
from opsqueue.server.frontend.answers import Answer, text_answer
from opsqueue.server.frontend.routing import Endpoint
from opsqueue.server.frontend.writer_client import WriterClient, WriterUnavailableError

#: What a producer may rely on here beyond the reference, said with the version (docs/http_api.md).
PRODUCER_FEATURES = "idempotency-key, wait, done-blocks, key-lookup, list, retry"
#: Seconds that the writer has to answer a ping.
PING_TIMEOUT_S = 1.0


class PlainEndpoints:
    """Handlers of the plain endpoints."""

    def __init__(self, writer: WriterClient, board: Board, version: str) -> None:
        self._writer = writer
        self._board = board
        self._version = version

    def endpoints(self) -> Iterator[Endpoint]:
        yield Endpoint("GET", "/ping", self.ping)
        yield Endpoint("GET", "/version", self.version)
        yield Endpoint("GET", "/producer/version", self.producer_version)
        yield Endpoint("GET", "/metrics", self.metrics)

    async def ping(self, request: web.BaseRequest) -> Answer:
        """`pong` when the writer answers within a second and its last commit succeeded."""
        try:
            healthy = isinstance(await self._writer.ask(requests.Ping(), PING_TIMEOUT_S), requests.Done)
        except WriterUnavailableError:
            healthy = False
        if healthy:
            return text_answer("pong")
        unhealthy = text_answer("unhealthy")
        unhealthy.status = 503
        unhealthy.headers["Retry-After"] = "1"
        return unhealthy

    async def version(self, request: web.BaseRequest) -> Answer:
        """`v` and our version."""
        return text_answer(self._version)

    async def producer_version(self, request: web.BaseRequest) -> Answer:
        """The version, and in a header what the reference's server does not offer."""
        answer = text_answer(self._version)
        answer.headers["Opsqueue-Features"] = PRODUCER_FEATURES
        return answer

    async def metrics(self, request: web.BaseRequest) -> Answer:
        """Everything on the board, of all processes."""
        body = metrics.render(self._board, self._version)
        return Answer(200, body, metrics.CONTENT_TYPE)

"""Cold requests to the writer and their replies: request numbers, time-outs, the writer's restarts. Parses no HTTP."""

from __future__ import annotations

import asyncio
from typing import Protocol

from opsqueue.server import requests

#: Seconds that a request may take. A hung writer is replaced after five, so this ends only what is lost.
REQUEST_TIMEOUT_S = 10.0


class RequestPump(Protocol):
    """What is needed of a front-end's pump."""

    def send_request(self, request_id: int, payload: bytes) -> bool: ...

    def room(self) -> asyncio.Future[None]: ...


class WriterUnavailableError(Exception):
    """The writer did not answer: {reason}."""

    def __init__(self, reason: str, retry_after_s: int = 1) -> None:
        super().__init__(reason)
        self.reason = reason
        self.retry_after_s = retry_after_s


class WriterRestartedError(WriterUnavailableError):
    """The writer was replaced after the request was sent: whether it was carried out is not known."""

    def __init__(self) -> None:
        super().__init__("the server's writer process is being replaced; try again")


class WriterClient:
    """Asks the writer. `on_reply` and `on_writer_restart` are the pump's callbacks."""

    def __init__(self) -> None:
        self._pump: RequestPump | None = None
        self._next = 1
        self._pending: dict[int, asyncio.Future[requests.Reply]] = {}
        self._closed: str | None = None

    def attach(self, pump: RequestPump) -> None:
        """Send through `pump` from now on."""
        self._pump = pump

    @property
    def pending(self) -> int:
        """Requests that wait for their reply."""
        return len(self._pending)

    async def ask(self, request: requests.Request, timeout_s: float = REQUEST_TIMEOUT_S) -> requests.Reply:
        """The writer's reply. Raises WriterUnavailableError when there is none within `timeout_s`."""
        if self._closed is not None:
            raise WriterUnavailableError(self._closed)
        if self._pump is None:
            raise WriterUnavailableError("the server is starting; try again")
        number = self._next
        self._next += 1
        reply: asyncio.Future[requests.Reply] = asyncio.get_running_loop().create_future()
        self._pending[number] = reply
        try:
            async with asyncio.timeout(timeout_s):
                payload = requests.encode(request)
                while not self._pump.send_request(number, payload):
                    await self._room_or_failure(reply)
                return await reply
        except TimeoutError:
            raise WriterUnavailableError(
                f"the server's writer process did not answer within {timeout_s:g} s; try again"
            ) from None
        finally:
            del self._pending[number]

    async def _room_or_failure(self, reply: asyncio.Future[requests.Reply]) -> None:
        assert self._pump is not None
        room = self._pump.room()
        await asyncio.wait((room, reply), return_when=asyncio.FIRST_COMPLETED)
        if reply.done():
            reply.result()

    def on_reply(self, request_id: int, payload: bytes) -> None:
        """A reply has come; one that nobody waits for any more is dropped."""
        waiting = self._pending.get(request_id)
        if waiting is None or waiting.done():
            return
        try:
            waiting.set_result(requests.decode_reply(payload))
        except ValueError as error:  # msgspec's decoding errors: a writer of another version
            waiting.set_exception(error)

    def on_writer_restart(self) -> None:
        """Every pending request is answered: the writer that had it is gone."""
        self._fail_pending(WriterRestartedError)

    def close(self, reason: str) -> None:
        """Answer what is pending, and what still comes, with `reason`."""
        self._closed = reason
        self._fail_pending(lambda: WriterUnavailableError(reason))

    def _fail_pending(self, make: type[WriterRestartedError] | _MakeError) -> None:
        for waiting in list(self._pending.values()):
            if not waiting.done():
                waiting.set_exception(make())


class _MakeError(Protocol):
    def __call__(self) -> WriterUnavailableError: ...

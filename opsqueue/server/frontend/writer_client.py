"""Cold requests to the writer and their replies: request numbers, time-outs, the writer's restarts. Parses no HTTP."""

from __future__ import annotations

import asyncio
from typing import Protocol

from opsqueue.server import requests
from opsqueue.server.logs import logger

#: Seconds that a request may take. A hung writer is replaced after five, so this ends only what is lost.
REQUEST_TIMEOUT_S = 10.0
#: Seconds to wait for room in the ring, or for a writer that is being replaced (which takes less than one).
SEND_TIMEOUT_S = 2.0
_NO_ANSWER = "the server's writer process does not answer; try again"

log = logger("frontend")


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


def _give_up(reply: asyncio.Future[requests.Reply]) -> None:
    if not reply.done():
        reply.set_exception(WriterUnavailableError(_NO_ANSWER))


class WriterClient:
    """Asks the writer. `on_reply` and `on_writer_restart` are the pump's callbacks."""

    def __init__(self) -> None:
        self._pump: RequestPump | None = None
        self._next = 1
        self._pending: dict[int, asyncio.Future[requests.Reply]] = {}
        #: Those of the pending that are not in the ring yet.
        self._unsent: set[int] = set()
        self._closed: str | None = None
        self._unwatches = True
        self._unwatching: set[asyncio.Task[None]] = set()

    def attach(self, pump: RequestPump) -> None:
        """Send through `pump` from now on."""
        self._pump = pump

    @property
    def pending(self) -> int:
        """Requests that wait for their reply."""
        return len(self._pending)

    async def ask(self, request: requests.Request, timeout_s: float = REQUEST_TIMEOUT_S) -> requests.Reply:
        """The writer's reply. Raises WriterUnavailableError when there is none within `timeout_s`."""
        number, reply = self._begin()
        timer = asyncio.get_running_loop().call_later(timeout_s, _give_up, reply)
        try:
            await self._send(number, requests.encode(request), reply)
            return await reply
        except TimeoutError:  # no room in the ring
            raise WriterUnavailableError(_NO_ANSWER) from None
        finally:
            timer.cancel()
            del self._pending[number]

    async def watch(self, watch: requests.Watch, seconds: float, leave: asyncio.Future[None]) -> bool:
        """True when the writer says that it is so; False after `seconds`, when `leave` is done or with a new writer.

        What is so then is still to be asked. Raises WriterUnavailableError when the writer cannot be asked.
        """
        number, reply = self._begin()
        try:
            async with asyncio.timeout(REQUEST_TIMEOUT_S):
                await self._send(number, requests.encode(watch), reply)
            await asyncio.wait((reply, leave), timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
            if reply.done():
                reply.result()
            return reply.done()
        except WriterRestartedError:
            return False
        except TimeoutError:
            raise WriterUnavailableError(_NO_ANSWER) from None
        finally:
            del self._pending[number]
            if not reply.done():
                reply.cancel()
                self._unwatch(number)

    def stop_unwatching(self) -> None:
        """This front-end ends: its watches are void with it."""
        self._unwatches = False

    def _unwatch(self, watch: int) -> None:
        """Nobody waits for the answer; a ring without room is waited for."""
        if not self._unwatches or self._pump is None:
            return
        self._next += 1
        if not self._pump.send_request(self._next - 1, requests.encode(requests.Unwatch(watch))):
            task = asyncio.ensure_future(self._ask_unwatch(watch))
            self._unwatching.add(task)
            task.add_done_callback(self._unwatching.discard)

    async def _ask_unwatch(self, watch: int) -> None:
        try:
            await self.ask(requests.Unwatch(watch))
        except WriterUnavailableError as error:
            # A new writer knows of no watch; one that lives drops it with the submission's end.
            log.debug("a watch was not ended", watch=watch, reason=error.reason)

    def _begin(self) -> tuple[int, asyncio.Future[requests.Reply]]:
        if self._closed is not None:
            raise WriterUnavailableError(self._closed)
        number = self._next
        self._next += 1
        reply: asyncio.Future[requests.Reply] = asyncio.get_running_loop().create_future()
        self._pending[number] = reply
        return number, reply

    async def _send(self, number: int, payload: bytes, reply: asyncio.Future[requests.Reply]) -> None:
        if self._pump is None:
            raise WriterUnavailableError("the server is starting; try again")
        if not self._pump.send_request(number, payload):
            await self._send_when_possible(self._pump, number, payload, reply)

    async def _send_when_possible(
        self, pump: RequestPump, number: int, payload: bytes, reply: asyncio.Future[requests.Reply]
    ) -> None:
        self._unsent.add(number)
        try:
            async with asyncio.timeout(SEND_TIMEOUT_S):
                while not pump.send_request(number, payload):
                    room = pump.room()
                    if room.cancelled():
                        raise WriterUnavailableError("this process is cut off from the server's writer; try again")
                    await asyncio.wait((room, reply), return_when=asyncio.FIRST_COMPLETED)
                    if reply.done():  # closed: there will be no room
                        return
        finally:
            self._unsent.discard(number)

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
        """Every request that was sent is answered: the writer that had it is gone. Others wait for the new one."""
        for number, waiting in list(self._pending.items()):
            if number not in self._unsent and not waiting.done():
                waiting.set_exception(WriterRestartedError())

    def close(self, reason: str) -> None:
        """Answer what is pending, and what still comes, with `reason`."""
        self._unwatches = False
        self._closed = reason
        for waiting in list(self._pending.values()):
            if not waiting.done():
                waiting.set_exception(WriterUnavailableError(reason))

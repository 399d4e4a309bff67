"""Takes the steps of requests under asyncio. Decides nothing, starts no thread."""

from __future__ import annotations

import asyncio
from typing import TypeVar

import aiohttp

from opsqueue.client.exchange import RETRIED, Answer, Call, Failure, Outcome, Sleep, Try, unavailable
from opsqueue.client.urls import ServerAddress
from opsqueue.protocol.version import own_version

_USER_AGENT = f"opsqueue/{own_version().removeprefix('v')}"

T = TypeVar("T")


class AsyncHttpClient:
    """Connections to one server, of the event loop that uses it first."""

    def __init__(self, address: ServerAddress) -> None:
        self._address = address
        self._session: aiohttp.ClientSession | None = None

    async def run(self, call: Call[T]) -> T:
        """Takes all steps of a call and gives its result; raises what it raises."""
        outcome: Outcome = None
        while True:
            try:
                step = call.send(outcome)
            except StopIteration as end:
                return end.value  # type: ignore[no-any-return]  # StopIteration does not say of what type
            if isinstance(step, Sleep):
                await asyncio.sleep(step.seconds)
                outcome = None
            else:
                outcome = await self._try(step)

    async def close(self) -> None:
        """Closes the connections; the next request makes new ones."""
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    async def _try(self, step: Try) -> Answer | Failure:
        if self._session is None:
            # redirects are not followed, and no cookies are kept
            self._session = aiohttp.ClientSession(
                headers={"User-Agent": _USER_AGENT}, cookie_jar=aiohttp.DummyCookieJar(), auto_decompress=False
            )
        timeout = aiohttp.ClientTimeout(total=None, connect=None, sock_connect=step.connect_s, sock_read=step.read_s)
        try:
            async with self._session.request(
                step.method,
                self._address.http + step.path,
                data=step.body,
                headers=step.headers,
                timeout=timeout,
                allow_redirects=False,
            ) as response:
                body = await response.read()
        except aiohttp.ClientConnectorCertificateError as error:
            return Failure(f"the connection is not secure: {error}", arrived=False, cause=error, final=True)
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
            return Failure(f"{type(error).__name__}: {error}", arrived=False, cause=error)
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            return Failure(f"{type(error).__name__}: {error}", arrived=True, cause=error)
        answer = Answer(response.status, body, {name.lower(): text for name, text in response.headers.items()})
        if answer.status in RETRIED:
            return unavailable(answer.status, answer.text, answer.headers.get("retry-after"))
        return answer

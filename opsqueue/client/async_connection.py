"""A consumer's connection under asyncio. Never reconnects and touches no store."""

from __future__ import annotations

import asyncio
import logging
import ssl
from typing import cast

from opsqueue.client.session import ConnectError, ConnectionLostError, Session
from opsqueue.client.urls import ServerAddress
from opsqueue.exceptions import InternalConsumerClientError, UnexpectedOpsqueueConsumerServerResponseError

logger = logging.getLogger("opsqueue.consumer")

#: Seconds until the first frame, and for the server's close frame.
_OPEN_TIMEOUT_S = 10.0
_CLOSE_TIMEOUT_S = 0.5


class AsyncConnection(Session, asyncio.Protocol):
    """A connection that is open, or lost for good. To be used on its event loop's thread."""

    def __init__(self, address: ServerAddress) -> None:
        super().__init__(address)
        self._transport: asyncio.Transport | None = None
        self._ended = asyncio.Event()
        self._silence_s = _OPEN_TIMEOUT_S
        self._heard = 0.0
        self._watch: asyncio.TimerHandle | None = None
        #: Set while the transport takes more; a sender waits for it, so that what is not read does not fill memory.
        self.writable = asyncio.Event()
        self.writable.set()

    @classmethod
    async def connect(cls, address: ServerAddress) -> AsyncConnection:
        """An open connection. Raises ConnectError, and InternalConsumerClientError when trying again is of no use."""
        connection = cls(address)
        try:
            async with asyncio.timeout(_OPEN_TIMEOUT_S):
                await asyncio.get_running_loop().create_connection(
                    lambda: connection,
                    address.host,
                    address.port,
                    ssl=ssl.create_default_context() if address.secure else None,
                )
                await asyncio.wrap_future(connection.opened)
        except ssl.SSLCertVerificationError as error:
            raise InternalConsumerClientError(f"{address.consumer} is not trusted: {error}") from error
        except (OSError, TimeoutError, ConnectionLostError) as error:
            connection._abort()
            raise ConnectError(f"{type(error).__name__}: {error}") from error
        except BaseException:
            connection._abort()
            raise
        return connection

    async def close(self) -> None:
        """Closes with a close frame; waits for the server's a moment."""
        self._begin_close()
        self._write_if_open()
        if self._transport is not None:
            try:
                async with asyncio.timeout(_CLOSE_TIMEOUT_S):
                    await self._ended.wait()
            except TimeoutError:
                logger.debug("the server did not answer the close frame")
        self._abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's is one, but does not say so
        self._transport = cast("asyncio.Transport", transport)
        loop = asyncio.get_running_loop()
        self._heard = loop.time()
        self._watch = loop.call_later(self._silence_s, self._look)
        self._begin_handshake()
        self._write()

    def data_received(self, data: bytes) -> None:
        self._heard = asyncio.get_running_loop().time()
        self._receive(data)

    def eof_received(self) -> bool:
        self._receive(b"")
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        if self._watch is not None:
            self._watch.cancel()
        self._transport = None
        if self._error is None:
            self._lost(f"{type(exc).__name__}: {exc}" if exc is not None else "it was closed", exc)
        self.writable.set()
        self._ended.set()

    def pause_writing(self) -> None:
        self.writable.clear()

    def resume_writing(self) -> None:
        self.writable.set()

    def _receive(self, data: bytes) -> None:
        try:
            self._take(data)
        except (InternalConsumerClientError, UnexpectedOpsqueueConsumerServerResponseError, ConnectError) as error:
            self._fail(error)
        except Exception as error:
            if self.opened.done():
                self._lost(f"{type(error).__name__}: {error}", error)
            else:
                failed = ConnectError(f"{type(error).__name__}: {error}")
                failed.__cause__ = error
                self._fail(failed)

    def _write(self) -> None:
        while self._out:
            part = self._out.popleft()
            if self._transport is None:
                raise ConnectionLostError(str(self._error or "the connection has ended"))
            if part:
                self._transport.write(part)
            elif self._transport.can_write_eof():
                self._transport.write_eof()

    def _abort(self) -> None:
        if self._transport is not None:
            # not close(), which waits until everything is written: a peer that has gone reads nothing
            self._transport.abort()
        self.writable.set()

    def _limit_silence(self, seconds: float) -> None:
        self._silence_s = seconds

    def _look(self) -> None:
        """Whether the server has been silent for too long."""
        loop = asyncio.get_running_loop()
        left = self._heard + self._silence_s - loop.time()
        if left <= 0:
            self._lost(f"the server sent nothing for {self._silence_s:g} s")
            return
        self._watch = loop.call_later(left, self._look)

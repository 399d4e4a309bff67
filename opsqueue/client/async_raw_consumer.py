"""The consumer's client below serialization, under asyncio: one connection, made again when it is lost."""

from __future__ import annotations

import asyncio
import logging
import weakref
from collections.abc import Awaitable, Callable, Sequence

from opsqueue.client.async_connection import AsyncConnection
from opsqueue.client.async_loop import AsyncChunkLoop
from opsqueue.client.async_store import AsyncStore
from opsqueue.client.backoff import Backoff
from opsqueue.client.bytes_like import BytesLike
from opsqueue.client.raw_consumer import SHORT_LIVED_S, WARN_EVERY_S, checked_strategy
from opsqueue.client.session import ConnectError
from opsqueue.client.store import open_store
from opsqueue.client.urls import parse_address
from opsqueue.client.values import Chunk, Strategy

logger = logging.getLogger("opsqueue.consumer")


class AsyncRawConsumer:
    """Reserves chunks and reports what became of them, on one event loop."""

    def __init__(
        self, address: str, object_store_url: str, object_store_options: Sequence[tuple[str, str]] = []
    ) -> None:
        self._address = parse_address(address)
        self.store = AsyncStore(open_store(object_store_url, object_store_options))
        self._connecting = asyncio.Lock()
        self._current: AsyncConnection | None = None
        self._short_lived = Backoff()
        self._opened_at = -SHORT_LIVED_S
        self._loops: weakref.WeakSet[AsyncChunkLoop] = weakref.WeakSet()
        self._stopped = False

    async def connect(self) -> AsyncConnection:
        """The open connection, made now if need be: retried for ever. Raises InternalConsumerClientError."""
        async with self._connecting:
            connection = self._current
            if connection is not None and connection.alive:
                return connection
            now = asyncio.get_running_loop().time()
            if connection is not None and connection.lost and now - self._opened_at < SHORT_LIVED_S:
                await asyncio.sleep(self._short_lived.next())
            else:
                self._short_lived = Backoff()
            self._current = await self._connect()
            self._opened_at = asyncio.get_running_loop().time()
            return self._current

    async def _connect(self) -> AsyncConnection:
        backoff = Backoff()
        warned_at: float | None = None
        while True:
            try:
                connection = await AsyncConnection.connect(self._address)
            except ConnectError as error:
                now = asyncio.get_running_loop().time()
                if warned_at is None or now - warned_at >= WARN_EVERY_S:
                    warned_at = now
                    logger.warning(
                        "cannot connect to %s, trying again until it works: %s", self._address.consumer, error
                    )
                await asyncio.sleep(backoff.next())
            else:
                if warned_at is not None:
                    logger.info("connected to %s", self._address.consumer)
                return connection

    async def close(self) -> None:
        """Closes the connection properly; the next call makes another. What is held goes back to the server."""
        connection, self._current = self._current, None
        if connection is not None:
            await connection.close()

    async def run_per_chunk(
        self, strategy: Strategy, callback: Callable[[Chunk], Awaitable[BytesLike]], concurrency: int
    ) -> None:
        """Calls `callback` with chunks, `concurrency` at a time, until `stop`; see opsqueue.client.async_loop."""
        if not isinstance(concurrency, int) or concurrency < 1:
            raise TypeError(f"concurrency must be a number of chunks, 1 or more, not {concurrency!r}")
        loop = AsyncChunkLoop(self, checked_strategy(strategy), callback, concurrency)
        self._loops.add(loop)
        if not self._stopped:
            await loop.run()

    def stop(self) -> None:
        """Ends the loops, each after the chunks in hand, also those to come."""
        self._stopped = True
        for loop in list(self._loops):
            loop.stop()

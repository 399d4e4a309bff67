"""Uploads and downloads of a submission's chunks under asyncio: several at a time, bounded in memory."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable

from opsqueue.client.async_store import AsyncStore
from opsqueue.client.bytes_like import BytesLike, content_of
from opsqueue.client.download import ahead_limit
from opsqueue.client.store import input_path
from opsqueue.client.store_error import StoreError
from opsqueue.client.streaming import Finished
from opsqueue.client.upload import MAX_BYTES, MAX_CHUNKS
from opsqueue.exceptions import ChunksStorageError


async def upload(store: AsyncStore, prefix: str, chunks: AsyncIterable[BytesLike]) -> int:
    """Stores all chunks and gives their number. Raises ChunksStorageError; what `chunks` raises passes."""
    running: deque[tuple[int, asyncio.Task[None]]] = deque()
    waiting, count = 0, 0
    try:
        async for chunk in chunks:
            content = content_of(chunk, "a chunk")
            while running and (len(running) >= MAX_CHUNKS or waiting + len(content) > MAX_BYTES):
                size, oldest = running.popleft()
                await oldest
                waiting -= size
            running.append((len(content), asyncio.create_task(store.put(input_path(prefix, count), content))))
            waiting += len(content)
            count += 1
        while running:
            _, oldest = running.popleft()
            await oldest
    except StoreError as error:
        raise ChunksStorageError(f"the chunks of the submission could not be stored: {error}") from error
    finally:
        for _, task in running:
            task.cancel()
        await asyncio.gather(*(task for _, task in running), return_exceptions=True)
    return count


async def download(fetch: Callable[[int], Awaitable[bytes]], total: int) -> AsyncIterator[bytes]:
    """The chunks 0 to `total` - 1 in order, fetched ahead. Raises what `fetch` raises, at that chunk."""
    running: deque[asyncio.Future[bytes]] = deque()
    largest, started = 0, 0
    try:
        while True:
            while started < total and len(running) < ahead_limit(largest):
                running.append(asyncio.ensure_future(fetch(started)))
                started += 1
            if not running:
                return
            content = await running.popleft()
            largest = max(largest, len(content), 1)
            yield content
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)


async def stream(
    finished: Finished,
    refresh: Callable[[], Awaitable[bool]],
    fetch: Callable[[int], Awaitable[bytes]],
    ended: Callable[[], bool],
) -> AsyncIterator[tuple[int, bytes]]:
    """As `opsqueue.client.streaming.stream`, under asyncio."""
    running: deque[tuple[int, asyncio.Future[bytes]]] = deque()
    largest = 0
    try:
        while True:
            while len(running) < ahead_limit(largest) and (chunk := finished.take()) is not None:
                running.append((chunk, asyncio.ensure_future(fetch(chunk))))
            if running:
                index, coming = running.popleft()
                content = await coming
                largest = max(largest, len(content), 1)
                yield index, content
                del content  # before the next ones come
            elif ended():
                return
            else:
                await refresh()
                finished.refreshed()
    finally:
        for _, coming in running:
            coming.cancel()

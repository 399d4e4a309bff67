"""The results of a completed submission, chunk by chunk in order, fetched ahead. Knows no serialization."""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Future
from functools import partial
from typing import TypeAlias

from opsqueue.exceptions import ChunkRetrievalError

#: Starts a fetch, on some thread.
Start: TypeAlias = Callable[[Callable[[], bytes]], Future[bytes]]

#: Chunks that are fetched ahead at most.
MAX_AHEAD = 32
#: Bytes that chunks fetched ahead may take, judged by the largest so far; one chunk may always.
MAX_BYTES = 64 * 1024 * 1024
#: Fetched at first, when no chunk's size is known.
FIRST_AHEAD = 4


def ahead_limit(largest: int) -> int:
    """Chunks that may be fetched ahead when the largest so far had so many bytes; 0: none has come."""
    return FIRST_AHEAD if not largest else max(1, min(MAX_AHEAD, MAX_BYTES // largest))


class _Ahead:
    """Fetches of chunks, 0 to `chunks` - 1 or those that it lists, started a few ahead of the one that is taken."""

    def __init__(self, fetch: Callable[[int], bytes], chunks: int | Iterator[int], start: Start) -> None:
        self._fetch = fetch
        self._chunks = iter(range(chunks)) if isinstance(chunks, int) else chunks
        self._start = start
        self._largest = 0
        self._running: deque[Future[bytes]] = deque()

    def start(self) -> Future[bytes] | None:
        """The fetch of the next chunk; None at the end."""
        limit = ahead_limit(self._largest)
        while len(self._running) < limit and (index := next(self._chunks, None)) is not None:
            self._running.append(self._start(partial(self._fetch, index)))
        return self._running[0] if self._running else None

    def taken(self, content: bytes) -> bytes:
        """Call with the result of the fetch that `start` gave."""
        self._running.popleft()
        self._largest = max(self._largest, len(content), 1)
        return content

    def stop(self) -> None:
        """Nothing more is wanted."""
        for future in self._running:
            future.cancel()
        self._running.clear()
        self._chunks = iter(())


class PyChunksIter(Iterator[bytes]):
    """A completed submission's results in order. Raises ChunkRetrievalError at a missing one, and then ends."""

    def __init__(self, fetch: Callable[[int], bytes], chunks: int | Iterator[int], start: Start) -> None:
        self._ahead = _Ahead(fetch, chunks, start)

    def __iter__(self) -> PyChunksIter:
        return self

    def __next__(self) -> bytes:
        future = self._ahead.start()
        if future is None:
            raise StopIteration
        try:
            return self._ahead.taken(future.result())
        except ChunkRetrievalError:
            self._ahead.stop()
            raise


class PyChunksAsyncIter(AsyncIterator[bytes]):
    """As PyChunksIter, for `async for`."""

    def __init__(self, fetch: Callable[[int], bytes], chunks: int | Iterator[int], start: Start) -> None:
        self._ahead = _Ahead(fetch, chunks, start)

    def __aiter__(self) -> PyChunksAsyncIter:
        return self

    async def __anext__(self) -> bytes:
        import asyncio  # most programs do without

        future = self._ahead.start()
        if future is None:
            raise StopAsyncIteration
        try:
            # shielded: a cancelled wait must not cancel the fetch, which the next call would find
            return self._ahead.taken(await asyncio.shield(asyncio.wrap_future(future)))
        except ChunkRetrievalError:
            self._ahead.stop()
            raise

"""Stores a submission's chunks: several at a time, bounded in memory. Inserts nothing into the queue.

The chunks are made on the calling thread, stored on the pool's.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future

from opsqueue.client.bytes_like import BytesLike, content_of
from opsqueue.client.pool import Pool
from opsqueue.client.store import Store, input_path
from opsqueue.client.store_error import StoreError
from opsqueue.exceptions import ChunksStorageError

#: Bytes and chunks that wait to be stored; one chunk may always.
MAX_BYTES = 64 * 1024 * 1024
MAX_CHUNKS = 32


class Upload:
    """The upload of one submission under `prefix`."""

    def __init__(self, store: Store, pool: Pool, prefix: str) -> None:
        self._store = store
        self._pool = pool
        self._prefix = prefix
        self._running: deque[tuple[int, Future[None]]] = deque()
        self._bytes = 0
        self._count = 0

    def run(self, chunks: Iterable[BytesLike]) -> int:
        """Stores all chunks and gives their number. Raises ChunksStorageError; what `chunks` raises passes."""
        try:
            for wanted in self._steps(chunks):
                if wanted is not None:
                    wanted.result()
        except StoreError as error:
            raise self._failed(error) from error
        finally:
            self._cancel()
        return self._count

    async def run_async(self, chunks: Iterable[BytesLike]) -> int:
        """As `run`, without blocking the event loop while chunks are stored."""
        import asyncio  # most programs do without

        try:
            for wanted in self._steps(chunks):
                if wanted is not None:
                    await asyncio.wrap_future(wanted)
                # a fast store would otherwise keep the loop to this task alone
                await asyncio.sleep(0)
        except StoreError as error:
            raise self._failed(error) from error
        finally:
            self._cancel()
        return self._count

    def _steps(self, chunks: Iterable[BytesLike]) -> Iterator[Future[None] | None]:
        """Starts uploads; yields each that has to end before the next may start, and at the end all others.

        Yields None after each chunk that was stored at once.
        """
        for chunk in chunks:
            content = content_of(chunk, "a chunk")
            while self._running and self._running[0][1].done():
                yield from self._oldest()
            while self._running and (len(self._running) >= MAX_CHUNKS or self._bytes + len(content) > MAX_BYTES):
                yield from self._oldest()
            if self._store.is_quick(len(content)):
                self._store.put(self._next_path(), content)
                yield None
            else:
                self._start(content)
        while self._running:
            yield from self._oldest()

    def _oldest(self) -> Iterator[Future[None]]:
        size, future = self._running[0]
        yield future
        self._running.popleft()
        self._bytes -= size

    def _start(self, content: bytes) -> None:
        path = self._next_path()
        self._running.append((len(content), self._pool.submit(lambda: self._store.put(path, content))))
        self._bytes += len(content)

    def _next_path(self) -> str:
        path = input_path(self._prefix, self._count)
        self._count += 1
        return path

    def _cancel(self) -> None:
        for _, future in self._running:
            future.cancel()

    def _failed(self, error: StoreError) -> ChunksStorageError:
        return ChunksStorageError(f"the chunks of the submission could not be stored: {error}")

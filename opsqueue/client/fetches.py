"""The inputs of the chunks that a loop has reserved ahead: fetched in order, as many as there is room for."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Final

from opsqueue.protocol import consumer as wire

#: Bytes of inputs that wait to be worked on. Those that are on their way, whose sizes nobody knows, come on top.
MAX_BYTES: Final = 64 * 1024 * 1024


class Fetches:
    """Starts fetching while less than `MAX_BYTES` wait and less than `limit` are on their way."""

    def __init__(self, start: Callable[[wire.Chunk, wire.Submission], Future[bytes]], limit: int) -> None:
        self._start = start
        self._limit = limit
        self._lock = threading.Lock()
        self._queue: dict[Future[bytes], tuple[wire.Chunk, wire.Submission]] = {}
        #: Bytes of each input that waits to be worked on.
        self._sizes: dict[Future[bytes], int] = {}
        self._bytes = 0
        #: Whether its bytes will wait, of each input that is on its way.
        self._running: dict[Future[bytes], bool] = {}
        self._needed: Future[bytes] | None = None

    def fetch(self, chunk: wire.Chunk, submission: wire.Submission) -> Future[bytes]:
        """A chunk's input, to be fetched in its turn."""
        content: Future[bytes] = Future()
        with self._lock:
            self._queue[content] = (chunk, submission)
        self._start_next()
        return content

    def take(self, content: Future[bytes]) -> None:
        """It is worked on now: fetched at once, if it was not, and others in the room that it leaves."""
        with self._lock:
            self._needed = content if content in self._queue else None
            self._leave(content)
        self._start_next()

    def forget(self, content: Future[bytes]) -> None:
        """Nobody will work on it here."""
        with self._lock:
            if self._needed is content:
                self._needed = None
            self._queue.pop(content, None)
            self._leave(content)
        self._start_next()

    def _leave(self, content: Future[bytes]) -> None:
        """Under the lock: it no longer waits."""
        self._bytes -= self._sizes.pop(content, 0)
        if content in self._running:
            self._running[content] = False

    def _next(self) -> tuple[Future[bytes], wire.Chunk, wire.Submission] | None:
        with self._lock:
            if not self._queue or len(self._running) >= self._limit:
                return None
            content = self._needed
            if content is None:
                if self._bytes >= MAX_BYTES:
                    return None
                content = next(iter(self._queue))
            chunk, submission = self._queue.pop(content)
            self._running[content] = content is not self._needed
            self._needed = None
        return content, chunk, submission

    def _start_next(self) -> None:
        while (found := self._next()) is not None:
            content, chunk, submission = found
            started = self._start(chunk, submission)
            if started.done():
                self._end(content, started)
            else:
                started.add_done_callback(lambda done, content=content: self._ended(content, done))  # type: ignore[misc]

    def _ended(self, content: Future[bytes], done: Future[bytes]) -> None:
        self._end(content, done)
        self._start_next()

    def _end(self, content: Future[bytes], done: Future[bytes]) -> None:
        error = done.exception()
        with self._lock:
            if self._running.pop(content) and error is None:
                self._sizes[content] = len(done.result())
                self._bytes += self._sizes[content]
        if error is None:
            content.set_result(done.result())
        else:
            content.set_exception(error)

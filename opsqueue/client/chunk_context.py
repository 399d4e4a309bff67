"""What a callback can learn and say about the chunk that it works on. No I/O."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from datetime import timedelta

from opsqueue.client.values import Chunk

#: Milliseconds that a chunk may be put off at most, a week.
_LONGEST_DELAY_MS = 7 * 24 * 3600 * 1000


class RetryLater(Exception):
    """Raise it from a callback: the chunk is handed out again after `delay`, seconds or a timedelta; no retry counts.

    Where the server does not offer that, the chunk fails like with any other exception.
    """

    def __init__(self, delay: float | timedelta = 0.0) -> None:
        seconds = delay.total_seconds() if isinstance(delay, timedelta) else delay
        if isinstance(seconds, bool) or not isinstance(seconds, int | float):
            raise TypeError(f"delay must be seconds or a timedelta, not {delay!r}")
        if not 0 <= seconds * 1000 <= _LONGEST_DELAY_MS:
            raise ValueError(f"delay must be between 0 and a week, it is {delay!r}")
        super().__init__(delay)
        self.delay_ms: int = round(seconds * 1000)

    def __str__(self) -> str:
        return f"to be tried again in {self.delay_ms / 1000:g} s"


class FailSubmission(Exception):
    """Raise it from a callback: the whole submission fails with `reason`, whatever retries are left.

    Where the server does not offer that, the chunk fails like with any other exception.
    """

    def __init__(self, reason: str) -> None:
        if not isinstance(reason, str):
            raise TypeError(f"reason must be a str, not {reason!r}")
        super().__init__(reason)
        self.reason = reason


class ChunkContext:
    """The chunk that a callback works on. May be passed to other threads."""

    __slots__ = ("_dropped", "chunk", "told")

    def __init__(self, chunk: Chunk, dropped: Callable[[], str | None]) -> None:
        self.chunk: Chunk = chunk
        self._dropped = dropped
        #: The callback has learnt that its result is not wanted: what it returns then may be no result at all.
        self.told: bool = False

    @property
    def reason(self) -> str | None:
        """Why the result is no longer wanted: "cancelled", "failed", "completed" or "expired"; None while it is."""
        reason = self._dropped()
        self.told = self.told or reason is not None
        return reason

    @property
    def cancelled(self) -> bool:
        """The result is no longer wanted: the submission has ended, or another consumer has the chunk now.

        Always False with a server that does not tell, such as the reference implementation.
        """
        return self.reason is not None


_current: ContextVar[ChunkContext] = ContextVar("opsqueue_chunk_context")


def chunk_context() -> ChunkContext:
    """The chunk that the calling callback works on. Raises LookupError outside one."""
    context = _current.get(None)
    if context is None:
        raise LookupError("chunk_context() was called outside a callback of a consumer's loop, or on another thread")
    return context


class Entered:
    """`with Entered(context):` makes it the one that `chunk_context` gives."""

    __slots__ = ("_context", "_token")

    def __init__(self, context: ChunkContext) -> None:
        self._context = context

    def __enter__(self) -> ChunkContext:
        self._token = _current.set(self._context)
        return self._context

    def __exit__(self, *_: object) -> None:
        _current.reset(self._token)

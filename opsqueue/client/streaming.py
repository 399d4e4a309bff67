"""The results of a submission while it is still running, chunk by chunk. Knows no serialization."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Final

from opsqueue.client.done_chunks import DoneView
from opsqueue.client.download import ahead_limit

#: Seconds that one question for news waits.
WAIT_S: Final = 30.0


class Finished:
    """Which chunks to fetch next: as they turn out to be done, or in order as soon as all before are."""

    def __init__(self, view: DoneView, *, ordered: bool) -> None:
        self._view = view
        self._ordered = ordered
        self._next = 0
        self._ready: deque[int] = deque()
        view.follow()

    def take(self) -> int | None:
        """The next chunk that is done; None when there is none yet."""
        if self._ordered:
            if not self._view.is_done(self._next):
                return None
            self._next += 1
            return self._next - 1
        return self._ready.popleft() if self._ready else None

    def refreshed(self) -> None:
        """The view has changed."""
        if not self._ordered:
            self._ready.extend(self._view.news())


def stream(
    finished: Finished,
    refresh: Callable[[], bool],
    start: Callable[[int], Future[bytes]],
    ended: Callable[[], bool],
) -> Iterator[tuple[int, bytes]]:
    """Each chunk's index and result, fetched a few ahead. `refresh` waits for news; `ended`: there will be none."""
    running: deque[tuple[int, Future[bytes]]] = deque()
    largest = 0
    try:
        while True:
            while len(running) < ahead_limit(largest) and (chunk := finished.take()) is not None:
                running.append((chunk, start(chunk)))
            if running:
                index, coming = running.popleft()
                content = coming.result()
                largest = max(largest, len(content), 1)
                yield index, content
                del content  # before the next ones come
            elif ended():
                return
            else:
                refresh()
                finished.refreshed()
    finally:
        for _, coming in running:
            coming.cancel()

"""The front-end's read side of the file: one reader for the loop's point reads, one on a thread for everything longer.

Opened when the file is first needed, after the fork. Writes nothing and asks the writer nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from opsqueue.server.reader import Reader

T = TypeVar("T")


class Lookups:
    """Reads by primary key on the loop (`point`), other reads in turn on one thread (`on_thread`)."""

    def __init__(self, open_reader: Callable[[], Reader]) -> None:
        self._open = open_reader
        self._point: Reader | None = None
        self._long: Reader | None = None
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="opsqueue-lookups")

    @property
    def point(self) -> Reader:
        """For reads of one row by its primary key, on the loop's thread."""
        if self._point is None:
            self._point = self._open()
        return self._point

    async def on_thread(self, read: Callable[[Reader], T]) -> T:
        """The result of `read`, run on the thread with the thread's reader."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._run, read)

    def _run(self, read: Callable[[Reader], T]) -> T:
        if self._long is None:
            self._long = self._open()
        return read(self._long)

    def close(self) -> None:
        """Close the loop's reader and let the thread end after what it is doing."""
        if self._point is not None:
            self._point.close()
            self._point = None
        self._thread.submit(self._close_long)
        self._thread.shutdown(wait=False)

    def _close_long(self) -> None:
        if self._long is not None:
            self._long.close()
            self._long = None

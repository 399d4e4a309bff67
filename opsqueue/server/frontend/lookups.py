"""The front-end's read side of the file: one reader for the loop's point reads, one on a thread for everything longer.

Made after the fork. Writes nothing and asks the writer nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from opsqueue.server.reader import Reader

T = TypeVar("T")


class Lookups:
    """`point` reads rows by their primary key, on the loop; `on_thread` runs other reads one after the other."""

    def __init__(self, database_path: str) -> None:
        #: For the loop's thread only.
        self.point = Reader(database_path)
        self._long = Reader(database_path, cache_bytes=0)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="opsqueue-lookups")

    async def on_thread(self, read: Callable[[Reader], T]) -> T:
        """The result of `read`, run on the thread with the thread's reader. Raises what it raises."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, read, self._long)

    def close(self) -> None:
        """Close the loop's reader at once and the thread's when it has done what it is doing; waits for nothing."""
        self.point.close()
        self._thread.submit(self._long.close)
        self._thread.shutdown(wait=False)

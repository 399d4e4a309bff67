"""Threads for store and network calls, so that the calling thread stays open to signals. Knows no chunks."""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Generic, TypeVar

T = TypeVar("T")


class _Task(Generic[T]):
    __slots__ = ("call", "future")

    def __init__(self, call: Callable[[], T]) -> None:
        self.call = call
        self.future: Future[T] = Future()

    def run(self) -> None:
        if not self.future.set_running_or_notify_cancel():
            return
        try:
            result = self.call()
        except BaseException as error:
            self.future.set_exception(error)
        else:
            self.future.set_result(result)


class Pool:
    """At most `size` daemon threads, started as they are needed, and started anew in a forked child.

    Daemon threads: an upload that hangs must not keep the interpreter from ending, as those of a ThreadPoolExecutor do.
    """

    def __init__(self, size: int, name: str) -> None:
        self._size = size
        self._name = name
        self._start_over()

    def _start_over(self) -> None:
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._tasks: queue.SimpleQueue[_Task[object] | None] = queue.SimpleQueue()
        self._threads = 0
        self._waiting = 0

    def submit(self, call: Callable[[], T]) -> Future[T]:
        """Runs `call` on a thread; the future gives what it returns or raises."""
        if self._pid != os.getpid():
            self._start_over()
        task: _Task[T] = _Task(call)
        with self._lock:
            start = self._waiting == 0 and self._threads < self._size
            if start:
                self._threads += 1
                number = self._threads
            elif self._waiting:
                self._waiting -= 1
            self._tasks.put(task)  # type: ignore[arg-type]  # the queue holds tasks of any result
        if start:
            threading.Thread(target=self._work, name=f"{self._name}-{number}", daemon=True).start()
        return task.future

    def _work(self) -> None:
        tasks = self._tasks
        while True:
            task = tasks.get()
            if task is None:
                return
            task.run()
            # a waiting thread holds neither its last task nor the client that the task refers to
            del task
            with self._lock:
                self._waiting += 1

    def close(self) -> None:
        """Lets the threads end once they have done what was submitted."""
        if self._pid != os.getpid():
            return
        with self._lock:
            for _ in range(self._threads):
                self._tasks.put(None)

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


def ready(call: Callable[[], T]) -> Future[T]:
    """What `call` gives or raises, which was called on this thread."""
    task = _Task(call)
    task.run()
    return task.future


class _Shared:
    """What threads share with their pool: they refer to this, never to the pool, which can so be forgotten."""

    __slots__ = ("lock", "tasks", "threads", "waiting")

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.tasks: queue.SimpleQueue[_Task[object] | None] = queue.SimpleQueue()
        self.threads = 0
        self.waiting = 0

    def work(self) -> None:
        """What each thread does."""
        while True:
            task = self.tasks.get()
            if task is None:
                return
            task.run()
            # a waiting thread holds neither its last task nor the client that the task refers to
            del task
            with self.lock:
                self.waiting += 1


class Pool:
    """At most `size` daemon threads, started as they are needed, and started anew in a forked child.

    They end when the pool is forgotten: by its client, and by each iterator that the client has given away.
    Daemon threads: an upload that hangs must not keep the interpreter from ending, as those of a ThreadPoolExecutor do.
    """

    def __init__(self, size: int, name: str) -> None:
        self._size = size
        self._name = name
        self._pid = os.getpid()
        self._shared = _Shared()

    def __del__(self) -> None:
        # without the lock, which this thread may hold where the collector runs; no thread is started any more
        if self._pid == os.getpid():
            for _ in range(self._shared.threads):
                self._shared.tasks.put(None)

    def submit(self, call: Callable[[], T]) -> Future[T]:
        """Runs `call` on a thread; the future gives what it returns or raises."""
        if self._pid != os.getpid():
            self._pid = os.getpid()
            self._shared = _Shared()
        shared = self._shared
        task: _Task[T] = _Task(call)
        with shared.lock:
            start = shared.waiting == 0 and shared.threads < self._size
            if start:
                shared.threads += 1
                number = shared.threads
            elif shared.waiting:
                shared.waiting -= 1
            shared.tasks.put(task)  # type: ignore[arg-type]  # the queue holds tasks of any result
        if start:
            threading.Thread(target=shared.work, name=f"{self._name}-{number}", daemon=True).start()
        return task.future

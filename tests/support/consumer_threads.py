"""Consumers on threads of the test's own process, for tests that look at what a callback does while it does it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from opsqueue.consumer import ConsumerClient
from tests.support.server import Server


@contextmanager
def consuming(
    server: Server, store_url: str, run: Callable[[ConsumerClient], None], count: int = 1
) -> Iterator[list[ConsumerClient]]:
    """`count` clients, each running `run` on a thread until the block ends; what a thread raised is raised then."""
    clients = [ConsumerClient(f"127.0.0.1:{server.port}", store_url) for _ in range(count)]
    raised: list[BaseException] = []

    def guarded(client: ConsumerClient) -> None:
        try:
            run(client)
        except BaseException as error:
            raised.append(error)

    threads = [threading.Thread(target=guarded, args=(client,), daemon=True) for client in clients]
    for thread in threads:
        thread.start()
    try:
        yield clients
    finally:
        for client in clients:
            client.stop()
        for thread in threads:
            thread.join(20)
    assert not any(thread.is_alive() for thread in threads), "a loop did not stop"
    for error in raised:
        raise error


def of_each_op(callback: Callable[[Any], Any], **arguments: Any) -> Callable[[ConsumerClient], None]:
    """A `run` for `consuming`."""
    return lambda client: client.run_each_op(callback, **arguments)

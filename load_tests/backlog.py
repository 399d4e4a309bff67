"""Fills a server with submissions, as many at a time as it takes. Measures nothing."""

from __future__ import annotations

import contextlib
import json
import socket
import uuid
from collections.abc import Callable, Iterator

from load_tests import peers
from load_tests.generator import Inserters
from load_tests.server_process import ServerProcess
from load_tests.strategies import SELECTED, metadata

CONNECTIONS = 32
#: Requests prepared at a time; a million at once would take a gigabyte.
PORTION = 20_000


def unique_prefix() -> str:
    return f"bench-{uuid.uuid4()}"


@contextlib.contextmanager
def producers(server: ServerProcess, count: int = CONNECTIONS) -> Iterator[list[socket.socket]]:
    """Keep-alive connections."""
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(peers.connect(server.address)) for _ in range(count)]


@contextlib.contextmanager
def consumers(server: ServerProcess, count: int, features: str | None = None) -> Iterator[list[int]]:
    """File descriptors of consumers' connections after their handshake; `features` as in `peers.consumer`."""
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(peers.consumer(server.address, features)).fileno() for _ in range(count)]


def fill_selected(server: ServerProcess, submissions: int, chunks_each: int) -> None:
    """Insert that many submissions of the customer SELECTED."""
    _fill(server, submissions, chunks_each, lambda number: {**metadata(number), "customer": SELECTED})


def fill(server: ServerProcess, submissions: int, chunks_each: int) -> None:
    """Insert that many submissions, each with strategic metadata by its number."""
    _fill(server, submissions, chunks_each, metadata)


def _fill(
    server: ServerProcess, submissions: int, chunks_each: int, described: Callable[[int], dict[str, int]]
) -> None:
    with producers(server) as sockets:
        inserters = Inserters([each.fileno() for each in sockets])
        for start in range(0, submissions, PORTION):
            numbers = range(start, min(start + PORTION, submissions))
            inserters.run(
                [
                    peers.insert_request(server.address, unique_prefix(), chunks_each, described(number))
                    for number in numbers
                ]
            )
            if inserters.refused:
                raise RuntimeError(f"{inserters.refused} of {len(numbers)} inserts were refused")


def insert(connection: socket.socket, server: ServerProcess, chunks: int) -> int:
    """One submission's id."""
    answer = peers.exchange(connection, peers.insert_request(server.address, unique_prefix(), chunks))
    return int(json.loads(answer))


def cancel(connection: socket.socket, server: ServerProcess, submission: int) -> None:
    peers.exchange(connection, peers.request(server.address, "POST", f"/producer/submissions/cancel/{submission}"))

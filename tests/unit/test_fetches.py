"""Fetches: inputs come in order, as many as there is room for, and the one that is needed always."""

from __future__ import annotations

from concurrent.futures import Future

import pytest

from opsqueue.client.fetches import MAX_BYTES, Fetches
from opsqueue.client.store_error import StoreError
from opsqueue.protocol import consumer as wire

_SUBMISSION = wire.Submission(1, "p", 100, 0, 1, None, {}, "{}")
_LARGE = bytes(MAX_BYTES // 2)


class Store:
    """Gives what a test says, when it says so."""

    def __init__(self) -> None:
        self.started: list[int] = []
        self.futures: dict[int, Future[bytes]] = {}
        #: What is given at once, as from a store that is quick.
        self.at_once: bytes | None = None

    def start(self, chunk: wire.Chunk, _submission: wire.Submission) -> Future[bytes]:
        self.started.append(chunk.chunk_index)
        future: Future[bytes] = Future()
        self.futures[chunk.chunk_index] = future
        if self.at_once is not None:
            future.set_result(self.at_once)
        return future


@pytest.fixture
def store() -> Store:
    return Store()


def _fetch(fetches: Fetches, *indexes: int) -> list[Future[bytes]]:
    return [fetches.fetch(wire.Chunk(1, index, None, 0), _SUBMISSION) for index in indexes]


def test_no_more_than_the_limit_are_on_their_way(store: Store) -> None:
    fetches = Fetches(store.start, 3)
    contents = _fetch(fetches, *range(5))
    assert store.started == [0, 1, 2]
    store.futures[1].set_result(b"one")
    assert contents[1].result(0) == b"one"
    assert store.started == [0, 1, 2, 3]


@pytest.mark.parametrize("quick", [True, False])
def test_nothing_more_is_fetched_when_the_bytes_that_wait_reach_the_bound(store: Store, quick: bool) -> None:
    store.at_once = _LARGE if quick else None
    fetches = Fetches(store.start, 1)
    contents = _fetch(fetches, *range(5))
    if not quick:
        store.futures[0].set_result(_LARGE)
        store.futures[1].set_result(_LARGE)
    assert store.started == [0, 1]
    fetches.take(contents[0])
    assert store.started == [0, 1, 2]
    fetches.forget(contents[1])
    fetches.forget(contents[4])
    if not quick:
        store.futures[2].set_result(b"")
    assert store.started == [0, 1, 2, 3]


def test_the_one_that_is_needed_is_fetched_without_room(store: Store) -> None:
    store.at_once = _LARGE
    fetches = Fetches(store.start, 1)
    contents = _fetch(fetches, *range(5))
    fetches.take(contents[3])
    assert contents[3].result(0) == _LARGE
    assert store.started == [0, 1, 3]
    fetches.take(contents[0])
    assert store.started == [0, 1, 3, 2], "what was worked on takes no room"


def test_the_one_that_is_needed_is_the_next_when_one_ends(store: Store) -> None:
    fetches = Fetches(store.start, 1)
    contents = _fetch(fetches, *range(3))
    fetches.take(contents[2])
    assert store.started == [0]
    store.futures[0].set_result(b"")
    assert store.started == [0, 2]


def test_one_that_is_taken_or_forgotten_on_its_way_takes_no_room(store: Store) -> None:
    fetches = Fetches(store.start, 2)
    contents = _fetch(fetches, *range(4))
    fetches.take(contents[0])
    fetches.forget(contents[1])
    store.futures[0].set_result(_LARGE)
    store.futures[1].set_result(_LARGE)
    assert store.started == [0, 1, 2, 3]
    assert contents[0].result(0) == _LARGE


def test_one_that_cannot_be_fetched_says_so_and_the_others_come(store: Store) -> None:
    fetches = Fetches(store.start, 1)
    first, second = _fetch(fetches, 0, 1)
    store.futures[0].set_exception(StoreError("away"))
    with pytest.raises(StoreError, match="away"):
        first.result(0)
    store.futures[1].set_result(b"here")
    assert second.result(0) == b"here"

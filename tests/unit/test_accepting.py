"""How connections spread over front-ends: real sockets, a real board, the other front-ends' loads set by hand."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator

import pytest

from opsqueue._speedups.board import Board, SlotState
from opsqueue.server.context import frontend_slot
from opsqueue.server.frontend.accepting import Acceptor, overloaded

OWN, OTHER, THIRD = frontend_slot(0), frontend_slot(1), frontend_slot(2)


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0), backlog=64) as made:
        yield made


def board_with(own: int, other: int, state: SlotState = SlotState.SERVING) -> Board:
    board = Board(4)
    board.start(OWN, SlotState.SERVING)
    board.start(OTHER, state)
    board.set_connections(OWN, own)
    board.set_connections(OTHER, other)
    return board


@pytest.mark.parametrize(("own", "other", "expected"), [(0, 0, False), (1, 0, False), (2, 0, True), (9, 8, False)])
def test_two_connections_more_than_the_least_loaded_is_too_many(own: int, other: int, expected: bool) -> None:
    assert overloaded(board_with(own, other), OWN, OWN) is expected


@pytest.mark.parametrize("state", [SlotState.ABSENT, SlotState.STARTING, SlotState.DRAINING])
def test_a_front_end_that_does_not_serve_is_left_out(state: SlotState) -> None:
    assert not overloaded(board_with(50, 0, state), OWN, OWN)


def test_a_front_end_without_progress_is_left_out() -> None:
    board = Board(5)  # the third has never moved its progress word
    board.start(OWN, SlotState.SERVING)
    board.set_connections(OWN, 50)
    board.set_state(THIRD, SlotState.SERVING)
    assert not overloaded(board, OWN, OWN)


class Connections:
    """Protocols of what was accepted; tells when a number of them is reached."""

    def __init__(self) -> None:
        self.transports: list[asyncio.Transport] = []
        self.changed = asyncio.Condition()
        self.tasks: list[asyncio.Task[None]] = []

    def protocol(self) -> asyncio.Protocol:
        outer = self

        class Accepted(asyncio.Protocol):
            def connection_made(self, transport: asyncio.BaseTransport) -> None:
                assert isinstance(transport, asyncio.Transport)
                outer.transports.append(transport)
                outer.tasks.append(asyncio.ensure_future(outer.tell()))

        return Accepted()

    async def tell(self) -> None:
        async with self.changed:
            self.changed.notify_all()

    async def reach(self, count: int) -> None:
        async with self.changed, asyncio.timeout(5):
            await self.changed.wait_for(lambda: len(self.transports) >= count)


async def test_an_accepted_connection_has_no_delay_and_is_counted(listener: socket.socket) -> None:
    board = board_with(0, 0)
    connections = Connections()
    acceptor = Acceptor(asyncio.get_running_loop(), listener, board, OWN, OWN, connections.protocol)
    acceptor.start()
    with socket.create_connection(listener.getsockname()):
        await connections.reach(1)
        accepted = connections.transports[0].get_extra_info("socket")
        assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) != 0
        assert board.connections(OWN) == acceptor.open_connections == 1
        connections.transports[0].close()
        acceptor.connection_ended()
        assert board.connections(OWN) == 0
    acceptor.stop()


async def test_an_overloaded_front_end_pauses_and_goes_on_when_the_others_have_caught_up(
    listener: socket.socket,
) -> None:
    board = board_with(0, 0)
    connections = Connections()
    acceptor = Acceptor(asyncio.get_running_loop(), listener, board, OWN, OWN, connections.protocol)
    acceptor.start()
    clients = [socket.create_connection(listener.getsockname()) for _ in range(5)]
    await connections.reach(2)
    # Several turns of its re-check: it does not take the third although it is there.
    for _ in range(5):
        board.progress(OTHER)
        await asyncio.sleep(0.02)  # paces the turns in which nothing may happen
    assert len(connections.transports) == 2
    board.set_connections(OTHER, 2)
    board.progress(OTHER)
    await connections.reach(4)
    board.set_state(OTHER, SlotState.DRAINING)
    await connections.reach(5)
    acceptor.stop()
    for open_end in [*connections.transports, *clients]:
        open_end.close()


async def test_stopping_takes_what_is_queued_and_nothing_after_it(listener: socket.socket) -> None:
    board = board_with(0, 0)
    connections = Connections()
    ours = listener.dup()  # as after a fork: the supervisor keeps its own
    acceptor = Acceptor(asyncio.get_running_loop(), ours, board, OWN, OWN, connections.protocol)
    queued = [socket.create_connection(listener.getsockname()) for _ in range(3)]
    acceptor.stop()
    await connections.reach(3)
    assert ours.fileno() == -1
    with socket.create_connection(listener.getsockname()):
        acceptor.start()
        assert acceptor.open_connections == 3
    for open_end in [*connections.transports, *queued]:
        open_end.close()

"""Servers that the tests of a file share: one for each set of settings, empty and without consumers for each test."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import pytest

from tests.conftest import SERVERS
from tests.support.raw_consumer import RawConsumer
from tests.support.raw_producer import RawProducer
from tests.support.server import Server


class Wire:
    """A server, a producer, and as many consumers as a test wants."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.producer = RawProducer(server.port)
        self._consumers: list[RawConsumer] = []

    def consumer(
        self, features: str | None = None, *, nodelay: bool = True, receive_buffer: int | None = None
    ) -> RawConsumer:
        made = RawConsumer(self.server.port, features, nodelay=nodelay, receive_buffer=receive_buffer)
        self._consumers.append(made)
        return made

    def clear(self) -> None:
        """No consumers, nothing in progress."""
        for consumer in self._consumers:
            consumer.drop()
        self._consumers.clear()
        for submission in self.producer.inserted:
            # 404 and 409 say that it has ended already.
            assert self.producer.ask("POST", f"/producer/submissions/cancel/{submission}")[0] in (200, 404, 409)
        self.producer.inserted.clear()
        self.producer.wait_for_metric("opsqueue_consumers_connected", 0)
        self.producer.wait_for_parked(0)
        self.producer.wait_for_metric("opsqueue_chunks_reserved", 0)


class Serve(Protocol):
    """Gives the file's server with these settings: `serve(max_chunk_retries=1)`."""

    def __call__(self, **settings: object) -> Wire: ...


@pytest.fixture(scope="module")
def _wires(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Wire]]:
    wires: dict[str, Wire] = {}
    yield wires
    for wire in wires.values():
        wire.server.close()


@pytest.fixture
def serve(
    _wires: dict[str, Wire], request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Serve]:
    used: list[Wire] = []

    def get(**settings: object) -> Wire:
        key = repr(sorted(settings.items()))
        if key not in _wires:
            server = Server(tmp_path_factory.mktemp("server"), dict(settings))
            request.node.stash.setdefault(SERVERS, []).append(server)
            _wires[key] = Wire(server.start())
        wire = _wires[key]
        if wire not in used:
            used.append(wire)
            servers = request.node.stash.setdefault(SERVERS, [])
            if wire.server not in servers:
                servers.append(wire.server)
        return wire

    yield get
    for wire in used:
        wire.clear()


@pytest.fixture
def wire(serve: Serve) -> Wire:
    """A server with the default settings and one front-end."""
    return serve()

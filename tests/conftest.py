"""Fixtures for every test: real servers, and an object store in a directory."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Protocol

import pytest

from tests.support.server import Server


class ServerFactory(Protocol):
    """Starts a server with settings as keywords: `server_factory(frontends=2, max_chunk_retries=1)`."""

    def __call__(self, **settings: object) -> Server: ...


#: Where an item keeps the servers that its fixtures started, so that their logs show when it fails.
SERVERS = pytest.StashKey[list[Server]]()


@pytest.fixture
def server_factory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerFactory]:
    """Starts servers, each with a database of its own unless told otherwise; all are gone after the test."""
    started = request.node.stash.setdefault(SERVERS, [])
    with ExitStack() as stack:

        def start(**settings: object) -> Server:
            server = Server(tmp_path_factory.mktemp("server"), settings)
            started.append(server)
            stack.callback(server.close)
            return server.start()

        yield start


@pytest.fixture
def server(server_factory: ServerFactory) -> Server:
    """A running server with one front-end and the default settings."""
    return server_factory()


@pytest.fixture
def store_url(tmp_path: Path) -> str:
    """The URL of an empty object store."""
    directory = tmp_path / "store"
    directory.mkdir()
    return directory.as_uri()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A failed test shows what its servers have logged."""
    report = yield
    if report.failed:
        for server in item.stash.get(SERVERS, []):
            report.sections.append((f"log of the server in {server.directory}", server.log()))
    return report

"""What a producer's connection promises, whichever of the two readers reads it: ours for a request that comes whole and
has nothing unusual about it, aiohttp's for every other.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Callable, Iterable
from pathlib import Path

import pytest
import uvloop

from opsqueue.server import requests
from opsqueue.server.frontend import http_server
from opsqueue.server.frontend.short_requests import MAX_BODY, recognise
from opsqueue.server.writer.batch import JournalOptions
from opsqueue.server.writer.journal import SqliteJournal

from .scripted_frontend import Frontend, scripted_frontend

STORED = b'{"chunk_contents": {"SeeObjectStorage": {"prefix": "p", "count": 3}}}'
CANCEL = b"POST /producer/submissions/cancel/1 HTTP/1.1\r\nHost: h\r\nContent-Length: 0\r\n\r\n"
VERSION = b"GET /version HTTP/1.1\r\nHost: h\r\n\r\n"


class EmptySink:
    """Recovery of an empty file."""

    def load_submissions(self, rows: Iterable[object]) -> None:
        assert not list(rows)

    def load_blocks(self, rows: Iterable[object]) -> None:
        assert not list(rows)

    def events(self, events: bytes) -> None: ...


@pytest.fixture(scope="module")
def event_loop_policy() -> asyncio.AbstractEventLoopPolicy:
    """The server's own event loop."""
    return uvloop.EventLoopPolicy()


@pytest.fixture
async def frontend(tmp_path: Path) -> AsyncIterator[Frontend]:
    path = str(tmp_path / "opsqueue.db")
    journal = SqliteJournal(JournalOptions(path))
    journal.load(EmptySink())
    async with scripted_frontend(path) as made:
        yield made
    journal.close()


def insert(body: bytes = STORED, *more: bytes, kind: bytes = b"application/json") -> bytes:
    lines = [
        b"POST /producer/submissions HTTP/1.1",
        b"Host: h",
        b"Content-Type: " + kind,
        b"Content-Length: %d" % len(body),
        *more,
    ]
    return b"\r\n".join(lines) + b"\r\n\r\n" + body


async def connect(frontend: Frontend) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    return await asyncio.open_connection("127.0.0.1", frontend.port)


async def answer(reader: asyncio.StreamReader) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body of the next answer."""
    async with asyncio.timeout(5):
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        status, *lines = head[:-4].split("\r\n")
        headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
        return int(status.split()[1]), headers, await reader.readexactly(int(headers.get("content-length", 0)))


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not true():
            await asyncio.sleep(0.001)


REQUESTS = {
    "an insert": insert(),
    "not JSON": insert(b"{"),
    "another shape": insert(b'{"chunk_contents": 3}'),
    "another content type": insert(kind=b"text/plain"),
    "an empty body": insert(b""),
    "a version": VERSION,
    "a features header": VERSION.replace(b"/version", b"/producer/version"),
    "an unknown path": VERSION.replace(b"/version", b"/nothing"),
    "another method": VERSION.replace(b"/version", b"/producer/submissions/cancel/1"),
    "a bad id": VERSION.replace(b"/version", b"/producer/submissions/minus-one"),
    "a query": VERSION.replace(b"/version", b"/producer/submissions/1?wait=never"),
    "no handshake": VERSION.replace(b"/version", b"/consumer"),
    "a defect of ours": VERSION.replace(b"/version", b"/explode"),
    "an empty answer": CANCEL,
}
STATUS = {"an insert": 200, "not JSON": 400, "another shape": 422, "an unknown path": 404, "a defect of ours": 500}


@pytest.mark.parametrize("name", REQUESTS)
async def test_both_readers_give_the_same_answer(frontend: Frontend, name: str) -> None:
    message = REQUESTS[name]
    frontend.writer.answer = lambda request: (
        requests.Inserted(7, known=False) if isinstance(request, requests.Insert) else requests.Done()
    )
    assert recognise(message) is not None
    assert recognise(message[:20]) is None
    answers = []
    for parts in ([message], [message[:20], message[20:]]):
        reader, writer = await connect(frontend)
        writer.write(parts[0])
        if len(parts) > 1:
            await until(lambda: not frontend.server.own)  # it is aiohttp's now
            writer.write(parts[1])
        status, headers, body = await answer(reader)
        headers.pop("date")
        answers.append((status, headers, body))
        # the connection stays
        writer.write(VERSION)
        assert (await answer(reader))[0] == 200
        writer.close()
    assert answers[0] == answers[1]
    if name in STATUS:
        assert answers[0][0] == STATUS[name]


@pytest.mark.parametrize(
    "message",
    [
        pytest.param(insert()[:-1], id="a part of a body"),
        pytest.param(insert() + b"x", id="more than one request"),
        pytest.param(insert(STORED, b"Expect: 100-continue"), id="a question"),
        pytest.param(insert(STORED, b"Transfer-Encoding: chunked"), id="chunked"),
        pytest.param(insert(STORED, b"Content-Encoding: gzip"), id="compressed"),
        pytest.param(insert(STORED, b"Connection: close"), id="a last request"),
        pytest.param(insert(STORED, b"Content-Length: 3"), id="two lengths"),
        pytest.param(insert(STORED, b"Host: other"), id="two hosts"),
        pytest.param(insert(STORED, b"X-Name : x"), id="a blank before the colon"),
        pytest.param(insert(STORED, b"X-Name: \xff"), id="not ASCII"),
        pytest.param(insert(STORED, b"X-Name: a\r\n b"), id="a folded line"),
        pytest.param(insert(STORED, b"X: a\nY: b"), id="a bare newline"),
        pytest.param(insert().replace(b"HTTP/1.1", b"HTTP/1.0"), id="an older version"),
        pytest.param(insert().replace(b"POST /", b"POST http://h/"), id="the absolute form"),
        pytest.param(insert().replace(b"POST", b"PUT"), id="another method"),
        pytest.param(insert(b"x" * (MAX_BODY * 10)), id="a large body"),
        pytest.param(VERSION.replace(b"\r\n\r\n", b"\r\nContent-Length: 1\r\n\r\nx"), id="a body with GET"),
        pytest.param(VERSION.replace(b"Host: h\r\n", b""), id="no host"),
        pytest.param(b"\x16\x03\x01" + insert(), id="garbage"),
        pytest.param(b"", id="nothing"),
    ],
)
def test_anything_unusual_is_left_to_aiohttp(message: bytes) -> None:
    assert recognise(message) is None


async def test_requests_sent_ahead_are_answered_in_their_order(frontend: Frontend) -> None:
    reader, writer = await connect(frontend)
    writer.write(insert())
    await frontend.writer.wait_for_requests(1)
    writer.write(VERSION)
    writer.write(VERSION.replace(b"/version", b"/nothing"))
    (connection,) = frontend.server.own
    await until(lambda: connection._ahead.endswith(b"\r\n\r\n") and b"/nothing" in connection._ahead)
    frontend.writer.give(requests.Inserted(5, known=False))
    assert (await answer(reader))[2] == b"5"
    assert (await answer(reader))[0] == 200
    assert (await answer(reader))[0] == 404
    writer.close()


async def test_two_requests_in_one_segment_are_both_answered(frontend: Frontend) -> None:
    reader, writer = await connect(frontend)
    writer.write(VERSION + VERSION.replace(b"/version", b"/nothing"))
    assert [(await answer(reader))[0] for _ in range(2)] == [200, 404]
    writer.close()


async def test_a_client_that_sends_ahead_without_end_is_not_read(frontend: Frontend) -> None:
    reader, writer = await connect(frontend)
    writer.write(insert())
    await frontend.writer.wait_for_requests(1)
    (connection,) = frontend.server.own
    assert connection.transport is not None
    piece = VERSION * 200
    sent = 0
    while connection.transport.is_reading():
        writer.write(piece)
        sent += 200
        await asyncio.sleep(0)
    frontend.writer.give(requests.Inserted(5, known=False))
    assert (await answer(reader))[2] == b"5"
    for _ in range(sent):
        assert (await answer(reader))[0] == 200
    writer.close()


async def test_an_idle_connection_ends(frontend: Frontend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_server, "KEEPALIVE_S", 0.05)
    monkeypatch.setattr(http_server, "LOOK_AGAIN_S", 0.01)
    reader, writer = await connect(frontend)
    writer.write(VERSION)
    assert (await answer(reader))[0] == 200
    async with asyncio.timeout(5):
        assert await reader.read() == b""
    assert not frontend.server.own
    writer.close()


async def test_a_request_that_waits_for_the_writer_is_not_idle(
    frontend: Frontend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_server, "KEEPALIVE_S", 0.02)
    monkeypatch.setattr(http_server, "LOOK_AGAIN_S", 0.005)
    reader, writer = await connect(frontend)
    writer.write(insert())
    await frontend.writer.wait_for_requests(1)
    await asyncio.sleep(0.1)  # several times as long as it may be idle
    frontend.writer.give(requests.Inserted(5, known=False))
    assert (await answer(reader))[2] == b"5"
    writer.close()


async def test_a_client_that_leaves_in_mid_request_leaves_nothing_behind(frontend: Frontend) -> None:
    _, writer = await connect(frontend)
    writer.write(insert())
    await frontend.writer.wait_for_requests(1)
    writer.transport.abort()
    await until(lambda: not frontend.acceptor.open_connections)
    frontend.writer.give(requests.Inserted(5, known=False))
    assert await frontend.app.wait_until_idle(5)
    assert not frontend.server.own


async def test_when_the_server_stops_idle_connections_end_and_a_request_gets_its_answer(frontend: Frontend) -> None:
    idle_reader, idle_writer = await connect(frontend)
    idle_writer.write(VERSION)
    await answer(idle_reader)
    reader, writer = await connect(frontend)
    writer.write(insert())
    await frontend.writer.wait_for_requests(1)
    draining = asyncio.ensure_future(frontend.drain())
    frontend.writer.give(requests.Inserted(5, known=False))
    status, headers, body = await answer(reader)
    assert (status, headers["connection"], body) == (200, "close", b"5")
    await draining
    assert await reader.read() == b""
    assert await idle_reader.read() == b""
    for each in (writer, idle_writer):
        each.close()


def test_what_is_recognised_is_read_as_it_was_sent() -> None:
    found = recognise(insert(STORED, b"traceparent:  00-1-2-3 ", b"X-Empty:", b"baggage: a=1", b"Baggage: b=2"))
    assert found is not None
    head, body = found
    assert body == STORED
    assert (head.method, head.target, head.length) == ("POST", "/producer/submissions", len(STORED))
    assert head.headers["Traceparent"] == "00-1-2-3"
    assert head.headers["x-empty"] == ""
    assert head.headers.getall("baggage") == ["a=1", "b=2"]
    assert re.fullmatch(r"\d+", head.headers["content-length"])

"""What a producer is told when something is wrong: with its request, the writer, the disk or the server."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import uvloop
from aiohttp import web

from opsqueue._speedups.counters import Counter
from opsqueue.server import requests
from opsqueue.server.frontend.body import BodyReader
from opsqueue.server.writer.batch import JournalOptions
from opsqueue.server.writer.journal import SqliteJournal

from .scripted_frontend import LIMITS, MAX_BODY, SLOT, VERSION, Frontend, scripted_frontend

JSON = {"Content-Type": "application/json"}
STORED = {"chunk_contents": {"SeeObjectStorage": {"prefix": "p", "count": 3}}}
HEAD = b"POST /producer/submissions HTTP/1.1\r\nHost: h\r\nContent-Type: application/json\r\n"
DIRECT = {"chunk_contents": {"Direct": {"contents": [[1, 2], None]}}}


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


@pytest.fixture
async def http(frontend: Frontend) -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(f"http://127.0.0.1:{frontend.port}") as session:
        yield session


async def insert(
    http: aiohttp.ClientSession, body: Any, headers: dict[str, str] | None = None
) -> tuple[int, str, aiohttp.ClientResponse]:
    async with http.post("/producer/submissions", json=body, headers=headers) as response:
        return response.status, await response.text(), response


def inserted(request: requests.Request) -> requests.Reply:
    return requests.Inserted(77, False)


async def test_an_insert_reaches_the_writer_whole(frontend: Frontend, http: aiohttp.ClientSession) -> None:
    frontend.writer.answer = inserted
    body = STORED | {"metadata": [0, 255], "strategic_metadata": {"a": -3}, "chunk_size": 2, "paused": True}
    headers = {"traceparent": "00-aa-bb-01", "baggage": "k=v", "Idempotency-Key": "monday"}
    status, text, _ = await insert(http, body, headers)
    assert (status, text) == (200, "77")
    [stored] = frontend.writer.asked
    assert isinstance(stored, requests.Insert)
    assert (stored.prefix, stored.count, stored.contents, stored.idempotency_key) == ("p", 3, None, "monday")
    assert (stored.metadata, stored.strategic_metadata, stored.chunk_size) == (b"\x00\xff", {"a": -3}, 2)
    assert stored.paused
    assert json.loads(stored.otel_trace_carrier) == {"traceparent": "00-aa-bb-01", "baggage": "k=v"}
    assert len(stored.fingerprint) == 16


async def test_a_direct_insert_has_defaults_and_null_becomes_an_empty_content(
    frontend: Frontend, http: aiohttp.ClientSession
) -> None:
    frontend.writer.answer = inserted
    await insert(http, DIRECT, {"Idempotency-Key": "k1"})
    [stored] = frontend.writer.asked
    assert isinstance(stored, requests.Insert)
    assert (stored.prefix, stored.count, stored.contents) == (None, 2, [b"\x01\x02", b""])
    assert (stored.idempotency_key, stored.chunk_size, stored.metadata) == ("k1", 1, None)
    assert (stored.otel_trace_carrier, stored.paused, stored.strategic_metadata) == ("{}", False, {})


@pytest.mark.parametrize(
    "other",
    [
        {"chunk_contents": {"SeeObjectStorage": {"prefix": "p", "count": 4}}},
        {"chunk_size": 2},
        {"metadata": []},
        {"strategic_metadata": {"a": 1}},
    ],
)
async def test_the_fingerprint_tells_different_inserts_apart_and_nothing_else(
    frontend: Frontend, http: aiohttp.ClientSession, other: dict[str, Any]
) -> None:
    frontend.writer.answer = inserted
    await insert(http, STORED, {"traceparent": "00-1-1-01"})
    await insert(http, STORED | {"paused": True})
    await insert(http, STORED | other)
    first, same, different = (
        request.fingerprint for request in frontend.writer.asked if isinstance(request, requests.Insert)
    )
    assert first == same != different


@pytest.mark.parametrize(
    ("body", "status", "says"),
    [
        (STORED | {"metadata": [0] * (LIMITS.max_metadata_size + 1)}, 422, "--max-metadata-size"),
        (STORED | {"strategic_metadata": dict.fromkeys("abcd", 1)}, 422, "--max-strategic-keys"),
        (STORED | {"strategic_metadata": {"ü" * 6: 1}}, 422, "--max-strategic-key-size"),
        ({"chunk_contents": {"SeeObjectStorage": {"prefix": "p" * 21, "count": 1}}}, 422, "--max-prefix-size"),
        ({"chunk_contents": {"Direct": {"contents": [[], [0] * 2001]}}}, 422, "content 1"),
        ({"chunk_contents": {"SeeObjectStorage": {"prefix": "p", "count": 4_000_004}}}, 413, "--memory-limit"),
        ({"chunk_contents": {"SeeObjectStorage": {"prefix": "p", "count": 2**63}}}, 422, "count"),
        ({"chunk_contents": {"SeeObjectStorage": {"prefix": "p", "count": 1.5}}}, 422, "count"),
        (STORED | {"metadata": [256]}, 422, "metadata"),
        (STORED | {"metadata": "AAEC"}, 422, "metadata"),
        (STORED | {"strategic_metadata": None}, 422, "strategic_metadata"),
        (STORED | {"strategic_metadata": {"a": 2**63}}, 422, "strategic_metadata"),
        (STORED | {"chunk_size": 2**63}, 422, "chunk_size"),
        (STORED | {"paused": 1}, 422, "paused"),
        ([], 422, "wrong shape"),
        ("text", 422, "wrong shape"),
    ],
)
async def test_a_body_outside_the_contract_is_refused_with_a_text_that_says_where(
    frontend: Frontend, http: aiohttp.ClientSession, body: Any, status: int, says: str
) -> None:
    answered, text, response = await insert(http, body)
    assert (answered, response.headers["Content-Type"]) == (status, "text/plain; charset=utf-8")
    assert says in text
    assert frontend.writer.asked == []


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b"\xff",
        b'{"a": ' + b"[" * 90_000,
        b'{"chunk_contents": {"SeeObjectStorage": {"prefix": "\xff"',
        b'{"chunk_contents": {"Direct": {"contents": []}}} {}',
    ],
)
async def test_what_is_not_json_is_400(http: aiohttp.ClientSession, raw: bytes) -> None:
    async with http.post("/producer/submissions", data=raw, headers=JSON) as response:
        assert (response.status, response.headers["Content-Type"]) == (400, "text/plain; charset=utf-8")
        assert "not JSON" in await response.text()


async def test_a_400_of_the_metadata_lookup_is_kept_for_the_maximum(http: aiohttp.ClientSession) -> None:
    path = "/producer/submissions/lookup_ids_by_strategic_metadata"
    for raw, status in ((b"{", 422), (b"[]", 422), (b'{"a": "b"}', 422), (b"{}", 200)):
        async with http.post(path, data=raw, headers=JSON) as response:
            assert response.status == status


async def test_other_json_content_types_are_json_and_compressed_bodies_are_refused(
    frontend: Frontend, http: aiohttp.ClientSession
) -> None:
    frontend.writer.answer = inserted
    raw = json.dumps(STORED).encode()
    for headers, status in (
        ({"Content-Type": "application/vnd.a+json; charset=utf-8"}, 200),
        ({"Content-Type": "APPLICATION/JSON"}, 200),
        ({"Content-Type": "text/json"}, 415),
        (JSON | {"Content-Encoding": "gzip"}, 415),
        (JSON | {"Expect": "the-impossible"}, 417),
    ):
        async with http.post("/producer/submissions", data=raw, headers=headers) as response:
            assert response.status == status, headers


async def test_a_body_above_the_limit_is_refused_before_it_is_sent(frontend: Frontend) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", frontend.port)
    writer.write(HEAD + f"Expect: 100-continue\r\nContent-Length: {MAX_BODY + 1}\r\n\r\n".encode())
    assert (await reader.readline()).startswith(b"HTTP/1.1 413")
    writer.close()


async def test_a_chunked_body_above_the_limit_is_refused_although_it_never_said_its_size(
    http: aiohttp.ClientSession,
) -> None:
    async def endless() -> AsyncIterator[bytes]:
        for _ in range(30):
            yield b" " * (MAX_BODY // 10)

    async with http.post("/producer/submissions", data=endless(), headers=JSON) as response:
        assert response.status == 413
        assert "--max-body-size" in await response.text()


async def test_a_body_that_does_not_come_is_503_and_others_are_served_meanwhile(
    frontend: Frontend, http: aiohttp.ClientSession
) -> None:
    frontend.writer.answer = inserted
    reader, slow = await asyncio.open_connection("127.0.0.1", frontend.port)
    slow.write(HEAD + b"Content-Length: 500\r\n\r\n{")
    assert (await insert(http, STORED))[0] == 200
    answer = await reader.readuntil(b"\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 503")
    assert b"Retry-After" in answer
    slow.close()


async def test_bodies_that_do_not_fit_into_memory_together_are_503(
    frontend: Frontend, http: aiohttp.ClientSession
) -> None:
    frontend.writer.answer = inserted
    ends = [await asyncio.open_connection("127.0.0.1", frontend.port) for _ in range(3)]
    for _, end in ends:
        end.write(HEAD + f"Content-Length: {MAX_BODY}\r\n\r\n{{".encode())
    done, _ = await asyncio.wait(
        [asyncio.create_task(reader.readline()) for reader, _ in ends], return_when=asyncio.FIRST_COMPLETED
    )
    assert [task.result().split()[1] for task in done] == [b"503"]
    for _, end in ends:
        end.transport.abort()
    assert (await insert(http, STORED))[0] == 200


async def test_a_single_body_is_taken_however_little_memory_there_is_for_several() -> None:
    bodies = BodyReader(MAX_BODY, in_memory=1)
    seen: list[bytes] = []
    reading = asyncio.Event()

    async def handle(request: web.BaseRequest) -> web.StreamResponse:
        reading.set()
        seen.append(await bodies.read(request))
        return web.Response()

    server = await asyncio.get_running_loop().create_server(web.Server(handle), "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n")
    await reading.wait()
    writer.write(b"0\r\n\r\n")
    assert (await reader.readline()).split()[1] == b"200"
    assert seen == [b"a"]
    writer.transport.abort()
    server.close()


async def test_a_client_that_waits_for_100_continue_gets_it(frontend: Frontend) -> None:
    frontend.writer.answer = inserted
    reader, writer = await asyncio.open_connection("127.0.0.1", frontend.port)
    body = json.dumps(STORED).encode()
    writer.write(HEAD + f"Expect: 100-continue\r\nContent-Length: {len(body)}\r\n\r\n".encode())
    assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
    writer.write(body)
    answer = await reader.readuntil(b"\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 200")
    assert await reader.readexactly(2) == b"77"
    writer.close()


async def test_a_client_that_goes_away_in_mid_body_hurts_nobody(
    frontend: Frontend, http: aiohttp.ClientSession
) -> None:
    frontend.writer.answer = inserted
    _, gone = await asyncio.open_connection("127.0.0.1", frontend.port)
    gone.write(HEAD + b"Content-Length: 500\r\n\r\n{")
    await gone.drain()
    gone.transport.abort()
    assert (await insert(http, STORED))[0] == 200
    assert len(frontend.writer.asked) == 1


async def test_malformed_http_is_400_without_a_traceback_and_ends_that_connection_only(
    frontend: Frontend, http: aiohttp.ClientSession, caplog: pytest.LogCaptureFixture
) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", frontend.port)
    writer.write(b"\x00\x01 nonsense\r\n\r\n")
    answer = await reader.read()
    assert answer.startswith(b"HTTP/1.0 400")
    assert b"Traceback" not in answer
    writer.close()
    assert [record for record in caplog.records if record.exc_info] == []
    async with http.get("/version") as response:
        assert await response.text() == VERSION


async def test_an_unexpected_exception_is_a_500_with_a_json_string_that_gives_nothing_away(
    frontend: Frontend, http: aiohttp.ClientSession
) -> None:
    async with http.get("/explode") as response:
        assert (response.status, response.headers["Content-Type"]) == (500, "application/json")
        text = await response.json()
    assert isinstance(text, str)
    assert "secret" not in text
    assert frontend.board.get(SLOT, Counter.HTTP_ERRORS_5XX) == 1


async def test_a_full_disk_is_507_and_a_refusal_is_503_with_retry_after(
    frontend: Frontend, http: aiohttp.ClientSession
) -> None:
    frontend.writer.answer = lambda request: requests.Unavailable("the disk is full", 7, True)
    status, text, response = await insert(http, STORED)
    assert (status, text, response.headers["Retry-After"]) == (507, "the disk is full", "7")
    frontend.writer.answer = lambda request: requests.Unavailable("memory is promised to others", 5, False)
    status, text, response = await insert(http, STORED)
    assert (status, text, response.headers["Retry-After"]) == (503, "memory is promised to others", "5")


async def test_a_conflict_is_409_and_names_the_other_submission(
    frontend: Frontend, http: aiohttp.ClientSession
) -> None:
    frontend.writer.answer = lambda request: requests.Conflict(4711)
    status, text, _ = await insert(http, STORED)
    assert status == 409
    assert "4711" in text
    assert "'p'" in text


@pytest.mark.parametrize(
    ("body", "headers", "sent", "status"),
    [(STORED, {}, 2, 200), (DIRECT, {"Idempotency-Key": "k"}, 2, 200), (DIRECT, {}, 1, 503)],
)
async def test_an_insert_in_a_writers_restart_is_repeated_only_when_that_cannot_make_a_second_submission(
    frontend: Frontend, http: aiohttp.ClientSession, body: Any, headers: dict[str, str], sent: int, status: int
) -> None:
    asked = asyncio.create_task(insert(http, body, headers))
    await frontend.writer.wait_for_requests(1)
    frontend.writer.answer = inserted
    frontend.writer.client.on_writer_restart()
    answered, _, response = await asked
    assert answered == status
    assert len(frontend.writer.asked) == sent
    assert ("Retry-After" in response.headers) == (status == 503)


async def test_a_status_in_a_writers_restart_is_503(frontend: Frontend, http: aiohttp.ClientSession) -> None:
    asked = asyncio.create_task(http.get("/producer/submissions/5"))
    await frontend.writer.wait_for_requests(1)
    frontend.writer.client.on_writer_restart()
    response = await asked
    assert (response.status, response.headers["Retry-After"]) == (503, "1")


async def test_ping_is_unhealthy_when_a_commit_failed_and_when_the_writer_is_silent(
    frontend: Frontend, http: aiohttp.ClientSession
) -> None:
    replies: list[requests.Reply | None] = [requests.Done(), requests.Unavailable("no", 1, False), None]
    frontend.writer.answer = lambda request: replies.pop(0)
    for status, text in ((200, "pong"), (503, "unhealthy"), (503, "unhealthy")):
        async with http.get("/ping") as response:
            assert (response.status, await response.text()) == (status, text)
            assert response.headers["Content-Type"] == "text/plain; charset=utf-8"


async def test_head_is_answered_like_get_without_a_body(http: aiohttp.ClientSession) -> None:
    async with http.head("/version") as response:
        assert (response.status, response.headers["Content-Length"]) == (200, str(len(VERSION)))
        assert await response.read() == b""


async def test_requests_and_errors_are_counted(frontend: Frontend, http: aiohttp.ClientSession) -> None:
    for path in ("/version", "/nope", "/producer/submissions/x"):
        (await http.get(path)).release()
    assert frontend.board.get(SLOT, Counter.HTTP_REQUESTS) == 3
    assert frontend.board.get(SLOT, Counter.HTTP_ERRORS_4XX) == 2

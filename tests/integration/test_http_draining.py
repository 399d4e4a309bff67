"""How a front-end stops: every accepted request is answered, nothing stays open, in less than half a second."""

from __future__ import annotations

import asyncio
import json
import time

import aiohttp

from opsqueue.server import requests

from .scripted_frontend import Frontend
from .test_http_faults import HEAD, STORED, event_loop_policy, frontend, http, insert, inserted

__all__ = ["event_loop_policy", "frontend", "http"]


async def test_a_request_in_flight_is_finished_and_its_connection_closed(
    frontend: Frontend, http: aiohttp.ClientSession
) -> None:
    asked = asyncio.create_task(insert(http, STORED))
    await frontend.writer.wait_for_requests(1)
    draining = asyncio.create_task(frontend.drain())
    await asyncio.sleep(0)  # because others need a turn
    frontend.writer.client.on_reply(1, requests.encode(requests.Inserted(9, False)))
    status, text, response = await asked
    assert (status, text) == (200, "9")
    assert response.headers["Connection"] == "close"
    await draining
    assert frontend.acceptor.open_connections == 0


async def test_what_the_writer_does_not_answer_in_time_is_503_and_stopping_takes_less_than_half_a_second(
    frontend: Frontend, http: aiohttp.ClientSession
) -> None:
    asked = asyncio.create_task(insert(http, STORED))
    await frontend.writer.wait_for_requests(1)
    begun = time.monotonic()
    await frontend.drain()
    assert time.monotonic() - begun < 0.5
    status, text, response = await asked
    assert status == 503
    assert "stopping" in text
    assert "Retry-After" in response.headers


async def test_a_request_whose_body_has_not_come_is_answered_503(frontend: Frontend) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", frontend.port)
    writer.write(HEAD + b"Expect: 100-continue\r\nContent-Length: 100\r\n\r\n{")
    assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
    await frontend.drain()
    answer = await reader.read()
    assert answer.startswith(b"HTTP/1.1 503")
    writer.close()


async def test_an_idle_connection_is_closed_and_one_that_asks_just_then_is_answered(frontend: Frontend) -> None:
    frontend.writer.answer = inserted
    idle_reader, idle_writer = await asyncio.open_connection("127.0.0.1", frontend.port)
    reader, writer = await asyncio.open_connection("127.0.0.1", frontend.port)
    draining = asyncio.create_task(frontend.drain())
    await asyncio.sleep(0)  # because others need a turn
    body = json.dumps(STORED).encode()
    writer.write(HEAD + f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
    assert (await reader.read()).startswith(b"HTTP/1.1 200")
    assert await idle_reader.read() == b""
    await draining
    for end in (writer, idle_writer):
        end.close()


async def test_connections_that_wait_in_the_listeners_queue_are_answered_too(frontend: Frontend) -> None:
    ends = await asyncio.gather(*(asyncio.open_connection("127.0.0.1", frontend.port) for _ in range(5)))
    for _, writer in ends:
        writer.write(b"GET /version HTTP/1.1\r\nHost: h\r\n\r\n")
    await frontend.drain()
    for reader, writer in ends:
        assert (await reader.read()).startswith(b"HTTP/1.1 200")
        writer.close()

"""Lists of submissions over HTTP: every one once, by state and metadata, with progress that is durable."""

from __future__ import annotations

import json
import urllib.parse
from typing import Any

import pytest

from tests.conftest import ServerFactory
from tests.support.raw_consumer import RawConsumer
from tests.support.raw_producer import RawProducer
from tests.support.server import Server

STATES = ("in_progress", "paused", "completed", "failed", "cancelled")


def page(producer: RawProducer, **query: Any) -> tuple[list[tuple[str, Any]], str | None]:
    """(state, about) of each submission of a page, and its cursor; `meta` is a list of (key, value)."""
    pairs = [(f"meta.{key}", str(value)) for key, value in query.pop("meta", ())]
    text = urllib.parse.urlencode([*((key, str(value)) for key, value in query.items()), *pairs])
    status, body = producer.ask("GET", "/producer/submissions" + (f"?{text}" if text else ""))
    assert status == 200, (status, body)
    answer = json.loads(body)
    assert list(answer) == ["submissions", "next"]
    return [next(iter(entry.items())) for entry in answer["submissions"]], answer["next"]


def number(entry: tuple[str, Any]) -> int:
    state, about = entry
    return int((about[0] if state == "Failed" else about)["id"])


def everything(producer: RawProducer, **query: Any) -> list[int]:
    """The ids of all pages, which must not be larger than asked."""
    found: list[int] = []
    cursor: str | None = None
    while True:
        entries, cursor = page(producer, **query, **({"cursor": cursor} if cursor else {}))
        assert len(entries) <= query.get("limit", 100)
        found += map(number, entries)
        if cursor is None:
            return found


def one_of_each(producer: RawProducer, consumer: RawConsumer, **fields: Any) -> dict[str, int]:
    """A submission of two chunks in each state; needs a server on which the first failure is the last."""
    made = {"completed": producer.insert(2, **fields), "failed": producer.insert(2, **fields)}
    made["cancelled"] = producer.insert(2, **fields)
    producer.cancel(made["cancelled"])
    made["paused"] = producer.insert(2, paused=True, **fields)
    consumer.complete((made["completed"], 0), (made["completed"], 1))
    [held] = consumer.reserve_ids()
    assert held == (made["failed"], 0)
    consumer.fail(held, "no")
    for state in ("completed", "failed"):
        producer.wait_for_state(made[state], state.capitalize())
    made["in_progress"] = producer.insert(2, **fields)
    return made


@pytest.fixture
def server(server_factory: ServerFactory) -> Server:
    return server_factory(max_chunk_retries=1)


def test_a_page_tells_what_the_status_of_each_tells(server: Server) -> None:
    with RawProducer(server.port) as producer, RawConsumer(server.port) as consumer:
        assert page(producer) == ([], None)
        made = one_of_each(producer, consumer, metadata=[1, 2, 3], strategic_metadata={"a": -1})
        consumer.complete((made["in_progress"], 1))
        consumer.settle()
        entries, cursor = page(producer)
        assert cursor is None
        assert list(map(number, entries)) == sorted(made.values())
        assert entries == [producer.status(submission) for submission in sorted(made.values())]
        assert dict(entries)["InProgress"]["chunks_done"] == 1
        for state in STATES:
            assert everything(producer, state=state) == [made[state]], state


@pytest.mark.parametrize("limit", [1, 7, 20, 21, 1_000])
def test_pages_hold_every_submission_once_in_order(server: Server, limit: int) -> None:
    with RawProducer(server.port) as producer:
        made = [producer.insert(1) for _ in range(20)]
        assert everything(producer, limit=limit) == made
        assert everything(producer, limit=limit, state="in_progress") == made
        assert page(producer, limit=20)[1] is None, "a page that holds the rest has no cursor"


def test_every_pair_must_match_in_any_state(server: Server) -> None:
    with RawProducer(server.port) as producer, RawConsumer(server.port) as consumer:
        both = one_of_each(producer, consumer, strategic_metadata={"a b&=": 1, "größe": -(2**63)})
        consumer.complete((both["in_progress"], 0), (both["in_progress"], 1))
        producer.wait_for_state(both["in_progress"], "Completed")
        one = one_of_each(producer, consumer, strategic_metadata={"a b&=": 1})
        pairs = [("a b&=", 1), ("größe", -(2**63))]
        assert everything(producer, meta=pairs) == sorted(both.values())
        assert everything(producer, meta=pairs[:1]) == sorted([*both.values(), *one.values()])
        assert everything(producer, meta=[pairs[0], pairs[0]], limit=3) == sorted([*both.values(), *one.values()])
        for state in ("paused", "failed", "cancelled"):
            assert everything(producer, meta=pairs, state=state) == [both[state]], state
            assert everything(producer, meta=pairs[:1], state=state, limit=1) == sorted([both[state], one[state]])
        assert everything(producer, meta=pairs, state="in_progress") == []
        assert everything(producer, meta=pairs[:1], state="in_progress") == [one["in_progress"]]
        assert everything(producer, meta=[("a b&=", 1), ("a b&=", 2)]) == []
        assert everything(producer, meta=[("nobody", 1)]) == []


@pytest.mark.parametrize(
    ("query", "named"),
    [
        ("state=Failed", "state"),
        ("state=", "state"),
        ("state=failed&state=paused", "state"),
        ("limit=0", "limit"),
        ("limit=1001", "limit"),
        ("limit=-1", "limit"),
        ("limit=ten", "limit"),
        ("cursor=", "cursor"),
        ("cursor=-1", "cursor"),
        ("cursor=8000000000000000", "cursor"),
        ("cursor=1&cursor=2", "cursor"),
        ("meta.a=x", "meta.a"),
        ("&".join(f"meta.{name}=1" for name in range(65)), "65 pairs"),
        ("meta.a=", "meta.a"),
        ("meta.a=9223372036854775808", "meta.a"),
        ("meta.a=-9223372036854775809", "meta.a"),
    ],
)
def test_a_query_that_cannot_be_read_is_422_and_named(server: Server, query: str, named: str) -> None:
    with RawProducer(server.port) as producer:
        status, text = producer.ask("GET", f"/producer/submissions?{query}")
        assert status == 422
        assert named.encode() in text


def test_a_query_that_is_not_known_here_is_ignored(server: Server) -> None:
    with RawProducer(server.port) as producer:
        made = producer.insert(1)
        entries, cursor = page(producer, colour="blue")
        assert ([number(entry) for entry in entries], cursor) == ([made], None)


def test_large_metadata_makes_short_pages(server: Server) -> None:
    with RawProducer(server.port) as producer:
        made = [producer.insert(1, metadata=[7] * 400_000) for _ in range(7)]
        entries, cursor = page(producer)
        assert [number(entry) for entry in entries] == made[:3]
        assert cursor is not None
        assert everything(producer) == made


@pytest.mark.parametrize("kill", [False, True])
def test_a_cursor_goes_on_where_it_was_after_a_restart(server: Server, kill: bool) -> None:
    with RawProducer(server.port) as producer:
        made = [producer.insert(1) for _ in range(5)]
        entries, cursor = page(producer, limit=2)
        assert list(map(number, entries)) == made[:2]
    server.restart(kill=kill)
    server.wait_until_healthy()
    with RawProducer(server.port) as producer:
        made.append(producer.insert(1))
        entries, cursor = page(producer, limit=10, cursor=cursor)
        assert (list(map(number, entries)), cursor) == (made[2:], None)


def test_the_features_say_that_there_are_lists_and_retries(server: Server) -> None:
    with RawProducer(server.port) as producer:
        producer._connection.request("GET", "/producer/version")
        answer = producer._connection.getresponse()
        answer.read()
        features = [name.strip() for name in answer.headers["Opsqueue-Features"].split(",")]
        assert {"list", "retry"} <= set(features)

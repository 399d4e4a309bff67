"""The writer's dispatch over real rings, in one process: who is woken, when, and whom a full ring holds up."""

from __future__ import annotations

import struct
from collections.abc import Iterable
from typing import NamedTuple

import pytest

from opsqueue._speedups.board import Board
from opsqueue._speedups.dispatch import Dispatch
from opsqueue._speedups.ring import Channel, Endpoint
from opsqueue._speedups.scripted import ScriptedEngine
from opsqueue.protocol.strategy import (
    MaxSimultaneous,
    Newest,
    Oldest,
    OrElse,
    PreferDistinct,
    SelectOnly,
    Strategy,
    canonical,
)  # fmt: skip

OPEN, CLOSE, RESERVE, COMPLETE, FAIL = 1, 2, 3, 4, 5
RESERVED, REFUSED, DROPPED = 64, 65, 66
MIB = 1024 * 1024
#: The most chunks of one reply.
MOST = 4096


class Event(NamedTuple):
    """What a front-end read: `chunks` are (submission, chunk) that were given or dropped; a refusal has none."""

    kind: int
    connection: int
    chunks: tuple[tuple[int, int], ...]


class Rig:
    """A dispatch with its engine, and the other ends of its rings."""

    def __init__(self, *, capacity: int = 4 * MIB, frontends: int = 1, reservation_ms: int = 600_000) -> None:
        self.engine = ScriptedEngine(seed=1, reservation_ms=reservation_ms)
        channels = [Channel(capacity) for _ in range(frontends)]
        ends = [channel.writer_end() for channel in channels]
        self.frontends = [channel.frontend_end() for channel in channels]
        while not all(end.connected for end in (*ends, *self.frontends)):
            for end in (*ends, *self.frontends):
                end.poll()
        self.dispatch = Dispatch(self.engine, ends, Board(2), 1, lambda *_: None, lambda *_: None)
        self.now_ms = 1000

    def send(self, kind: int, record: bytes, frontend: int = 0) -> None:
        assert self.frontends[frontend].send(kind, record)

    def open(self, connections: Iterable[int], frontend: int = 0) -> None:
        for connection in connections:
            self.send(OPEN, struct.pack("<QII", connection, 0, 0), frontend)
        self.round()

    def close(self, connection: int, frontend: int = 0) -> None:
        self.send(CLOSE, struct.pack("<QII", connection, 0, 0), frontend)

    def ask(self, connection: int, strategy: Strategy, chunks: int = 1, nonce: int = 1, frontend: int = 0) -> None:
        wanted = canonical(strategy)
        self.send(RESERVE, struct.pack("<QQII", connection, nonce, chunks, len(wanted)) + wanted, frontend)

    def complete(self, connection: int, submission: int, chunk: int, frontend: int = 0) -> None:
        self.send(COMPLETE, struct.pack("<QQQQII", connection, submission, chunk, 0, 0, 0), frontend)

    def insert(self, submission: int, chunks: int, metadata: dict[str, int] | None = None) -> None:
        self.engine.add_submission(submission, chunks, 1, metadata or {}, direct=False)

    def round(self, milliseconds: int = 1, unread: int | None = None) -> list[Event]:
        """One of the writer's rounds; what the front-ends read then, except the one that does not read."""
        for frontend in self.frontends:
            frontend.publish()
        while self.dispatch.turn():
            pass
        self.now_ms += milliseconds
        self.engine.advance(self.now_ms)
        while self.engine.work(10**9):
            pass
        self.dispatch.serve()
        events = []
        for index, frontend in enumerate(self.frontends):
            if index != unread:
                events += read(frontend)
        return events


def read(frontend: Endpoint) -> list[Event]:
    frontend.poll()
    events = []
    while (record := frontend.get()) is not None:
        kind, content = record
        (connection,) = struct.unpack_from("<Q", content)
        chunks: list[tuple[int, int]] = []
        if kind == RESERVED:
            (count,) = struct.unpack_from("<I", content, 16)
            chunks = [struct.unpack_from("<QQ", content, 24 + 32 * at) for at in range(count)]
        elif kind == DROPPED:
            chunks = [struct.unpack_from("<QQ", content, 8)]
        events.append(Event(kind, connection, tuple(chunks)))
    frontend.release()
    return events


def given(events: list[Event]) -> dict[int, tuple[tuple[int, int], ...]]:
    """By connection, what it was given."""
    return {event.connection: event.chunks for event in events if event.kind == RESERVED}


def test_alternatives_that_select_the_same_value_wait_once_and_are_served() -> None:
    rig = Rig()
    rig.open([1, 2])
    wanted = OrElse(SelectOnly("k", 1, PreferDistinct("a", Oldest())), SelectOnly("k", 1, Oldest()))
    rig.ask(1, wanted)
    rig.ask(2, wanted)
    assert rig.round() == []
    rig.close(2)
    assert rig.round() == []
    rig.insert(5, 3, {"k": 1})
    assert given(rig.round()) == {1: ((5, 0),)}
    assert rig.dispatch.parked == 0


def test_with_more_indexes_wanted_than_are_kept_everybody_is_served() -> None:
    rig = Rig()
    rig.open(range(1, 201))
    rig.round()
    # for values that nobody has, of 200 keys: each has an index of its own
    for number in range(1, 200):
        rig.ask(number, SelectOnly(f"key{number}", 1, Oldest()))
    rig.round(0)
    assert rig.engine.ranking_count == 64
    rig.insert(5, 3, {"other": 1})
    rig.ask(200, SelectOnly("other", 1, Oldest()))
    served: dict[int, tuple[tuple[int, int], ...]] = {}
    for _ in range(200):  # 10 seconds, in which nothing else happens
        served |= given(rig.round(50))
    assert served == {200: ((5, 0),)}
    rig.insert(6, 1, {"key199": 1})
    for _ in range(200):
        served |= given(rig.round(50))
    assert served[199] == ((6, 0),)


def test_who_waits_for_an_index_is_looked_at_again_at_intervals_and_not_in_every_round() -> None:
    rig = Rig()
    rig.open(range(1, 81))
    for number in range(1, 81):
        rig.ask(number, SelectOnly(f"key{number}", 1, Oldest()))
    rig.round(0)
    timer = rig.engine.next_timer_ms()
    assert timer is not None
    assert 40 <= timer <= 50
    rig.round(10)
    assert rig.engine.next_timer_ms() == timer - 10
    for number in range(1, 81):
        rig.close(number)
    rig.round(100)
    assert rig.engine.next_timer_ms() is None, "nobody waits any more"


def test_limits_that_come_and_go_leave_room_for_others() -> None:
    rig = Rig()
    limit = 0
    for connection in range(1, 140):
        rig.open([connection])
        for nonce in range(1_000):
            limit += 1
            rig.ask(connection, MaxSimultaneous("k", limit, Oldest()), nonce=nonce)
        assert rig.round() == []
        rig.close(connection)
    rig.open([1])
    rig.insert(5, 3, {"k": 1})
    rig.ask(1, PreferDistinct("k", Newest()))
    events = rig.round()
    for _ in range(30):  # as many other indexes have just been asked for as are kept
        events += rig.round(50)
    assert given(events) == {1: ((5, 2),)}


@pytest.mark.parametrize("underlying", [Oldest(), PreferDistinct("host", Oldest())])
def test_a_completion_wakes_only_whom_its_limit_held_back(underlying: Strategy) -> None:
    rig = Rig()
    count = 50
    rig.open(range(1, count + 3))
    rig.insert(5, 100, {"host": 1})
    rig.ask(1, Oldest(), chunks=2)
    (first, second) = given(rig.round())[1]
    # one waits for host 1, which has two chunks in flight and may have one; the others for values that nobody has
    rig.ask(2, MaxSimultaneous("host", 1, underlying))
    for number in range(3, count + 3):
        rig.ask(number, SelectOnly("customer", number, MaxSimultaneous("host", 2, Oldest())))
    assert rig.round() == []
    rig.complete(1, *first)
    assert rig.round() == [], "one chunk is still in flight"
    rig.complete(1, *second)
    assert given(rig.round()) == {2: ((5, 2),)}
    assert rig.dispatch.parked == count
    rig.insert(6, 1, {"customer": 7, "host": 9})
    assert given(rig.round()) == {7: ((6, 0),)}


def test_a_selected_value_behind_a_limit_is_served_when_another_values_chunk_frees_the_limit() -> None:
    rig = Rig()
    rig.open([1, 2])
    rig.insert(5, 1, {"customer": 1, "host": 1})
    rig.insert(6, 1, {"customer": 2, "host": 1})
    rig.ask(1, SelectOnly("customer", 1, Oldest()))
    assert given(rig.round()) == {1: ((5, 0),)}
    rig.ask(2, SelectOnly("customer", 2, MaxSimultaneous("host", 1, Oldest())))
    assert rig.round() == []
    rig.complete(1, 5, 0)
    assert given(rig.round()) == {2: ((6, 0),)}


def test_a_front_end_that_does_not_read_holds_up_no_other() -> None:
    rig = Rig(capacity=MIB, frontends=2)
    count = 6_000
    rig.open(range(1, count + 1), frontend=0)
    rig.open([1], frontend=1)
    for number in range(1, count + 1):
        rig.ask(number, SelectOnly("customer", number, Oldest()), frontend=0)
        if number % 2_000 == 0:
            rig.round()
    rig.ask(1, SelectOnly("mine", 1, Oldest()), frontend=1)
    rig.insert(1, 100_000, {"greedy": 1})
    for nonce in range(2, 12):  # more than the ring takes
        rig.ask(1, SelectOnly("greedy", 1, Oldest()), chunks=MOST, nonce=nonce, frontend=0)
    rig.round(unread=0)
    for number in range(1, count + 1):
        rig.insert(10 + number, 1, {"customer": number})
    rig.insert(1_000_000, 1, {"mine": 1})
    assert given(rig.round(unread=0)) == {1: ((1_000_000, 0),)}
    # and when it reads again, its own are served
    served: set[tuple[int, int]] = set()
    for _ in range(60):
        for event in rig.round():
            served.update(event.chunks)
    assert {(10 + number, 0) for number in range(1, count + 1)} <= served
    assert rig.dispatch.parked == 0


def test_a_notice_never_comes_after_the_chunk_was_given_anew() -> None:
    rig = Rig(capacity=MIB, reservation_ms=1_000)
    rig.open([1])
    rig.insert(5, 10 * MOST)
    for nonce in range(10):
        rig.ask(1, Oldest(), chunks=MOST, nonce=nonce)
        rig.round()
    for _ in range(20):  # all expire, and more notices come of it than the ring takes
        rig.round(400, unread=0)
    events = read(rig.frontends[0])
    rig.ask(1, Newest(), chunks=MOST, nonce=99)
    while not given(events):
        news = rig.round()
        assert news, "nothing happens any more"
        events += news
    events += rig.round()
    at = next(place for place, event in enumerate(events) if event.kind == RESERVED)
    assert sum(event.kind == DROPPED for event in events[:at]) == 10 * MOST
    assert all(event.kind != DROPPED for event in events[at:])


def test_a_ring_too_small_for_the_largest_reply_is_refused() -> None:
    channel = Channel(256 * 1024)
    with pytest.raises(ValueError, match="a reply has up to"):
        Dispatch(ScriptedEngine(seed=1), [channel.writer_end()], Board(2), 1, lambda *_: None, lambda *_: None)

"""Reservations in time: nothing fires early, nothing is forgotten, however far away or however many at once."""

from __future__ import annotations

import random

import pytest

from opsqueue._speedups.board import Board
from opsqueue._speedups.counters import Counter
from opsqueue._speedups.scripted import ScriptedEngine

HOLDER = 1
TICK_MS = 4


def ready_engine(**limits: int) -> ScriptedEngine:
    engine = ScriptedEngine(seed=1, **limits)
    engine.advance(1_000)
    engine.open_connection(HOLDER, 0)
    return engine


@pytest.mark.parametrize(
    "delay_ms", [1, 3, 4, 5, 1019, 1020, 1024, 1025, 262_143, 262_144, 67_108_865, 17_179_869_184, 20_000_000_000]
)
def test_a_chunk_that_is_put_off_comes_back_in_time_and_not_early(delay_ms: int) -> None:
    engine = ready_engine()
    engine.add_submission(1, 1, 1, {}, direct=False)
    engine.reserve_chunks(HOLDER, b"O", 1)
    assert engine.retry_chunk_later(HOLDER, 1, 0, delay_ms)
    due = 1_000 + delay_ms
    now, wakeups = 1_000, 0
    while engine.available == 0:
        wait = engine.next_timer_ms()
        assert wait is not None
        assert now + wait <= due + TICK_MS
        now += max(wait, 1)
        wakeups += 1
        engine.advance(now)
    assert due <= now <= due + TICK_MS
    assert wakeups <= 8


def test_a_jump_of_the_clock_fires_everything_that_was_due_and_nothing_else() -> None:
    engine = ready_engine(reservation_ms=10**12)
    chance = random.Random(5)
    engine.add_submission(1, 3000, 1, {}, direct=False)
    due = {}
    for _, chunk, *_ in engine.reserve_chunks(HOLDER, b"O", 3000):
        due[chunk] = chance.choice([chance.randrange(1, 3_000), chance.randrange(1, 10**6), chance.randrange(1, 10**9)])
        engine.retry_chunk_later(HOLDER, 1, chunk, due[chunk])
    now = 1_000
    for step in (4, 1_020, 300_000, 4, 700_000, 4, 10**8, 5 * 10**8, 10**9):
        now += step
        engine.advance(now)
        assert engine.available == sum(1 for at in due.values() if -(-(1_000 + at) // TICK_MS) <= now // TICK_MS)
    assert engine.available == 3000


def test_many_expiries_at_once_are_taken_in_bounded_turns() -> None:
    engine = ready_engine(reservation_ms=500)
    engine.add_submission(1, 10_000, 1, {}, direct=False)
    assert len(engine.reserve_chunks(HOLDER, b"O", 10_000)) == 10_000
    assert engine.next_timer_ms() == 500
    assert engine.advance(1_500)
    assert engine.available == 4096
    assert engine.next_timer_ms() == 0
    assert engine.advance(1_500)
    assert not engine.advance(1_500)
    assert engine.available == 10_000
    assert engine.counter(Counter.CHUNKS_EXPIRED) == 10_000
    assert len(engine.take_notices()) == 10_000
    assert engine.next_timer_ms() is None


def test_extending_moves_the_deadline_and_nothing_else() -> None:
    engine = ready_engine(reservation_ms=500)
    engine.add_submission(1, 1, 1, {}, direct=False)
    engine.reserve_chunks(HOLDER, b"O", 1)
    for now in range(1_400, 5_000, 400):
        engine.advance(now)
        assert engine.extend_held(HOLDER, 1, 0)
    assert engine.counter(Counter.CHUNKS_RETRIED) == 0
    engine.advance(now + 500)
    assert engine.take_notices() == [(HOLDER, 1, 0, 4)]


def test_counting_on_a_board_goes_on_from_its_counters_and_sets_its_gauges() -> None:
    board = Board(2)
    board.put(1, Counter.CHUNKS_COMPLETED, 40)
    board.put(1, Counter.CHUNKS_BACKLOG, 999)
    engine = ready_engine()
    engine.add_submission(1, 3, 5, {}, direct=False)
    engine.use_board(board, 1)
    engine.reserve_chunks(HOLDER, b"O", 2)
    engine.complete_chunk(HOLDER, 1, 0)
    figures = (Counter.CHUNKS_COMPLETED, Counter.CHUNKS_BACKLOG, Counter.OPERATIONS_BACKLOG, Counter.CHUNKS_RESERVED)
    assert [board.get(1, counter) for counter in figures] == [41, 2, 10, 1]
    with pytest.raises(IndexError):
        engine.use_board(board, 2)

"""Submissions at the edges of blocks and far beyond memory's worth of chunks: order, folding, freeing."""

from __future__ import annotations

import random
import time

import pytest

from opsqueue._speedups.counters import Counter
from opsqueue._speedups.scripted import ScriptedEngine
from opsqueue.server.writer.batch import LoadedSubmission, State

HOLDER = 1
HUGE = 10**9


@pytest.fixture
def engine() -> ScriptedEngine:
    engine = ScriptedEngine(seed=3)
    engine.advance(10)
    engine.open_connection(HOLDER, 0)
    return engine


def chunks(taken: list[tuple[int, int, int, int, int]]) -> list[int]:
    return [chunk for _, chunk, _, _, _ in taken]


def everything_folded(engine: ScriptedEngine) -> list[tuple[int, int, bytes, bytes]]:
    rows: list[tuple[int, int, bytes, bytes]] = []
    while engine.fold_remaining():
        taken = engine.fold_take(3)
        engine.fold_committed(taken)
        rows += taken
    return rows


@pytest.mark.parametrize("total", [1, 63, 64, 65, 127, 128, 4095, 4096, 4097, 8191, 8192, 8193, 12289])
@pytest.mark.parametrize("strategy", [b"O", b"N", b"R"])
def test_every_chunk_is_handed_out_once_and_in_order(engine: ScriptedEngine, total: int, strategy: bytes) -> None:
    engine.add_submission(5, total, 1, {}, direct=False)
    got: list[int] = []
    while taken := chunks(engine.reserve_chunks(HOLDER, strategy, 100)):
        got += taken
    expected = list(range(total))
    if strategy == b"N":
        expected.reverse()
    elif strategy == b"R":
        assert total < 100 or got != expected
        got.sort()
    assert got == expected
    for chunk in got:
        assert engine.complete_chunk(HOLDER, 5, chunk)
    assert engine.taken_ended() == [(5, State.COMPLETED, total, None, None)]
    engine.ended_committed(5)
    assert not engine.holds(5)


@pytest.mark.parametrize("total", [4095, 4096, 4097, 8193])
def test_first_and_last_are_right_whatever_is_done_between(engine: ScriptedEngine, total: int) -> None:
    chance = random.Random(total)
    engine.add_submission(5, total, 1, {}, direct=False)
    left = list(range(total))
    while left:
        assert chunks(engine.reserve_chunks(HOLDER, b"O", 1)) == [left[0]]
        assert engine.release_held(HOLDER, 5, left[0])
        assert chunks(engine.reserve_chunks(HOLDER, b"N", 1)) == [left[-1]]
        assert engine.release_held(HOLDER, 5, left[-1])
        ends = [left[0], left[-1]] if chance.random() < 0.3 else []
        for chunk in {*ends, *chance.sample(left, min(len(left), 97))}:
            assert engine.complete_chunk(HOLDER, 5, chunk)
            left.remove(chunk)
    assert engine.taken_ended() == [(5, State.COMPLETED, total, None, None)]


def test_a_submission_of_a_billion_chunks_is_inserted_as_fast_as_a_small_one(engine: ScriptedEngine) -> None:
    begun = time.perf_counter()
    engine.add_submission(5, HUGE, 1, {}, direct=False)
    assert time.perf_counter() - begun < 0.05
    assert engine.available == HUGE
    assert engine.counter(Counter.CHUNKS_BACKLOG) == HUGE
    assert chunks(engine.reserve_chunks(HOLDER, b"O", 3)) == [0, 1, 2]
    assert chunks(engine.reserve_chunks(HOLDER, b"N", 3)) == [HUGE - 1, HUGE - 2, HUGE - 3]
    assert engine.complete_chunk(HOLDER, 5, HUGE // 2)
    assert not engine.complete_chunk(HOLDER, 5, HUGE)
    engine.fold_start()
    ((submission, block, done, attempts),) = engine.fold_take(10)
    assert (submission, block, attempts) == (5, HUGE // 2 // 4096, b"")
    assert [bit for bit in range(4096) if done[bit // 8] >> bit % 8 & 1] == [HUGE // 2 % 4096]


def test_random_chunks_come_evenly_from_all_of_a_billion(engine: ScriptedEngine) -> None:
    engine.add_submission(5, HUGE, 1, {}, direct=False)
    tenths = [0] * 10
    for chunk in chunks(engine.reserve_chunks(HOLDER, b"R", 4096)):
        tenths[chunk * 10 // HUGE] += 1
    assert all(300 < tenth < 520 for tenth in tenths), tenths


def test_freeing_a_huge_submission_is_done_in_slices(engine: ScriptedEngine) -> None:
    blocks = 20_000
    engine.add_submission(5, blocks * 4096, 1, {}, direct=False)
    for block in range(blocks):
        assert engine.complete_chunk(HOLDER, 5, block * 4096)
    assert engine.begin_cancel(5)
    engine.finish_cancel(5)
    engine.fold_start()
    folded = 0
    while engine.fold_remaining():
        rows = engine.fold_take(128)
        engine.fold_committed(rows)
        folded += len(rows)
    assert folded == blocks
    assert not engine.holds(5)
    slices = 0
    while engine.work(1):
        slices += 1
    assert slices > 50
    assert not engine.work(1)


def test_reservations_of_a_failed_submission_are_dropped_in_slices_and_counted_at_once(engine: ScriptedEngine) -> None:
    other = 2
    engine.open_connection(other, 4)
    engine.add_submission(5, 10_000, 1, {"customer": 7}, direct=False)
    (first,) = chunks(engine.reserve_chunks(HOLDER, b"O", 1))
    held = chunks(engine.reserve_chunks(other, b"O", 4096))
    assert engine.in_flight_of("customer", 7) == 4097
    assert engine.fail_whole_submission(HOLDER, 5, first, b"wrong")
    assert engine.in_flight_of("customer", 7) == 0
    assert engine.counter(Counter.CHUNKS_RESERVED) == 0
    told = engine.take_notices()
    assert len(told) == 1024
    while engine.work(1):
        told += engine.take_notices()
    told += engine.take_notices()
    assert sorted(chunk for _, _, chunk, _ in told) == held
    assert not engine.complete_chunk(other, 5, held[0])
    assert engine.next_timer_ms() is None


@pytest.mark.parametrize(
    ("block", "done", "attempts", "complaint"),
    [
        (3, b"", b"", "has 2 blocks"),
        (0, b"\x00" * 511, b"", "511 bytes, which are not the bits of 4096 chunks"),
        (1, b"\x02", b"", "1 bytes, which are not the bits of 1 chunks"),
        (1, b"\x00", b"\x01\x01\x01", "attempts are damaged"),
        (1, b"\x00", b"\x00\x01", "attempts are damaged"),
        (1, b"\x00", b"\x80\x80\x80", "attempts are damaged"),
    ],
)
def test_a_block_that_cannot_be_what_was_written_is_refused(
    engine: ScriptedEngine, block: int, done: bytes, attempts: bytes, complaint: str
) -> None:
    engine.load_submissions([LoadedSubmission(5, State.IN_PROGRESS, 4097, 1, False, {})])
    with pytest.raises(ValueError, match=complaint):
        engine.load_blocks([(5, block, 0, done, attempts, 4097)])


def test_a_block_that_comes_twice_or_for_nobody_is_refused(engine: ScriptedEngine) -> None:
    engine.load_submissions([LoadedSubmission(5, State.IN_PROGRESS, 4097, 1, False, {})])
    engine.load_blocks([(5, 1, 0, b"", b"", 4097)])
    with pytest.raises(ValueError, match="comes twice"):
        engine.load_blocks([(5, 1, 0, b"", b"", 4097)])
    with pytest.raises(ValueError, match="no such submission"):
        engine.load_blocks([(6, 1, 0, b"", b"", 4097)])


@pytest.mark.parametrize(
    "row",
    [
        b"\x00\x05\x00",
        b"\x04\x05\x00",
        b"\x21\x05\x00",
        b"\x11\x00",
        b"\x01",
        b"\x01\x05",
        b"\x01\x85",
        b"\x01" + b"\xff" * 9 + b"\x00",
    ],
)
def test_a_damaged_log_row_is_refused(engine: ScriptedEngine, row: bytes) -> None:
    engine.load_submissions([LoadedSubmission(5, State.IN_PROGRESS, 10, 1, False, {})])
    with pytest.raises(ValueError, match="damaged"):
        engine.events(row)


def test_a_log_row_about_a_chunk_that_does_not_exist_is_refused(engine: ScriptedEngine) -> None:
    engine.load_submissions([LoadedSubmission(5, State.IN_PROGRESS, 10, 1, False, {})])
    with pytest.raises(ValueError, match="names chunk 10 of submission 5"):
        engine.events(b"\x01\x05\x0a")


def test_what_the_log_completes_ends_as_completed_after_a_restart(engine: ScriptedEngine) -> None:
    engine.load_submissions([LoadedSubmission(5, State.IN_PROGRESS, 2, 1, False, {})])
    engine.events(b"\x01\x05\x00\x11\x01\x01\x09\x00")
    assert engine.taken_ended() == [(5, State.COMPLETED, 2, None, None)]
    assert engine.taken_events() == b""


def test_a_chunk_found_at_its_retry_limit_fails_its_submission_after_the_grace_time() -> None:
    engine = ScriptedEngine(max_retries=2, grace_ms=2000)
    engine.advance(10_000)
    engine.load_submissions([LoadedSubmission(5, State.IN_PROGRESS, 2, 1, False, {})])
    engine.events(b"\x02\x05\x01\x12\x01")
    assert engine.available == 1
    engine.advance(11_999)
    assert engine.taken_ended() == []
    engine.advance(12_000)
    assert engine.taken_ended() == [(5, State.FAILED, 0, 1, "Reservation expired")]


def test_an_ended_submission_stays_until_the_blocks_that_the_log_touches_are_folded(engine: ScriptedEngine) -> None:
    engine.load_submissions([LoadedSubmission(5, State.FAILED, 10, 1, False, {"a": 1})])
    engine.load_submissions([LoadedSubmission(6, State.CANCELLED, 10, 1, False, {})])
    engine.events(b"\x01\x05\x03")
    assert not engine.work(10**9)
    assert engine.holds(5)
    assert not engine.holds(6)
    engine.fold_start()
    rows = engine.fold_take(5)
    assert rows == ((5, 0, b"\x08\x00", b""),)
    assert engine.holds(5), "the file has not got them yet"
    engine.fold_failed(rows)
    assert engine.fold_remaining() == 1
    assert engine.holds(5)
    assert engine.fold_take(5) == rows
    assert engine.fold_remaining() == 0
    engine.fold_committed(rows)
    assert not engine.holds(5)


def test_a_second_fold_may_not_begin_while_one_is_under_way(engine: ScriptedEngine) -> None:
    engine.add_submission(5, 10, 1, {}, direct=False)
    engine.complete_chunk(HOLDER, 5, 1)
    engine.fold_start()
    with pytest.raises(RuntimeError, match="1 blocks are still to be taken"):
        engine.fold_start()


def test_a_fold_gives_blocks_in_key_order_as_they_are_then(engine: ScriptedEngine) -> None:
    engine.add_submission(9, 3, 1, {}, direct=False)
    engine.add_submission(5, 4096 * 200, 1, {}, direct=False)
    for chunk in (4096 * 150, 4096 * 63, 4096 * 64, 7):
        engine.complete_chunk(HOLDER, 5, chunk)
    engine.complete_chunk(HOLDER, 9, 0)
    engine.fold_start()
    engine.complete_chunk(HOLDER, 9, 1)
    engine.complete_chunk(HOLDER, 5, 4096 * 199)
    rows = everything_folded(engine)
    assert [(submission, block) for submission, block, _, _ in rows] == [(5, 0), (5, 63), (5, 64), (5, 150), (9, 0)]
    assert rows[-1][2] == b"\x03"
    engine.fold_start()
    assert [row[:2] for row in everything_folded(engine)] == [(5, 199), (9, 0)]


def test_a_million_submissions_of_one_chunk_fit_in_300_mib_and_cost_no_more_each() -> None:
    engine = ScriptedEngine(seed=1)
    before = resident_bytes()
    for submission in range(1_000_000):
        engine.add_submission(submission, 1, 1, {}, direct=False)
    assert resident_bytes() - before < 300 * 1024 * 1024


def resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096

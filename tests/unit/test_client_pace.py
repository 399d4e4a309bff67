"""How many chunks a consumer's loop reserves ahead."""

from __future__ import annotations

from opsqueue.client.pace import LONGEST_WAIT_S, SLACK_S, Pace


def a_pace(chunk_s: float, fetch_s: float = 0.0, reservation_s: float | None = 600.0, limit: int = 32) -> Pace:
    pace = Pace(limit, reservation_s)
    for _ in range(20):
        pace.processed(chunk_s)
        pace.fetched(fetch_s)
        pace.answered(0.0005)
    return pace


def test_nothing_is_reserved_ahead_before_the_first_chunk_has_ended() -> None:
    pace = Pace(32, 600.0)
    assert pace.wanted(0, None) == 0
    assert pace.due_s(0, 5.0) is None


def test_nothing_is_reserved_ahead_where_the_limit_is_zero() -> None:
    assert a_pace(0.001, limit=0).wanted(0, None) == 0


def test_short_chunks_are_reserved_many_at_a_time_but_no_more_than_the_limit() -> None:
    assert a_pace(0.0001).wanted(0, None) == 32
    assert a_pace(0.0).wanted(0, None) == 32


def test_half_of_what_is_ahead_is_used_up_before_more_is_asked_for() -> None:
    pace = a_pace(0.0001)
    assert pace.wanted(17, None) == 0
    assert pace.wanted(16, None) == 16


def test_a_chunk_is_asked_for_just_before_the_running_one_ends() -> None:
    pace = a_pace(0.1, fetch_s=0.03)
    assert pace.wanted(0, 0.0) == 0
    due_s = pace.due_s(0, 0.0)
    assert due_s is not None
    assert 0.1 - 1.5 * 0.0305 - SLACK_S - 0.001 < due_s < 0.1 - 0.03
    assert pace.wanted(0, due_s + 0.001) == 1
    assert pace.wanted(1, due_s + 0.001) == 0


def test_a_slow_store_is_covered_by_more_chunks() -> None:
    assert a_pace(0.01, fetch_s=0.2).wanted(0, 0.0) >= 20


def test_chunks_that_take_long_beside_the_reservation_are_not_reserved_ahead() -> None:
    assert a_pace(7.0).wanted(0, 6.999) == 0
    assert a_pace(0.5, reservation_s=10.0).wanted(0, 0.499) == 0


def test_what_waits_goes_back_after_a_second_or_a_small_share_of_the_reservation() -> None:
    assert a_pace(0.1).longest_wait_s == LONGEST_WAIT_S
    assert a_pace(0.1, reservation_s=10.0).longest_wait_s == 0.1


def test_answers_that_had_to_wait_for_work_do_not_count_as_slow() -> None:
    pace = a_pace(0.1)
    before = pace.arrival_s
    pace.answered(30.0)
    assert pace.arrival_s < before * 1.2 + 0.001

"""Submission ids: never repeated, never going back, whatever the clock and restarts do."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opsqueue.server.writer.ids import SubmissionIds

MILLISECONDS = st.integers(min_value=0, max_value=(1 << 41) - 1_000_000)


def milliseconds(submission: int) -> int:
    return submission >> 22


@given(instance=st.integers(0, 1023), now_ms=MILLISECONDS)
def test_an_id_is_milliseconds_instance_and_sequence_below_two_to_the_63(instance: int, now_ms: int) -> None:
    ids = SubmissionIds(instance, 0)
    made = ids.next(now_ms + 1)
    assert made == ((now_ms + 1) << 22) | (instance << 12)
    assert made < 1 << 63


@given(st.lists(st.lists(MILLISECONDS, max_size=20), max_size=6))
def test_ids_grow_over_any_steps_of_the_clock_and_any_restarts(lives: list[list[int]]) -> None:
    stored_mark = 0
    last = 0
    for clock in lives:
        ids = SubmissionIds(7, stored_mark)
        for now_ms in clock:
            made = ids.next(now_ms)
            assert made > last
            last = made
            mark = ids.mark_to_store()  # what the batch that carries this id stores with it
            if mark is not None:
                stored_mark = mark
                ids.mark_stored(mark)
            assert milliseconds(made) <= stored_mark


def test_more_than_4096_ids_in_a_millisecond_go_on_in_the_next() -> None:
    ids = SubmissionIds(0, 0)
    made = [ids.next(1_000) for _ in range(10_000)]
    assert made == sorted(set(made))
    assert milliseconds(made[-1]) == 1_002


def test_a_mark_is_asked_for_only_when_the_stored_one_no_longer_covers() -> None:
    ids = SubmissionIds(0, 5_000)
    ids.next(4_000)
    mark = ids.mark_to_store()
    assert mark is not None
    assert mark > 5_000
    ids.mark_stored(mark)
    ids.next(4_100)
    assert ids.mark_to_store() is None


@pytest.mark.parametrize("instance", [-1, 1024])
def test_an_instance_out_of_range_is_refused(instance: int) -> None:
    with pytest.raises(ValueError, match="from 0 to 1023"):
        SubmissionIds(instance, 0)

"""Strategies: distribution of Random, fairness of PreferDistinct, building and dropping of indexes, refusals."""

from __future__ import annotations

import random
from collections import Counter as Multiset

import pytest

from opsqueue._speedups.scripted import ScriptedEngine
from opsqueue.protocol.strategy import (
    MaxSimultaneous,
    Newest,
    Oldest,
    OrElse,
    PreferDistinct,
    Random,
    SelectOnly,
    Strategy,
    canonical,
)

HOLDER = 1
MANY = 25_000


@pytest.fixture
def engine() -> ScriptedEngine:
    engine = ScriptedEngine(seed=42)
    engine.advance(10)
    engine.open_connection(HOLDER, 0)
    return engine


def draw(engine: ScriptedEngine, strategy: Strategy) -> int:
    """The submission that a reservation takes from; the chunk is given back."""
    ((submission, chunk, _, _, _),) = engine.reserve_chunks(HOLDER, canonical(strategy), 1)
    assert engine.release_held(HOLDER, submission, chunk)
    return submission


def chi_square(seen: Multiset[int], expected: dict[int, float]) -> float:
    assert set(seen) <= set(expected)
    return sum((seen[key] - amount) ** 2 / amount for key, amount in expected.items())


@pytest.mark.parametrize(
    "strategy",
    [Random(), PreferDistinct("customer", Random()), PreferDistinct("customer", PreferDistinct("kind", Random()))],
)
def test_random_spreads_over_submissions_in_proportion_to_their_available_chunks(
    engine: ScriptedEngine, strategy: Strategy
) -> None:
    sizes = {1: 1, 2: 10, 3: 100, 4: 1000, 5: 5000}
    for submission, size in sizes.items():
        engine.add_submission(submission, size, 1, {"customer": submission % 2, "kind": submission % 3}, direct=False)
    draws = 20_000
    seen = Multiset(draw(engine, strategy) for _ in range(draws))
    expected = {submission: draws * size / sum(sizes.values()) for submission, size in sizes.items()}
    assert chi_square(seen, expected) < 30  # 4 degrees of freedom: one in 200,000


@pytest.mark.parametrize("strategy", [Random(), PreferDistinct("customer", Random()), SelectOnly("kind", 0, Random())])
def test_random_draws_submission_and_chunk_independently(engine: ScriptedEngine, strategy: Strategy) -> None:
    for submission in range(1, 11):
        engine.add_submission(submission, 10, 1, {"customer": 5, "kind": 0}, direct=False)
    seen: Multiset[int] = Multiset()
    for _ in range(20_000):
        ((submission, chunk, _, _, _),) = engine.reserve_chunks(HOLDER, canonical(strategy), 1)
        assert engine.release_held(HOLDER, submission, chunk)
        seen[10 * submission + chunk] += 1
    assert chi_square(seen, dict.fromkeys(range(10, 110), 200.0)) < 185  # 99 degrees of freedom: one in 3 million


def test_random_takes_every_chunk_of_a_submission_as_often(engine: ScriptedEngine) -> None:
    engine.add_submission(1, 40, 1, {}, direct=False)
    seen: Multiset[int] = Multiset()
    for _ in range(20_000):
        ((_, chunk, _, _, _),) = engine.reserve_chunks(HOLDER, b"R", 1)
        engine.release_held(HOLDER, 1, chunk)
        seen[chunk] += 1
    assert chi_square(seen, dict.fromkeys(range(40), 500.0)) < 100  # 39 degrees of freedom


def test_one_request_for_several_chunks_ranks_again_after_each(engine: ScriptedEngine) -> None:
    for submission, customer in ((1, 7), (2, 8), (3, 7), (4, 9)):
        engine.add_submission(submission, 10, 1, {"customer": customer}, direct=False)
    engine.add_submission(5, 2, 1, {}, direct=False)
    taken = engine.reserve_chunks(HOLDER, canonical(PreferDistinct("customer", Oldest())), 9)
    # nobody's customer counts as none in flight: 5 is taken until it has no more
    assert [submission for submission, *_ in taken] == [1, 2, 4, 5, 5, 1, 2, 4, 1]
    engine.close_connection(HOLDER, lost=False)
    engine.open_connection(HOLDER, 0)
    taken = engine.reserve_chunks(HOLDER, canonical(PreferDistinct("customer", Newest())), 7)
    assert [submission for submission, *_ in taken] == [5, 5, 4, 3, 2, 4, 3]


def test_a_large_backlog_is_indexed_in_slices_and_events_meanwhile_are_not_lost(engine: ScriptedEngine) -> None:
    strategy = canonical(PreferDistinct("customer", Oldest()))
    chance = random.Random(1)
    customer = {submission: chance.randrange(100) for submission in range(1, MANY + 1)}
    for submission, value in customer.items():
        engine.add_submission(submission, 2, 1, {"customer": value}, direct=False)
    assert engine.reserve_chunks(HOLDER, strategy, 10) == []
    assert not engine.is_ready(strategy)
    in_flight: Multiset[int] = Multiset()
    left = Multiset({value: 2 * count for value, count in Multiset(customer.values()).items()})

    def take(submission: int) -> None:
        in_flight[customer[submission]] += 1
        left[customer[submission]] -= 1

    slices = 0
    while engine.work(1):
        slices += 1
        for submission, *_ in engine.reserve_chunks(HOLDER, b"R", 5) + engine.reserve_chunks(HOLDER, b"N", 1):
            take(submission)
        engine.add_submission(MANY + slices, 2, 1, {"customer": -slices}, direct=False)
        customer[MANY + slices] = -slices
        left[-slices] += 2
    assert slices > 50
    assert engine.is_ready(strategy)
    for submission, *_ in engine.reserve_chunks(HOLDER, strategy, 3000):
        assert in_flight[customer[submission]] == min(in_flight[value] for value, count in left.items() if count)
        take(submission)


def test_at_most_64_indexes_are_kept_and_the_one_idle_longest_goes(engine: ScriptedEngine) -> None:
    engine.add_submission(1, 1000, 1, {"k3": 1}, direct=False)
    for number in range(200):
        engine.advance(1000 + 20 * number)
        (taken,) = engine.reserve_chunks(HOLDER, canonical(PreferDistinct(f"k{number}", Oldest())), 1)
        assert taken[0] == 1
        assert engine.ranking_count == min(number + 1, 64)
    assert engine.reserve_chunks(HOLDER, canonical(PreferDistinct("k3", Oldest())), 1)
    assert engine.ranking_count == 64


@pytest.mark.parametrize(
    ("strategy", "complaint"),
    [
        (b"", "byte 0 of 0"),
        (b"X", "one of O, N, R"),
        (b"OO", "must be the end"),
        (b"P\x01\x00", "length"),
        (b"P\x01\x00\xffO", "not UTF-8"),
        (b"P\x01\x00aO" + b"O", "must be the end"),
        (b"P\x01\x00a" * 9 + b"O", "more than 8 deep"),
        (b"H\x01\x00", "length"),
        (b"S\x01\x00a\x01", "cut off"),
        (b"M\x01\x00a" + bytes(8) + b"O", "from 1 to"),
        (canonical(PreferDistinct("a", OrElse(Oldest(), Newest()))), "put OrElse outside"),
        (canonical(MaxSimultaneous("a", 1, PreferDistinct("b", Oldest()))), "prefer a first"),
        (canonical(MaxSimultaneous("a", 1, MaxSimultaneous("b", 1, Oldest()))), "one limit is possible"),
    ],
)
def test_a_strategy_that_cannot_be_served_is_refused_with_its_reason(
    engine: ScriptedEngine, strategy: bytes, complaint: str
) -> None:
    with pytest.raises(ValueError, match=complaint):
        engine.reserve_chunks(HOLDER, strategy, 1)
    assert complaint in engine.refusal


def test_a_value_that_nobody_has_is_not_taken_for_no_value(engine: ScriptedEngine) -> None:
    engine.add_submission(1, 2, 1, {"a": 1}, direct=False)
    both = SelectOnly("a", 1, SelectOnly("b", 1, Oldest()))
    assert engine.reserve_chunks(HOLDER, canonical(both), 2) == []
    assert [chunk[1] for chunk in engine.reserve_chunks(HOLDER, canonical(OrElse(both, Newest())), 2)] == [1, 0]


def test_eight_nested_keys_are_served(engine: ScriptedEngine) -> None:
    engine.add_submission(1, 1, 1, {"a": 1}, direct=False)
    engine.add_submission(2, 1, 1, {"a": 1}, direct=False)
    strategy = b"P\x01\x00a" * 8 + b"N"
    assert [taken[0] for taken in engine.reserve_chunks(HOLDER, strategy, 5)] == [2, 1]


def test_metadata_keys_and_values_of_forgotten_submissions_are_forgotten(engine: ScriptedEngine) -> None:
    strategy = canonical(PreferDistinct("shared", Oldest()))
    for submission in range(1, 2000):
        engine.add_submission(submission, 1, 1, {f"key{submission}": submission, "shared": submission}, direct=False)
        assert engine.reserve_chunks(HOLDER, strategy, 1) == [(submission, 0, 0, 0, 0)]
        assert engine.complete_chunk(HOLDER, submission, 0)
        engine.ended_committed(submission)
        assert engine.in_flight_of("shared", submission) == 0
    assert engine.submission_count == 0


@pytest.mark.parametrize(
    ("total", "metadata", "complaint"),
    [(0, {}, "has 0 chunks"), (2**60, {}, "chunks; 1 to"), (1, {"a": 2**63}, "not a 64-bit integer")],
)
def test_a_submission_that_cannot_be_is_refused_and_leaves_nothing(
    engine: ScriptedEngine, total: int, metadata: dict[str, int], complaint: str
) -> None:
    with pytest.raises(ValueError, match=complaint):
        engine.add_submission(1, total, 1, metadata, direct=False)
    assert not engine.holds(1)
    assert engine.submission_count == engine.promised == 0


def test_a_submission_may_not_come_twice(engine: ScriptedEngine) -> None:
    engine.add_submission(1, 1, 1, {}, direct=False)
    with pytest.raises(ValueError, match="is there already"):
        engine.add_submission(1, 1, 1, {}, direct=False)

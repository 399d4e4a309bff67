"""WIRE section 4 over raw sockets: which chunk comes first, for each strategy."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from tests.acceptance.conftest import Serve, Wire
from tests.support.raw_consumer import ChunkId, RawConsumer

#: Draws of the tests of Random. With bounds of more than six standard deviations, one run in a billion fails by chance.
DRAWS = 400


def distinct(key: str, underlying: Any = "Oldest") -> dict[str, Any]:
    return {"PreferDistinct": {"meta_key": key, "underlying": underlying}}


def of(wire: Wire, count: int = 1, **values: int) -> int:
    """A submission with these values."""
    return wire.producer.insert(count, strategic_metadata=values)


def submissions(chunks: list[ChunkId]) -> list[int]:
    return [chunk[0] for chunk in chunks]


# --- Oldest and Newest ---


def test_oldest_takes_submissions_and_chunks_in_ascending_order(wire: Wire) -> None:
    made = [wire.producer.insert(2) for _ in range(3)]
    consumer = wire.consumer("release")
    assert consumer.reserve_ids(3) == [(made[0], 0), (made[0], 1), (made[1], 0)]
    consumer.about("ReleaseChunk", (made[0], 1))
    assert consumer.reserve_ids(2) == [(made[0], 1), (made[1], 1)]
    consumer.about("ReleaseChunk", (made[1], 0))
    consumer.about("ReleaseChunk", (made[0], 0))
    assert consumer.reserve_ids(9) == [(made[0], 0), (made[1], 0), (made[2], 0), (made[2], 1)]


def test_newest_takes_submissions_and_chunks_in_descending_order(wire: Wire) -> None:
    made = [wire.producer.insert(2) for _ in range(3)]
    consumer = wire.consumer("release")
    assert consumer.reserve_ids(3, "Newest") == [(made[2], 1), (made[2], 0), (made[1], 1)]
    consumer.about("ReleaseChunk", (made[2], 0))
    assert consumer.reserve_ids(2, "Newest") == [(made[2], 0), (made[1], 0)]
    later = wire.producer.insert(1)
    assert consumer.reserve_ids(9, "Newest") == [(later, 0), (made[0], 1), (made[0], 0)]


def test_strategies_of_one_connection_do_not_disturb_each_other(wire: Wire) -> None:
    first, second = of(wire, 3, k=1), of(wire, 3, k=2)
    consumer = wire.consumer()
    assert consumer.reserve_ids(1, "Newest") == [(second, 2)]
    assert consumer.reserve_ids(1, distinct("k", "Newest")) == [(first, 2)]
    assert consumer.reserve_ids(1, "Oldest") == [(first, 0)]
    assert consumer.reserve_ids(1, distinct("k", "Oldest")) == [(second, 0)]
    assert sorted(consumer.reserve_ids(2, "Random")) == [(first, 1), (second, 1)]


# --- Random ---


def draw(consumer: RawConsumer, strategy: Any) -> list[ChunkId]:
    """Chunks as drawn one by one from the same set: each goes back before the next draw."""
    drawn = []
    for _ in range(DRAWS):
        [chunk] = consumer.reserve_ids(1, strategy)
        consumer.about("ReleaseChunk", chunk)
        drawn.append(chunk)
    return drawn


def test_random_spreads_over_submissions_in_proportion_to_their_available_chunks(wire: Wire) -> None:
    few, many = wire.producer.insert(1000), wire.producer.insert(9000)
    consumer = wire.consumer("release")
    counts = Counter(submissions(draw(consumer, "Random")))
    # A standard deviation is 6 of 400.
    assert abs(counts[few] - 40) < 38
    assert counts[few] + counts[many] == DRAWS


def test_random_prefers_neither_of_two_submissions_of_the_same_moment(wire: Wire) -> None:
    older, newer = wire.producer.insert(50), wire.producer.insert(50)
    counts = Counter(submissions(draw(wire.consumer("release"), "Random")))
    # A standard deviation is 10.
    assert abs(counts[older] - counts[newer]) < 130


def test_random_takes_any_chunk_of_a_submission(wire: Wire) -> None:
    wire.producer.insert(1_000_000)
    drawn = [chunk for _, chunk in draw(wire.consumer("release"), "Random")]
    assert len(set(drawn)) > 0.95 * DRAWS
    for quarter in range(4):
        # 100 each, with a standard deviation of 9.
        count = sum(quarter * 250_000 <= chunk < (quarter + 1) * 250_000 for chunk in drawn)
        assert 40 < count < 160


def test_random_counts_what_is_available_now(wire: Wire) -> None:
    taken, free = wire.producer.insert(2000), wire.producer.insert(100)
    holder = wire.consumer()
    assert set(submissions(holder.reserve_ids(1900, "Oldest"))) == {taken}
    counts = Counter(submissions(draw(wire.consumer("release"), "Random")))
    # 100 of either are left.
    assert abs(counts[taken] - counts[free]) < 130


def test_random_hands_out_every_chunk_once(wire: Wire) -> None:
    made = [wire.producer.insert(count) for count in (1, 700, 30, 4096)]
    consumer = wire.consumer()
    got = [chunk for _ in range(40) for chunk in consumer.reserve_ids(123, "Random")][:4827]
    assert len(set(got)) == 4827
    assert Counter(submissions(got)) == dict(zip(made, (1, 700, 30, 4096), strict=True))


# --- PreferDistinct ---


def test_prefer_distinct_ranks_again_after_each_chunk_of_one_reservation(wire: Wire) -> None:
    a, b, c = of(wire, 4, k=1), of(wire, 4, k=-(2**63)), of(wire, 1, k=2**63 - 1)
    got = wire.consumer().reserve_ids(9, distinct("k"))
    assert submissions(got) == [a, b, c, a, b, a, b, a, b]
    assert [chunk for submission, chunk in got if submission == a] == [0, 1, 2, 3]


def test_ties_go_by_the_underlying_strategy(wire: Wire) -> None:
    a, b = of(wire, 2, k=1), of(wire, 2, k=2)
    assert wire.consumer().reserve_ids(4, distinct("k", "Newest")) == [(b, 1), (a, 1), (b, 0), (a, 0)]
    c, d = of(wire, 2, k=3), of(wire, 2, k=3)
    e = of(wire, 2, k=4)
    assert submissions(wire.consumer().reserve_ids(6, distinct("k"))) == [c, e, c, e, d, d]


def test_with_random_underneath_values_still_take_turns(wire: Wire) -> None:
    many, one = of(wire, 1000, k=1), of(wire, 40, k=2)
    consumer = wire.consumer()
    for _ in range(20):
        assert sorted(submissions(consumer.reserve_ids(2, distinct("k", "Random")))) == [many, one]


def test_random_underneath_draws_in_proportion_among_the_tied(wire: Wire) -> None:
    few, many, busy = of(wire, 1000, k=1), of(wire, 9000, k=2), of(wire, 90_000, k=3)
    holder = wire.consumer()
    assert submissions(holder.reserve_ids(1, "Newest")) == [busy]
    counts = Counter(submissions(draw(wire.consumer("release"), distinct("k", "Random"))))
    assert abs(counts[few] - 40) < 38
    assert counts[few] + counts[many] == DRAWS


def test_no_value_counts_as_none_in_flight(wire: Wire) -> None:
    with_value, without, other_key = of(wire, 3, k=1), of(wire, 2), of(wire, 2, other=1)
    got = wire.consumer().reserve_ids(9, distinct("k"))
    assert submissions(got) == [with_value, without, without, other_key, other_key, with_value, with_value]


def test_chunks_in_flight_count_whoever_holds_them_and_by_whatever_strategy(wire: Wire) -> None:
    a = of(wire, 5, k=1)
    assert submissions(wire.consumer().reserve_ids(2, "Oldest")) == [a, a]
    # The key is first used after they were reserved.
    b = of(wire, 5, k=2)
    assert submissions(wire.consumer().reserve_ids(3, distinct("k"))) == [b, b, a]


def test_several_submissions_of_one_value_count_together(wire: Wire) -> None:
    a, also_a, b = of(wire, 1, k=1), of(wire, 3, k=1), of(wire, 4, k=2)
    consumer = wire.consumer()
    assert submissions(consumer.reserve_ids(2, "Oldest")) == [a, also_a]
    assert submissions(consumer.reserve_ids(4, distinct("k"))) == [b, b, also_a, b]


Event = Callable[[Wire, RawConsumer, ChunkId], None]


def _completion(_wire: Wire, holder: RawConsumer, held: ChunkId) -> None:
    holder.complete(held)


def _failure(_wire: Wire, holder: RawConsumer, held: ChunkId) -> None:
    holder.fail(held, "no")


def _end_of_the_connection(_wire: Wire, holder: RawConsumer, _held: ChunkId) -> None:
    holder.drop()


def _release(_wire: Wire, holder: RawConsumer, held: ChunkId) -> None:
    holder.about("ReleaseChunk", held)


def _delay(_wire: Wire, holder: RawConsumer, held: ChunkId) -> None:
    holder.about("RetryLater", held, delay_ms=3_600_000)


def _cancellation(wire: Wire, _holder: RawConsumer, held: ChunkId) -> None:
    wire.producer.cancel(held[0])


def _failed_submission(_wire: Wire, holder: RawConsumer, held: ChunkId) -> None:
    holder.about("FailSubmission", held, reason="no")


def _expiry(_wire: Wire, holder: RawConsumer, held: ChunkId) -> None:
    holder.notice()


def _completion_by_another(wire: Wire, _holder: RawConsumer, held: ChunkId) -> None:
    wire.consumer().complete(held)


@pytest.mark.parametrize(
    "event",
    [
        _completion,
        _failure,
        _end_of_the_connection,
        _release,
        _delay,
        _cancellation,
        _failed_submission,
        _expiry,
        _completion_by_another,
    ],
    ids=lambda event: event.__name__.strip("_"),
)
@pytest.mark.parametrize("used_before", [False, True], ids=["a new index", "a kept index"])
def test_the_end_of_every_reservation_lowers_the_count_in_flight(serve: Serve, event: Event, used_before: bool) -> None:
    wire = serve(reservation_expiration="400ms" if event is _expiry else "10 minutes")
    strategy = distinct("company", "Newest")
    features = "release, retry-later, fail-submission"
    first_of_a, second_of_a, b = of(wire, 2, company=1), of(wire, 5, company=1), of(wire, 5, company=2)
    holder, other = wire.consumer(features), wire.consumer(features)
    if used_before:
        # B has one in flight as long as it is not given back.
        [used] = holder.reserve_ids(1, strategy)
        assert used[0] == b
        holder.about("ReleaseChunk", used)
    [held] = holder.reserve_ids(1, "Oldest")
    assert held[0] == first_of_a
    event(wire, holder, held)
    wire.producer.wait_for_metric("opsqueue_chunks_reserved", 0)
    # With none in flight for either, a tie: the newest is B's. One in flight for A would not show here, but then:
    # B has one in flight and A none, so A is next. Had A kept its one, the tie would give B again.
    assert submissions(other.reserve_ids(2, strategy)) == [b, second_of_a]


def test_nested_keys_are_the_next_sort_keys(wire: Wire) -> None:
    made = {(a, b): of(wire, 2, a=a, b=b) for a in (1, 2) for b in (1, 2)}
    names = {submission: values for values, submission in made.items()}
    got = wire.consumer().reserve_ids(8, distinct("a", distinct("b")))
    # Expected by a slow and obvious ranking.
    left, in_a, in_b, expected = dict.fromkeys(made, 2), Counter[int](), Counter[int](), []
    for _ in range(8):
        best = min((v for v in left if left[v]), key=lambda v: (in_a[v[0]], in_b[v[1]], made[v]))
        left[best] -= 1
        in_a[best[0]] += 1
        in_b[best[1]] += 1
        expected.append(best)
    assert [names[submission] for submission, _ in got] == expected


def test_nested_keys_in_the_other_order_rank_otherwise(wire: Wire) -> None:
    # Two of a=1, b=1 are in flight, and one of a=2, b=2, b=3 each.
    busy = of(wire, 2, a=1, b=1)
    holder = wire.consumer()
    holder.reserve_ids(2)
    x = of(wire, 1, a=2, b=1)
    y = of(wire, 1, a=1, b=2)
    consumer = wire.consumer("release")
    for strategy, first in ((distinct("a", distinct("b")), x), (distinct("b", distinct("a")), y)):
        [chunk] = consumer.reserve_ids(1, strategy)
        assert chunk[0] == first, (busy, x, y)
        consumer.about("ReleaseChunk", chunk)


def test_the_same_key_nested_in_itself_is_as_good_as_once(wire: Wire) -> None:
    a, b = of(wire, 2, k=1), of(wire, 2, k=2)
    assert submissions(wire.consumer().reserve_ids(4, distinct("k", distinct("k", "Newest")))) == [b, a, b, a]


def test_a_waiting_request_is_served_in_the_order_of_its_own_strategy(wire: Wire) -> None:
    newest, preferring = wire.consumer(), wire.consumer()
    first = newest.ask(2, "Newest")
    wire.producer.wait_for_parked(1)
    second = preferring.ask(2, distinct("k", "Newest"))
    wire.producer.wait_for_parked(2)
    submission = of(wire, 5, k=1)
    assert [reserved.id[1] for reserved in newest.chunks(first)] == [4, 3]
    assert [reserved.id for reserved in preferring.chunks(second)] == [(submission, 2), (submission, 1)]


def test_keys_of_any_text_are_told_apart(wire: Wire) -> None:
    keys = ["", "k", "K", "kk", "ü", "\U0001f493", "x" * 256]
    made = {key: of(wire, 2, **{key: 1}) for key in keys}
    consumer = wire.consumer()
    holder = wire.consumer("release")
    for key in keys:
        held = holder.reserve_ids(14)
        for chunk in held:
            if chunk[0] != made[key]:
                holder.about("ReleaseChunk", chunk)
        kept = [chunk for chunk in held if chunk[0] == made[key]]
        holder.about("ReleaseChunk", kept[0])
        # One in flight for this key's value: its submission comes last.
        got = submissions(consumer.reserve_ids(13, distinct(key)))
        assert got[-1] == made[key]
        consumer.close()
        consumer = wire.consumer()
        holder.about("ReleaseChunk", kept[1])

"""The strategies of the feature `strategies` over raw sockets (docs/protocol.md): order, filters, waiting, refusal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from opsqueue.consumer import ConsumerClient, Strategy
from opsqueue.exceptions import IncorrectUsageError
from opsqueue.producer import ProducerClient
from tests.acceptance.conftest import Wire
from tests.support.raw_consumer import RawConsumer


def highest(key: str) -> dict[str, Any]:
    return {"Highest": {"meta_key": key}}


def lowest(key: str) -> dict[str, Any]:
    return {"Lowest": {"meta_key": key}}


def select(key: str, value: int, underlying: Any = "Oldest") -> dict[str, Any]:
    return {"SelectOnly": {"meta_key": key, "value": value, "underlying": underlying}}


def at_most(key: str, limit: int, underlying: Any = "Oldest") -> dict[str, Any]:
    return {"MaxSimultaneous": {"meta_key": key, "limit": limit, "underlying": underlying}}


def or_else(first: Any, second: Any) -> dict[str, Any]:
    return {"OrElse": {"first": first, "second": second}}


def of(wire: Wire, count: int = 1, **values: int) -> int:
    return wire.producer.insert(count, strategic_metadata=values)


def taken(consumer: RawConsumer, maximum: int, strategy: Any) -> list[int]:
    return [submission for submission, _ in consumer.reserve_ids(maximum, strategy)]


def test_the_server_says_that_it_knows_them(wire: Wire) -> None:
    assert "strategies" in wire.consumer("strategies").init["features"]


def test_highest_and_lowest_go_by_value_then_age_and_take_what_has_no_value_last(wire: Wire) -> None:
    none = of(wire)
    small, large, older, least = of(wire, p=-5), of(wire, p=9), of(wire, p=3), of(wire, p=-(2**63))
    younger = of(wire, p=3)
    consumer = wire.consumer("release")
    assert taken(consumer, 9, highest("p")) == [large, older, younger, small, least, none]
    for submission in (none, small, large, older, least, younger):
        consumer.about("ReleaseChunk", (submission, 0))
    assert taken(consumer, 9, lowest("p")) == [least, small, older, younger, large, none]


def test_a_new_priority_overtakes_what_waits(wire: Wire) -> None:
    first = of(wire, 3, p=1)
    consumer = wire.consumer()
    assert taken(consumer, 1, highest("p")) == [first]
    urgent = of(wire, 1, p=2)
    assert taken(consumer, 2, highest("p")) == [urgent, first]


def test_select_only_takes_nothing_else_and_waits_for_its_own(wire: Wire) -> None:
    other, wanted = of(wire, 1, queue=1), of(wire, 1, queue=2)
    consumer = wire.consumer()
    assert taken(consumer, 5, select("queue", 2)) == [wanted]
    nonce = consumer.ask(5, select("queue", 2))
    consumer.settle()
    assert consumer.has_nothing()
    assert taken(wire.consumer(), 5, "Oldest") == [other]
    late = of(wire, 1, queue=2)
    assert [chunk.id[0] for chunk in consumer.chunks(nonce)] == [late]


def test_ten_thousand_parked_requests_wake_one_by_one_for_their_own_value(wire: Wire) -> None:
    consumers = [wire.consumer() for _ in range(10)]
    nonces = [
        [consumer.ask(1, select("queue", 1000 * number + at)) for at in range(1000)]
        for number, consumer in enumerate(consumers)
    ]
    for consumer in consumers:
        consumer.settle()
        assert consumer.has_nothing()
    for number, at in ((7, 999), (0, 0), (9, 500)):
        submission = of(wire, 1, queue=1000 * number + at)
        assert [chunk.id for chunk in consumers[number].chunks(nonces[number][at])] == [(submission, 0)]
    for consumer in consumers:
        consumer.settle()
        assert consumer.has_nothing()


def test_a_limit_counts_what_anybody_holds_and_is_looked_at_after_each_chunk(wire: Wire) -> None:
    submission = of(wire, 9, customer=1)
    other = wire.consumer("release")
    assert taken(other, 1, "Oldest") == [submission]
    consumer = wire.consumer()
    assert taken(consumer, 9, at_most("customer", 3)) == [submission, submission]
    # a limit binds only the requests that carry it, each with its own
    assert taken(wire.consumer(), 9, at_most("customer", 4)) == [submission]
    assert taken(wire.consumer(), 1, "Newest") == [submission]


@pytest.mark.parametrize("how", ["complete", "release", "fail", "leave"])
def test_a_request_held_back_by_its_limit_wakes_when_the_count_falls(wire: Wire, how: str) -> None:
    submission = of(wire, 3, customer=1)
    holder = wire.consumer("release")
    (held,) = holder.reserve_ids(1)
    consumer = wire.consumer()
    nonce = consumer.ask(1, at_most("customer", 1))
    consumer.settle()
    assert consumer.has_nothing()
    if how == "complete":
        holder.complete(held)
    elif how == "release":
        holder.about("ReleaseChunk", held)
    elif how == "fail":
        holder.fail(held, "no")
    else:
        holder.close()
    assert [chunk.id[0] for chunk in consumer.chunks(nonce)] == [submission]


def test_a_limit_inside_a_selection_wakes_when_somebody_else_completes(wire: Wire) -> None:
    submission = of(wire, 3, queue=1, customer=1)
    holder = wire.consumer()
    (held,) = holder.reserve_ids(1)
    consumer = wire.consumer()
    nonce = consumer.ask(1, select("queue", 1, at_most("customer", 1)))
    consumer.settle()
    assert consumer.has_nothing()
    holder.complete(held)
    assert [chunk.id[0] for chunk in consumer.chunks(nonce)] == [submission]


def test_without_the_key_there_is_no_limit(wire: Wire) -> None:
    free = of(wire, 3)
    bound = of(wire, 3, customer=1)
    assert taken(wire.consumer(), 9, at_most("customer", 1)) == [free, free, free, bound]


def test_a_limit_with_fairness_takes_from_everybody_up_to_it(wire: Wire) -> None:
    one, two = of(wire, 5, customer=1), of(wire, 5, customer=2)
    fair = at_most("customer", 2, {"PreferDistinct": {"meta_key": "customer", "underlying": "Oldest"}})
    assert sorted(taken(wire.consumer(), 9, fair)) == [one, one, two, two]


def test_or_else_takes_the_second_only_where_the_first_has_none(wire: Wire) -> None:
    ordinary, own = of(wire, 2), of(wire, 1, queue=7)
    consumer = wire.consumer()
    assert taken(consumer, 2, or_else(select("queue", 7), "Newest")) == [own, ordinary]
    nonce = consumer.ask(3, or_else(select("queue", 7), select("queue", 8)))
    consumer.settle()
    assert consumer.has_nothing()
    late = of(wire, 1, queue=8)
    assert [chunk.id[0] for chunk in consumer.chunks(nonce)] == [late]


REFUSED = {
    "an unknown one": ({"Middle": {"meta_key": "k"}}, "is no strategy with fields"),
    "a field is missing": ({"SelectOnly": {"meta_key": "k", "underlying": "Oldest"}}, "lacks value"),
    "a limit of none": (at_most("k", 0), "from 1 to"),
    "a value too large": (select("k", 2**63), "must be an integer"),
    "an order that no index keeps": (
        {"PreferDistinct": {"meta_key": "k", "underlying": or_else("Oldest", "Newest")}},
        "put OrElse outside",
    ),
    "a scan": (at_most("a", 1, {"PreferDistinct": {"meta_key": "b", "underlying": "Oldest"}}), "prefer a first"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_served_is_refused_and_says_why(wire: Wire, name: str) -> None:
    strategy, why = REFUSED[name]
    consumer = wire.consumer("refusal, strategies")
    answer = consumer.answer(consumer.ask(1, strategy))
    assert why in answer["ReservationRefused"]["reason"]
    submission = of(wire)
    assert taken(consumer, 1, "Oldest") == [submission]  # the connection goes on
    reference = wire.consumer()
    reference.ask(1, strategy)
    code, reason = reference.end()
    assert code == 1008
    assert reason


def test_a_nest_deeper_than_eight_is_refused(wire: Wire) -> None:
    strategy: Any = "Oldest"
    for _ in range(9):
        strategy = select("k", 1, strategy)
    consumer = wire.consumer("refusal, strategies")
    assert "8 deep" in consumer.answer(consumer.ask(1, strategy))["ReservationRefused"]["reason"]


def test_a_credit_follows_the_same_strategies(wire: Wire) -> None:
    consumer = wire.consumer("compact, strategies")
    consumer.say({"OpenCredit": {"chunks": 5, "strategy": at_most("customer", 2)}})
    consumer.settle()
    of(wire, 9, customer=1)
    wire.producer.wait_for_metric("opsqueue_chunks_reserved", 2)
    consumer.settle()
    wire.producer.wait_for_metric("opsqueue_chunks_reserved", 2)
    of(wire, 1, customer=2)
    wire.producer.wait_for_metric("opsqueue_chunks_reserved", 3)


def test_our_client_asks_by_them_and_says_when_a_server_lacks_them(wire: Wire, tmp_path: Path) -> None:
    server, store = f"http://127.0.0.1:{wire.server.port}", f"file://{tmp_path}"
    producer = ProducerClient(server, store)
    made = [producer.insert_submission([p], chunk_size=1, strategic_metadata={"p": p}) for p in (1, 3, 2)]
    wire.producer.inserted.extend(int(submission) for submission in made)
    client = ConsumerClient(server, store)
    strategy = Strategy.OrElse(
        first=Strategy.SelectOnly(meta_key="p", value=2, underlying=Strategy.Oldest()),
        second=Strategy.MaxSimultaneous(meta_key="p", limit=1, underlying=Strategy.Highest(meta_key="p")),
    )
    chunks = client.inner.reserve_chunks(3, strategy)
    assert [chunk.submission_id for chunk in chunks] == [made[2], made[1], made[0]]
    connection = client.inner.connect()
    connection._features = frozenset()  # as a server that does not know them
    with pytest.raises(IncorrectUsageError, match=r"does not offer Strategy\.OrElse"):
        client.inner.reserve_chunks(1, strategy)
    connection.close()


def test_the_clients_strategies_check_their_fields_and_show_them() -> None:
    nested = Strategy.SelectOnly(
        meta_key="a", value=-1, underlying=Strategy.MaxSimultaneous(meta_key="b", limit=2, underlying=Strategy.Random())
    )
    assert repr(nested) == (
        'Strategy.SelectOnly { meta_key: "a", value: -1, '
        'underlying: Strategy.MaxSimultaneous { meta_key: "b", limit: 2, underlying: Strategy.Random } }'
    )
    assert repr(Strategy.OrElse(first=Strategy.Highest(meta_key="p"), second=Strategy.Lowest(meta_key="p"))) == (
        'Strategy.OrElse { first: Strategy.Highest { meta_key: "p" }, second: Strategy.Lowest { meta_key: "p" } }'
    )
    with pytest.raises(TypeError, match="meta_key must be a str"):
        Strategy.Highest(meta_key=3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="limit must be from 1 to"):
        Strategy.MaxSimultaneous(meta_key="k", limit=0, underlying=Strategy.Oldest())
    with pytest.raises(TypeError, match="first must be a Strategy"):
        Strategy.OrElse(first="Oldest", second=Strategy.Oldest())  # type: ignore[arg-type]

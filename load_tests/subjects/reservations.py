"""One reservation in a large backlog: three shapes of it, each strategy."""

from __future__ import annotations

import time
from collections.abc import Iterator

from load_tests import peers
from load_tests.backlog import consumers, fill, fill_selected
from load_tests.figures import Figure, Processors, percentile
from load_tests.generator import Consumers
from load_tests.server_process import ServerProcess
from load_tests.setting import Bench
from load_tests.strategies import CASES, encoded, selects
from load_tests.waiting_consumer import WaitingConsumer
from opsqueue.protocol.strategy import Strategy, to_wire

ASKED_MS = (0.2, 1.0)
#: Milliseconds p50 and p99 that the reference takes, by shape and strategy, where it was measured.
REFERENCE = {
    (100, 10_000): {"Oldest": (1.6, 8.8), "Random": (1.9, 4.0), "PreferDistinct(customer, Oldest)": (2.2, 5.7)},
    (20_000, 1): {"Oldest": (1.4, 4.5), "Random": (1.6, 3.2), "PreferDistinct(customer, Oldest)": (30.0, 56.0)},
}


def measure(bench: Bench) -> Iterator[Figure]:
    for submissions, chunks_each in bench.scale.shapes:
        bench.say(f"inserting {submissions:,} submissions of {chunks_each:,} chunks")
        with bench.server() as server:
            fill(server, submissions, chunks_each)
            reference = REFERENCE.get((submissions, chunks_each), {})
            # One chunk a submission: what a strategy takes away must leave enough for the next.
            most = submissions * chunks_each // (2 * len(CASES))
            for name, strategy in CASES.items():
                if selects(name):
                    fill_selected(server, -(-most // chunks_each), chunks_each)
                what = f"one reservation, {submissions:,} submissions of {chunks_each:,}, {name}"
                yield from _one(bench, server, what, strategy, reference.get(name, (None, None)), most)


def first_use(server: ServerProcess, strategy: Strategy) -> float:
    """Milliseconds of the first reservation with a strategy, which builds its index."""
    with peers.consumer(server.address) as connection:
        consumer = WaitingConsumer(connection, to_wire(strategy))
        begun = time.perf_counter()
        consumer.ask()
        consumer.held()
        return (time.perf_counter() - begun) * 1000


def latencies_ms(server: ServerProcess, strategy: Strategy, seconds: float, most: int) -> tuple[list[float], str]:
    """Sorted times of one consumer's reservations, and what was the limit."""
    with consumers(server, 1) as sockets:
        generator = Consumers(sockets, 1, encoded(strategy))
        with Processors(server) as processors:
            generator.run(seconds, most)
    return [each / 1000 for each in generator.latencies_us()], processors.limit(generator.seconds_ns / 1e9)


def _one(
    bench: Bench,
    server: ServerProcess,
    what: str,
    strategy: Strategy,
    reference: tuple[float | None, float | None],
    most: int,
) -> Iterator[Figure]:
    built = first_use(server, strategy)
    taken, limit = latencies_ms(server, strategy, bench.scale.reservations, most)
    p50, p99 = percentile(taken, 0.5), percentile(taken, 0.99)
    note = f"the first one, which builds the index: {built:.1f} ms"
    yield Figure(f"{what}, p50", p50, "ms", reference[0], ASKED_MS[0], False, limit, note)
    yield Figure(
        f"{what}, p99",
        p99,
        "ms",
        reference[1],
        ASKED_MS[1],
        False,
        limit,
        f"longest of {len(taken):,}: {taken[-1]:.2f} ms",
    )

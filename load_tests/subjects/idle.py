"""Latencies of a server that has nothing else to do: wake-ups of sleeping processes and one commit."""

from __future__ import annotations

import time
from collections.abc import Iterator

from load_tests import peers
from load_tests.backlog import consumers, fill, unique_prefix
from load_tests.figures import Figure, Processors, percentile
from load_tests.generator import Consumers
from load_tests.setting import Bench
from load_tests.strategies import CASES, encoded
from load_tests.waiting_consumer import WaitingConsumer

#: Long enough that the request before was parked, its completion committed, and every process sleeps.
PAUSE_S = 0.006
#: Long enough that the machine's cores may sleep as well; what waking them takes, GET /version shows.
LONG_PAUSE_S = 0.02


def measure(bench: Bench) -> Iterator[Figure]:
    yield from insert_to_held(bench, PAUSE_S)
    yield from insert_to_held(bench, LONG_PAUSE_S)
    yield version(bench, LONG_PAUSE_S)
    yield from round_trip(bench)
    yield paused_round_trip(bench)


def insert_to_held(bench: Bench, pause_s: float) -> Iterator[Figure]:
    """From an insert's POST until a consumer that waits holds its chunk."""
    taken = []
    with (
        bench.server() as server,
        peers.connect(server.address) as producer,
        peers.consumer(server.address) as connection,
    ):
        consumer = WaitingConsumer(connection)
        with Processors(server) as processors:
            for _ in range(bench.scale.idle_repeats):
                consumer.ask()
                time.sleep(pause_s)
                message = peers.insert_request(server.address, unique_prefix(), 1)
                begun = time.perf_counter()
                producer.sendall(message)
                consumer.held()
                taken.append((time.perf_counter() - begun) * 1000)
                producer.recv(65536)
    asked = (1.0, 2.5) if pause_s == PAUSE_S else (None, None)
    what = f"idle: insert to held, each {pause_s * 1000:.0f} ms after the last"
    yield from _percentiles(what, taken, (3.8, 27), asked, processors.limit())


def version(bench: Bench, pause_s: float) -> Figure:
    """A request that stays in the front-end: what the machine takes to wake up for any request at all."""
    taken = []
    with bench.server() as server, peers.connect(server.address) as connection:
        message = peers.request(server.address, "GET", "/version")
        with Processors(server) as processors:
            for _ in range(bench.scale.idle_repeats):
                time.sleep(pause_s)
                begun = time.perf_counter()
                peers.exchange(connection, message)
                taken.append((time.perf_counter() - begun) * 1000)
    what = f"idle: GET /version, each {pause_s * 1000:.0f} ms after the last"
    return _percentiles(what, taken, (None, None), (None, None), processors.limit())[0]


def round_trip(bench: Bench) -> Iterator[Figure]:
    """One consumer that asks again as soon as it has completed; nothing else happens."""
    with bench.server() as server:
        fill(server, 100, 100_000)
        with consumers(server, 1) as sockets:
            generator = Consumers(sockets, 1, encoded(CASES["Oldest"]))
            generator.run(0.2)
            with Processors(server) as processors:
                generator.run(bench.scale.seconds)
    taken = [each / 1000 for each in generator.latencies_us()]
    yield from _percentiles(
        "reserve round trip, one consumer",
        taken,
        (1.4, None),
        (0.15, 0.6),
        processors.limit(generator.seconds_ns / 1e9),
    )


def paused_round_trip(bench: Bench) -> Figure:
    """The same with all processes asleep before each request."""
    taken = []
    with bench.server() as server, peers.consumer(server.address) as connection:
        fill(server, 100, 100_000)
        consumer = WaitingConsumer(connection)
        with Processors(server) as processors:
            for _ in range(bench.scale.idle_repeats):
                time.sleep(LONG_PAUSE_S)
                begun = time.perf_counter()
                consumer.ask()
                consumer.held()
                taken.append((time.perf_counter() - begun) * 1000)
    p50, _ = _percentiles(
        f"reserve round trip after {LONG_PAUSE_S * 1000:.0f} ms of quiet",
        taken,
        (1.4, None),
        (None, None),
        processors.limit(),
    )
    return p50


def _percentiles(
    what: str,
    taken: list[float],
    reference: tuple[float | None, float | None],
    asked: tuple[float | None, float | None],
    limit: str,
) -> tuple[Figure, Figure]:
    taken = sorted(taken)
    p50, p99 = percentile(taken, 0.5), percentile(taken, 0.99)
    return (
        Figure(f"{what}, p50", p50, "ms", reference[0], asked[0], False, limit, f"p99 {p99:.2f} ms of {len(taken):,}"),
        Figure(f"{what}, p99", p99, "ms", reference[1], asked[1], False, limit, f"longest {taken[-1]:.2f} ms"),
    )

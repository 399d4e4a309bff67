"""Chunks reserved and completed per second: consumers at full speed on a backlog that does not end."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from load_tests.backlog import consumers, fill
from load_tests.figures import Figure, Processors, percentile
from load_tests.generator import CompactConsumers, Consumers
from load_tests.setting import Bench
from load_tests.strategies import CASES, CUSTOMERS, encoded

WARM_UP_S = 0.5
#: A credit stands for this many requests: it is topped up with each reply, long before it is used up.
CREDIT_REQUESTS = 8


@dataclass(frozen=True)
class Load:
    """One row. `reference` and `asked` in chunks a second; `near_oldest`: asked is 80 % of the first row's figure;
    `compact`: by our own messages, on a credit of several requests.
    """

    connections: int
    max_chunks: int
    strategy: str = "Oldest"
    reference: float | None = None
    asked: float | None = None
    near_oldest: bool = False
    durability: str | None = None
    compact: bool = False


LOADS = (
    Load(8, 1, "Oldest", 680, 45_000),
    Load(8, 1, "PreferDistinct(customer, Oldest)", 680, near_oldest=True),
    Load(8, 1, "Random", 680, near_oldest=True),
    Load(64, 1, "Oldest", 490, 100_000),
    Load(8, 64, "Oldest", 980, 1_000_000),
    Load(8, 64, "Oldest", 980, 2_000_000, compact=True),
    Load(8, 64, "Random", 980, compact=True),
    Load(8, 1, "Oldest", 680, durability="normal"),
    Load(8, 64, "Oldest", 980, durability="normal"),
)


def measure(bench: Bench) -> Iterator[Figure]:
    oldest: float | None = None
    for load in LOADS:
        asked = load.asked
        if load.near_oldest and oldest is not None:
            asked = 0.8 * oldest
        figure = lifecycles(bench, load, asked)
        oldest = oldest or figure.value
        yield figure


def lifecycles(bench: Bench, load: Load, asked: float | None) -> Figure:
    durability = load.durability or bench.durability
    with bench.server("--durability", durability) as server:
        # As many submissions as values, so that each strategy has a choice to make.
        fill(server, CUSTOMERS, 400_000)
        strategy = encoded(CASES[load.strategy])
        with consumers(server, load.connections, "compact" if load.compact else None) as sockets:
            if load.compact:
                generator: Consumers = CompactConsumers(sockets, load.max_chunks * CREDIT_REQUESTS, strategy)
            else:
                generator = Consumers(sockets, load.max_chunks, strategy)
            generator.run(WARM_UP_S)
            with Processors(server) as processors:
                generator.run(bench.scale.seconds)
    latencies = generator.latencies_us()
    name = f"lifecycles, {load.connections} consumers, {load.max_chunks} a request, {load.strategy}"
    if load.compact:
        name += f", compact messages, a credit of {load.max_chunks * CREDIT_REQUESTS}"
    if durability != "full":
        name += f", durability {durability}"
    note = f"reserve p50 {percentile(latencies, 0.5) / 1000:.2f} ms, p99 {percentile(latencies, 0.99) / 1000:.2f} ms"
    return Figure(
        name,
        generator.chunks / (generator.seconds_ns / 1e9),
        "/s",
        load.reference,
        asked,
        limit=processors.limit(generator.seconds_ns / 1e9),
        note=note,
    )

"""Inserts: how many a second, and how long one takes, whatever its number of chunks."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator

from load_tests import peers
from load_tests.backlog import CONNECTIONS, cancel, producers, unique_prefix
from load_tests.figures import Figure, Processors, percentile
from load_tests.generator import Inserters
from load_tests.setting import Bench

#: Chunks of one submission, and milliseconds that the reference takes to insert it.
SIZES = ((1, 4.3), (1_000, 4.1), (1_000_000, 5_098), (1_000_000_000, None))
ASKED_MS = 1.3


def measure(bench: Bench) -> Iterator[Figure]:
    yield rate(bench)
    for chunks, reference in SIZES:
        yield latency(bench, chunks, reference)


def rate(bench: Bench) -> Figure:
    with bench.server() as server, producers(server) as sockets:
        requests = [peers.insert_request(server.address, unique_prefix(), 10) for _ in range(bench.scale.inserts)]
        inserters = Inserters([each.fileno() for each in sockets])
        with Processors(server) as processors:
            inserters.run(requests)
    if inserters.refused:
        raise RuntimeError(f"{inserters.refused} of {len(requests)} inserts were refused")
    return Figure(
        f"inserts of 10 chunks, {CONNECTIONS} connections",
        inserters.done / (inserters.seconds_ns / 1e9),
        "/s",
        306,
        12_000,
        limit=processors.limit(inserters.seconds_ns / 1e9),
    )


def latency(bench: Bench, chunks: int, reference: float | None) -> Figure:
    """One insert at a time; each is cancelled before the next, so that the memory limit is not met."""
    taken = []
    with bench.server() as server, peers.connect(server.address) as producer, Processors(server) as processors:
        for _ in range(bench.scale.insert_repeats):
            message = peers.insert_request(server.address, unique_prefix(), chunks)
            begun = time.perf_counter()
            answer = peers.exchange(producer, message)
            taken.append((time.perf_counter() - begun) * 1000)
            cancel(producer, server, int(json.loads(answer)))
    taken.sort()
    return Figure(
        f"insert of {chunks:,} chunks, p50",
        percentile(taken, 0.5),
        "ms",
        reference,
        ASKED_MS,
        higher_is_better=False,
        limit=processors.limit(),
        note=f"p99 {percentile(taken, 0.99):.2f} ms of {len(taken)}",
    )

"""A billion chunks waiting: memory, the file, completions at random, and how soon the service is back after SIGKILL."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

from load_tests import peers
from load_tests.backlog import consumers, fill
from load_tests.figures import Figure, Processors
from load_tests.generator import Consumers
from load_tests.scale import BILLION
from load_tests.scraped import metrics
from load_tests.server_process import ServerProcess
from load_tests.setting import Bench
from load_tests.strategies import CASES, encoded
from load_tests.waiting_consumer import WaitingConsumer

MIB = 1024 * 1024
MB = 1_000_000
CONNECTIONS = 8
MAX_CHUNKS = 64
#: A checkpoint follows when the write-ahead log passes 16 MiB: this is nearly there.
FULL_WAL = 12 * MIB
#: Give up waiting for a full log after this many seconds.
FULL_WAL_WITHIN_S = 30.0
#: The reference keeps this much on disk for a waiting chunk.
REFERENCE_BYTES_A_CHUNK = 42


def measure(bench: Bench) -> Iterator[Figure]:
    submissions = bench.scale.backlog_submissions
    shape = f"10^9 chunks in {submissions:,} submissions"
    with bench.home() as home:
        with bench.server(home=home) as server:
            bench.say(f"inserting {shape}")
            fill(server, submissions, BILLION // submissions)
            yield from _sizes(server, f"{shape}, untouched", memory_mib=200, file_mb=10, waiting=BILLION)
            bench.say(f"completing {bench.scale.backlog_done:,} chunks at random")
            yield from _random_completions(bench, server)
            done = bench.scale.backlog_done / BILLION
            what = f"{shape}, {done:.1%} done at random"
            yield from _sizes(server, what, memory_mib=600, file_mb=170, waiting=BILLION)
            wal = _fill_wal(server)
            server.kill()
        yield _recovery(bench, home, what, wal)


def _sizes(server: ServerProcess, what: str, *, memory_mib: float, file_mb: float, waiting: int) -> Iterator[Figure]:
    database, wal = server.file_bytes()
    yield Figure(
        f"memory (PSS), {what}", server.pss_bytes() / MIB, "MiB", None, memory_mib, False, note="all processes together"
    )
    yield Figure(
        f"database, {what}",
        database / MB,
        "MB",
        REFERENCE_BYTES_A_CHUNK * waiting / MB,
        file_mb,
        False,
        note=f"and a write-ahead log of {wal / MB:.1f} MB",
    )


def _random_completions(bench: Bench, server: ServerProcess) -> Iterator[Figure]:
    # A tenth of a billion at the rate that was asked takes six minutes; ten times that is a failure.
    longest = 60.0 + bench.scale.backlog_done / 30_000
    with consumers(server, CONNECTIONS) as sockets:
        generator = Consumers(sockets, MAX_CHUNKS, encoded(CASES["Random"]))
        generator.run(0.5)
        written = server.written_bytes()
        with Processors(server) as processors:
            generator.run(longest, bench.scale.backlog_done)
        written = server.written_bytes() - written
    seconds = generator.seconds_ns / 1e9
    limit = processors.limit(seconds)
    what = f"completions at random over 10^9 chunks, {CONNECTIONS} consumers, {MAX_CHUNKS} a request"
    done = f"{generator.chunks:,} in {seconds:.1f} s"
    yield Figure(what, generator.chunks / seconds, "/s", None, 300_000, limit=limit, note=done)
    yield Figure(
        "bytes written for each of them", written / generator.chunks, "bytes", None, 40, False, limit, note=done
    )


def _fill_wal(server: ServerProcess) -> int:
    """Go on completing until the log is nearly full; its size."""
    deadline = time.monotonic() + FULL_WAL_WITHIN_S
    with consumers(server, CONNECTIONS) as sockets:
        generator = Consumers(sockets, MAX_CHUNKS, encoded(CASES["Random"]))
        while True:
            generator.run(0.1)
            wal = int(metrics(server)["opsqueue_wal_bytes"])  # of the file's part in use
            if wal >= FULL_WAL or time.monotonic() > deadline:
                return wal


def _recovery(bench: Bench, home: Path, what: str, wal: int) -> Figure:
    seconds, started = first_reservation_after_start(bench, home)
    return Figure(
        f"after SIGKILL until the first reservation, {what}",
        seconds,
        "s",
        None,
        1.5,
        higher_is_better=False,
        note=f"write-ahead log of {wal / MB:.1f} MB at the kill; port open after {started:.2f} s",
    )


def first_reservation_after_start(bench: Bench, home: Path) -> tuple[float, float]:
    """Seconds from starting the command until a consumer holds a chunk, and until the port was open."""
    begun = time.perf_counter()
    with bench.server(home=home) as server:
        started = time.perf_counter() - begun
        with peers.consumer(server.address) as connection:
            consumer = WaitingConsumer(connection)
            consumer.ask()
            consumer.held()
            return time.perf_counter() - begun, started

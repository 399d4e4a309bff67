"""The longest stall of a reservation, and of a reply that needs a commit, while everything goes on at once.

Consumers ask at 70 % of the rate that the server has just reached; meanwhile submissions are inserted, finish and are
forgotten, the journal checkpoints, submissions of 10^8 chunks are cancelled, and the metrics are scraped.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from load_tests import peers
from load_tests.backlog import cancel, consumers, fill, insert
from load_tests.figures import Figure, Processors, percentile
from load_tests.generator import Consumers, PacedConsumers
from load_tests.scraped import metrics
from load_tests.server_process import ServerProcess
from load_tests.setting import Bench
from load_tests.strategies import CASES, encoded

SHARE_OF_TOP_RATE = 0.7
CONNECTIONS = 8
MAX_CHUNKS = 64
HUGE = 10**8
ASKED_MS = 20.0
#: Seconds between two of each disturbance.
INSERTS_EVERY_S = 0.05
CANCELS_EVERY_S = 3.0
SCRAPES_EVERY_S = 1.0
PROBES_EVERY_S = 0.05


class Disturbances:
    """Threads that each do one thing again and again until the end; `taken` has the seconds of each turn."""

    def __init__(self) -> None:
        self.taken: dict[str, list[float]] = {}
        self.failures: list[BaseException] = []
        self._over = threading.Event()
        self._threads: list[threading.Thread] = []

    def add(self, name: str, every_s: float, action: Callable[[], None]) -> None:
        turns = self.taken.setdefault(name, [])

        def repeat() -> None:
            try:
                while not self._over.wait(every_s):
                    begun = time.perf_counter()
                    action()
                    turns.append(time.perf_counter() - begun)
            except Exception as error:  # shown by `end`: a thread's failure must fail the row
                self.failures.append(error)

        self._threads.append(threading.Thread(target=repeat, name=name, daemon=True))

    def start(self) -> None:
        for each in self._threads:
            each.start()

    def end(self) -> None:
        """Stop them; RuntimeError when one had failed."""
        self._over.set()
        for each in self._threads:
            each.join()
        if self.failures:
            raise RuntimeError(f"a disturbance failed: {self.failures[0]}") from self.failures[0]


def measure(bench: Bench) -> Iterator[Figure]:
    flags = ("--max-submission-age", "2 seconds")
    with bench.server(*flags) as server, contextlib.ExitStack() as stack:
        fill(server, 100, 10_000_000)
        top = _top_rate(bench, server)
        disturbances = _disturbances(server, stack)
        probe = stack.enter_context(_probe(server.directory))
        disturbances.add("fdatasync", PROBES_EVERY_S, probe)
        before = _counters(server)
        with consumers(server, CONNECTIONS) as sockets:
            # Newest takes what is inserted meanwhile: the small submissions end, the huge ones are cancelled in use.
            generator = PacedConsumers(sockets, MAX_CHUNKS, encoded(CASES["Newest"]))
            disturbances.start()
            try:
                with Processors(server) as processors:
                    generator.run_paced(bench.scale.stall_seconds, SHARE_OF_TOP_RATE * top / MAX_CHUNKS)
            finally:
                disturbances.end()
        happened = {name: value - before[name] for name, value in _counters(server).items()}
    yield from _figures(bench, generator, disturbances, happened, processors.limit())


def _top_rate(bench: Bench, server: ServerProcess) -> float:
    """Chunks a second at full speed."""
    with consumers(server, CONNECTIONS) as sockets:
        generator = Consumers(sockets, MAX_CHUNKS, encoded(CASES["Newest"]))
        generator.run(min(5.0, bench.scale.seconds))
    return generator.chunks / (generator.seconds_ns / 1e9)


def _disturbances(server: ServerProcess, stack: contextlib.ExitStack) -> Disturbances:
    inserting, cancelling, scraping = (stack.enter_context(peers.connect(server.address)) for _ in range(3))
    disturbances = Disturbances()

    def insert_small() -> None:
        insert(inserting, server, 10)

    def insert_and_cancel_huge() -> None:
        submission = insert(cancelling, server, HUGE)
        time.sleep(CANCELS_EVERY_S / 3)  # the consumers prefer the newest: they have touched it by then
        cancel(cancelling, server, submission)

    def scrape() -> None:
        peers.exchange(scraping, peers.request(server.address, "GET", "/metrics"))

    disturbances.add("insert", INSERTS_EVERY_S, insert_small)
    disturbances.add("cancel", CANCELS_EVERY_S, insert_and_cancel_huge)
    disturbances.add("scrape", SCRAPES_EVERY_S, scrape)
    return disturbances


@contextlib.contextmanager
def _probe(directory: Path) -> Iterator[Callable[[], None]]:
    """One small write and its fdatasync, beside the database: what the disk itself takes at that time."""
    path = directory / "probe"
    file = os.open(path, os.O_CREAT | os.O_WRONLY, 0o600)
    try:

        def write() -> None:
            os.pwrite(file, os.urandom(4096), 0)
            os.fdatasync(file)

        yield write
    finally:
        os.close(file)
        path.unlink()


COUNTERS = (
    "opsqueue_checkpoints_total",
    "opsqueue_submissions_forgotten_total",
    "opsqueue_submissions_cancelled_total",
    "opsqueue_commits_total",
    "opsqueue_fsyncs_total",
)


def _counters(server: ServerProcess) -> dict[str, float]:
    scraped = metrics(server)
    return {name: scraped[name] for name in COUNTERS}


def _figures(
    bench: Bench, generator: PacedConsumers, disturbances: Disturbances, happened: dict[str, float], limit: str
) -> Iterator[Figure]:
    seconds = bench.scale.stall_seconds
    latencies = generator.latencies_us()
    rate = generator.chunks / (generator.seconds_ns / 1e9)
    checkpoints, forgotten, cancelled, commits, fsyncs = (int(happened[name]) for name in COUNTERS)
    yield Figure(
        f"longest stall of a reservation, {seconds:.0f} s at 70 % of the top rate",
        generator.longest_ns / 1e6,
        "ms",
        None,
        ASKED_MS,
        higher_is_better=False,
        limit=limit,
        note=(
            f"{rate:,.0f} chunks/s, p99 {percentile(latencies, 0.99) / 1000:.2f} ms, {generator.late:,} of "
            f"{generator.replies:,} replies over 5 ms, the longest {generator.longest_at_ns / 1e9:.1f} s after the "
            f"beginning ({generator.longest_overdue_ns / 1e6:.1f} ms counted from when a request was due); "
            f"{checkpoints} checkpoints, {forgotten:,} submissions forgotten, "
            f"{cancelled} of 10^8 chunks cancelled, {len(disturbances.taken['scrape'])} scrapes, "
            f"{commits / seconds:,.0f} commits/s, {fsyncs / seconds:,.0f} fsyncs/s"
        ),
    )
    synced = max(disturbances.taken["fdatasync"], default=0.0) * 1000
    inserted = sorted(each * 1000 for each in disturbances.taken["insert"])
    yield Figure(
        "longest reply that needs a commit in that run",
        inserted[-1] if inserted else None,
        "ms",
        None,
        synced + ASKED_MS,
        higher_is_better=False,
        limit=limit,
        note=f"of {len(inserted)} inserts, p50 {percentile(inserted, 0.5):.2f} ms; longest fdatasync of a probe "
        f"beside the database: {synced:.1f} ms"
        if inserted
        else "the run was too short for an insert",
    )

"""Submissions that come, finish and are forgotten at a fixed rate for minutes: does anything grow?"""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

from load_tests import peers
from load_tests.backlog import CONNECTIONS, consumers, producers, unique_prefix
from load_tests.figures import Figure, Processors
from load_tests.generator import Consumers, Inserters
from load_tests.server_process import ServerProcess
from load_tests.setting import Bench
from load_tests.strategies import CASES, encoded
from load_tests.subjects.backlog import MIB

CHUNKS = 10
#: Inserts are sent in portions this often: seconds.
PORTION_S = 0.1
#: The growth is that of the run's last half, between the means of its first and its last fifth.
FIFTH = 5


@dataclass(frozen=True)
class Sample:
    at: float
    memory: int
    file: int
    wal: int


class Producer(threading.Thread):
    """Inserts at a fixed rate, or as fast as the server takes them, and samples the server's size between."""

    def __init__(self, server: ServerProcess, rate: int, seconds: float) -> None:
        super().__init__(name="churn", daemon=True)
        self._server = server
        self._rate = rate
        self._seconds = seconds
        self.inserted = 0
        self.samples: list[Sample] = []
        self.failure: BaseException | None = None

    def run(self) -> None:
        try:
            with producers(self._server) as sockets:
                self._insert(Inserters([each.fileno() for each in sockets]))
        except Exception as error:  # raised again by `measure`
            self.failure = error

    def _insert(self, inserters: Inserters) -> None:
        begun = time.monotonic()
        portion = max(1, round(self._rate * PORTION_S))
        sample_every = max(PORTION_S, self._seconds / 200)
        due = begun
        next_sample = begun + sample_every
        while (now := time.monotonic()) < begun + self._seconds:
            if now < due:
                time.sleep(due - now)
            inserters.run([peers.insert_request(self._server.address, unique_prefix(), CHUNKS) for _ in range(portion)])
            if inserters.refused:
                raise RuntimeError(f"{inserters.refused} of {portion} inserts were refused")
            self.inserted += portion
            # Where the server is too slow, the debt is not paid back in one burst.
            due = max(due + PORTION_S, time.monotonic() - PORTION_S)
            if time.monotonic() >= next_sample:
                next_sample += sample_every
                file, wal = self._server.file_bytes()
                self.samples.append(Sample(time.monotonic() - begun, self._server.pss_bytes(), file, wal))


def measure(bench: Bench) -> Iterator[Figure]:
    scale = bench.scale
    age = f"{scale.churn_age_seconds:g} seconds"
    with bench.server("--max-submission-age", age) as server:
        with consumers(server, 8) as sockets:
            producer = Producer(server, scale.churn_rate, scale.churn_seconds)
            generator = Consumers(sockets, 64, encoded(CASES["Oldest"]))
            with Processors(server) as processors:
                producer.start()
                generator.run(scale.churn_seconds)
                producer.join()
        if producer.failure is not None:
            raise RuntimeError(f"the producer failed: {producer.failure}") from producer.failure
    rate = producer.inserted / scale.churn_seconds
    what = (
        f"{scale.churn_rate:,} submissions of {CHUNKS} chunks a second for {scale.churn_seconds:.0f} s, "
        f"forgotten after {age}"
    )
    limit = processors.limit()
    yield Figure(
        f"{what}: inserts taken",
        rate,
        "/s",
        None,
        scale.churn_rate,
        limit=limit,
        note=f"{generator.chunks:,} of {producer.inserted * CHUNKS:,} chunks done; {CONNECTIONS} connections",
    )
    yield from _growth(producer.samples, scale.churn_seconds, limit)


def _growth(samples: list[Sample], seconds: float, limit: str) -> Iterator[Figure]:
    last = [each for each in samples if each.at >= seconds / 2]
    width = max(1, len(last) // FIFTH)
    for name, values in (("memory (PSS)", [each.memory for each in last]), ("file", [each.file for each in last])):
        what = f"growth of the {name} in the last half of that run"
        if len(values) < 2:
            yield Figure(what, None, "MiB", note="not run: too short for two samples")
            continue
        first, final = statistics.fmean(values[:width]), statistics.fmean(values[-width:])
        note = f"from {first / MIB:.1f} to {final / MIB:.1f} MiB, at most {max(values) / MIB:.1f}; asked: none"
        if name == "file":
            note += f"; write-ahead log at most {max(each.wal for each in samples) / MIB:.1f} MiB"
        yield Figure(what, (final - first) / MIB, "MiB", higher_is_better=False, limit=limit, note=note)

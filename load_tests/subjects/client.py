"""The client library through files, two consumer processes, everything included; beside the reference's client."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator

from load_tests.client_programs import work
from load_tests.figures import Figure, Processors, did_not_run
from load_tests.reference_client import ROOT, VERSION, ReferenceClient, find_python312
from load_tests.server_process import ServerProcess, fresh_directory
from load_tests.setting import Bench
from opsqueue.producer import ProducerClient

CONSUMERS = 2
ROUNDS = 3
#: Of each of the two that are compared, an even number.
_POOL_ROUNDS = 8
#: (chunks, operations in each, chunks a second that the reference's client and server reach, what is asked).
SHORT = ((1_000, 10, 39.0, 2_500.0), (200, 1_000, 200 / 5.2, 200 / 0.25))
_IMPORTS = 15
_FIRST_CLIENT = "from opsqueue.producer import ProducerClient; ProducerClient('127.0.0.1:1', 'memory://')"
#: Operations of the row about memory, and of each of its chunks.
MANY = 10_000_000
MANY_CHUNK_SIZE = 5_000


def measure(bench: Bench) -> Iterator[Figure]:
    python = find_python312()
    reference = ReferenceClient(python) if python is not None else None
    if reference is None:
        yield did_not_run(f"the reference's client {VERSION}", "it is a wheel for CPython 3.12, which is not here")
    for chunks, size, published, asked in SHORT:
        yield from _short(bench, reference, max(chunks // bench.scale.client_share, 50), size, published, asked)
    yield _beside_a_pool(bench)
    yield _with_a_slow_store(bench)
    yield from _import_time(max(5, _IMPORTS // bench.scale.client_share))
    yield _memory(bench)


@contextlib.contextmanager
def consumers(
    server: ServerProcess, function: str, delay_ms: float = 0.0, results: list[tuple[float, float]] | None = None
) -> Iterator[None]:
    """Our consumer processes, ready and later stopped; `results` gets what they print."""
    words = [server.address, (server.directory / "objects").as_uri(), function, str(delay_ms)]
    running = [
        subprocess.Popen(
            [sys.executable, "-m", "load_tests.client_programs.consumer", *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        for _ in range(CONSUMERS)
    ]
    try:
        for each in running:
            assert each.stdout is not None
            if each.stdout.readline().strip() != "ready":
                raise RuntimeError("a consumer did not start")
        yield
        for each in running:
            output, _ = each.communicate("stop\n", timeout=30)
            if results is not None:
                busy, span = map(float, output.split())
                results.append((busy, span))
    finally:
        for each in running:
            each.kill()
            each.wait()


def roundtrip(server: ServerProcess, operations: list[int], chunk_size: int) -> float:
    """Seconds of one submission, from the first operation to the last result."""
    client = ProducerClient(server.address, (server.directory / "objects").as_uri())
    begun = time.perf_counter()
    count = sum(1 for _ in client.run_submission(operations, chunk_size=chunk_size))
    seconds = time.perf_counter() - begun
    if count != len(operations):
        raise RuntimeError(f"{len(operations)} operations went in, {count} results came back")
    return seconds


def _short(
    bench: Bench,
    reference: ReferenceClient | None,
    chunks: int,
    size: int,
    published: float,
    asked: float,
) -> Iterator[Figure]:
    ours: list[float] = []
    theirs: list[float] = []
    limit = ""
    for _ in range(ROUNDS):
        with bench.server_of_many_files() as server, consumers(server, "no_op"):
            roundtrip(server, list(range(size)), size)
            with Processors(server) as processors:
                ours.append(chunks / roundtrip(server, list(range(chunks * size)), size))
            limit = processors.limit()
        if reference is not None:
            with bench.server_of_many_files() as server:
                objects = server.directory / "objects"
                seconds = reference.roundtrip(
                    server.address, objects, chunks=chunks, chunk_size=size, consumers=CONSUMERS
                )
                theirs.append(chunks / seconds)
    what = f"{chunks:,} chunks of {size:,} no-op operations, {CONSUMERS} consumer processes"
    best = f"{min(ours):,.0f} to {max(ours):,.0f}; {chunks / statistics.median(ours):.2f} s for all"
    yield Figure(f"our client, {what}", statistics.median(ours), "chunks/s", published, asked, limit=limit, note=best)
    if theirs:
        note = f"on our server, interleaved; our client is {statistics.median(ours) / statistics.median(theirs):.1f} x"
        yield Figure(
            f"the reference's client, {what}", statistics.median(theirs), "chunks/s", published, limit="", note=note
        )


def _beside_a_pool(bench: Bench) -> Figure:
    operations = [work.rounds_of(0.001)] * (100 * (64 // bench.scale.client_share + CONSUMERS))
    chunks = [operations[at : at + 100] for at in range(0, len(operations), 100)]

    def alone() -> float:
        with multiprocessing.get_context("fork").Pool(CONSUMERS) as pool:
            list(pool.imap(work.spin_all, chunks[:CONSUMERS]))
            begun = time.perf_counter()
            list(pool.imap(work.spin_all, chunks))
            return time.perf_counter() - begun

    def ours() -> float:
        with bench.server() as server, consumers(server, "spin"):
            roundtrip(server, operations[:200], 100)
            return roundtrip(server, operations, 100)

    # the machine's pace drifts: each goes first in every other round, and what counts is all of them together
    pairs: list[tuple[float, float]] = []
    rounds = max(2, _POOL_ROUNDS // bench.scale.client_share)
    for number in range(rounds):
        if number % 2:
            seconds = alone()
            pairs.append((ours(), seconds))
        else:
            pairs.append((ours(), alone()))
    ratios = [mine / its for mine, its in pairs]
    return Figure(
        f"operations of 1 ms in chunks of 100, {CONSUMERS} processes: time over multiprocessing.Pool.imap",
        sum(mine for mine, _ in pairs) / sum(its for _, its in pairs),
        "x",
        None,
        1.03,
        False,
        limit="consumers",
        note=f"{len(chunks)} chunks; {min(ratios):.3f} to {max(ratios):.3f} in {rounds} interleaved rounds",
    )


def _with_a_slow_store(bench: Bench) -> Figure:
    results: list[tuple[float, float]] = []
    count = 100 // bench.scale.client_share
    with bench.server() as server, consumers(server, "rest", 30.0, results):
        seconds = roundtrip(server, list(range(count * CONSUMERS)), 1)
    busy = sum(busy for busy, _ in results) / sum(span for _, span in results)
    return Figure(
        "operations of 100 ms in chunks of 1, 30 ms more for every store call: busy share of the consumers",
        100 * busy,
        "%",
        None,
        97.0,
        limit="consumers",
        note=f"{count * CONSUMERS} operations in {seconds:.1f} s",
    )


def _import_time(rounds: int) -> Iterator[Figure]:
    with fresh_directory(None) as directory:
        # an installed package has its bytecode, a source tree perhaps not
        environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": str(directory)}

        def seconds(code: str) -> float:
            begun = time.perf_counter()
            subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, env=environment)
            return time.perf_counter() - begun

        programs = (
            ("import opsqueue.producer", "import opsqueue.producer", 150.0),
            ("import opsqueue.producer and make a client", _FIRST_CLIENT, None),
            ("import aiohttp, for comparison", "import aiohttp", None),
        )
        taken: dict[str, list[float]] = {what: [] for what, _, _ in programs}
        for number in range(rounds + 1):
            for what, code, _ in programs:
                beyond = seconds(code) - seconds("pass")
                if number:  # the first one writes the bytecode
                    taken[what].append(beyond)
    for what, _, asked in programs:
        note = f"beyond an empty program, median of {rounds}"
        yield Figure(what, 1000 * statistics.median(taken[what]), "ms", None, asked, False, limit="", note=note)


def _memory(bench: Bench) -> Figure:
    count = MANY // bench.scale.client_share
    with bench.server_of_many_files() as server, consumers(server, "no_op"):
        words = [server.address, (server.directory / "objects").as_uri(), str(count), str(MANY_CHUNK_SIZE)]
        told = subprocess.run(
            [sys.executable, "-m", "load_tests.client_programs.producer", *words],
            check=True,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        ).stdout
    most, seconds = map(float, told.split())
    return Figure(
        f"{count:,} operations through one producer: the most memory that it used",
        most / 2**20,
        "MiB",
        None,
        300.0,
        False,
        limit="",
        note=f"chunks of {MANY_CHUNK_SIZE:,}; {count / seconds:,.0f} operations/s with {CONSUMERS} consumer processes",
    )

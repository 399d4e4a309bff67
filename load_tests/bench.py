"""`make bench`: what opsqueue reaches on this machine, beside what the reference reached on this kind of machine.

Server and load generator share the machine; the generator's own share of a core is printed with each figure, so that
one can see which of them was the limit. Figures of the reference are those of its release build with its database on
the same kind of disk (docs/benchmarks.md has their source).
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from load_tests import peers
from load_tests.generator import CompactConsumers, Consumers, Inserters
from load_tests.reference_client import ReferenceClient, find_python312
from load_tests.server_process import ServerProcess, running_server

OLDEST = b"\x66Oldest"
RANDOM = b"\x66Random"
#: A credit stands for this many requests: it is topped up with each reply, long before it is used up.
CREDIT_REQUESTS = 8


@dataclass(frozen=True)
class Figure:
    """One row: `value` in `unit`; `reference` in the same unit (None: not measured there); `higher_is_better`."""

    what: str
    value: float
    unit: str
    reference: float | None
    higher_is_better: bool
    note: str

    @property
    def ratio(self) -> str:
        if self.reference is None or not self.value:
            return "-"
        factor = self.value / self.reference if self.higher_is_better else self.reference / self.value
        return f"{factor:,.1f} x"


def unique_prefix() -> str:
    return f"bench-{uuid.uuid4()}"


def cores(cpu_s: float, seconds: float) -> str:
    return f"{cpu_s / seconds:.2f}"


def lifecycles(
    server: ServerProcess,
    consumers: int,
    max_chunks: int,
    seconds: float,
    reference: float,
    strategy: bytes,
    name: str,
    *,
    compact: bool = False,
) -> Figure:
    """Chunks reserved and completed per second; `compact`: by our own messages, on a credit of several requests."""
    with peers.connect(server.address) as producer:
        peers.exchange(producer, peers.insert_request(server.address, unique_prefix(), 200_000_000))
        sockets = [peers.consumer(server.address, "compact" if compact else None) for _ in range(consumers)]
        descriptors = [each.fileno() for each in sockets]
        if compact:
            generator: Consumers = CompactConsumers(descriptors, max_chunks * CREDIT_REQUESTS, strategy)
        else:
            generator = Consumers(descriptors, max_chunks, strategy)
        generator.run(0.5)  # warm up
        before = server.cpu_by_process()
        generator.run(seconds)
        after = server.cpu_by_process()
        for each in sockets:
            each.close()
        cancel_all(server, producer)
    elapsed = generator.seconds_ns / 1e9
    latencies = generator.latencies_us()
    used = ", ".join(f"{process} {cores(after[process] - before[process], elapsed)}" for process in after)
    note = (
        f"reserve p50 {latencies[len(latencies) // 2] / 1000:.2f} ms, "
        f"p99 {latencies[len(latencies) * 99 // 100] / 1000:.2f} ms; "
        f"cores: generator {cores(generator.cpu_ns / 1e9, elapsed)}, {used}"
    )
    if compact:
        name += f", compact messages, a credit of {max_chunks * CREDIT_REQUESTS}"
    what = f"lifecycles, {consumers} consumers, {max_chunks} a request, {name}"
    return Figure(what, generator.chunks / elapsed, "1/s", reference, True, note)


def cancel_all(server: ServerProcess, producer: object) -> None:
    """So that the next measurement starts with an empty queue."""
    import json

    connection = producer
    body = peers.request(server.address, "POST", "/producer/submissions/lookup_ids_by_strategic_metadata", b"{}")
    for submission in json.loads(peers.exchange(connection, body)):  # type: ignore[arg-type]
        peers.exchange(  # type: ignore[arg-type]
            connection, peers.request(server.address, "POST", f"/producer/submissions/cancel/{submission}")
        )


def insert_latency(server: ServerProcess, chunks: int, repeats: int, reference: float) -> Figure:
    """Milliseconds of one insert, one at a time."""
    with peers.connect(server.address) as producer:
        taken = []
        for _ in range(repeats):
            message = peers.insert_request(server.address, unique_prefix(), chunks)
            begun = time.perf_counter()
            peers.exchange(producer, message)
            taken.append((time.perf_counter() - begun) * 1000)
        cancel_all(server, producer)
    note = f"p99 {sorted(taken)[len(taken) * 99 // 100]:.2f} ms of {repeats}"
    return Figure(f"insert of {chunks:,} chunks, p50", statistics.median(taken), "ms", reference, False, note)


def insert_rate(server: ServerProcess, connections: int, count: int) -> Figure:
    """Inserts of 10 chunks a second."""
    sockets = [peers.connect(server.address) for _ in range(connections)]
    requests = [peers.insert_request(server.address, unique_prefix(), 10) for _ in range(count)]
    inserters = Inserters([each.fileno() for each in sockets])
    before = server.cpu_seconds()
    inserters.run(requests)
    used = server.cpu_seconds() - before
    if inserters.refused:
        raise RuntimeError(f"{inserters.refused} of {count} inserts were refused")
    for each in sockets:
        each.close()
    elapsed = inserters.seconds_ns / 1e9
    note = f"cores: generator {cores(inserters.cpu_ns / 1e9, elapsed)}, server {cores(used, elapsed)}"
    return Figure(f"inserts of 10 chunks, {connections} connections", inserters.done / elapsed, "1/s", 306, True, note)


def idle_latency(server: ServerProcess, repeats: int, pause_ms: int) -> Figure:
    """Milliseconds from an insert's POST until a waiting consumer holds its chunk, on an idle server.

    After 6 ms the request has been parked, the completion committed (5 ms at most) and every process sleeps; after
    20 ms the machine's cores may sleep as well, which then is most of what is measured.
    """
    taken = []
    with peers.connect(server.address) as producer:
        cancel_all(server, producer)
        waiting = peers.consumer(server.address)
        waiting.settimeout(10)
        consumer = Waiting(waiting)
        for _ in range(repeats):
            consumer.ask()
            time.sleep(pause_ms / 1000)
            message = peers.insert_request(server.address, unique_prefix(), 1)
            begun = time.perf_counter()
            producer.sendall(message)
            consumer.held()
            taken.append((time.perf_counter() - begun) * 1000)
            producer.recv(65536)
        waiting.close()
    taken.sort()
    note = f"p99 {taken[len(taken) * 99 // 100]:.2f} ms of {repeats} (reference 27 ms)"
    what = f"idle: insert to held, p50, each {pause_ms} ms after the last"
    return Figure(what, statistics.median(taken), "ms", 3.8, False, note)


class Waiting:
    """A consumer that asks for one chunk at a time and completes the one before."""

    def __init__(self, connection: object) -> None:
        import cbor2

        self._cbor2 = cbor2
        self._connection = connection
        self._nonce = 0
        self._input = b""
        self._done: tuple[int, int] | None = None

    def _send(self, contents: object) -> bytes:
        payload = self._cbor2.dumps({"nonce": self._nonce, "contents": contents})
        self._nonce += 1
        head = (
            bytes([0x82, 0x80 | len(payload)]) if len(payload) < 126 else b"\x82\xfe" + len(payload).to_bytes(2, "big")
        )
        return head + bytes(4) + payload

    def ask(self) -> None:
        messages = b""
        if self._done is not None:
            submission, chunk = self._done
            identity = {"submission_id": submission, "chunk_index": chunk}
            messages += self._send({"CompleteChunk": {"id": identity, "output_content": None}})
        messages += self._send({"WantToReserveChunks": {"max": 1, "strategy": "Oldest"}})
        self._connection.sendall(messages)  # type: ignore[attr-defined]

    def held(self) -> None:
        while True:
            self._input += self._connection.recv(65536)  # type: ignore[attr-defined]
            at = self._input.find(b"\x6eChunksReserved")
            if at < 0:
                continue
            key = self._input.index(b"\x6dsubmission_id", at)
            submission = int.from_bytes(self._input[key + 15 : key + 23], "big")
            chunk = self._input[self._input.index(b"\x6bchunk_index", at) + 12]
            self._done = (submission, chunk)
            self._input = b""
            return


def reference_client(server: ServerProcess, client: ReferenceClient, chunks: int, consumers: int) -> Figure:
    """The reference's own client, unmodified, through files: chunks of 10 no-op operations per second."""
    seconds = client.roundtrip(
        server.address, server.directory / "objects", chunks=chunks, chunk_size=10, consumers=consumers
    )
    what = f"reference's client 0.30.3, {consumers} consumers, end to end"
    return Figure(
        what,
        chunks / seconds,
        "chunks/s",
        39 if consumers == 2 else 95,
        True,
        f"{chunks} chunks of 10 no-op operations",
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__)
    parser.add_argument("--seconds", type=float, default=5.0, help="of each throughput measurement (default 5)")
    parser.add_argument("--directory", help="where the databases go (default: the system's temporary directory)")
    parser.add_argument("--durability", choices=("full", "normal"), default="full")
    arguments = parser.parse_args()
    console = Console()
    figures: list[Figure] = []
    measurements: list[Callable[[ServerProcess], Figure]] = [
        lambda server: lifecycles(server, 8, 1, arguments.seconds, 680, OLDEST, "Oldest"),
        lambda server: lifecycles(server, 8, 1, arguments.seconds, 680, RANDOM, "Random"),
        lambda server: lifecycles(server, 64, 1, arguments.seconds, 490, OLDEST, "Oldest"),
        lambda server: lifecycles(server, 8, 64, arguments.seconds, 980, OLDEST, "Oldest"),
        lambda server: lifecycles(server, 8, 64, arguments.seconds, 980, OLDEST, "Oldest", compact=True),
        lambda server: lifecycles(server, 8, 64, arguments.seconds, 980, RANDOM, "Random", compact=True),
        lambda server: insert_latency(server, 1, 200, 4.3),
        lambda server: insert_latency(server, 1_000, 200, 4.1),
        lambda server: insert_latency(server, 1_000_000, 100, 5_098),
        lambda server: insert_rate(server, 32, int(4_000 * arguments.seconds)),
        lambda server: idle_latency(server, 300, 6),
        lambda server: idle_latency(server, 300, 20),
    ]
    python312 = find_python312()
    if python312 is None:
        console.print(
            "no python3.12 on this machine: the reference's client (a wheel for CPython 3.12) is not measured"
        )
    else:
        client = ReferenceClient(python312)
        measurements.append(lambda server: reference_client(server, client, 1_000, 2))
    for measurement in measurements:
        with running_server("--durability", arguments.durability, directory=arguments.directory) as server:
            figures.append(measurement(server))
            console.print(f"  {figures[-1].what}: {figures[-1].value:,.1f} {figures[-1].unit}")
    table = Table(
        title=f"opsqueue on {os.cpu_count()} cores, {platform.python_version()}, durability {arguments.durability}"
    )
    for heading in ("what", "measured", "reference", "ratio", "notes"):
        table.add_column(heading, justify="left" if heading in ("what", "notes") else "right")
    for figure in figures:
        digits = 0 if figure.value >= 100 else 2
        reference = "-" if figure.reference is None else f"{figure.reference:,g} {figure.unit}"
        table.add_row(figure.what, f"{figure.value:,.{digits}f} {figure.unit}", reference, figure.ratio, figure.note)
    console.print(table)


if __name__ == "__main__":
    main()

"""`make bench-peers`: one lifecycle (reserve one, complete it, durable) by opsqueue and by other queues, side by side.

Same machine, same run, 8 consumers each, rounds interleaved, medians. Every queue reaches the disk before a completion
counts: opsqueue with --durability full, redis with appendfsync always, beanstalkd with fsync on each write, PostgreSQL
with fsync and synchronous_commit. Each has the machine to itself while it is measured.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from load_tests.backlog import consumers, fill
from load_tests.bench import command_line
from load_tests.comparison import clients, servers
from load_tests.figures import Figure, Machine, Processors, as_json, as_markdown, as_table, did_not_run, terminal
from load_tests.generator import Consumers
from load_tests.server_process import running_server
from load_tests.strategies import CASES, encoded

CONNECTIONS = 8
WARM_UP_S = 0.3
OURS = "opsqueue"


@dataclass(frozen=True)
class Queue:
    """`jobs_per_second`: more than it completes, so that its queue never runs dry."""

    what: str
    start: Callable[[str | None], AbstractContextManager[servers.Peer]]
    fill: Callable[[int, int], None]
    kind: type[clients.Connection]
    jobs_per_second: int


QUEUES: dict[str, Queue] = {
    "redis": Queue(
        "LMOVE and LREM, appendfsync always", servers.redis, clients.fill_redis, clients.RedisConnection, 60_000
    ),
    "beanstalkd": Queue(
        "reserve and delete, fsync on each",
        servers.beanstalkd,
        clients.fill_beanstalkd,
        clients.BeanstalkConnection,
        25_000,
    ),
    "PostgreSQL": Queue(
        "FOR UPDATE SKIP LOCKED, synchronous_commit on",
        servers.postgresql,
        clients.fill_postgresql,
        clients.PostgresConnection,
        40_000,
    ),
}


@dataclass(frozen=True)
class Round:
    rate: float
    limit: str


def measure_ours(directory: str | None, seconds: float) -> Round:
    with running_server(directory=directory) as server:
        fill(server, 100, 10_000_000)
        with consumers(server, CONNECTIONS) as sockets:
            generator = Consumers(sockets, 1, encoded(CASES["Oldest"]))
            generator.run(WARM_UP_S)
            with Processors(server) as processors:
                generator.run(seconds)
    took = generator.seconds_ns / 1e9
    return Round(generator.chunks / took, processors.limit(took))


def measure_peer(queue: Queue, directory: str | None, seconds: float) -> Round:
    with queue.start(directory) as peer:
        queue.fill(peer.port, int(queue.jobs_per_second * (seconds + WARM_UP_S)))
        with clients.connected(queue.kind, peer.port, CONNECTIONS) as connections:
            clients.run(connections, WARM_UP_S)
        with clients.connected(queue.kind, peer.port, CONNECTIONS) as connections, Processors(peer) as processors:
            done = clients.run(connections, seconds)
    return Round(done.count / done.seconds, processors.limit(done.seconds))


def compare(directory: str | None, seconds: float, rounds: int, names: Sequence[str], console: Console) -> list[Figure]:
    """The medians; a queue that is not installed, or fails, is a row that says so."""
    results: dict[str, list[Round]] = {OURS: [], **{name: [] for name in names}}
    failures: dict[str, str] = {}
    for number in range(rounds):
        for name, taken in results.items():
            if name in failures:
                continue
            try:
                done = (
                    measure_ours(directory, seconds) if name == OURS else measure_peer(QUEUES[name], directory, seconds)
                )
            except (RuntimeError, OSError) as error:
                if name == OURS:
                    raise
                failures[name] = str(error)
                console.print(f"  {name} is skipped: {error}", soft_wrap=True)
                continue
            taken.append(done)
            console.print(f"  round {number + 1}, {name}: {done.rate:,.0f} /s, limit: {done.limit}", soft_wrap=True)
    ours = statistics.median(each.rate for each in results[OURS])
    return [_figure(name, taken, ours, failures.get(name)) for name, taken in results.items()]


def _figure(name: str, taken: Sequence[Round], ours: float, failure: str | None) -> Figure:
    what = f"lifecycles, {CONNECTIONS} consumers, {name}"
    if name != OURS:
        what += f" ({QUEUES[name].what})"
    if failure is not None:
        return did_not_run(what, failure)
    rates = sorted(each.rate for each in taken)
    rate = statistics.median(rates)
    note = f"{len(rates)} rounds, {rates[0]:,.0f} to {rates[-1]:,.0f}"
    if name != OURS:
        note = f"opsqueue is {ours / rate:.1f} times as fast; {note}"
    return Figure(what, rate, "/s", limit=taken[-1].limit, note=note)


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m load_tests.bench_peers",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--seconds", type=float, default=4.0, help="of each round (default 4)")
    parser.add_argument("--rounds", type=int, default=3, help="(default 3)")
    parser.add_argument("--only", nargs="+", choices=list(QUEUES), default=list(QUEUES), metavar="QUEUE")
    parser.add_argument("--directory", help="where the queues keep their files (default: the temporary directory)")
    parser.add_argument("--json", metavar="FILE", help="write the results to this file")
    parser.add_argument("--markdown", metavar="FILE", help="write the table for docs/benchmarks.md to this file")
    arguments = parser.parse_args(given)
    console = terminal()
    figures = compare(arguments.directory, arguments.seconds, arguments.rounds, arguments.only, console)
    machine = Machine.here(command_line("bench_peers"))
    console.print(as_table(str(machine), figures))
    for figure in figures:
        console.print(f"  {figure.what}: {figure.note}", soft_wrap=True)
    if arguments.json:
        Path(arguments.json).write_text(as_json(machine, figures))
    if arguments.markdown:
        Path(arguments.markdown).write_text(as_markdown(machine, figures))


if __name__ == "__main__":
    main()

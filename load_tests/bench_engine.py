"""What the engine's decisions cost: nanoseconds per reserve and per complete, by strategy. No process, ring or file.

python -m load_tests.bench_engine [--chunks 1000000] [--submissions 100] [--count 100000]
"""

from __future__ import annotations

import argparse
import resource
import time

from rich.console import Console
from rich.table import Table

from load_tests.strategies import CASES, metadata
from opsqueue._speedups.scripted import ScriptedEngine
from opsqueue.protocol.strategy import canonical

HOLDER = 1


def filled(submissions: int, chunks_each: int) -> ScriptedEngine:
    engine = ScriptedEngine(seed=1)
    engine.advance(1)
    engine.open_connection(HOLDER, 0)
    for submission in range(1, submissions + 1):
        engine.add_submission(submission, chunks_each, 1, metadata(submission), direct=False)
    return engine


def resident_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(console: Console, submissions: int, chunks_each: int, count: int) -> None:
    table = Table(title=f"{submissions:,} submissions of {chunks_each:,} chunks", title_justify="left")
    for column in ("strategy", "a request", "reserve ns", "complete ns", "first use ms"):
        table.add_column(column, justify="left" if column == "strategy" else "right", no_wrap=True)
    for name, strategy in CASES.items():
        for per_request in (1, 64):
            engine = filled(submissions, chunks_each)
            begun = time.perf_counter()
            while not engine.is_ready(canonical(strategy)):
                engine.work(2_000_000)
            first_use = time.perf_counter() - begun
            reserving, completing, done = engine.time_lifecycles(HOLDER, canonical(strategy), count, per_request)
            table.add_row(
                name, str(per_request), f"{reserving / done:.0f}", f"{completing / done:.0f}", f"{first_use * 1e3:.1f}"
            )
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chunks", type=int, default=1_000_000, help="over all submissions")
    parser.add_argument("--submissions", type=int, default=100)
    parser.add_argument("--count", type=int, default=100_000, help="chunk lifecycles to time")
    arguments = parser.parse_args()
    console = Console()
    measure(console, arguments.submissions, arguments.chunks // arguments.submissions, arguments.count)
    measure(console, 20_000, 1, 10_000)

    begun = time.perf_counter_ns()
    engine = ScriptedEngine(seed=1)
    engine.add_submission(1, 10**9, 1, {}, direct=False)
    console.print(f"insert of a submission of 10^9 chunks: {(time.perf_counter_ns() - begun) / 1e3:.0f} us")
    before = resident_mib()
    begun = time.perf_counter_ns()
    for submission in range(2, 1_000_002):
        engine.add_submission(submission, 1, 1, {}, direct=False)
    each = (time.perf_counter_ns() - begun) / 1e6
    console.print(f"insert of a submission of 1 chunk: {each:.0f} ns; a million take {resident_mib() - before:.0f} MiB")


if __name__ == "__main__":
    main()

"""`make bench`: what opsqueue reaches on this machine, beside what the reference reached on this kind of machine.

Server and load generator share the machine; the processor time of each process is printed with each row, so that one
can see which of them was the limit. Figures of the reference are those of its release build with its database on the
same kind of disk.
"""

from __future__ import annotations

import argparse
import resource
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from load_tests.figures import Figure, Machine, as_json, as_markdown, as_table, cells, did_not_run, from_json, terminal
from load_tests.pace import Pace
from load_tests.scale import FULL, QUICK
from load_tests.setting import Bench
from load_tests.subjects import (
    backlog,
    churn,
    client,
    connections,
    idle,
    inserts,
    interop,
    lifecycles,
    reservations,
    small_submissions,
    stalls,
)

#: Every subject, in the order of the table in docs/benchmarks.md.
SUBJECTS: dict[str, Callable[[Bench], Iterator[Figure]]] = {
    "lifecycles": lifecycles.measure,
    "inserts": inserts.measure,
    "idle": idle.measure,
    "reservations": reservations.measure,
    "stalls": stalls.measure,
    "backlog": backlog.measure,
    "small-submissions": small_submissions.measure,
    "churn": churn.measure,
    "connections": connections.measure,
    "client": client.measure,
    "interop": interop.measure,
}


def measured(name: str, bench: Bench) -> Iterator[Figure]:
    """A subject's rows; when it fails, the rows so far and one that says why."""
    try:
        yield from SUBJECTS[name](bench)
    except (RuntimeError, OSError, ValueError) as error:
        yield did_not_run(name, f"{type(error).__name__}: {error}")


def raise_descriptor_limit() -> None:
    """As far as this user may: 10,000 connections need as many descriptors here and in the server."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def arguments_of(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m load_tests.bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="subjects:\n  " + " ".join(SUBJECTS),
    )
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="every subject at a small size, under 2 minutes (default)")
    size.add_argument("--full", action="store_true", help="every row of the table at its size, about half an hour")
    parser.add_argument(
        "--scale", type=float, default=1.0, metavar="F", help="durations and counts times F (default 1)"
    )
    parser.add_argument("--only", nargs="+", choices=list(SUBJECTS), metavar="SUBJECT", help="measure these alone")
    parser.add_argument("--directory", help="where the databases go (default: the system's temporary directory)")
    parser.add_argument("--durability", choices=("full", "normal"), default="full")
    parser.add_argument("--json", metavar="FILE", help="write the results to this file")
    parser.add_argument("--markdown", metavar="FILE", help="write the table for docs/benchmarks.md to this file")
    parser.add_argument("--from-json", metavar="FILE", help="measure nothing: show the results in this file")
    arguments = parser.parse_args(given)
    if arguments.scale <= 0:
        parser.error(f"--scale is {arguments.scale}, it must be above 0")
    return arguments


def run(arguments: argparse.Namespace, console: Console) -> tuple[Machine, list[Figure]]:
    """Measure what was asked for, and say each row as soon as it is there."""
    raise_descriptor_limit()
    scale = FULL if arguments.full else QUICK
    if arguments.scale != 1.0:
        scale = scale.scaled(arguments.scale)
    figures: list[Figure] = []
    with ExitStack() as homes:
        bench = Bench(
            scale, homes, arguments.directory, arguments.durability, say=lambda text: console.print(f"  … {text}")
        )
        for name in arguments.only or SUBJECTS:
            figures += run_subject(name, bench, console)
    return Machine.here(command_line()), figures


def run_subject(name: str, bench: Bench, console: Console) -> Iterator[Figure]:
    """One subject's rows, with the machine's pace just before."""
    begun = time.perf_counter()
    pace = Pace.now(bench.directory)
    console.print(f"{name}; machine: {pace}", style="dim")
    for figure in measured(name, bench):
        what, value, _, ratio, asked, of_asked, limit, _, note = cells(figure)
        console.print(
            f"  {what}: {value} (reference x {ratio}; asked {asked}, x {of_asked}) {limit} {note}", soft_wrap=True
        )
        yield replace(figure, pace=str(pace))
    console.print(f"{name}: {time.perf_counter() - begun:.0f} s", style="dim")


def command_line(program: str = "bench") -> str:
    """As it was given."""
    return shlex.join(["python", "-m", f"load_tests.{program}", *sys.argv[1:]])


def main(given: Sequence[str] | None = None) -> None:
    arguments = arguments_of(given)
    console = terminal()
    if arguments.from_json:
        machine, figures = from_json(Path(arguments.from_json).read_text())
    else:
        machine, figures = run(arguments, console)
    console.print(as_table(str(machine), figures))
    if arguments.json:
        Path(arguments.json).write_text(as_json(machine, figures))
    if arguments.markdown:
        Path(arguments.markdown).write_text(as_markdown(machine, figures))


if __name__ == "__main__":
    main()

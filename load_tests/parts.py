"""Where the time of one chunk's lifecycle goes: instructions and processor time of each process, part by part.

`python -m load_tests.parts` runs a server and consumers like the rows "lifecycles" of the benchmark under Linux's perf
(Debian's package linux-perf), as root or with kernel.perf_event_paranoid at most 1.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from load_tests.backlog import consumers, fill
from load_tests.generator import CompactConsumers, Consumers
from load_tests.server_process import ServerProcess, running_server
from load_tests.strategies import CASES, CUSTOMERS, encoded
from load_tests.subjects.lifecycles import CREDIT_REQUESTS, WARM_UP_S

EVENTS = ("instructions:u", "instructions:k", "task-clock", "context-switches")
#: What a symbol belongs to: the first of these that its library's path contains.
PARTS = {
    "[kernel": "kernel",
    "_speedups/": "our Cython",
    "uvloop": "uvloop",
    "libpython": "Python",
    "bin/python": "Python",
    "apsw": "SQLite",
    "generator": "generator",
    "libc": "libc",
}
#: Functions of one process that are shown, the heaviest first.
SHOWN = 8


@dataclass(frozen=True)
class Process:
    name: str
    pid: int


@dataclass(frozen=True)
class Counted:
    """Per lifecycle: instructions in the program and in the kernel, microseconds, and switches to another process."""

    user: float
    kernel: float
    microseconds: float
    switches: float


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--consumers", type=int, default=8)
    parser.add_argument("--max-chunks", type=int, default=1, help="chunks a request (default: 1)")
    parser.add_argument("--strategy", choices=sorted(CASES), default="Oldest")
    parser.add_argument("--compact", action="store_true", help="our own messages, on a credit")
    parser.add_argument("--seconds", type=float, default=5.0, help="length of each of the two runs (default: 5)")
    arguments = parser.parse_args()
    if shutil.which("perf") is None:
        print("there is no perf on this machine: apt-get install linux-perf", file=sys.stderr)
        return 1
    with running_server() as server, tempfile.TemporaryDirectory(prefix="opsqueue-parts-") as directory:
        fill(server, CUSTOMERS, 400_000)
        strategy = encoded(CASES[arguments.strategy])
        with consumers(server, arguments.consumers, "compact" if arguments.compact else None) as sockets:
            if arguments.compact:
                generator: Consumers = CompactConsumers(sockets, arguments.max_chunks * CREDIT_REQUESTS, strategy)
            else:
                generator = Consumers(sockets, arguments.max_chunks, strategy)
            generator.run(WARM_UP_S)
            processes = [*_processes(server), Process("generator", os.getpid())]
            counted = _count(generator, processes, arguments.seconds, Path(directory))
            shares = _sample(generator, processes, arguments.seconds, Path(directory))
    command = f"python -m load_tests.parts {' '.join(sys.argv[1:])}".strip()
    _show(command, counted, shares)
    return 0


def _processes(server: ServerProcess) -> Iterator[Process]:
    for pid in server.pids()[1:]:
        name = Path(f"/proc/{pid}/comm").read_text().strip().removeprefix("opsqueue").strip(" :-")
        if name.startswith(("writer", "fe")):
            yield Process(name, pid)


@contextmanager
def _perf(*words: str) -> Iterator[None]:
    """Runs while the body does. Raises RuntimeError with perf's own words when it refuses."""
    control, theirs = os.pipe()
    told, acknowledged = os.pipe()
    process = subprocess.Popen(
        ["perf", *words, "--delay", "-1", "--control", f"fd:{control},{acknowledged}"],
        pass_fds=[control, acknowledged],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    os.close(control)
    os.close(acknowledged)
    try:
        os.write(theirs, b"enable\n")
        if not os.read(told, 5):
            raise RuntimeError(f"perf refused: {process.communicate()[0]}")
        yield
        os.write(theirs, b"disable\n")
        os.read(told, 5)
    finally:
        process.send_signal(2)
        output, _ = process.communicate(timeout=60)
        os.close(theirs)
        os.close(told)
    if process.returncode not in (0, -2):
        raise RuntimeError(f"perf ended with {process.returncode}: {output}")


def _count(generator: Consumers, processes: list[Process], seconds: float, directory: Path) -> dict[str, Counted]:
    """Every event of each process, at the same time."""
    results = {process.name: directory / f"{process.name}.stat" for process in processes}
    with _all_of(
        ("stat", "-x", ";", "-e", ",".join(EVENTS), "-p", str(process.pid), "-o", str(results[process.name]))
        for process in processes
    ):
        generator.run(seconds)
    return {name: _read_counts(path, generator.chunks) for name, path in results.items()}


@contextmanager
def _all_of(commands: Iterator[tuple[str, ...]]) -> Iterator[None]:
    words = next(commands, None)
    if words is None:
        yield
        return
    with _perf(*words), _all_of(commands):
        yield


def _read_counts(path: Path, chunks: int) -> Counted:
    found: dict[str, float] = {}
    for line in path.read_text().splitlines():
        fields = line.split(";")
        if len(fields) > 2 and fields[2] in EVENTS:
            if not fields[0].replace(".", "").isdigit():
                raise RuntimeError(f"perf counts no {fields[2]} on this machine: {fields[0]}")
            found[fields[2]] = float(fields[0])
    return Counted(
        found["instructions:u"] / chunks,
        found["instructions:k"] / chunks,
        found["task-clock"] * 1000 / chunks,
        found["context-switches"] / chunks,
    )


def _sample(
    generator: Consumers, processes: list[Process], seconds: float, directory: Path
) -> dict[str, Counter[tuple[str, str]]]:
    """Samples of each process by part and function."""
    data = directory / "perf.data"
    pids = ",".join(str(process.pid) for process in processes)
    with _perf("record", "-q", "-F", "1999", "-o", str(data), "-p", pids):
        generator.run(seconds)
    text = subprocess.run(
        ["perf", "script", "-i", str(data), "-F", "pid,ip,sym,dso"],
        check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    ).stdout  # fmt: skip
    names = {process.pid: process.name for process in processes}
    samples: dict[str, Counter[tuple[str, str]]] = {process.name: Counter() for process in processes}
    for line in text.splitlines():
        fields = line.split(maxsplit=2)
        if len(fields) == 3 and int(fields[0]) in names:
            symbol, _, library = fields[2].rpartition(" (")
            samples[names[int(fields[0])]][_part(library), symbol] += 1
    return samples


def _part(library: str) -> str:
    return next((part for piece, part in PARTS.items() if piece in library), "other")


def _show(command: str, counted: dict[str, Counted], samples: dict[str, Counter[tuple[str, str]]]) -> None:
    console = Console(width=None if sys.stdout.isatty() else 140)
    table = Table("process", title=f"one lifecycle: `{command}`", title_justify="left")
    for title in ("instructions", "of them kernel", "us of a core", "switches"):
        table.add_column(title, justify="right")
    for name, each in counted.items():
        table.add_row(
            name,
            f"{each.user + each.kernel:,.0f}",
            f"{each.kernel:,.0f}",
            f"{each.microseconds:.2f}",
            f"{each.switches:.2f}",
        )
    console.print(table)
    for name, functions in samples.items():
        total = sum(functions.values()) or 1
        parts: Counter[str] = Counter()
        for (part, _), count in functions.items():
            parts[part] += count
        console.print(f"{name}: " + ", ".join(f"{part} {count / total:.0%}" for part, count in parts.most_common()))
        for (part, symbol), count in functions.most_common(SHOWN):
            console.print(f"    {count / total:6.1%}  {part}: {symbol}", markup=False)


if __name__ == "__main__":
    sys.exit(main())

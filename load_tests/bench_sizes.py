"""`make bench-sizes`: how long one reservation takes as the backlog grows, for each strategy; as a log-log plot too.

One server's backlog grows from 100 submissions of 1,000 chunks to a million of them, a billion chunks; at each size one
consumer reserves and completes one chunk at a time with each strategy.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.table import Table

from load_tests.backlog import fill, fill_selected
from load_tests.bench import command_line
from load_tests.figures import Machine, percentile, terminal
from load_tests.server_process import running_server
from load_tests.strategies import CASES, selects
from load_tests.subjects.reservations import first_use, latencies_ms

CHUNKS_EACH = 1_000
#: Inserted for each SelectOnly at each size, beside the others: more than it can take.
SELECTED_SUBMISSIONS = 200
SIZES = tuple(10**power for power in range(2, 7))
#: What the table of docs/benchmarks.md asks of p50 and p99: milliseconds.
ASKED_MS = (0.2, 1.0)


@dataclass(frozen=True)
class Point:
    """Milliseconds of a reservation; `first_ms`: of the first one, which builds the strategy's index."""

    strategy: str
    submissions: int
    chunks: int
    p50_ms: float
    p99_ms: float
    first_ms: float
    limit: str


def measure(sizes: Sequence[int], seconds: float, directory: str | None) -> Iterator[Point]:
    """The points of each size, one by one."""
    inserted = 0
    with running_server(directory=directory) as server:
        for size in sizes:
            fill(server, size - inserted, CHUNKS_EACH)
            inserted = size
            for name, strategy in CASES.items():
                if selects(name):
                    fill_selected(server, SELECTED_SUBMISSIONS, CHUNKS_EACH)
                first = first_use(server, strategy)
                # all strategies together take at most half of the backlog
                most = size * CHUNKS_EACH // (2 * len(CASES))
                taken, limit = latencies_ms(server, strategy, seconds, most)
                yield Point(
                    name, size, size * CHUNKS_EACH, percentile(taken, 0.5), percentile(taken, 0.99), first, limit
                )


def plot(points: Sequence[Point], machine: Machine, path: Path) -> None:
    """Write the plot; its format is that of the path's ending."""
    import matplotlib

    matplotlib.use("svg")
    # The same points give the same file.
    matplotlib.rcParams["svg.hashsalt"] = "opsqueue"
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(11, 5), sharey=True, layout="constrained")
    for panel, field, asked, title in (
        (panels[0], "p50_ms", ASKED_MS[0], "median"),
        (panels[1], "p99_ms", ASKED_MS[1], "99th percentile"),
    ):
        for name in dict.fromkeys(point.strategy for point in points):
            own = [point for point in points if point.strategy == name]
            panel.loglog(
                [point.submissions for point in own], [getattr(point, field) for point in own], marker="o", label=name
            )
        panel.axhline(asked, color="gray", linestyle=":", label=f"asked: {asked:g} ms")
        panel.set_title(f"One reservation, {title}")
        panel.set_xlabel(f"submissions waiting, of {CHUNKS_EACH:,} chunks each")
        panel.grid(visible=True, which="both", alpha=0.3)
    panels[0].set_ylabel("milliseconds")
    panels[1].legend(fontsize="small")
    figure.suptitle(f"opsqueue {machine.opsqueue}, {machine.cores} cores, {machine.taken}", fontsize="small")
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    pyplot.close(figure)


def as_table(points: Sequence[Point]) -> Table:
    table = Table()
    for heading in ("strategy", "submissions", "p50 ms", "p99 ms", "first ms"):
        table.add_column(heading, justify="left" if heading == "strategy" else "right")
    for point in points:
        table.add_row(
            point.strategy,
            f"{point.submissions:,}",
            f"{point.p50_ms:.3f}",
            f"{point.p99_ms:.3f}",
            f"{point.first_ms:.1f}",
        )
    return table


def as_json(machine: Machine, points: Sequence[Point]) -> str:
    return json.dumps({"machine": asdict(machine), "points": [asdict(point) for point in points]}, indent=2) + "\n"


def from_json(text: str) -> tuple[Machine, list[Point]]:
    """What `as_json` wrote."""
    read = json.loads(text)
    return Machine(**read["machine"]), [Point(**each) for each in read["points"]]


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m load_tests.bench_sizes",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--seconds", type=float, default=2.0, help="of each strategy at each size (default 2)")
    parser.add_argument("--most", type=int, default=SIZES[-1], help="submissions at most (default 1000000)")
    parser.add_argument("--directory", help="where the database goes (default: the temporary directory)")
    parser.add_argument("--json", metavar="FILE", help="write the results to this file")
    parser.add_argument("--svg", metavar="FILE", help="write the plot to this file")
    parser.add_argument("--from-json", metavar="FILE", help="measure nothing: take the results from this file")
    arguments = parser.parse_args(given)
    console = terminal()
    if arguments.from_json:
        machine, points = from_json(Path(arguments.from_json).read_text())
    else:
        points = []
        for point in measure(
            [each for each in SIZES if each <= arguments.most], arguments.seconds, arguments.directory
        ):
            points.append(point)
            console.print(
                f"  {point.submissions:,} submissions, {point.strategy}: p50 {point.p50_ms:.3f} ms, "
                f"p99 {point.p99_ms:.3f} ms, limit: {point.limit}",
                soft_wrap=True,
            )
        machine = Machine.here(command_line("bench_sizes"))
    if not points:
        parser.error(f"--most is {arguments.most}, the smallest backlog has {SIZES[0]} submissions")
    console.print(as_table(points))
    if arguments.json:
        Path(arguments.json).write_text(as_json(machine, points))
    if arguments.svg:
        plot(points, machine, Path(arguments.svg))


if __name__ == "__main__":
    main()

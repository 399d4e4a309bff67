"""What one row of the benchmark says: its figure, the reference's, what was asked, and which process was the limit.

Also how rows are written: a table for the terminal, JSON, Markdown. Measures nothing but processor time.
"""

from __future__ import annotations

import json
import os
import platform
import resource
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol, Self

import apsw
from rich.console import Console
from rich.table import Table

from opsqueue._version import VERSION

#: Shares of one core from which on a process counts as the limit: the rest is what wake-ups take away.
BUSY = 0.85
#: What neither the server nor the generator used: other programs, and the kernel on nobody's account.
OTHERS = "others"


@dataclass(frozen=True)
class Figure:
    """One row: `value` in `unit`, None when the row could not run, and then `note` says why.

    `reference`: what the reference reaches, in the same unit; None where it was not measured. `asked`: what is to be
    reached. `limit`: the processor time of each process as a share of one core, and which of them was the limit.
    `pace`: of the machine just before, see pace.py.
    """

    what: str
    value: float | None
    unit: str
    reference: float | None = None
    asked: float | None = None
    higher_is_better: bool = True
    limit: str = ""
    note: str = ""
    pace: str = ""

    @property
    def ratio(self) -> float | None:
        """How many times better than the reference."""
        return _times_better(self.value, self.reference, self.higher_is_better)

    @property
    def of_asked(self) -> float | None:
        """How many times better than asked; 1 and more is reached."""
        return _times_better(self.value, self.asked, self.higher_is_better)


def _times_better(value: float | None, other: float | None, higher_is_better: bool) -> float | None:
    if value is None or other is None or value <= 0 or other <= 0:
        return None
    return value / other if higher_is_better else other / value


def did_not_run(what: str, why: str) -> Figure:
    """A row that this machine or this server cannot run."""
    return Figure(what, None, "", note=f"not run: {why}")


class Measured(Protocol):
    """A server whose processes can be looked at."""

    def cpu_by_process(self) -> dict[str, float]:
        """Processor seconds used so far, by the process's name."""


class Processors:
    """Processor time of the server's processes and of this one between `with` and its end; see `limit`."""

    def __init__(self, server: Measured) -> None:
        self._server = server
        self.elapsed = 0.0
        self.shares: dict[str, float] = {}

    def __enter__(self) -> Self:
        self._begun = time.perf_counter()
        self._own = _own_cpu_seconds()
        self._all = _all_cpu_seconds()
        self._before = self._server.cpu_by_process()
        return self

    def __exit__(self, *_: object) -> None:
        after = self._server.cpu_by_process()
        self.elapsed = time.perf_counter() - self._begun
        self.shares = {name: (used - self._before.get(name, 0.0)) / self.elapsed for name, used in after.items()}
        self.shares["generator"] = (_own_cpu_seconds() - self._own) / self.elapsed
        busy = (_all_cpu_seconds() - self._all) / self.elapsed
        self.shares[OTHERS] = max(0.0, busy - sum(self.shares.values()))

    def limit(self, active_seconds: float | None = None) -> str:
        """Such as `writer (writer 0.96, fe0 0.41, generator 0.30)`.

        `active_seconds`: how long there was work, where that is less than the time between `with` and its end.
        """
        longer = 1.0 if active_seconds is None else self.elapsed / active_seconds
        return limit_of({name: share * longer for name, share in self.shares.items()})


def limit_of(shares: Mapping[str, float]) -> str:
    """Which of the processes was the limit, and what each used; `shares` of one core."""
    shown = ", ".join(f"{name} {share:.2f}" for name, share in shares.items() if share >= 0.005)
    cores = os.cpu_count() or 1
    name = max((each for each in shares if each != OTHERS), key=lambda each: shares[each])
    if shares[name] >= BUSY:
        who = name
    elif sum(shares.values()) >= BUSY * cores:
        who = f"all {cores} cores"
    else:
        who = "waiting"
    return f"{who} ({shown})"


def _own_cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def _all_cpu_seconds() -> float:
    """Processor time that the machine has used: everything but idle and waiting for the disk."""
    fields = [int(each) for each in Path("/proc/stat").read_text().partition("\n")[0].split()[1:]]
    idle, waiting = fields[3:5]
    return (sum(fields[:8]) - idle - waiting) / os.sysconf("SC_CLK_TCK")


def percentile(ordered: list[float], share: float) -> float:
    """The value that `share` of the sorted values do not exceed."""
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))]


@dataclass(frozen=True)
class Machine:
    """Where and with what the rows were measured."""

    cores: int
    processor: str
    kernel: str
    python: str
    sqlite: str
    opsqueue: str
    taken: str
    command: str

    @classmethod
    def here(cls, command: str) -> Machine:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        return cls(
            os.cpu_count() or 1,
            names[0] if names else platform.machine(),
            platform.release(),
            platform.python_version(),
            apsw.sqlite_lib_version(),
            VERSION,
            datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
            command,
        )

    def __str__(self) -> str:
        return (
            f"`{self.command}` on {self.cores} cores ({self.processor}), Linux {self.kernel}, Python {self.python}, "
            f"SQLite {self.sqlite}, opsqueue {self.opsqueue}, {self.taken}"
        )


#: Stands where a row has no such number.
NONE = "-"

HEADINGS = ("what", "measured", "reference", "ratio", "asked", "of asked", "limit", "machine", "notes")


def cells(figure: Figure) -> tuple[str, ...]:
    """One row's cells, in the order of HEADINGS."""
    return (
        figure.what,
        _amount(figure.value, figure.unit),
        _amount(figure.reference, figure.unit),
        _factor(figure.ratio),
        _amount(figure.asked, figure.unit),
        _factor(figure.of_asked),
        figure.limit,
        figure.pace or NONE,
        figure.note,
    )


def _amount(value: float | None, unit: str) -> str:
    if value is None:
        return NONE
    digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2
    return f"{value:,.{digits}f} {unit}"


def _factor(value: float | None) -> str:
    if value is None:
        return NONE
    return f"{value:,.0f}" if value >= 100 else f"{value:,.2f}"


def terminal() -> Console:
    """Where rows go: as wide as the terminal, and wide enough for the table where there is none."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else 160)


def as_table(title: str, figures: Iterable[Figure]) -> Table:
    """For a terminal: what fits there; the line of each row said the rest when it was measured."""
    table = Table(title=title, title_justify="left")
    for heading in HEADINGS[:-3]:
        table.add_column(heading, justify="left" if heading == "what" else "right", no_wrap=heading != "what")
    for figure in figures:
        table.add_row(*cells(figure)[:-3])
    return table


def as_markdown(machine: Machine, figures: Iterable[Figure]) -> str:
    """The table that docs/benchmarks.md holds."""
    rows = [HEADINGS, ("---",) * len(HEADINGS), *(cells(figure) for figure in figures)]
    lines = ("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)
    return f"{machine}\n\n" + "\n".join(lines) + "\n"


def as_json(machine: Machine, figures: Iterable[Figure]) -> str:
    rows = [{**asdict(figure), "ratio": figure.ratio, "of_asked": figure.of_asked} for figure in figures]
    return json.dumps({"machine": asdict(machine), "figures": rows}, indent=2, ensure_ascii=False) + "\n"


def from_json(text: str) -> tuple[Machine, list[Figure]]:
    """What `as_json` wrote."""
    read = json.loads(text)
    derived = ("ratio", "of_asked")
    figures = [Figure(**{key: row[key] for key in row if key not in derived}) for row in read["figures"]]
    return Machine(**read["machine"]), figures

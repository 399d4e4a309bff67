"""How large each subject of the benchmark is: quick, full, or full with everything scaled down."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

#: Chunks of the large backlog of the table; the others follow from it.
BILLION = 10**9


@dataclass(frozen=True)
class Scale:
    """Durations in seconds; counts of requests, submissions, chunks or connections."""

    seconds: float  # of each throughput measurement
    insert_repeats: int
    inserts: int  # of the insert rate
    idle_repeats: int
    reservations: float  # seconds of each strategy in each shape
    shapes: tuple[tuple[int, int], ...]  # submissions, chunks in each
    stall_seconds: float
    backlog_submissions: int  # of BILLION chunks together
    backlog_done: int  # chunks done at random
    small_submissions: int  # of one chunk
    churn_seconds: float
    churn_age_seconds: float
    churn_rate: int  # submissions a second
    idle_connections: int
    reference_chunks: int
    client_share: int  # what the client's rows are divided by

    def scaled(self, factor: float) -> Scale:
        """All durations and counts times `factor`; shapes and ages stay, and with them what a row means."""
        kept = ("shapes", "churn_age_seconds", "churn_rate", "backlog_submissions", "client_share")
        scaled: dict[str, Any] = {}
        for name in (each.name for each in fields(self) if each.name not in kept):
            value = getattr(self, name)
            scaled[name] = max(1, round(value * factor)) if isinstance(value, int) else value * factor
        return replace(self, **scaled)


#: Under two minutes on two cores. Its backlog is as large as the full one's, less of it is done.
QUICK = Scale(
    seconds=2.0,
    insert_repeats=60,
    inserts=8_000,
    idle_repeats=100,
    reservations=0.3,
    shapes=((100, 10_000), (10_000, 100_000), (20_000, 1)),
    stall_seconds=5.0,
    backlog_submissions=10_000,
    backlog_done=1_000_000,
    small_submissions=20_000,
    churn_seconds=6.0,
    churn_age_seconds=1.0,
    churn_rate=1_000,
    idle_connections=1_000,
    reference_chunks=500,
    client_share=8,
)

#: The table of docs/benchmarks.md.
FULL = Scale(
    seconds=10.0,
    insert_repeats=400,
    inserts=100_000,
    idle_repeats=500,
    reservations=5.0,
    shapes=((100, 10_000), (10_000, 100_000), (1_000_000, 1)),
    stall_seconds=60.0,
    backlog_submissions=10_000,
    backlog_done=BILLION // 10,
    small_submissions=1_000_000,
    churn_seconds=600.0,
    churn_age_seconds=60.0,
    churn_rate=5_000,
    idle_connections=10_000,
    reference_chunks=1_000,
    client_share=1,
)

"""Many submissions of one chunk each: memory, and how soon the service is back."""

from __future__ import annotations

from collections.abc import Iterator

from load_tests.backlog import fill
from load_tests.figures import Figure
from load_tests.setting import Bench
from load_tests.subjects.backlog import MB, MIB, first_reservation_after_start


def measure(bench: Bench) -> Iterator[Figure]:
    count = bench.scale.small_submissions
    what = f"{count:,} submissions of 1 chunk"
    # What was asked is of a million.
    asked_mib = 500.0 if count >= 1_000_000 else None
    with bench.home() as home:
        with bench.server(home=home) as server:
            bench.say(f"inserting {what}")
            fill(server, count, 1)
            database, wal = server.file_bytes()
            yield Figure(
                f"memory (PSS), {what}",
                server.pss_bytes() / MIB,
                "MiB",
                None,
                asked_mib,
                higher_is_better=False,
                note=f"database {database / MB:.1f} MB, write-ahead log {wal / MB:.1f} MB",
            )
            server.kill()
        seconds, started = first_reservation_after_start(bench, home)
        with bench.server(home=home) as server:
            memory = server.pss_bytes() / MIB
        yield Figure(
            f"after SIGKILL until the first reservation, {what}",
            seconds,
            "s",
            None,
            3.0 if asked_mib else None,
            higher_is_better=False,
            note=f"port open after {started:.2f} s; memory after another restart {memory:.0f} MiB",
        )

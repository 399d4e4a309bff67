"""A progress bar on standard error while a submission runs, where that is a terminal."""

from __future__ import annotations

from collections.abc import Callable

from opsqueue.client.values import SubmissionStatus

#: Seconds between two looks.
LOOK_S = 0.25


def follow(
    wait: Callable[[float | None], SubmissionStatus], status: Callable[[], SubmissionStatus | None]
) -> SubmissionStatus:
    """Waits for the end and shows how far the submission is; `wait` raises TimeoutError after the seconds it is given.

    Raises what `wait` raises.
    """
    # imported late: most programs show nothing
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True)
    if not console.is_terminal:
        return wait(None)
    columns = (TextColumn("chunks"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("chunks", total=None)
        while True:
            try:
                ended = wait(LOOK_S)
            except TimeoutError:
                found = status()
                if isinstance(found, SubmissionStatus.InProgress):
                    going = found.submission
                    progress.update(bar, total=going.chunks_total, completed=going.chunks_done)
                continue
            if isinstance(ended, SubmissionStatus.Completed):
                total = ended.submission.chunks_total
                progress.update(bar, total=total, completed=total)
            return ended

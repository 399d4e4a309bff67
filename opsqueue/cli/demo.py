"""`opsqueue demo`: a server, consumers and a producer in processes of their own, on real files, with a live view.

Everything lives in one temporary directory and under one process, and is gone when that ends, however it ends.
"""

from __future__ import annotations

import argparse
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from opsqueue.cli.local_queue import LocalQueueError, child, local_server
from opsqueue.cli.wordcount import count_identifiers, source_files, standard_library, total
from opsqueue.exceptions import SubmissionFailedError
from opsqueue.producer import ProducerClient, SubmissionId, SubmissionStatus
from opsqueue.server import machine
from opsqueue.server.exit_codes import ExitCode
from opsqueue.server.processes import STOP_SIGNALS
from opsqueue.server.settings_sources import OneLineParser, SettingsError

#: Files in a chunk: small, so that there are many chunks to watch.
CHUNK_SIZE: Final = 4
#: The bar asks the server this often.
LOOK_EVERY_S: Final = 0.1
MOST_FREQUENT: Final = 10

EXAMPLES: Final = """\
examples:
  opsqueue demo
      Count the identifiers of Python's standard library.
  opsqueue demo ~/src/project --check
      Count those of a project, and compare with the same computed without a queue.

exit codes: 0 done, 1 something failed or --check found a difference, 2 a wrong flag, 130 interrupted
"""


class DemoError(Exception):
    """The demo cannot go on; the text says why."""


@dataclass(frozen=True)
class Outcome:
    """What was computed, and what it took."""

    results: list[dict[str, int]]
    chunks: int
    retries: int
    seconds: float


def run(words: Sequence[str]) -> int:
    """Run the demo; the exit code. Raises SettingsError for wrong flags."""
    arguments = _parse(words)
    directory = Path(arguments.directory or standard_library())
    if not directory.is_dir():
        raise SettingsError(f"demo: {directory} is not a directory")
    files = source_files(directory)
    if not files:
        raise SettingsError(f"demo: there are no Python source files (*.py) under {directory}")
    console = Console()
    console.print(
        f"Counting the identifiers in {len(files):,} files under {directory}", highlight=False, soft_wrap=True
    )
    try:
        with _Interruption() as interruption:
            outcome = _through_the_queue(console, files, arguments.consumers, interruption)
            interruption.check()
            _report(console, files, outcome)
            return _check(console, files, outcome.results) if arguments.check else ExitCode.STOPPED
    except (DemoError, LocalQueueError, SubmissionFailedError) as error:
        print(f"opsqueue: demo: {error}", file=sys.stderr)
        return ExitCode.CANNOT_START


def _parse(words: Sequence[str]) -> argparse.Namespace:
    parser = OneLineParser(
        prog="opsqueue demo",
        allow_abbrev=False,
        description="Run a server, consumers and a producer on this machine: count the identifiers of source files.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("directory", nargs="?", metavar="DIRECTORY", help="default: Python's own standard library")
    parser.add_argument("--check", action="store_true", help="compute the same without the queue, and compare")
    parser.add_argument(
        "--consumers", type=_count, metavar="N", default=machine.cores(), help="consumer processes (default: the cores)"
    )
    return parser.parse_args(words)


def _count(text: str) -> int:
    if not text.isdigit() or not 1 <= int(text) <= 1_000:
        raise argparse.ArgumentTypeError(f"expected a number from 1 to 1,000, not {text!r}")
    return int(text)


class _Interruption:
    """Ctrl-C, SIGTERM and SIGHUP raise KeyboardInterrupt, so that everything is cleaned up.

    Also remembered, because a library in which the exception comes up may lose it, as cbor2 does while it encodes.
    """

    def __init__(self) -> None:
        self._came = False

    def __enter__(self) -> Self:
        self._before = {number: signal.signal(number, self._handle) for number in STOP_SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, *_: object) -> None:
        self._came = True
        raise KeyboardInterrupt

    def check(self) -> None:
        """Raise KeyboardInterrupt if one was lost."""
        if self._came:
            raise KeyboardInterrupt


def _through_the_queue(console: Console, files: list[str], consumer_count: int, interruption: _Interruption) -> Outcome:
    """Start everything, submit the files, follow the submission, and read its results."""
    with ExitStack() as stack:
        home = stack.enter_context(_home())
        server = stack.enter_context(local_server(home))
        store_url = (home / "store").as_uri()
        console.print(
            f"server http://{server}, {consumer_count} consumers, objects in {store_url}",
            highlight=False,
            soft_wrap=True,
        )
        consumers = [stack.enter_context(child(home, "consumer", [server, store_url])) for _ in range(consumer_count)]
        client = ProducerClient(server, store_url)
        begun = time.monotonic()
        submission = client.insert_submission(files, chunk_size=CHUNK_SIZE)
        chunks = _follow(console, client, submission, consumers, interruption)
        results = list(client.blocking_stream_completed_submission(submission))
        seconds = time.monotonic() - begun
        return Outcome(results, chunks, _retries(server), seconds)


@contextmanager
def _home() -> Iterator[Path]:
    home = Path(tempfile.mkdtemp(prefix="opsqueue-demo-"))
    try:
        (home / "store").mkdir()
        yield home
    finally:
        shutil.rmtree(home, ignore_errors=True)


def _follow(
    console: Console,
    client: ProducerClient,
    submission: SubmissionId,
    consumers: list[subprocess.Popen[bytes]],
    interruption: _Interruption,
) -> int:
    """Draw the submission's progress until its end; its number of chunks."""
    columns = (TextColumn("chunks"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("chunks", total=None)
        while True:
            interruption.check()
            status = client.get_submission_status(submission)
            if not isinstance(status, SubmissionStatus.InProgress):
                break
            progress.update(bar, total=status.submission.chunks_total, completed=status.submission.chunks_done)
            if all(consumer.poll() is not None for consumer in consumers):
                raise DemoError("all consumers have ended")
            time.sleep(LOOK_EVERY_S)
        chunks = status.submission.chunks_total if isinstance(status, SubmissionStatus.Completed) else 0
        progress.update(bar, total=chunks, completed=chunks)
    return chunks


def _retries(server: str) -> int:
    with urllib.request.urlopen(f"http://{server}/metrics", timeout=5) as answer:
        for line in answer.read().decode().splitlines():
            if line.startswith("chunks_retried_count "):
                return int(float(line.split()[1]))
    return 0


def _report(console: Console, files: list[str], outcome: Outcome) -> None:
    table = Table("identifier", "count", title=f"The {MOST_FREQUENT} most frequent", title_justify="left")
    table.columns[1].justify = "right"
    for name, count in total(outcome.results).most_common(MOST_FREQUENT):
        table.add_row(name, f"{count:,}")
    console.print(table)
    console.print(
        f"{len(files):,} files, {outcome.chunks:,} chunks, {outcome.retries:,} retries, {outcome.seconds:.2f} seconds, "
        f"{len(files) / outcome.seconds:,.0f} operations per second",
        highlight=False,
        soft_wrap=True,
    )


def _check(console: Console, files: list[str], results: list[dict[str, int]]) -> int:
    """Compute the same without the queue, file by file."""
    expected = [count_identifiers(file) for file in files]
    if results == expected:
        console.print("The same without the queue: equal")
        return ExitCode.STOPPED
    different = [file for file, ours, queued in zip(files, expected, results, strict=False) if Counter(ours) != queued]
    console.print(f"The same without the queue: {len(results)} results of {len(files)}, different: {different[:5]}")
    return ExitCode.CANNOT_START

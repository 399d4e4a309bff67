"""`opsqueue import`: reads the flags, shows how far the import is, says what came over. Imports nothing itself."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Final

from opsqueue.server.database_location import locate
from opsqueue.server.errors import StartupError
from opsqueue.server.exit_codes import ExitCode
from opsqueue.server.importing.importer import Summary, import_reference
from opsqueue.server.settings_sources import OneLineParser, SettingsError, load
from opsqueue.server.writer.batch import JournalOptions

DESCRIPTION: Final = """\
Bring the submissions of a stopped reference server (channable/opsqueue 0.30 to 0.40) over: unfinished ones with their
done chunks and retries, ended ones with how they ended. The old file is only read. All of it comes over, or nothing;
what an earlier import brought is skipped.
"""

EXAMPLES: Final = """\
examples:
  opsqueue import old.db --database-filename new.db
      Then `opsqueue serve --database-filename new.db` goes on where the old server stopped.

exit codes: 0 imported, 1 nothing was imported (the line on standard error says why), 2 a flag or a setting is wrong,
130 interrupted, nothing was imported
"""


def run(words: Sequence[str]) -> int:
    """Import; the exit code. Raises SettingsError."""
    parser = OneLineParser(
        prog="opsqueue import",
        allow_abbrev=False,
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("old", metavar="OLD.db", help="the database of the stopped reference server")
    parser.add_argument(
        "--database-filename",
        metavar="NEW.db",
        help="the database to import into, made if absent; its server must be stopped (default: opsqueue.db)",
    )
    parser.add_argument("--config", metavar="FILE", default=argparse.SUPPRESS, help="the server's TOML file")
    arguments = parser.parse_args(list(words))
    settings = load(vars(arguments), os.environ).settings
    try:
        place = locate(settings.database_filename)
        if place.is_temporary:
            place.remove()
            raise SettingsError("--database-filename names a database in memory; an import needs a file")
        options = JournalOptions(
            path=place.path, durability=settings.durability, external_checkpoints=settings.external_checkpoints
        )
        with ExitStack() as stack:
            summary = import_reference(arguments.old, options, _progress(stack))
    except StartupError as error:
        print(f"opsqueue: {error}", file=sys.stderr, flush=True)
        return ExitCode.CANNOT_START
    _print(summary, arguments.old, place.path)
    return ExitCode.STOPPED


def _progress(stack: ExitStack) -> Callable[[int, int], None]:
    """What shows a bar on standard error until `stack` ends, where that is a terminal."""
    if not sys.stderr.isatty():
        return lambda _seen, _total: None
    # imported late: it takes longer than a small import
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("chunks"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    bar = stack.enter_context(Progress(*columns, console=Console(stderr=True)))
    task = bar.add_task("chunks", total=None)
    return lambda seen, total: bar.update(task, completed=seen, total=total)


def _print(summary: Summary, old: str, new: str) -> None:
    print(f"imported {old} into {new} in {summary.seconds:.1f} s")
    print(f"unfinished  {_count(summary.unfinished, 'submission')}: {_count(summary.waiting, 'chunk')} waiting "
          f"({summary.retried:,} with retries), {summary.done:,} done")  # fmt: skip
    print(f"ended       {summary.completed:,} completed, {summary.failed:,} failed, {summary.cancelled:,} cancelled")
    print(f"skipped     {_count(summary.known, 'submission')} of an earlier import")


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"

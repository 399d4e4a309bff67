"""`opsqueue serve`: reads the settings, imports what the processes need, and hands over to the supervisor."""

from __future__ import annotations

import argparse
import gc
import os
import sys
from typing import Final

from opsqueue.server.errors import StartupError
from opsqueue.server.exit_codes import ExitCode
from opsqueue.server.settings_sources import LoadedSettings, OneLineParser, add_flags, load

DESCRIPTION: Final = "Run the queue: one writer and some front-ends behind one port, one SQLite file."

EXAMPLES: Final = """\
examples:
  opsqueue serve
      Listen on 127.0.0.1:3999; keep the queue in ./opsqueue.db.
  opsqueue serve --host 0.0.0.0 --port 8000 --database-filename /var/lib/opsqueue/opsqueue.db
      Serve other machines too.
  opsqueue serve --database-filename :memory: --port 0
      A queue for tests: in memory, on any free port, which the log names.
  OPSQUEUE_MAX_CHUNK_RETRIES=3 opsqueue serve --config /etc/opsqueue.toml
      Flags win over OPSQUEUE_* variables, variables over the file.

exit codes: 0 stopped as asked, 1 cannot start, 2 a setting is wrong, 3 stopped at once by a second signal
"""


def add_arguments(parser: OneLineParser) -> None:
    """Make `parser` the parser of `opsqueue serve`."""
    parser.description = DESCRIPTION
    parser.epilog = EXAMPLES
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add_flags(parser)


def run(arguments: argparse.Namespace) -> int:
    """Serve; the exit code. Raises SettingsError."""
    loaded = load(vars(arguments), os.environ)
    try:
        return _serve(loaded)
    except StartupError as error:
        print(f"opsqueue: {error}", file=sys.stderr, flush=True)
        return ExitCode.CANNOT_START


def _serve(loaded: LoadedSettings) -> int:
    # The imports make no garbage worth a look; the supervisor turns collection on again before it forks.
    gc.disable()
    import opsqueue.server.lean_imports  # noqa: F401  # first, it says why
    from opsqueue.server import logs

    logs.configure(loaded.settings.log_level, loaded.settings.log_format)
    for warning in loaded.warnings:
        logs.logger("settings").warning(warning)

    # Everything that children use is imported here, once, so that a replacement starts in milliseconds.
    from opsqueue.server.frontend.main import run as run_frontend
    from opsqueue.server.supervisor import EntryPoints, Supervisor
    from opsqueue.server.writer.database_file import acquire_lock
    from opsqueue.server.writer.main import run as run_writer

    entry_points = EntryPoints(lock=acquire_lock, writer=run_writer, frontend=run_frontend)
    return Supervisor(loaded.settings, entry_points, os.environ).run()

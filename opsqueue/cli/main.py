"""The command `opsqueue`: picks the subcommand and parses its arguments. Does none of their work."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Final

from opsqueue.cli import serve
from opsqueue.protocol.version import own_version
from opsqueue.server.exit_codes import ExitCode
from opsqueue.server.settings_sources import OneLineParser, SettingsError

DESCRIPTION: Final = "opsqueue: a batch-processing queue for heavy loads."

COMMANDS: Final = """\
commands:
  serve       run the queue (also without the word: `opsqueue --port 8000`)
  consume     work on chunks with a function of yours, in several processes
  import      bring the submissions of a stopped reference server (Rust) over into a database of this one
  map         call a function with each line or file, in several processes, and write the results in order
  gc          remove from an object store what belongs to forgotten submissions
  demo        run a server, consumers and a producer on real files, and watch
`opsqueue COMMAND --help` says more.

"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        return _run(words)
    except SettingsError as error:
        print(f"opsqueue: {error}", file=sys.stderr)
        return ExitCode.USAGE
    except KeyboardInterrupt:
        return ExitCode.INTERRUPTED
    except BrokenPipeError:
        sys.stderr.close()  # whoever read our output has gone, a message would not arrive either
        return ExitCode.CANNOT_START


def _run(words: list[str]) -> int:
    if words[:1] == ["demo"]:
        from opsqueue.cli import demo  # rich and the client library are not for servers

        return demo.run(words[1:])
    if words[:1] == ["consume"]:
        from opsqueue.cli import consume

        return consume.run(words[1:])
    if words[:1] == ["import"]:
        from opsqueue.cli import import_command

        return import_command.run(words[1:])
    if words[:1] == ["map"]:
        from opsqueue.cli import map_command

        return map_command.run(words[1:])
    if words[:1] == ["gc"]:
        from opsqueue.cli import gc_command

        return gc_command.run(words[1:])
    if words[:1] == ["serve"]:
        parser = OneLineParser(prog="opsqueue serve", allow_abbrev=False)
        serve.add_arguments(parser)
        return serve.run(parser.parse_args(words[1:]))
    parser = OneLineParser(
        prog="opsqueue", allow_abbrev=False, usage="opsqueue [serve | consume | map | import | gc | demo] [flags]"
    )
    serve.add_arguments(parser)
    parser.description = DESCRIPTION
    parser.epilog = COMMANDS + serve.EXAMPLES
    version = f"opsqueue {own_version()}"
    parser.add_argument("-V", "--version", action="version", version=version, help="show the version and exit")
    if words and not words[0].startswith("-"):
        parser.error(f"unknown command {words[0]!r}")
    return serve.run(parser.parse_args(words))


if __name__ == "__main__":
    sys.exit(main())

"""The command `opsqueue`: picks the subcommand and parses its arguments. Does none of their work."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Final

from opsqueue.cli import serve
from opsqueue.server.exit_codes import ExitCode
from opsqueue.server.settings_sources import OneLineParser, SettingsError

DESCRIPTION: Final = "opsqueue: a batch-processing queue for heavy loads."

COMMANDS: Final = """\
commands:
  serve       run the queue (also without the word: `opsqueue --port 8000`)
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
    if words[:1] == ["serve"]:
        parser = OneLineParser(prog="opsqueue serve", allow_abbrev=False)
        serve.add_arguments(parser)
        return serve.run(parser.parse_args(words[1:]))
    parser = OneLineParser(prog="opsqueue", allow_abbrev=False, usage="opsqueue [serve | demo] [flags]")
    serve.add_arguments(parser)
    parser.description = DESCRIPTION
    parser.epilog = COMMANDS + serve.EXAMPLES
    parser.add_argument("-V", "--version", action=_ShowVersion, help="show the version and exit")
    if words and not words[0].startswith("-"):
        parser.error(f"unknown command {words[0]!r}")
    return serve.run(parser.parse_args(words))


class _ShowVersion(argparse.Action):
    """Looks the version up only when it is asked for."""

    def __init__(self, option_strings: Sequence[str], dest: str, help: str | None = None) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, default=argparse.SUPPRESS, help=help)

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from opsqueue.protocol.version import own_version

        print(f"opsqueue {own_version()}")
        parser.exit()


if __name__ == "__main__":
    sys.exit(main())

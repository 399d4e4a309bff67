"""`opsqueue gc`: removes from an object store what belongs to submissions that the server has forgotten."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
from collections import Counter
from collections.abc import Sequence
from typing import Final

from rich.console import Console
from rich.status import Status

from opsqueue.cli.store_flags import add_options, pairs
from opsqueue.client.garbage import Looked, ServerGoneError, Verdict, collect
from opsqueue.client.http import HttpClient
from opsqueue.client.producer_calls import ProducerCalls
from opsqueue.client.store import open_store
from opsqueue.client.store_error import StoreError
from opsqueue.client.store_objects import StoreObjects, objects_of
from opsqueue.client.urls import parse_address
from opsqueue.exceptions import IncorrectUsageError, InternalProducerClientError, NewObjectStoreClientError
from opsqueue.server.exit_codes import ExitCode
from opsqueue.server.settings_sources import OneLineParser, SettingsError
from opsqueue.server.values import parse_duration

#: Submissions live for days, and a producer uploads before it inserts: nothing younger is ever garbage.
_YOUNGEST_S: Final = 86_400.0
_DEFAULT: Final = "7 days"
#: Seconds for the first answer of the server, and for each later one: it may be restarted meanwhile.
_GREET_WITHIN_S: Final = 10.0
_ASK_WITHIN_S: Final = 60.0

EXAMPLES: Final = """\
examples:
  opsqueue gc file:///srv/objects --dry-run
  opsqueue gc s3://bucket/objects --server https://queue.example/opsqueue --older-than "30 days"

Only objects named PREFIX/NUMBER-in.bin and PREFIX/NUMBER-out.bin are removed, whose PREFIX is a UUIDv7 as the client
libraries make them, when that UUID and everything under it are older than --older-than and the server knows no
submission of that prefix. STORE must be this server's own: of another server's submissions it knows nothing.

exit codes: 0 done, 1 something could not be looked at or removed, or the server stopped answering, 2 a wrong flag or
store, 4 no connection to the server
"""


class _Server:
    """The server that knows which prefixes are in use. Raises IncorrectUsageError for a wrong address."""

    def __init__(self, address: str) -> None:
        parsed = parse_address(address)
        self._calls = ProducerCalls(parsed)
        self._http = HttpClient(parsed)

    def greet(self) -> None:
        """Raises InternalProducerClientError or TimeoutError when there is none."""
        self._http.run(self._calls.server_version(deadline=time.monotonic() + _GREET_WITHIN_S))

    def knows(self, prefix: str) -> bool:
        """Whether it has a submission of that prefix. Raises InternalProducerClientError or TimeoutError."""
        call = self._calls.lookup_submission_id_by_prefix(prefix, deadline=time.monotonic() + _ASK_WITHIN_S)
        return self._http.run(call) is not None


def run(words: Sequence[str]) -> int:
    """Run the command; the exit code. Raises SettingsError for wrong flags."""
    arguments = _parse(words)
    # without a server there is one line, ours; later the client may say that it has to wait for it
    logging.basicConfig(level=logging.ERROR, format="opsqueue: gc: %(message)s")
    try:
        objects = objects_of(open_store(arguments.store, pairs(arguments)))
        server = _Server(arguments.server)
    except (NewObjectStoreClientError, IncorrectUsageError) as error:
        raise SettingsError(f"gc: {error}") from error
    if arguments.store.startswith("memory:"):
        raise SettingsError(f"gc: {arguments.store} is this process's own memory, there is nothing in it")
    try:
        server.greet()
    except (InternalProducerClientError, TimeoutError) as error:
        print(f"opsqueue: gc: {error}", file=sys.stderr)
        return ExitCode.NOT_CONNECTED
    logging.getLogger().setLevel(logging.WARNING)
    try:
        totals = _collect(arguments, objects, server)
    except (StoreError, ServerGoneError) as error:
        print(f"opsqueue: gc: stopped: {error}", file=sys.stderr)
        return ExitCode.CANNOT_START
    return ExitCode.CANNOT_START if totals[Verdict.FAILED] else ExitCode.STOPPED


def _collect(arguments: argparse.Namespace, objects: StoreObjects, server: _Server) -> Counter[Verdict]:
    totals: Counter[Verdict] = Counter()
    removed = removed_bytes = 0
    console = Console(stderr=True)
    status = Status("looking", console=console) if console.is_terminal else None
    if status:
        status.start()
    try:
        for looked in collect(
            objects,
            server.knows,
            older_than_s=arguments.older_than,
            dry_run=arguments.dry_run,
        ):
            totals[looked.verdict] += 1
            if looked.verdict in (Verdict.REMOVED, Verdict.FAILED):
                removed += looked.objects
                removed_bytes += looked.size
            _tell(looked, arguments)
            if status:
                status.update(f"{totals.total():,} prefixes, {removed:,} objects")
    finally:
        if status:
            status.stop()
        # also when it was stopped: what was removed until then is removed
        verb = "would remove" if arguments.dry_run else "removed"
        print(
            f"{totals.total():,} prefixes seen; {verb} {removed:,} objects ({removed_bytes:,} bytes) under "
            f"{totals[Verdict.REMOVED]:,} of them; left "
            f"{totals[Verdict.KNOWN]:,} that the server knows, {totals[Verdict.YOUNG]:,} that are young, "
            f"{totals[Verdict.FOREIGN]:,} with nothing of a chunk's, {totals[Verdict.FAILED]:,} because of errors"
        )
    return totals


def _tell(looked: Looked, arguments: argparse.Namespace) -> None:
    if looked.verdict is Verdict.FAILED:
        left = (
            f"{looked.objects:,} objects were removed before, the rest is left" if looked.objects else "left as it is"
        )
        print(f"opsqueue: gc: {looked.prefix}: {looked.reason}; {left}", file=sys.stderr)
    elif arguments.verbose:
        what = "would be removed" if looked.verdict is Verdict.REMOVED and arguments.dry_run else looked.verdict.value
        counted = f"{looked.objects:,} objects, {looked.size:,} bytes: " if looked.objects else ""
        print(f"{looked.prefix}: {counted}{what}")


def _parse(words: Sequence[str]) -> argparse.Namespace:
    parser = OneLineParser(
        prog="opsqueue gc",
        allow_abbrev=False,
        description="Remove objects of submissions that the server has forgotten.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("store", metavar="STORE", help="the object store, such as file:///srv/objects or s3://bucket/objects")
    add("--server", metavar="URL", default=os.environ.get("OPSQUEUE_SERVER", "127.0.0.1:3999"),
        help="host:port or URL of the queue (default: $OPSQUEUE_SERVER or 127.0.0.1:3999)")  # fmt: skip
    add_options(parser)
    add("--older-than", metavar="TIME", type=_age, default=_DEFAULT,
        help=f'how old everything under a prefix must be, at least one day (default: "{_DEFAULT}")')  # fmt: skip
    add("--dry-run", action="store_true", help="remove nothing, say what would be removed")
    add("--verbose", action="store_true", help="one line for each prefix")
    return parser.parse_args(words)


def _age(text: str) -> float:
    try:
        seconds = parse_duration(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    if seconds < _YOUNGEST_S:
        raise argparse.ArgumentTypeError(f"expected one day or more, not {text!r}: a producer may still be uploading")
    return seconds

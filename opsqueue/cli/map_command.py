"""`opsqueue map`: a function over lines or files, by several processes, results in order; goes on where it stopped."""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import itertools
import json
import os
import shutil
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Final

import msgspec
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from opsqueue.cli import functions, map_items
from opsqueue.cli.local_queue import LocalQueueError, child, local_server, log_text
from opsqueue.cli.store_flags import add_options, pairs
from opsqueue.client.ids import new_prefix
from opsqueue.exceptions import (
    ChunkRetrievalError,
    ChunksStorageError,
    InternalProducerClientError,
    NewObjectStoreClientError,
    SerializationError,
    SubmissionCancelledError,
    SubmissionFailedError,
    SubmissionNotCancellableError,
    SubmissionNotFoundError,
)
from opsqueue.producer import ProducerClient, SubmissionId
from opsqueue.server import machine
from opsqueue.server.exit_codes import ExitCode
from opsqueue.server.settings_sources import OneLineParser, SettingsError

_STATE_FILE: Final = "map.json"
_LOCK_FILE: Final = "lock"
#: Times that an item may end the process that works on it.
_MAX_CRASHES: Final = 3
#: Seconds between two looks at the processes.
_LOOK_S: Final = 0.25

EXAMPLES: Final = """\
examples:
  opsqueue map mytasks:resize < in.jsonl > out.jsonl
      mytasks.resize(item) for each line of JSON, by one process per core.
  opsqueue map mytasks:thumbnail photos --kind files --errors failed.jsonl > out.jsonl
      For each file below photos; what fails goes to failed.jsonl, and its line of the output is null.
  opsqueue map mytasks:resize --resume < in.jsonl > out.jsonl
      After Ctrl-C: nothing that was done is done again; the output is written anew from its first line.
  opsqueue map mytasks:resize --server queue:3999 --object-store s3://bucket/x < in.jsonl > out.jsonl
      By the consumers of a server, which run: opsqueue consume mytasks:resize --per map

exit codes: 0 done, 1 it could not be done (an item failed, and there is no --errors), 2 a wrong flag or a function that
cannot be imported, 5 done but for the items in the file of --errors, 130 interrupted
"""


class MapError(Exception):
    """The run cannot go on; the text says why."""


class ItemFailedError(Exception):
    """An item failed, and nobody said where to write that."""


class Saved(msgspec.Struct):
    """What is written down of a State."""

    what: list[str]
    submission: int | None
    items: int | None
    prefix: str


@dataclass
class State:
    """What an interrupted run leaves behind, in a directory of its own."""

    home: Path
    what: list[str]
    submission: int | None = None
    #: None: they were counted by a run that was killed before it could write it down.
    items: int | None = 0
    #: Where the submission's chunks are: noted before the insert, so that no second one is ever made.
    prefix: str = field(default_factory=new_prefix)
    #: Locked for as long as the run lasts; the kernel lets go of it.
    lock: BinaryIO | None = None

    @classmethod
    def of(cls, arguments: argparse.Namespace) -> State:
        """The state of the run that `arguments` describe, as an earlier one left it if --resume is given.

        Raises SettingsError when another run uses it now, or left it unfinished and nobody says what to do with it.
        """
        what = [arguments.function, arguments.kind, arguments.source or "-", arguments.server or "local"]
        digest = hashlib.sha256(json.dumps(what).encode()).hexdigest()[:12]
        state = cls(arguments.state or Path(map_items.STATE_PREFIX + digest), what)
        if arguments.resume and not (state.home / _STATE_FILE).exists():
            raise SettingsError(f"map: there is nothing to resume: {state.home} does not exist")
        state._take()
        if not (state.home / _STATE_FILE).exists():
            return state
        saved = state._saved()
        if arguments.restart:
            state._empty()
            return state
        if not arguments.resume:
            raise SettingsError(
                f"map: an earlier run did not finish: --resume goes on with what is in {state.home}, --restart throws "
                "it away, --state names another place"
            )
        if saved.what != what:
            raise SettingsError(
                f"map: {state.home} belongs to another run: {' '.join(saved.what)}; give the same arguments"
            )
        state.submission, state.items, state.prefix = saved.submission, saved.items, saved.prefix
        return state

    def _take(self) -> None:
        try:
            self.home.mkdir(parents=True, exist_ok=True)
            self.lock = (self.home / _LOCK_FILE).open("ab")
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise SettingsError(
                f"map: another run is using {self.home}; wait for it, or name another place by --state"
            ) from error
        except OSError as error:
            raise SettingsError(f"map: cannot write {self.home}: {error.strerror or error}") from error

    def _empty(self) -> None:
        for path in self.home.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != _LOCK_FILE:
                path.unlink()

    def _saved(self) -> Saved:
        try:
            return msgspec.json.decode((self.home / _STATE_FILE).read_bytes(), type=Saved)
        except (OSError, msgspec.MsgspecError) as error:
            raise SettingsError(
                f"map: {self.home} was not made by opsqueue map ({error}); choose another --state, or remove it"
            ) from error

    def save(self) -> None:
        """Writes it, whole or not at all."""
        self.home.mkdir(parents=True, exist_ok=True)
        temporary = self.home / (_STATE_FILE + ".tmp")
        temporary.write_bytes(msgspec.json.encode(Saved(self.what, self.submission, self.items, self.prefix)))
        os.replace(temporary, self.home / _STATE_FILE)

    def remove(self) -> None:
        """Nothing is left to resume."""
        shutil.rmtree(self.home, ignore_errors=True)


def run(words: Sequence[str]) -> int:
    """Run the command; the exit code. Raises SettingsError for wrong flags."""
    arguments = _parse(words)
    if arguments.server is None:
        try:
            functions.load(arguments.function)
        except functions.FunctionError as error:
            raise SettingsError(f"map: {error}") from error
    state = State.of(arguments)
    try:
        failed = _run(arguments, state)
    except KeyboardInterrupt:
        print(f"opsqueue: map: interrupted; --resume goes on with what is in {state.home}", file=sys.stderr)
        return ExitCode.INTERRUPTED
    except (
        ItemFailedError, map_items.ItemError, SerializationError, SubmissionFailedError, SubmissionCancelledError,
        SubmissionNotFoundError,
    ) as error:  # fmt: skip
        print(f"opsqueue: map: {error}", file=sys.stderr)
        state.remove()  # going on would end in the same way
        return ExitCode.CANNOT_START
    except (
        MapError, LocalQueueError, InternalProducerClientError, ChunkRetrievalError, ChunksStorageError, OSError,
    ) as error:  # fmt: skip
        if isinstance(error, BrokenPipeError):
            _forget_output()
            error = MapError("whoever read the output has gone")
        print(f"opsqueue: map: {error}", file=sys.stderr)
        if state.submission is None:
            state.remove()
        else:
            print(f"opsqueue: map: --resume goes on with what is in {state.home}", file=sys.stderr)
        return ExitCode.CANNOT_START
    except SettingsError:
        if state.submission is None:
            state.remove()
        raise
    state.remove()
    return ExitCode.SOME_FAILED if failed else ExitCode.STOPPED


def _forget_output() -> None:
    """The interpreter would try once more to write what is left, at its end."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


def _run(arguments: argparse.Namespace, state: State) -> int:
    """The number of items that failed."""
    with ExitStack() as stack:
        output = stack.enter_context(_output(arguments.output))
        errors = None if arguments.errors is None else stack.enter_context(open(arguments.errors, "wb"))
        state.save()
        client = _client(arguments, state, stack)
        if state.submission is None:
            _insert(arguments, state, client)
        return _write_results(arguments, state, client, output, errors)


@contextmanager
def _output(path: str | None) -> Iterator[BinaryIO]:
    if path is None:
        yield sys.stdout.buffer
        sys.stdout.buffer.flush()
        return
    try:
        stream = open(path, "wb")  # noqa: SIM115  # closed below; what is raised inside is not about opening it
    except OSError as error:
        raise SettingsError(f"map: cannot write {path}: {error.strerror or error}") from error
    with stream:
        yield stream


def _client(arguments: argparse.Namespace, state: State, stack: ExitStack) -> ProducerClient:
    if arguments.server is not None:
        try:
            return ProducerClient(arguments.server, arguments.object_store, object_store_options=pairs(arguments))
        except NewObjectStoreClientError as error:
            raise SettingsError(f"map: {error}") from error
    home = state.home.absolute()
    (home / "store").mkdir(exist_ok=True)
    server = stack.enter_context(
        local_server(home, "--max-submission-age", "100 years", "--max-chunk-crashes", str(_MAX_CRASHES))
    )
    store_url = (home / "store").as_uri()
    words = [
        arguments.function, "--per", "map", "--strategy", "Oldest", "--server", server, "--object-store", store_url,
        "--processes", str(arguments.processes),
    ]  # fmt: skip
    client = ProducerClient(server, store_url)
    pool = stack.enter_context(child(home, "pool", words))
    stack.enter_context(_watching(pool, state, client))
    return client


@contextmanager
def _watching(pool: subprocess.Popen[bytes], state: State, client: ProducerClient) -> Iterator[None]:
    """When the processes end by themselves, so does the submission, and with it the wait for its results."""
    over = threading.Event()

    def watch() -> None:
        while not over.wait(_LOOK_S):
            if pool.poll() is not None and state.submission is not None:
                with contextlib.suppress(SubmissionNotCancellableError, InternalProducerClientError):
                    client.cancel_submission(SubmissionId(state.submission))
                return

    thread = threading.Thread(target=watch, name="opsqueue-map-watch", daemon=True)
    thread.start()
    try:
        yield
    except SubmissionCancelledError as error:
        if pool.poll() is None:
            raise
        lines = log_text(state.home, "pool").splitlines()
        raise map_items.ItemError(f"the processes ended: {lines[-1] if lines else 'they said nothing'}") from error
    finally:
        over.set()
        thread.join()


def _insert(arguments: argparse.Namespace, state: State, client: ProducerClient) -> None:
    count = None

    def counted() -> Iterator[Any]:
        nonlocal count
        count = 0
        ours = (sys.stdout.fileno(), arguments.output, arguments.errors, state.home)
        leave_out = frozenset(map_items.identity(file) for file in ours if file is not None)
        for item in map_items.read(arguments.kind, arguments.source, leave_out - {None}):
            count += 1
            yield item

    size, compression = arguments.chunk_size, arguments.compression
    found = client.find_or_insert(counted(), chunk_size=size, prefix=state.prefix, compression=compression)
    state.submission, state.items = found.id, count
    state.save()


def _write_results(
    arguments: argparse.Namespace,
    state: State,
    client: ProducerClient,
    output: BinaryIO,
    errors: BinaryIO | None,
) -> int:
    assert state.submission is not None
    writer = map_items.Writer(arguments.kind, output)
    console = Console(stderr=True)
    columns = (
        TextColumn("items"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    failed = number = 0
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task("items", total=state.items)
        for _, results in client.stream_submission(SubmissionId(state.submission), ordered=True):
            for result in results:
                number += 1
                value, error = _outcome(result, number)
                if error is None:
                    try:
                        writer.write(value)
                    except map_items.ItemError as unwritable:
                        error = (str(unwritable), "")
                if error is not None:
                    failed += 1
                    if errors is None:
                        raise ItemFailedError(_first_failure(number, *error))
                    line = {"item": number, "error": error[0], "traceback": error[1]}
                    errors.write(json.dumps(line).encode() + b"\n")
                    writer.write(None)
            progress.update(bar, completed=number)
    if state.items is not None and number != state.items:
        raise MapError(f"{state.items} items went in, {number} results came back")
    if failed:
        print(f"opsqueue: map: {failed} of {number} items failed, see {arguments.errors}", file=sys.stderr)
    return failed


def _first_failure(number: int, summary: str, trace: str) -> str:
    if trace:
        return f"item {number} failed; --errors FILE would go on\n{trace.rstrip()}"
    return f"item {number}: {summary}; --errors FILE would go on"


def _outcome(result: Any, number: int) -> tuple[Any, tuple[str, str] | None]:
    match result:
        case [True, value]:
            return value, None
        case [False, str(summary), str(trace)]:
            return None, (summary, trace)
    raise MapError(f"item {number}: its consumer does not run `opsqueue consume … --per map`")


def _parse(words: Sequence[str]) -> argparse.Namespace:
    parser = OneLineParser(
        prog="opsqueue map",
        allow_abbrev=False,
        description="Call a function with each line or file, in several processes; write the results in order.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("function", metavar="MODULE:FUNCTION", help="called with one item, gives its result")
    add("source", metavar="SOURCE", nargs="?", default=None, help="a file or directory (default: standard input)")
    add("--kind", choices=map_items.KINDS, default="json", help="JSON lines, text lines, or files (default: json)")
    add("--processes", type=int, metavar="N", default=machine.cores(), help="default: the cores")
    add("--chunk-size", type=int, metavar="N", default=16, help="items that travel together (default: 16)")
    add("--compression", choices=["zstd"], default=None, help="compress what is stored (default: not)")
    add("--output", metavar="FILE", default=None, help="default: standard output")
    add("--errors", metavar="FILE", default=None, help="go on after failures, and write them here as JSON lines")
    add("--resume", action="store_true", help="go on where the same command was interrupted")
    add("--restart", action="store_true", help="throw away what an interrupted run left, and begin anew")
    add("--state", type=Path, metavar="DIRECTORY", default=None, help="for --resume (default: .opsqueue-map-…, here)")
    add(
        "--server",
        metavar="URL",
        default=None,
        help="let the consumers of this server do it, instead of processes here",
    )
    add("--object-store", metavar="URL", default=os.environ.get("OPSQUEUE_OBJECT_STORE"), help="with --server")
    add_options(parser)
    arguments = parser.parse_args(words)
    if arguments.processes < 1 or arguments.chunk_size < 1:
        parser.error("--processes and --chunk-size must be at least 1")
    if arguments.kind == "files" and arguments.source is None:
        parser.error("--kind files needs a directory: opsqueue map MODULE:FUNCTION DIRECTORY --kind files")
    if arguments.server is not None and arguments.object_store is None:
        parser.error("--server needs --object-store URL (or the variable OPSQUEUE_OBJECT_STORE)")
    _check_files(parser, arguments)
    return arguments


def _check_files(parser: OneLineParser, arguments: argparse.Namespace) -> None:
    """Refuses to write over what is to be read, or to write two things into one file."""
    files: list[tuple[str, str | int]] = [
        ("the input", 0 if arguments.source is None else arguments.source),
        ("the output", 1 if arguments.output is None else arguments.output),
    ]
    if arguments.errors is not None:
        files.append(("--errors", arguments.errors))
    for (one, first), (other, second) in itertools.combinations(files, 2):
        if _is_one_file(first, second):
            parser.error(f"{one} and {other} are the same file{f', {second}' if isinstance(second, str) else ''}")


def _is_one_file(first: str | int, second: str | int) -> bool:
    if isinstance(first, str) and isinstance(second, str) and os.path.realpath(first) == os.path.realpath(second):
        return os.path.isfile(first) or not os.path.exists(first)
    known = map_items.identity(first)
    return known is not None and known == map_items.identity(second) and stat.S_ISREG(os.stat(first).st_mode)

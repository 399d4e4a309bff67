"""`opsqueue consume`: a pool of processes that work on chunks, watched and restarted. Runs no function itself."""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.live import Live

from opsqueue.cli.functions import LOG_FORMAT
from opsqueue.cli.health import HealthPort, write_whole
from opsqueue.cli.store_flags import add_options, pairs
from opsqueue.cli.strategies import USAGE, parse
from opsqueue.client.urls import parse_address
from opsqueue.exceptions import IncorrectUsageError
from opsqueue.server import machine
from opsqueue.server.exit_codes import ExitCode
from opsqueue.server.processes import Signals
from opsqueue.server.settings_sources import OneLineParser, SettingsError
from opsqueue.server.values import parse_duration

logger = logging.getLogger("opsqueue.consume")

#: Seconds between two looks at the processes.
_LOOK_S: Final = 0.25
#: Seconds between two lines in the log.
_LOG_EVERY_S: Final = 10.0
#: Seconds before a process that died is replaced: doubling, and again the first after it has lived for a while.
_RESTART_S: Final = (0.1, 10.0)
_LIVED_S: Final = 30.0
#: Seconds after a second signal until those who have not ended are killed.
_FORCE_AFTER_S: Final = 5.0

EXAMPLES: Final = """\
examples:
  opsqueue consume mytasks:resize --object-store file:///srv/objects
      One process per core; mytasks.resize(operation) gives the operation's result.
  opsqueue consume mytasks:train --per chunk --processes 1 --strategy "PreferDistinct(customer, Oldest)" \\
      --server https://queue.example/opsqueue --object-store s3://bucket/objects

SIGTERM and Ctrl-C end each process after the chunk that it works on; a second one ends them at once. Chunks that were
not finished go back to the server without a retry. A process that dies is replaced.

exit codes: 0 stopped as asked, 1 the server or the object store refuses us, 2 a wrong flag or a function that cannot be
imported, 3 stopped at once by a second signal, 4 no connection within --connect-timeout
"""


class Worker:
    """One process of the pool, or its place while it is being replaced."""

    def __init__(self, number: int, config: str) -> None:
        self.number = number
        self._config = config
        self.process: subprocess.Popen[bytes] | None = None
        self.status = -1
        #: Readable when the process has ended; its end of the status pipe may live on in children of its own.
        self.end = -1
        self._unread = b""
        self._started_at = 0.0
        self._pause = _RESTART_S[0]
        self.restart_at: float | None = 0.0
        self.fatal: str | None = None
        self.connected = False
        self.in_hand = 0
        self._now = {"done": 0, "failed": 0}
        self._before = {"done": 0, "failed": 0}

    @property
    def done(self) -> int:
        """Chunks that were finished here, by this process and those before it."""
        return self._before["done"] + self._now["done"]

    @property
    def failed(self) -> int:
        """Chunks whose function raised."""
        return self._before["failed"] + self._now["failed"]

    def start(self) -> None:
        """Starts the process. Ctrl-C does not reach it: we stop it."""
        reading, writing = os.pipe()
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "opsqueue.cli.consume_process", str(os.getpid()), str(writing), self._config],
                pass_fds=(writing,),
                stdin=subprocess.DEVNULL,
                process_group=0,
            )
        except BaseException:
            os.close(reading)
            raise
        finally:
            os.close(writing)
        os.set_blocking(reading, False)
        self.status = reading
        self.end = os.pidfd_open(self.process.pid)
        self._started_at = time.monotonic()
        self.restart_at = None

    def read(self) -> bool:
        """Takes what the process has written; False when nobody can write any more."""
        try:
            data = os.read(self.status, 65536)
        except BlockingIOError:
            return True
        self._unread += data
        *lines, self._unread = self._unread.split(b"\n")
        for line in lines:
            self._take(json.loads(line))
        return bool(data)

    def _take(self, fields: dict[str, object]) -> None:
        if "fatal" in fields:
            self.fatal = str(fields["fatal"])
        for name in self._now:
            value = fields.get(name)
            if isinstance(value, int):
                self._now[name] = value
        self.connected = bool(fields.get("connected", self.connected))
        in_hand = fields.get("in_hand", self.in_hand)
        self.in_hand = in_hand if isinstance(in_hand, int) else 0

    def ended(self) -> int:
        """The process has ended: takes what it wrote last, ends what it had started, and gives its exit code."""
        assert self.process is not None
        self.read()
        os.close(self.status)
        os.close(self.end)
        self.status = self.end = -1
        self._unread = b""
        code = self.process.wait()
        # What it had started holds its connection open, and with that its chunk.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process = None
        self.connected, self.in_hand = False, 0
        for name, value in self._now.items():
            self._before[name] += value
            self._now[name] = 0
        return code

    def replace_later(self) -> float:
        """Seconds until the process is started again."""
        now = time.monotonic()
        if now - self._started_at > _LIVED_S:
            self._pause = _RESTART_S[0]
        pause, self._pause = self._pause, min(self._pause * 2, _RESTART_S[1])
        self.restart_at = now + pause
        return pause


class Pool:
    """All processes, from the first start to the last end."""

    def __init__(self, arguments: argparse.Namespace, config: str) -> None:
        self._workers = [Worker(number, config) for number in range(1, arguments.processes + 1)]
        self._function: str = arguments.function
        self._connect_timeout: float | None = arguments.connect_timeout
        self._health_file: Path | None = arguments.health_file
        self._selector = selectors.DefaultSelector()
        self._stopping = 0
        self._restarts = 0
        self._was_connected = False
        self._begun = time.monotonic()
        #: Why something else than a signal ends us, and the exit code.
        self._last_words: tuple[str, int] | None = None
        #: When those who do not end are killed, on the monotonic clock.
        self._kill_at: float | None = None
        self._health_failed = False
        self._rates: list[tuple[float, int]] = []
        self._text = self._summary()

    @property
    def is_healthy(self) -> bool:
        """Some process runs and has a connection, and we are not stopping."""
        return not self._stopping and any(worker.connected for worker in self._workers)

    def run(self, signals: Signals, live: Live | None) -> int:
        """Runs until it is stopped; the exit code."""
        self._selector.register(signals, selectors.EVENT_READ)
        logged_at = time.monotonic()
        logged = ""
        code: int | None = None
        try:
            while code is None:
                self._start_those_due()
                for key, _ in self._selector.select(_LOOK_S):
                    if isinstance(key.data, Worker):
                        self._hear(key.data, ended=key.fd == key.data.end)
                    else:
                        for signal_ in signals.take():
                            self._stop(signal_.name)
                code = self._verdict()
                self._text = self._summary()
                self._show_health()
                if live is not None:
                    live.update(self.line())
                elif time.monotonic() - logged_at > _LOG_EVERY_S and self.line() != logged:
                    logged_at, logged = time.monotonic(), self.line()
                    logger.info("%s", logged)
            return code
        finally:
            self._kill()
            self._remove_health()

    def line(self) -> str:
        """What goes on, for people, as of the last look."""
        return self._text

    def _summary(self) -> str:
        done = sum(worker.done for worker in self._workers)
        now = time.monotonic()
        self._rates.append((now, done))
        while now - self._rates[0][0] > _LOG_EVERY_S:
            self._rates.pop(0)
        since, before = self._rates[0]
        rate = (done - before) / (now - since) if now > since else 0.0
        connected = sum(worker.connected for worker in self._workers)
        return (
            f"{self._function}: {done:,} chunks done, {sum(worker.failed for worker in self._workers):,} failed, "
            f"{rate:,.1f}/s, {sum(worker.in_hand for worker in self._workers)} in hand, "
            f"{connected} of {len(self._workers)} processes connected, {self._restarts} restarts"
            + (", stopping" if self._stopping else "")
        )

    def _start_those_due(self) -> None:
        now = time.monotonic()
        for worker in self._workers:
            if not self._stopping and worker.restart_at is not None and now >= worker.restart_at:
                worker.start()
                self._selector.register(worker.status, selectors.EVENT_READ, worker)
                self._selector.register(worker.end, selectors.EVENT_READ, worker)

    def _hear(self, worker: Worker, *, ended: bool) -> None:
        if worker.process is None:
            return  # both its files were ready at once
        if not ended:
            if not worker.read():
                self._selector.unregister(worker.status)
            self._was_connected = self._was_connected or worker.connected
            return
        if worker.status in self._selector.get_map():
            self._selector.unregister(worker.status)
        self._selector.unregister(worker.end)
        code = worker.ended()
        if worker.fatal is not None:
            # of no use to start it again
            self._give_up(worker.fatal, code if code > 0 else ExitCode.CANNOT_START)
        if self._stopping:
            return
        self._restarts += 1
        how = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
        pause = worker.replace_later()
        logger.warning("process %d %s; it is replaced in %.1f s", worker.number, how, pause)

    def _give_up(self, why: str, code: int) -> None:
        """Ends with `code`, after the chunks in hand."""
        if not self._stopping:
            self._last_words = (why, code)
            self._stop(None)

    def _stop(self, why: str | None) -> None:
        self._stopping += 1
        if self._stopping == 2:
            self._kill_at = time.monotonic() + _FORCE_AFTER_S
        if why is not None:
            logger.info("%s: %s", why, "ending after the chunks in hand" if self._stopping == 1 else "ending at once")
        for worker in self._workers:
            if worker.process is not None:
                worker.process.terminate()

    def _verdict(self) -> int | None:
        """The exit code, once there is nothing more to do."""
        if self._stopping and not any(worker.process is not None for worker in self._workers):
            if self._last_words is not None:
                why, code = self._last_words
                print(f"opsqueue: consume: {why}", file=sys.stderr)
                return code
            return ExitCode.STOPPED if self._stopping == 1 else ExitCode.FORCED
        if self._kill_at is not None and time.monotonic() >= self._kill_at:
            logger.warning("some did not end within %g s and are killed", _FORCE_AFTER_S)
            return ExitCode.FORCED
        late = self._connect_timeout is not None and time.monotonic() - self._begun > self._connect_timeout
        if late and not self._was_connected:
            self._give_up(
                f"no connection within {self._connect_timeout:g} s (--connect-timeout)", ExitCode.NOT_CONNECTED
            )
        return None

    def _show_health(self) -> None:
        if self._health_file is None:
            return
        if not self.is_healthy:
            self._remove_health()
            return
        try:
            write_whole(self._health_file, self.line() + "\n")
        except OSError as error:
            if not self._health_failed:
                logger.warning("--health-file %s cannot be written: %s", self._health_file, error.strerror or error)
        else:
            self._health_failed = False
            return
        self._health_failed = True

    def _remove_health(self) -> None:
        if self._health_file is not None:
            with contextlib.suppress(OSError):  # it is not there, or cannot be: whoever looks sees that it is not kept
                self._health_file.unlink()

    def _kill(self) -> None:
        for worker in self._workers:
            if worker.process is not None:
                worker.process.kill()
                worker.process.wait()


def run(words: Sequence[str]) -> int:
    """Run the pool; the exit code. Raises SettingsError for wrong flags."""
    arguments = _parse(words)
    config = {
        "function": arguments.function,
        "server": arguments.server,
        "object_store": arguments.object_store,
        "object_store_options": pairs(arguments),
        "strategy": arguments.strategy,
        "per": arguments.per,
        "prefetch": arguments.prefetch,
        "log_level": arguments.log_level,
    }
    logging.basicConfig(level=arguments.log_level, format=LOG_FORMAT)
    pool = Pool(arguments, json.dumps(config))
    console = Console(stderr=True)
    with Signals() as signals, HealthPort(arguments.health_port, pool):
        if not console.is_terminal:
            return pool.run(signals, None)
        with Live(pool.line(), console=console, refresh_per_second=4) as live:
            return pool.run(signals, live)


def _parse(words: Sequence[str]) -> argparse.Namespace:
    parser = OneLineParser(
        prog="opsqueue consume",
        allow_abbrev=False,
        description="Work on chunks with a function of yours, in several processes.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "function",
        metavar="MODULE:FUNCTION",
        help="called with each operation (or as --per says); its result is stored",
    )
    add("--server", metavar="URL", default=os.environ.get("OPSQUEUE_SERVER", "127.0.0.1:3999"),
        help="host:port or URL of the queue (default: $OPSQUEUE_SERVER or 127.0.0.1:3999)")  # fmt: skip
    add("--object-store", metavar="URL", default=os.environ.get("OPSQUEUE_OBJECT_STORE"),
        help="where the chunks are, such as file:///srv/objects (default: $OPSQUEUE_OBJECT_STORE)")  # fmt: skip
    add_options(parser)
    add("--processes", type=_count, metavar="N", default=machine.cores(), help="default: the cores")
    add("--strategy", type=_strategy, metavar="STRATEGY", default="Random", help=f"{USAGE} (default: Random)")
    add("--per", choices=("op", "chunk", "raw", "map"), default="op",
        help="what FUNCTION is called with (default: op; map: see opsqueue map)")  # fmt: skip
    add(
        "--prefetch",
        type=_prefetch,
        metavar="N",
        default=None,
        help="chunks reserved ahead at most (default: 32; 0: none)",
    )
    add("--connect-timeout", type=_seconds, metavar="TIME", default=None,
        help='give up when there is no first connection within this time, such as "30s" (default: never)')  # fmt: skip
    add("--health-file", type=Path, metavar="PATH", default=None, help="written every moment while all is well")
    add("--health-port", type=int, metavar="PORT", default=None,
        help="answers GET / on this port of 127.0.0.1 with 200 while all is well, else 503")  # fmt: skip
    add("--log-level", choices=("DEBUG", "INFO", "WARNING", "ERROR"), default="INFO", help="default: INFO")
    arguments = parser.parse_args(words)
    if arguments.object_store is None:
        raise SettingsError("consume: --object-store URL is missing (or the variable OPSQUEUE_OBJECT_STORE)")
    if arguments.health_file is not None:
        try:
            write_whole(arguments.health_file, "")
            arguments.health_file.unlink()
        except OSError as error:
            raise SettingsError(
                f"consume: --health-file {arguments.health_file} cannot be written: {error.strerror or error}"
            ) from error
    try:
        parse_address(arguments.server)
    except IncorrectUsageError as error:
        raise SettingsError(f"consume: {error}") from error
    return arguments


def _count(text: str) -> int:
    if not text.isdigit() or not 1 <= int(text) <= 1_000:
        raise argparse.ArgumentTypeError(f"expected a number from 1 to 1,000, not {text!r}")
    return int(text)


def _prefetch(text: str) -> int:
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"expected a number of chunks, 0 or more, not {text!r}")
    return int(text)


def _strategy(text: str) -> str:
    try:
        parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def _seconds(text: str) -> float:
    try:
        return parse_duration(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None

"""The supervisor: makes what the processes share, forks writer and front-ends, replaces what dies, and stops them.

One poll over signals, children's ends, their control channels, and time. It serves nobody, and opens no database.
"""

from __future__ import annotations

import contextlib
import os
import resource
import select
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Final

from opsqueue._speedups.board import Board, SlotState
from opsqueue._speedups.counters import Counter
from opsqueue._speedups.ring import Channel
from opsqueue.server import listener as listening
from opsqueue.server import processes
from opsqueue.server.context import SUPERVISOR_SLOT, WRITER_SLOT, Control, ServerContext, frontend_slot
from opsqueue.server.database_location import DatabaseLocation, locate
from opsqueue.server.errors import DatabaseInUseError
from opsqueue.server.exit_codes import ExitCode
from opsqueue.server.logs import logger
from opsqueue.server.metrics import METRICS, Kind
from opsqueue.server.processes import Child, Signals, describe_exit
from opsqueue.server.settings import Settings
from opsqueue.server.systemd import Notifier

#: A predecessor may still be closing its port and its database: both are tried again this long (seconds).
PREDECESSOR_CLOSES_WITHIN_S: Final = 1.5
TRY_AGAIN_AFTER_S: Final = 0.05

#: Front-ends have this long to answer what they accepted; then they are killed and the writer is told to stop.
DRAIN_WITHIN_S: Final = 0.6
#: The writer is killed when the whole stop has taken this long.
STOP_WITHIN_S: Final = 0.9

#: A serving process whose progress word is older than this hangs.
HANG_AFTER_S: Final = 5.0
#: A starting process may be busy for longer: a writer that recovers a large journal.
START_HANG_AFTER_S: Final = 60.0
#: Progress words are read this often. A hang is believed at the second look, because after a stop of the whole process
#: group (Ctrl-Z, a frozen container) all words are old at the first one.
LOOK_EVERY_S: Final = 0.5
STALE_LOOKS: Final = 2

#: A writer that dies this often within this time, each time before it serves, will not be helped by another try.
WRITER_TRIES: Final = 3
WRITER_TRIES_WITHIN_S: Final = 10.0

#: The first replacement is forked at once, the following ones after a delay that doubles, until one serves a while.
FIRST_DELAY_S: Final = 0.1
LONGEST_DELAY_S: Final = 5.0
STABLE_AFTER_S: Final = 10.0

log = logger("supervisor")


@dataclass(frozen=True)
class EntryPoints:
    """What the supervisor runs. `lock` gives a descriptor that holds the database's lock by being open, or raises
    DatabaseInUseError; `writer` and `frontend` are the children's main functions and give their exit codes."""

    lock: Callable[[str], int]
    writer: Callable[[ServerContext, Control, int], int]
    frontend: Callable[[ServerContext, Control, int], int]


class Phase(Enum):
    """What the supervisor is doing."""

    STARTING = "starting"
    SERVING = "serving"
    DRAINING = "draining"  # the front-ends answer what they accepted
    STOPPING = "stopping"  # the writer commits what is there


@dataclass
class Post:
    """A place that a child fills: the writer's, or one front-end's."""

    name: str
    slot: int
    in_child: Callable[[Control], int]
    child: Child | None = None
    #: When to fork the next child; None: one runs, or none is wanted.
    due: float | None = None
    #: Deaths since a child last served for STABLE_AFTER_S.
    deaths: int = 0
    #: Times of the deaths before serving.
    early_deaths: list[float] = field(default_factory=list)


class Supervisor:
    """Runs one server from its start to its end."""

    def __init__(self, settings: Settings, entry_points: EntryPoints, environment: Mapping[str, str]) -> None:
        self._settings = settings
        self._entry = entry_points
        self._notifier = Notifier(environment)
        self._phase = Phase.STARTING
        self._exit_code = ExitCode.STOPPED
        self._stop_began = 0.0
        self._look_at = 0.0
        self._alive_at = 0.0
        self._begun = time.monotonic()

    def run(self) -> int:
        """Serve until told to stop; the exit code. Raises StartupError, before anything was forked."""
        settings = self._settings
        with contextlib.ExitStack() as stack:
            stack.callback(self._notifier.close)
            self._report = listening.PortReport(settings.report_bound_port_pipe)
            stack.callback(lambda: self._report.close())
            self._signals = stack.enter_context(Signals())
            processes.set_process_name("opsqueue")
            _raise_file_limit()
            location = locate(settings.database_filename)
            stack.callback(location.remove)
            self._lock_fd = self._lock(location.path)
            stack.callback(os.close, self._lock_fd)
            listener = listening.bind(settings.host, settings.port, wait=self._predecessor_may_close)
            stack.enter_context(listener)
            self._context = self._share(location, listener)
            self._posts = self._make_posts()
            self._board = self._context.board
            self._board.start(SUPERVISOR_SLOT, SlotState.SERVING)
            processes.prepare_to_fork()
            stack.callback(self._end_children)
            self._fork(self._writer)
            while not self._turn():
                pass
        return self._exit_code

    # What the processes share

    def _predecessor_may_close(self) -> bool:
        """Pause before another try; False when there is to be none: it took too long, or we are told to stop."""
        if time.monotonic() - self._begun > PREDECESSOR_CLOSES_WITHIN_S:
            return False
        return not self._signals.arrives_within(TRY_AGAIN_AFTER_S)

    def _lock(self, path: str) -> int:
        while True:
            try:
                return self._entry.lock(path)
            except DatabaseInUseError:
                if not self._predecessor_may_close():
                    raise

    def _share(self, location: DatabaseLocation, listener: socket.socket) -> ServerContext:
        frontends = self._settings.frontends
        return ServerContext(
            settings=self._settings,
            database_path=location.path,
            database_is_temporary=location.is_temporary,
            listener=listener,
            board=Board(frontend_slot(frontends)),
            channels=tuple(Channel() for _ in range(frontends)),
        )

    def _make_posts(self) -> list[Post]:
        def frontend(index: int) -> Callable[[Control], int]:
            return lambda control: self._entry.frontend(self._context, control, index)

        def writer(control: Control) -> int:
            return self._entry.writer(self._context, control, self._lock_fd)

        return [Post("opsqueue-writer", WRITER_SLOT, writer)] + [
            Post(f"opsqueue-fe{index}", frontend_slot(index), frontend(index))
            for index in range(self._settings.frontends)
        ]

    @property
    def _writer(self) -> Post:
        return self._posts[0]

    @property
    def _frontends(self) -> list[Post]:
        return self._posts[1:]

    # Forking

    def _fork(self, post: Post) -> None:
        for metric in METRICS:
            if metric.kind is Kind.GAUGE:
                self._board.put(post.slot, metric.counter, 0)
        self._board.set_connections(post.slot, 0)

        def in_child(control: Control) -> int:
            self._leave_to_supervisor(post)
            return post.in_child(control)

        post.due = None
        post.child = processes.fork_child(post.name, time.monotonic(), in_child)

    def _leave_to_supervisor(self, post: Post) -> None:
        """In a new child: close what it must not keep open."""
        self._signals.close()
        self._report.close()
        self._notifier.close()
        for other in self._posts:
            if other is not post and other.child is not None:
                other.child.forget()
        if post.slot == WRITER_SLOT:
            # A writer that outlives us for a moment must not hold the port.
            self._context.listener.close()
        else:
            os.close(self._lock_fd)

    # The loop

    def _turn(self) -> bool:
        """Wait for what happens next and act on it; True: the server has ended."""
        ended, spoken, signalled = self._wait()
        if signalled:
            self._obey_signals()
        for post in spoken:
            self._listen(post)
        for post in ended:
            self._bury(post)
        now = time.monotonic()
        self._board.progress(SUPERVISOR_SLOT)
        if self._phase in (Phase.STARTING, Phase.SERVING):
            self._look_after(now)
            return False
        return self._go_on_stopping(now)

    def _wait(self) -> tuple[list[Post], list[Post], bool]:
        """Posts whose child has ended, posts whose child has said something, and whether there are signals."""
        poll = select.poll()
        poll.register(self._signals, select.POLLIN)
        ends, channels = {}, {}
        for post in self._posts:
            if post.child is not None:
                ends[post.child.pidfd] = post
                poll.register(post.child.pidfd, select.POLLIN)
                if post.child.serving_since is None:
                    channels[post.child.channel.fileno()] = post
                    poll.register(post.child.channel, select.POLLIN)
        ready = [fd for fd, _ in poll.poll(self._milliseconds_to_wait())]
        return (
            [ends[fd] for fd in ready if fd in ends],
            [channels[fd] for fd in ready if fd in channels],
            self._signals.fileno() in ready,
        )

    def _milliseconds_to_wait(self) -> int:
        now = time.monotonic()
        moments = [now + LOOK_EVERY_S, *(post.due for post in self._posts if post.due is not None)]
        if self._phase is Phase.DRAINING:
            moments.append(self._stop_began + DRAIN_WITHIN_S)
        if self._phase is Phase.STOPPING:
            moments.append(self._stop_began + STOP_WITHIN_S)
        if self._notifier.watchdog_interval is not None:
            moments.append(self._alive_at)
        return max(0, int((min(moments) - now) * 1000) + 1)

    def _listen(self, post: Post) -> None:
        """A child says that it serves; or it closed its channel, and its end will follow."""
        child = post.child
        assert child is not None
        try:
            said = child.channel.recv(64)
        except BlockingIOError:
            return
        except ConnectionError:  # it ended with an order unread
            said = b""
        if b"R" in said:
            child.serving_since = time.monotonic()
            if self._phase is Phase.STARTING:
                self._go_on_starting(child.serving_since)

    def _go_on_starting(self, now: float) -> None:
        """The first front-ends follow the first writer: until it serves, there may be no database to read."""
        for post in self._frontends:
            if post.child is None and post.due is None:
                post.due = now
        if all(post.child is not None and post.child.serving_since is not None for post in self._posts):
            self._announce()

    def _announce(self) -> None:
        self._phase = Phase.SERVING
        port = self._context.listener.getsockname()[1]
        log.info(
            "opsqueue serves",
            url=listening.url(self._context.listener),
            database=self._settings.database_filename,
            frontends=self._settings.frontends,
            seconds=round(time.monotonic() - self._begun, 3),
        )
        error = self._report.send(port)
        if error is not None:
            log.warning("nobody takes the report of the port", reason=error.strerror)
        self._notifier.ready(port)

    def _look_after(self, now: float) -> None:
        """Fork what is due, find what hangs, and tell systemd that we live."""
        for post in self._posts:
            if post.due is not None and post.due <= now:
                self._fork(post)
        if now >= self._look_at:
            self._look_at = now + LOOK_EVERY_S
            for post in self._posts:
                self._look_for_hang(post, now)
        interval = self._notifier.watchdog_interval
        if interval is not None and now >= self._alive_at:
            self._alive_at = now + interval
            self._notifier.alive()

    def _look_for_hang(self, post: Post, now: float) -> None:
        child = post.child
        if child is None:
            return
        # The word of a child that has not moved it yet is its predecessor's.
        age = min(self._board.seconds_since_progress(post.slot), now - child.forked_at)
        hangs = age > (START_HANG_AFTER_S if child.serving_since is None else HANG_AFTER_S)
        child.stale_checks = child.stale_checks + 1 if hangs else 0
        if child.stale_checks == STALE_LOOKS:
            log.error("a process hangs; it is killed", process=post.name, child=child.pid, seconds=round(age, 1))
            child.kill()

    # Deaths

    def _bury(self, post: Post) -> None:
        """Take note of a child's end, and plan its replacement."""
        child = post.child
        assert child is not None
        now = time.monotonic()
        if child.serving_since is None:
            self._listen(post)  # its last word may be unread: what counts is whether it ever served
        code = child.reap()
        post.child = None
        self._board.set_state(post.slot, SlotState.ABSENT)
        self._board.set_connections(post.slot, 0)
        if self._phase in (Phase.DRAINING, Phase.STOPPING):
            if code != 0:
                log.warning("a process did not end in order", process=post.name, end=describe_exit(code))
            return
        if post is self._writer and child.serving_since is None and self._writer_is_hopeless(code, now):
            if code != ExitCode.CANNOT_START:  # with that code it has said why, in the line that is to be the last
                log.error("the writer cannot start; the server ends", end=describe_exit(code))
            self._exit_code = ExitCode.CANNOT_START
            self._begin_stop(now)
            return
        self._plan_replacement(post, child, code, now)

    def _writer_is_hopeless(self, code: int, now: float) -> bool:
        early = self._writer.early_deaths
        early[:] = [then for then in early if now - then < WRITER_TRIES_WITHIN_S] + [now]
        refuses = self._phase is Phase.STARTING and code == ExitCode.CANNOT_START
        return refuses or len(early) >= WRITER_TRIES

    def _plan_replacement(self, post: Post, child: Child, code: int, now: float) -> None:
        if child.serving_since is not None and now - child.serving_since >= STABLE_AFTER_S:
            post.deaths = 0
        delay = 0.0 if post.deaths == 0 else min(FIRST_DELAY_S * 2 ** (post.deaths - 1), LONGEST_DELAY_S)
        post.deaths += 1
        post.due = now + delay
        self._board.add(SUPERVISOR_SLOT, Counter.PROCESSES_REPLACED, 1)
        end = describe_exit(code)
        log.error("a process died; it is replaced", process=post.name, child=child.pid, end=end, delay=delay)

    # The end

    def _obey_signals(self) -> None:
        for number in self._signals.take():
            if self._phase in (Phase.DRAINING, Phase.STOPPING):
                log.warning("stopped at once", signal=number.name)
                self._exit_code = ExitCode.FORCED
                self._kill(self._posts)
            else:
                log.info("stopping", signal=number.name)
                self._begin_stop(time.monotonic())

    def _begin_stop(self, now: float) -> None:
        self._phase = Phase.DRAINING
        self._stop_began = now
        self._notifier.stopping()
        # Ours is not the only one: the port is refused when the last front-end has closed its own.
        self._context.listener.close()
        for post in self._posts:
            post.due = None
        for post in self._frontends:
            if post.child is not None:
                post.child.tell(b"D")

    def _go_on_stopping(self, now: float) -> bool:
        """The next step of a stop, if it is time; True: all have ended."""
        if self._phase is Phase.DRAINING:
            if any(post.child is not None for post in self._frontends):
                if now >= self._stop_began + DRAIN_WITHIN_S:
                    self._kill(self._frontends)
                return False
            self._phase = Phase.STOPPING
            if self._writer.child is not None:
                self._writer.child.tell(b"S")
        if self._writer.child is None:
            if self._exit_code == ExitCode.STOPPED:
                log.info("stopped", seconds=round(now - self._stop_began, 3))
            return True
        if now >= self._stop_began + STOP_WITHIN_S:
            self._kill([self._writer])
        return False

    def _kill(self, posts: list[Post]) -> None:
        for post in posts:
            if post.child is not None:
                post.child.kill()

    def _end_children(self) -> None:
        """Whatever ended the loop: no child outlives it."""
        self._kill(self._posts)
        for post in self._posts:
            if post.child is not None:
                post.child.reap()
                post.child = None


def _raise_file_limit() -> None:
    """Every connection is an open file, and the usual limit is 1,024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(OSError, ValueError):  # the kernel may cap it below `hard`; then it stays as it was
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))

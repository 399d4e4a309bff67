"""A real writer process without supervisor and front-ends: a test speaks to it through a channel, record by record."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import select
import signal
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import msgspec

from opsqueue._speedups.board import Board
from opsqueue._speedups.ring import Channel, Endpoint
from opsqueue.server import logs, requests
from opsqueue.server.context import Control, ServerContext
from opsqueue.server.settings import Settings
from opsqueue.server.writer.database_file import acquire_lock
from opsqueue.server.writer.main import run

OPEN, CLOSE, RESERVE, COMPLETE, FAIL = 1, 2, 3, 4, 5
REQUEST, RESERVED, REFUSED, DROPPED, REPLY = 32, 64, 65, 66, 67
ANSWER_WITHIN_S = 20


@dataclasses.dataclass(frozen=True)
class Reservation:
    submission: int
    chunk: int
    chunks_done: int
    retries: int


class BareWriter:
    """The process, and one front-end's side of its channel."""

    def __init__(self, path: Path, **settings: object) -> None:
        defaults = Settings.defaults()
        listener = socket.socket()
        self.board = Board(3)
        self.context = ServerContext(
            settings=dataclasses.replace(defaults, **settings),  # type: ignore[arg-type]
            database_path=str(path),
            database_is_temporary=False,
            listener=listener,
            board=self.board,
            channels=(Channel(1 << 20),),
        )
        self.pid = 0
        self._requests = 0
        self._nonces = 0
        self._replies: dict[int, requests.Reply] = {}
        self.reserved: dict[int, list[Reservation]] = {}
        self.dropped: list[tuple[int, int, int]] = []
        self.endpoint: Endpoint = self.context.channels[0].frontend_end()
        self.start()

    def start(self) -> None:
        """Fork a writer; returns once it serves."""
        ours, theirs = socket.socketpair()
        lock = acquire_lock(self.context.database_path)
        self.pid = os.fork()
        if self.pid == 0:
            status = 1
            try:
                ours.close()
                logs.configure("info", "logfmt")  # as the supervisor does: a log that cannot be written ends nothing
                status = run(self.context, Control(theirs), lock)
            finally:
                os._exit(status)
        theirs.close()
        os.close(lock)
        self.control = ours
        self.control.settimeout(ANSWER_WITHIN_S)
        assert self.control.recv(1) == b"R", "the writer ended before it served"
        # It raised its epoch before it served; what is sent before that is noticed would be discarded.
        self.endpoint.poll()

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        self.control.close()

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        """It does nothing meanwhile."""
        os.kill(self.pid, signal.SIGSTOP)
        os.waitid(os.P_PID, self.pid, os.WSTOPPED)
        try:
            yield
        finally:
            os.kill(self.pid, signal.SIGCONT)

    def stop(self) -> int:
        """In order; the exit code."""
        self.control.sendall(b"S")
        code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        self.control.close()
        return code

    def replace_frontend(self) -> None:
        """A front-end's successor takes the channel over; returns once the writer has acknowledged it."""
        self.endpoint = self.context.channels[0].frontend_end()
        self.until(lambda: self.endpoint.connected)

    # --- records ---

    def send(self, kind: int, payload: bytes) -> None:
        while not self.endpoint.send(kind, payload):
            self.endpoint.publish()
            self._take()
        self.endpoint.publish()

    def open(self, connection: int, features: int = 0) -> None:
        self.send(OPEN, struct.pack("<QII", connection, features, 0))

    def close(self, connection: int, cause: int = 0) -> None:
        self.send(CLOSE, struct.pack("<QII", connection, cause, 0))

    def want(self, connection: int, maximum: int = 1, strategy: bytes = b"O") -> int:
        """Ask; the nonce under which the answer will be in `reserved`."""
        self._nonces += 1
        self.send(RESERVE, struct.pack("<QQII", connection, self._nonces, maximum, len(strategy)) + strategy)
        return self._nonces

    def reserve(self, connection: int, maximum: int = 1, strategy: bytes = b"O") -> list[Reservation]:
        nonce = self.want(connection, maximum, strategy)
        self.until(lambda: nonce in self.reserved)
        return self.reserved.pop(nonce)

    def complete(self, connection: int, submission: int, chunk: int) -> None:
        self.send(COMPLETE, struct.pack("<QQQQII", connection, submission, chunk, 0, 0, 0))

    def fail(self, connection: int, submission: int, chunk: int, text: bytes) -> None:
        self.send(FAIL, struct.pack("<QQQQII", connection, submission, chunk, 0, 0, len(text)) + text)

    def ask(self, request: requests.Request) -> int:
        """Send a cold request; its number."""
        self._requests += 1
        self.send(REQUEST, struct.pack("<Q", self._requests) + requests.encode(request))
        return self._requests

    def answer(self, number: int) -> requests.Reply:
        self.until(lambda: number in self._replies)
        return self._replies.pop(number)

    def call(self, request: requests.Request) -> requests.Reply:
        return self.answer(self.ask(request))

    def insert(self, prefix: str, count: int, **fields: object) -> requests.Reply:
        return self.answer(self.ask_insert(prefix, count, **fields))

    def ask_insert(self, prefix: str, count: int, **fields: object) -> int:
        """Send an insert; the number of the request."""
        insert = requests.Insert(
            prefix=prefix,
            count=count,
            contents=None,
            idempotency_key=None,
            fingerprint=count.to_bytes(16, "little"),
            chunk_size=1,
            metadata=None,
            strategic_metadata={},
            otel_trace_carrier="{}",
            paused=False,
        )
        return self.ask(msgspec.structs.replace(insert, **fields))

    def status(self, submission: int) -> requests.Reply:
        return self.call(requests.Status(submission))

    def has_answered(self, number: int) -> bool:
        self._take()
        return number in self._replies

    def until(self, condition: object) -> None:
        """Take records until the condition holds; AssertionError when the writer says nothing for long."""
        while True:
            self._take()
            if condition():  # type: ignore[operator]
                return
            if self.endpoint.prepare_to_sleep():
                ready, _, _ = select.select([self.endpoint.own_wake], [], [], ANSWER_WITHIN_S)
                assert ready, "the writer sent nothing"
                os.eventfd_read(self.endpoint.own_wake)

    def _take(self) -> None:
        self.endpoint.poll()
        while (record := self.endpoint.get()) is not None:
            kind, payload = record
            if kind == REPLY:
                self._replies[struct.unpack_from("<Q", payload)[0]] = requests.decode_reply(payload[8:])
            elif kind == RESERVED:
                _, nonce, count, _ = struct.unpack_from("<QQII", payload)
                self.reserved[nonce] = [
                    Reservation(*struct.unpack_from("<QQQI", payload, 24 + 32 * index)) for index in range(count)
                ]
            elif kind == DROPPED:
                _, submission, chunk, reason, _ = struct.unpack("<QQQII", payload)
                self.dropped.append((submission, chunk, reason))
        self.endpoint.release()


@contextlib.contextmanager
def bare_writer(path: Path, **settings: object) -> Iterator[BareWriter]:
    writer = BareWriter(path, **settings)
    try:
        yield writer
    finally:
        with contextlib.suppress(ProcessLookupError, ChildProcessError):  # the test has ended it
            writer.kill()

"""Consumers of the other queues: reserve one, complete it, durable. All connections in one thread, as in our generator.

Each connection sends a completion and its next reservation in one write, as our generator does, and the protocols are
taken apart by libraries in C (hiredis, libpq through psycopg.pq) or need no taking apart (beanstalkd's lines).
"""

from __future__ import annotations

import contextlib
import select
import socket
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import hiredis
import psycopg
from psycopg import pq

PAYLOAD = b"x" * 16
#: Jobs in one write while a queue is filled.
PORTION = 500


class RanDry(RuntimeError):
    """The queue was empty before the time was over: fill in more."""

    def __init__(self, name: str) -> None:
        super().__init__(f"{name}'s queue was empty before the time was over")


@dataclass(frozen=True)
class Lifecycles:
    count: int
    seconds: float


class Connection(ABC):
    """One consumer's connection, never blocking."""

    @abstractmethod
    def fileno(self) -> int: ...

    @abstractmethod
    def ask(self) -> None:
        """Reserve the first job."""

    @abstractmethod
    def turn(self) -> int:
        """Read what is there; for each reservation that came, complete it and reserve the next; how many came."""

    @abstractmethod
    def close(self) -> None: ...


def run(connections: Sequence[Connection], seconds: float) -> Lifecycles:
    """Reserve and complete on every connection until the time is over."""
    poll = select.epoll()
    by_descriptor = {each.fileno(): each for each in connections}
    for descriptor in by_descriptor:
        poll.register(descriptor, select.EPOLLIN)
    count = 0
    begun = time.perf_counter()
    until = begun + seconds
    for each in connections:
        each.ask()
    try:
        while time.perf_counter() < until:
            for descriptor, _ in poll.poll(0.05):
                count += by_descriptor[descriptor].turn()
    finally:
        poll.close()
    return Lifecycles(count, time.perf_counter() - begun)


def _connected(port: int) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", port), timeout=10)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


def _command(*words: str | bytes) -> bytes:
    packed: bytes = hiredis.pack_command(words)  # type: ignore[arg-type]  # its stub allows one word only
    return packed


class RedisConnection(Connection):
    """The reliable-queue pattern: LMOVE to a list of what is in progress, LREM from it when it is done."""

    RESERVE = _command("LMOVE", "queue", "taken", "RIGHT", "LEFT")

    def __init__(self, port: int) -> None:
        self._socket = _connected(port)
        self._socket.setblocking(False)
        self._reader = hiredis.Reader()

    def fileno(self) -> int:
        return self._socket.fileno()

    def ask(self) -> None:
        self._socket.sendall(self.RESERVE)

    def turn(self) -> int:
        self._reader.feed(self._socket.recv(65536))
        came = 0
        while (reply := self._reader.gets()) is not False:
            if isinstance(reply, bytes):
                came += 1
                self._socket.sendall(_command("LREM", "taken", "1", reply) + self.RESERVE)
            elif reply is None:
                raise RanDry("redis")
            elif isinstance(reply, Exception):
                raise reply
        return came

    def close(self) -> None:
        self._socket.close()


def fill_redis(port: int, jobs: int) -> None:
    with _connected(port) as connection:
        reader = hiredis.Reader()
        for start in range(0, jobs, PORTION):
            names = [b"%d" % number + PAYLOAD for number in range(start, start + PORTION)]
            connection.sendall(_command("LPUSH", "queue", *names))
            while (reply := reader.gets()) is False:
                reader.feed(connection.recv(65536))
            if isinstance(reply, Exception):
                raise reply


class BeanstalkConnection(Connection):
    """reserve, delete."""

    def __init__(self, port: int) -> None:
        self._socket = _connected(port)
        self._socket.setblocking(False)
        self._input = b""

    def fileno(self) -> int:
        return self._socket.fileno()

    def ask(self) -> None:
        self._socket.sendall(b"reserve-with-timeout 0\r\n")

    def turn(self) -> int:
        self._input += self._socket.recv(65536)
        came = 0
        while True:
            line, end, rest = self._input.partition(b"\r\n")
            if not end:
                return came
            if line.startswith(b"RESERVED "):
                _, job, size = line.split()
                if len(rest) < int(size) + 2:
                    return came
                rest = rest[int(size) + 2 :]
                came += 1
                self._socket.sendall(b"delete " + job + b"\r\nreserve-with-timeout 0\r\n")
            elif line == b"TIMED_OUT":
                raise RanDry("beanstalkd")
            elif line != b"DELETED":
                raise RuntimeError(f"beanstalkd answered {line!r}")
            self._input = rest

    def close(self) -> None:
        self._socket.close()


def fill_beanstalkd(port: int, jobs: int) -> None:
    put = b"put 0 0 600 %d\r\n%b\r\n" % (len(PAYLOAD), PAYLOAD)
    with _connected(port) as connection:
        for start in range(0, jobs, PORTION):
            count = min(PORTION, jobs - start)
            connection.sendall(put * count)
            answer = b""
            while answer.count(b"\r\n") < count:
                answer += connection.recv(65536)
            if answer.count(b"INSERTED ") != count:
                raise RuntimeError(f"beanstalkd answered {answer[:100]!r}")


class PostgresConnection(Connection):
    """A transaction holds its row by FOR UPDATE SKIP LOCKED; deleting it and committing completes the job."""

    RESERVE = b"SELECT id FROM jobs ORDER BY id LIMIT 1 FOR UPDATE SKIP LOCKED"
    COMPLETE = b"DELETE FROM jobs WHERE id = $1"

    def __init__(self, port: int) -> None:
        self._connection = pq.PGconn.connect(_postgres_address(port).encode())
        if self._connection.status != pq.ConnStatus.OK:
            raise RuntimeError(f"PostgreSQL refused the connection: {self._connection.get_error_message()}")
        for name, statement in ((b"reserve", self.RESERVE), (b"complete", self.COMPLETE)):
            self._connection.prepare(name, statement)
        self._connection.nonblocking = 1
        self._connection.enter_pipeline_mode()

    def fileno(self) -> int:
        return self._connection.socket

    def ask(self) -> None:
        self._connection.send_query_params(b"BEGIN", None)
        self._connection.send_query_prepared(b"reserve", None)
        self._send()

    def turn(self) -> int:
        self._connection.consume_input()
        came = 0
        ended = False  # a command's results end with one None; a second one says that nothing is left
        while not self._connection.is_busy():
            result = self._connection.get_result()
            if result is None:
                if ended:
                    return came
                ended = True
                continue
            ended = False
            if result.status == pq.ExecStatus.PIPELINE_SYNC:
                return came
            if result.status == pq.ExecStatus.TUPLES_OK:
                came += 1
                self._complete(result)
            elif result.status != pq.ExecStatus.COMMAND_OK:
                raise RuntimeError(f"PostgreSQL answered {result.get_error_message()}")
        return came

    def _complete(self, result: object) -> None:
        assert isinstance(result, pq.PGresult)
        job = result.get_value(0, 0) if result.ntuples else None
        if job is None:
            raise RanDry("PostgreSQL")
        self._connection.send_query_prepared(b"complete", [job])
        self._connection.send_query_params(b"COMMIT", None)
        self._connection.send_query_params(b"BEGIN", None)
        self._connection.send_query_prepared(b"reserve", None)
        self._send()

    def _send(self) -> None:
        self._connection.pipeline_sync()
        self._connection.flush()

    def close(self) -> None:
        self._connection.finish()


def _postgres_address(port: int) -> str:
    return f"host=127.0.0.1 port={port} user=bench dbname=postgres"


def fill_postgresql(port: int, jobs: int) -> None:
    with psycopg.connect(_postgres_address(port), autocommit=True) as connection:
        connection.execute("CREATE TABLE jobs (id bigserial PRIMARY KEY, payload bytea NOT NULL)")
        connection.execute("INSERT INTO jobs (payload) SELECT %s::bytea FROM generate_series(1, %s)", (PAYLOAD, jobs))
        connection.execute("VACUUM ANALYZE jobs")


@contextlib.contextmanager
def connected(kind: type[Connection], port: int, count: int) -> Iterator[list[Connection]]:
    with contextlib.ExitStack() as stack:
        connections: list[Connection] = []
        for _ in range(count):
            connection = kind(port)  # type: ignore[call-arg]
            stack.callback(connection.close)
            connections.append(connection)
        yield connections

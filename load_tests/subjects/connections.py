"""Thousands of consumers that are connected and ask for nothing: memory of each, and what the others notice."""

from __future__ import annotations

import contextlib
import resource
import select
import socket
import threading
from collections.abc import Iterator

from load_tests import peers
from load_tests.backlog import fill
from load_tests.figures import Figure, percentile
from load_tests.setting import Bench
from load_tests.strategies import CASES
from load_tests.subjects.reservations import latencies_ms

#: Descriptors that this process and a front-end need for everything else.
SPARE = 200
#: A ping's payload of four bytes is answered with a pong of the same, masked with the key zero.
PING = 0x89
ASKED_BYTES = 20_000


class Idle:
    """Connections that answer the server's pings and do nothing else."""

    def __init__(self, address: str, count: int) -> None:
        self._poll = select.epoll()
        self._ends = socket.socketpair()
        self._poll.register(self._ends[0], select.EPOLLIN)
        self.sockets: dict[int, socket.socket] = {}
        self.lost = 0
        self._thread = threading.Thread(target=self._answer, name="idle", daemon=True)
        self._thread.start()
        for _ in range(count):
            each = peers.consumer(address)
            each.setblocking(False)
            self.sockets[each.fileno()] = each
            self._poll.register(each, select.EPOLLIN)

    def _answer(self) -> None:
        while True:
            for descriptor, _ in self._poll.poll():
                if descriptor == self._ends[0].fileno():
                    return
                self._read(self.sockets[descriptor])

    def _read(self, each: socket.socket) -> None:
        try:
            received = each.recv(65536)
        except OSError:
            received = b""
        if not received:
            self.lost += 1
            self._poll.unregister(each)
            return
        while received:
            size = received[1] & 127
            head = 4 if size == 126 else 2
            if size == 126:
                size = int.from_bytes(received[2:4], "big")
            if received[0] == PING:
                each.send(bytes([0x8A, 0x80 | size]) + bytes(4) + received[head : head + size])
            received = received[head + size :]

    def close(self) -> None:
        self._ends[1].send(b"x")
        self._thread.join()
        for each in (*self.sockets.values(), *self._ends):
            each.close()
        self._poll.close()


def measure(bench: Bench) -> Iterator[Figure]:
    allowed = resource.getrlimit(resource.RLIMIT_NOFILE)[0] - SPARE
    count = min(bench.scale.idle_connections, allowed)
    with bench.server() as server:
        fill(server, 100, 1_000_000)
        strategy = CASES["Oldest"]
        before, _ = latencies_ms(server, strategy, bench.scale.seconds, 0)
        memory = server.pss_bytes()
        with contextlib.closing(Idle(server.address, count)) as idle:
            memory = server.pss_bytes() - memory
            after, limit = latencies_ms(server, strategy, bench.scale.seconds, 0)
            if idle.lost:
                raise RuntimeError(f"the server closed {idle.lost} of {count} idle connections")
    what = f"{count:,} idle consumer connections"
    note = "" if count == bench.scale.idle_connections else f"the descriptor limit allows {allowed:,} here"
    yield Figure(f"{what}: memory of each", memory / count, "bytes", None, ASKED_BYTES, False, note=note)
    yield Figure(
        f"{what}: reservation p99",
        percentile(after, 0.99),
        "ms",
        None,
        percentile(before, 0.99),
        higher_is_better=False,
        limit=limit,
        note=f"p50 {percentile(after, 0.5):.2f} ms; before they connected p50 {percentile(before, 0.5):.2f}, "
        f"p99 {percentile(before, 0.99):.2f} ms",
    )

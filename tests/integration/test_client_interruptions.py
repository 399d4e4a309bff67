"""Ctrl-C at any place of the consumer's code: nothing is sent twice, what is held goes back, all is closed."""

from __future__ import annotations

import gc
import os
import random
import signal
import socket
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import cbor2
import pytest

import opsqueue.client
from opsqueue.consumer import ConsumerClient
from opsqueue.protocol import consumer as wire
from tests.integration.client_fakes import FakeServer, running

_CLIENT = Path(opsqueue.client.__file__).parent
#: Whose lines are interrupted: what runs on the caller's thread once there is a connection.
_FILES = frozenset(str(_CLIENT / name) for name in ("connection.py", "session.py", "in_hand.py", "loop.py"))
_CHUNKS = 5


class Interruption:
    """Sends SIGINT once, so that its handler runs where the interpreter looks for signals: after a C function's return,
    and at a Python function's begin. Counted on this thread from the first callback on.
    """

    def __init__(self, at: int | None) -> None:
        self.at = at
        self.places = 0
        self.where = ""
        self._counts = False

    def begin(self) -> None:
        """From now on places count."""
        self._counts = True

    def profile(self, frame: FrameType, event: str, argument: Any) -> None:
        """For sys.setprofile."""
        if event in ("c_return", "call") and self._counts and frame.f_code.co_filename in _FILES:
            self.places += 1
            if self.places == self.at:
                self._counts = False
                self.where = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} {argument}"
                signal.raise_signal(signal.SIGINT)


def _run(at: int | None) -> Interruption:
    interruption = Interruption(at)
    with running(FakeServer()) as fake:
        server = fake.server
        server.add([cbor2.dumps([number]) for number in range(_CHUNKS)])
        consumer = ConsumerClient(f"127.0.0.1:{server.port}", "memory://")

        def double(op: int) -> int:
            interruption.begin()
            if op == _CHUNKS - 1:
                consumer.stop()
            return 2 * op

        gc.collect()  # the clients of the runs before close their connections here, not in the middle of this one
        sys.setprofile(interruption.profile)
        try:
            consumer.run_each_op(double, prefetch=2)
        finally:
            sys.setprofile(None)
        server.wait_for(lambda: len(server.closes) == len(server.handshakes), timeout=5)
        assert server.closes == [1000], interruption.where
        assert not server.sent(wire.FailChunk), interruption.where
        done = server.submissions[1]["done"]
        assert {index: cbor2.loads(output) for index, output in done.items()} == {
            index: [2 * index] for index in done
        }, interruption.where
        given_back = {index for _, index in server.available}
        assert given_back | set(done) == set(range(_CHUNKS)), interruption.where
    return interruption


def test_every_chunk_is_done_without_an_interruption() -> None:
    assert _run(None).places > 100


@pytest.mark.parametrize("seed", range(8))
def test_ctrl_c_at_any_place_gives_everything_back_and_closes_the_connection(seed: int) -> None:
    lines = _run(None).places
    chooser = random.Random(seed)
    for at in chooser.sample(range(1, lines), 20):
        _run(at)


def test_a_handler_of_ones_own_stays_and_pythons_comes_back() -> None:
    seen: list[Any] = []
    with running(FakeServer()) as fake:
        consumer = ConsumerClient(f"127.0.0.1:{fake.server.port}", "memory://")

        def note(chunk: Any) -> bytes:
            seen.append(signal.getsignal(signal.SIGINT))
            consumer.stop()
            return b""

        fake.server.add([b"", b""])
        consumer.run_each_chunk_raw(note)
        assert seen[0] is not signal.default_int_handler
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler

        def own(number: int, frame: FrameType | None) -> None:
            """Does nothing."""

        signal.signal(signal.SIGINT, own)
        try:
            consumer = ConsumerClient(f"127.0.0.1:{fake.server.port}", "memory://")
            consumer.run_each_chunk_raw(note)
            assert seen[1] is own
            assert signal.getsignal(signal.SIGINT) is own
        finally:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def test_ctrl_c_ends_a_loop_that_cannot_connect() -> None:
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    consumer = ConsumerClient(f"127.0.0.1:{port}", "memory://")
    timer = threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    consumer.run_each_op(lambda op: op)
    timer.join()

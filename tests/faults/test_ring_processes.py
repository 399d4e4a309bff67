"""Rings between real processes: millions of records, and producers killed at any moment."""

import contextlib
import os
import random
import select
import signal
from collections.abc import Callable, Iterator

from opsqueue._speedups.ring import Channel, Endpoint

CAPACITY = 1 << 18
RECORDS = 1_500_000
#: Kinds of the test's records; clear of the fragments' kind.
FIRST_KIND = 1000


@contextlib.contextmanager
def forked(child: Callable[[], None]) -> Iterator[int]:
    """A child process that is gone at the end, whatever the test did; a failure in it shows in its exit status."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            child()
            status = 0
        finally:
            os._exit(status)
    try:
        yield pid
    finally:
        with contextlib.suppress(ProcessLookupError, ChildProcessError):  # the test has waited for it
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def wait_for_signal(fd: int) -> None:
    """Until the other side signals; a lost wake-up shows as a time-out."""
    ready, _, _ = select.select([fd], [], [], 30)
    assert ready, "the other side never signalled"
    os.eventfd_read(fd)


def connect(endpoint: Endpoint) -> None:
    while not endpoint.connected:
        endpoint.poll()
        if not endpoint.connected:
            wait_for_signal(endpoint.own_wake)


def payloads(seed: int) -> Callable[[], bytes]:
    """An endless, reproducible sequence of payloads of 0 to 3,000 bytes, mostly small."""
    source = random.Random(seed)
    pool = [source.randbytes(source.choice((0, 1, 7, 8, 9, 40, 200, 3000))) for _ in range(997)]
    choose = source.random
    return lambda: pool[int(choose() * 997)]


def send_all(channel: Channel, seed: int, count: int) -> None:
    endpoint = channel.frontend_end()
    connect(endpoint)
    following = payloads(seed)
    sent = 0
    payload = following()
    while sent < count:
        if endpoint.send(FIRST_KIND + (sent & 0xFFF), payload):
            sent += 1
            payload = following()
            if sent % 64 == 0:
                endpoint.publish()
        else:
            endpoint.publish()
            os.sched_yield()
    endpoint.publish()


def test_millions_of_records_of_random_sizes_arrive_in_order_and_unchanged() -> None:
    channel = Channel(CAPACITY)
    with forked(lambda: send_all(channel, 11, RECORDS)) as pid:
        endpoint = channel.writer_end()
        connect(endpoint)
        following = payloads(11)
        received = 0
        while received < RECORDS:
            record = endpoint.get()
            if record is None:
                endpoint.release()
                if endpoint.prepare_to_sleep():
                    wait_for_signal(endpoint.own_wake)
                continue
            assert record == (FIRST_KIND + (received & 0xFFF), following())
            received += 1
            if received % 256 == 0:
                endpoint.release()
        assert os.waitpid(pid, 0)[1] == 0


def receive_and_kill(endpoint: Endpoint, pid: int, seed: int, stop_after: int) -> int:
    """Take records, kill the producer at the `stop_after`th, take what it had published; how many came, all checked."""
    following = payloads(seed)
    received = 0
    killed = False
    while True:
        record = endpoint.get()
        if record is not None:
            assert record == (FIRST_KIND + (received & 0xFFF), following())
            received += 1
            if received == stop_after:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                killed = True
            continue
        endpoint.release()
        if killed:
            return received
        endpoint.poll()
        if endpoint.prepare_to_sleep():
            wait_for_signal(endpoint.own_wake)


def test_a_producer_killed_in_mid_write_leaves_whole_records_and_its_successor_starts_clean() -> None:
    channel = Channel(CAPACITY)
    endpoint = channel.writer_end()
    source = random.Random(5)
    for generation in range(60):
        with forked(lambda seed=generation: send_all(channel, seed, 1 << 40)) as pid:
            while not endpoint.poll() & 1:
                wait_for_signal(endpoint.own_wake)
            stop_after = source.randrange(1, 3000)
            assert receive_and_kill(endpoint, pid, generation, stop_after) >= stop_after

"""The consumer's loop when something goes wrong between a chunk's reservation and its report."""

from __future__ import annotations

import gc
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from opsqueue.client.in_hand import InHand
from opsqueue.client.session import Arrival
from opsqueue.client.store import Store
from opsqueue.consumer import ConsumerClient, Strategy, chunk_context
from opsqueue.producer import ProducerClient, SubmissionStatus
from tests.conftest import ServerFactory
from tests.support.server import Server, wait_until


@contextmanager
def running(client: ConsumerClient, target: threading.Thread) -> Iterator[None]:
    target.start()
    try:
        yield
    finally:
        client.stop()
        target.join(30)
        assert not target.is_alive()
        client.inner.close()


def test_what_a_callback_returns_after_it_was_told_of_an_expiry_is_no_result(
    server_factory: ServerFactory, store_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(InHand, "extend", lambda _self: None)  # as with a server that does not offer it
    server = server_factory(reservation_expiration="1 second")
    producer = ProducerClient(server.address, store_url)
    consumer = ConsumerClient(server.address, store_url)
    tries: list[int] = []

    def square(number: int) -> int | None:
        tries.append(number)
        if len(tries) == 1:
            wait_until(lambda: chunk_context().cancelled, "the reservation expires")
            return None
        return number * number

    with running(consumer, threading.Thread(target=consumer.run_each_op, args=(square,))):
        assert list(producer.run_submission([7], chunk_size=1)) == [49]
    assert tries == [7, 7]


def test_a_run_that_fails_after_its_chunk_expired_and_came_again_does_not_fail_the_new_run(
    server_factory: ServerFactory, store_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(InHand, "extend", lambda _self: None)  # as with a server that does not offer it
    server = server_factory(reservation_expiration="1 second", max_chunk_retries=2)
    producer = ProducerClient(server.address, store_url)
    consumer = ConsumerClient(server.address, store_url)  # one connection, two loops
    tries: list[int] = []
    reasons: list[str | None] = []
    failed = threading.Event()

    def square(number: int) -> int:
        tries.append(number)
        if len(tries) == 1:
            wait_until(lambda: len(tries) > 1, "it came again")
            reasons.append(chunk_context().reason)
            failed.set()
            raise ValueError("too late")
        assert failed.wait(10)
        reasons.append(chunk_context().reason)
        return number * number

    target = threading.Thread(target=consumer.run_each_op, args=(square,))
    with running(consumer, target), running(consumer, threading.Thread(target=consumer.run_each_op, args=(square,))):
        assert list(producer.run_submission([7], chunk_size=1)) == [49]
    assert tries == [7, 7]
    assert reasons == ["expired", None]


def test_a_direct_result_that_no_message_can_hold_fails_its_submission_and_nothing_else(
    server_factory: ServerFactory, store_url: str
) -> None:
    server = server_factory(max_chunk_retries=0)
    producer = ProducerClient(server.address, store_url)
    consumer = ConsumerClient(server.address, store_url)
    large = producer.inner.insert_submission_direct([b"large"])
    small = producer.inner.insert_submission_direct([b"small"])

    def answer(chunk: object) -> bytes:
        return bytes(70 * 1024 * 1024) if getattr(chunk, "input_content", b"") == b"large" else b"ok"

    target = threading.Thread(target=consumer.run_each_chunk_raw, args=(answer,))
    with running(consumer, target):
        wait_until(lambda: ended(producer, small) and ended(producer, large), "both have ended", within=60)
    status = producer.get_submission_status(large)
    assert isinstance(status, SubmissionStatus.Failed)
    assert "the result has 73400320 bytes" in status.chunk.failure
    assert isinstance(producer.get_submission_status(small), SubmissionStatus.Completed)


def ended(producer: ProducerClient, submission: object) -> bool:
    status = producer.get_submission_status(submission)  # type: ignore[arg-type]
    return not isinstance(status, SubmissionStatus.InProgress)


def test_a_result_that_was_stored_when_the_server_restarted_is_reported_before_the_loop_ends(
    server: Server, store_url: str
) -> None:
    producer = ProducerClient(server.address, store_url)
    consumer = ConsumerClient(server.address, store_url)
    submission = producer.insert_submission([7], chunk_size=1)
    begun, go_on = threading.Event(), threading.Event()
    calls: Counter[int] = Counter()

    def slow(number: int) -> int:
        calls[number] += 1
        begun.set()
        assert go_on.wait(30)
        return number

    with running(consumer, threading.Thread(target=consumer.run_each_op, args=(slow,))):
        assert begun.wait(30)
        server.restart()
        wait_until(lambda: not consumer.inner.is_connected, "the connection is known to be lost")
        consumer.stop()
        go_on.set()
    assert isinstance(producer.get_submission_status(submission), SubmissionStatus.Completed)
    assert calls == {7: 1}


def test_chunks_are_kept_and_results_reported_while_the_loop_waits_for_a_download(
    server_factory: ServerFactory, store_url: str
) -> None:
    server = server_factory(reservation_expiration="2 seconds", max_chunk_retries=0)
    producer = ProducerClient(server.address, store_url)
    consumer = ConsumerClient(server.address, store_url)
    go_on = threading.Event()
    store = SlowStore(consumer.inner._store, "/20-in.bin", go_on)
    consumer.inner._store = store
    called: list[int] = []

    def note(number: int) -> int:
        called.append(number)
        return number

    def done() -> int:
        status = producer.get_submission_status(submission)
        assert isinstance(status, SubmissionStatus.InProgress)
        return status.submission.chunks_done

    def all_is_reported_but_the_one_in_hand() -> bool:
        return server.metric("opsqueue_chunks_reserved") == 1 and done() == len(called)

    target = threading.Thread(target=consumer.run_each_op, args=(note,), kwargs={"strategy": Strategy.Oldest()})
    with running(consumer, target):
        submission = producer.insert_submission(range(40), chunk_size=1)
        assert store.begun.wait(30)
        # what was reserved ahead goes back
        wait_until(all_is_reported_but_the_one_in_hand, "the loop waits for the download")
        # longer than a reservation: it is extended
        assert not go_on.wait(3)
        assert all_is_reported_but_the_one_in_hand()
        assert 20 not in called
        go_on.set()
        wait_until(lambda: ended(producer, submission), "it has ended", within=30)
    assert isinstance(producer.get_submission_status(submission), SubmissionStatus.Completed)
    assert server.metric("opsqueue_chunks_expired_total") == 0


class SlowStore:
    """A store in which one object takes until it is told to go on."""

    def __init__(self, store: Store, ending: str, go_on: threading.Event) -> None:
        self._store = store
        self._ending = ending
        self._go_on = go_on
        self.begun = threading.Event()

    def put(self, path: str, data: bytes) -> None:
        self._store.put(path, data)

    def get(self, path: str) -> bytes:
        if path.endswith(self._ending):
            self.begun.set()
            assert self._go_on.wait(30)
        return self._store.get(path)

    def is_quick(self, _size: int) -> bool:
        return False


def arrivals() -> list[Arrival]:
    return [each for each in gc.get_objects() if isinstance(each, Arrival)]


def test_what_was_worked_on_is_freed_at_once(server: Server, store_url: str) -> None:
    consumer = ConsumerClient(server.address, store_url)
    alive: list[int] = []

    def count(number: int) -> int:
        if number == 49:
            alive.append(len(arrivals()) - others)
        return number

    gc.collect()
    others = len(arrivals())  # of loops of other tests
    gc.disable()
    try:
        target = threading.Thread(target=consumer.run_each_op, args=(count,), kwargs={"strategy": Strategy.Oldest()})
        with running(consumer, target):
            results = ProducerClient(server.address, store_url).run_submission(range(50), chunk_size=1)
            assert list(results) == list(range(50))
    finally:
        gc.enable()
    assert alive[0] <= 2

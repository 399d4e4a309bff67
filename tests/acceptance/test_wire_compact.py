"""The compact messages (docs/protocol.md) over raw sockets: packed reports and replies, credits, and all else too."""

from __future__ import annotations

import contextlib
import random
import threading
from pathlib import Path
from typing import Any

import cbor2
import pytest

from opsqueue.consumer import ConsumerClient, Strategy
from opsqueue.producer import ProducerClient
from opsqueue.protocol.packed import pack_indexes, unpack_indexes, unpack_numbers
from tests.acceptance.conftest import Serve, Wire
from tests.conftest import ServerFactory
from tests.support.raw_consumer import ChunkId, EndedError, RawConsumer, chunk_id, frame
from tests.support.raw_producer import RawProducer
from tests.support.server import wait_until

FEATURES = "compact, dropped, refusal, release, extend, retry-later, clean-close, fail-submission"
MIB = 1024 * 1024


class Credit:
    """A credit of a raw consumer, and what came on it."""

    def __init__(self, consumer: RawConsumer, chunks: int, strategy: Any = "Oldest", nonce: int = 1000) -> None:
        self._consumer = consumer
        self.nonce = nonce
        #: Submissions that were described, by id; chunks in their order; retries and inputs of each.
        self.described: list[dict[str, Any]] = []
        self.got: list[ChunkId] = []
        self.retries: dict[ChunkId, int] = {}
        self.inputs: dict[ChunkId, bytes | None] = {}
        self.sizes: list[int] = []
        self.notices: list[dict[str, Any]] = []
        #: What was left of it, once it has ended; why it was refused.
        self.left: int | None = None
        self.refused: str | None = None
        consumer.send(consumer.message({"OpenCredit": {"chunks": chunks, "strategy": strategy}}, nonce))

    def add(self, chunks: int) -> None:
        self._consumer.say({"AddCredit": {"credit": self.nonce, "chunks": chunks}})

    def withdraw(self) -> int:
        """Ends it; what was left."""
        self._consumer.say({"WithdrawCredit": {"credit": self.nonce}})
        while self.left is None:
            self.hear()
        return self.left

    def hear(self) -> None:
        """The next message."""
        message = self._consumer.receive()
        if "Async" in message:
            self.notices.append(message["Async"])
            return
        if message["Sync"]["nonce"] != self.nonce:
            assert message["Sync"]["nonce"] not in self._consumer.answers
            self._consumer.answers[message["Sync"]["nonce"]] = message["Sync"]["contents"]
            return
        [(name, body)] = message["Sync"]["contents"].items()
        assert self.left is None, "nothing comes after the end of a credit"
        if name == "CreditWithdrawn":
            self.left = body["left"]
        elif name == "ReservationRefused":
            self.refused = body["reason"]
        else:
            assert name == "PackedChunks"
            self.sizes.append(sum(self.take(group) for group in body))

    def take(self, group: list[Any]) -> int:
        """One group of a reply; how many chunks."""
        submission, _done, packed, retries, inputs = group
        if isinstance(submission, dict):
            self.described.append(submission)
            self._consumer.described.append(submission)
            submission = submission["id"]
        assert submission in [each["id"] for each in self._consumer.described]
        chunks = unpack_indexes(packed, "chunks")
        counts = unpack_numbers(retries, "retries") if retries is not None else (0,) * len(chunks)
        contents = inputs if inputs is not None else [None] * len(chunks)
        for chunk, count, content in zip(chunks, counts, contents, strict=True):
            self.got.append((submission, chunk))
            self.retries[submission, chunk] = count
            self.inputs[submission, chunk] = content
        return len(chunks)

    def settle(self) -> None:
        """As the consumer's, with chunks of this credit in between."""
        nonce = self._consumer.ask(0)
        while nonce not in self._consumer.answers:
            self.hear()

    def wait_for(self, count: int) -> list[ChunkId]:
        """The first `count` chunks, once they have come."""
        while len(self.got) < count:
            self.hear()
        return self.got[:count]


def report(*reports: tuple[int, list[int], Any]) -> dict[str, Any]:
    wired = [[submission, pack_indexes(chunks), outcome] for submission, chunks, outcome in reports]
    return {"ReportChunks": {"reports": wired}}


def packed_answer(consumer: RawConsumer, nonce: int) -> Credit:
    """A request's answer, read as a credit's is."""
    contents = consumer.answer(nonce)
    assert list(contents) == ["PackedChunks"], contents
    read = Credit.__new__(Credit)
    read._consumer = consumer
    read.described, read.got, read.retries, read.inputs = [], [], {}, {}
    for group in contents["PackedChunks"]:
        read.take(group)
    return read


# --- offered and agreed ---


def test_a_peer_that_did_not_offer_it_never_sees_it(wire: Wire) -> None:
    submission = wire.producer.insert(3)
    assert "features" not in wire.consumer().init
    assert wire.consumer("release, dropped").init["features"] == ["dropped", "release"]
    for consumer in (wire.consumer(), wire.consumer("release")):
        assert consumer.reserve_ids() in ([(submission, 0)], [(submission, 1)])
    for contents in (
        report((submission, [0], None)),
        {"OpenCredit": {"chunks": 1, "strategy": "Oldest"}},
        {"AddCredit": {"credit": 0, "chunks": 1}},
        {"WithdrawCredit": {"credit": 0}},
    ):
        consumer = wire.consumer("release")
        consumer.say(contents)
        assert consumer.end() == (1008, f"{next(iter(contents))} needs the feature compact, which was not agreed")


def test_a_request_is_answered_in_the_packed_form_with_one_description(wire: Wire) -> None:
    submission = wire.producer.insert(10, strategic_metadata={"company": 7}, chunk_size=3)
    consumer = wire.consumer(FEATURES)
    first = packed_answer(consumer, consumer.ask(4))
    assert first.got == [(submission, chunk) for chunk in range(4)]
    [described] = first.described
    _, status = wire.producer.status(submission)
    assert {key: described[key] for key in status} == status
    assert list(described) == [
        "id", "prefix", "chunks_total", "chunks_done", "chunk_size", "metadata", "strategic_metadata",
        "otel_trace_carrier",
    ]  # fmt: skip
    nonce = consumer.ask(4)
    [[known, done, *_]] = consumer.answer(nonce)["PackedChunks"]
    assert (known, done) == (submission, 0)
    assert consumer.answer(consumer.ask(0)) == {"ChunksReserved": {"Err": []}}


# --- reports ---


def test_many_completions_and_failures_travel_in_one_message(serve: Serve) -> None:
    wire = serve(max_chunk_retries=3)
    first, second = wire.producer.insert(100), wire.producer.insert(50)
    consumer = wire.consumer(FEATURES)
    packed_answer(consumer, consumer.ask(150))
    consumer.say(
        report(
            (first, [*range(0, 60), 99, 80, 70], None),
            (second, [0, 49], "no"),
            (second, list(range(1, 49)), None),
            (first, [61], "neither"),
        )
    )
    consumer.settle()
    assert wire.producer.chunks_done(first) == 63
    assert wire.producer.chunks_done(second) == 48
    assert wire.producer.metric("opsqueue_chunks_reserved") == 150 - 63 - 48 - 3
    again = packed_answer(consumer, consumer.ask(10))
    assert again.retries == {(first, 61): 1, (second, 0): 1, (second, 49): 1}


def test_a_chunk_that_fails_too_often_in_reports_fails_its_submission_with_the_text(serve: Serve) -> None:
    wire = serve(max_chunk_retries=2)
    submission = wire.producer.insert(3)
    consumer = wire.consumer(FEATURES)
    for attempt in range(2):
        packed_answer(consumer, consumer.ask(1, "Newest"))
        consumer.say(report((submission, [2], f"attempt {attempt}: ünïcode")))
    wire.producer.wait_for_state(submission, "Failed")
    failure = wire.producer.failure(submission)
    assert (failure["chunk_index"], failure["failure"]) == (2, "attempt 1: ünïcode")


def test_a_report_comes_before_the_request_behind_it(wire: Wire) -> None:
    submission = wire.producer.insert(4)
    consumer = wire.consumer(FEATURES)
    packed_answer(consumer, consumer.ask(4))
    nonce = consumer._nonce + 1
    consumer.say(report((submission, [3, 1], "again")), {"WantToReserveChunks": {"max": 9, "strategy": "Oldest"}})
    assert packed_answer(consumer, nonce).got == [(submission, 1), (submission, 3)]


def test_direct_chunks_carry_inputs_and_outputs(wire: Wire) -> None:
    inputs = [b"first", b"", b"third" * 1000]
    submission = wire.producer.insert_direct(inputs)
    consumer = wire.consumer(FEATURES)
    got = packed_answer(consumer, consumer.ask(3))
    assert [got.inputs[submission, chunk] for chunk in range(3)] == inputs
    outputs = [bytes([chunk]) * 3000 * chunk for chunk in range(3)]
    consumer.say(report((submission, [2, 0, 1], [outputs[2], outputs[0], outputs[1]])))
    wire.producer.wait_for_state(submission, "Completed")
    for chunk in range(3):
        assert wire.producer.output(submission, chunk) == (200, outputs[chunk])


def test_outputs_larger_than_the_ring_arrive_whole_in_one_report(wire: Wire) -> None:
    submission = wire.producer.insert_direct([b"in"] * 3)
    consumer = wire.consumer(FEATURES)
    packed_answer(consumer, consumer.ask(3))
    outputs = [bytes([65 + chunk]) * (4 * MIB + chunk) for chunk in range(3)]
    consumer.say(report((submission, [0, 1, 2], outputs)))
    wire.producer.wait_for_state(submission, "Completed")
    for chunk in range(3):
        assert wire.producer.output(submission, chunk) == (200, outputs[chunk])


def test_a_chunk_counts_once_however_often_it_is_reported(wire: Wire) -> None:
    submission = wire.producer.insert(10)
    consumer, other = wire.consumer(FEATURES), wire.consumer()
    packed_answer(consumer, consumer.ask(10))
    before = wire.producer.metric("opsqueue_completions_ignored_total")
    consumer.say(report((submission, [1, 1, 2], None), (submission, [1, 2**63 - 1], None), (7, [1], None)))
    other.complete((submission, 2))
    consumer.settle()
    other.settle()
    assert wire.producer.chunks_done(submission) == 2
    assert wire.producer.metric("opsqueue_completions_ignored_total") == before + 5


def test_failures_of_chunks_that_are_not_held_are_ignored(wire: Wire) -> None:
    submission = wire.producer.insert(2)
    holder, other = wire.consumer(), wire.consumer(FEATURES)
    holder.reserve_ids(2)
    other.say(report((submission, [0, 1], "not mine")))
    other.settle()
    assert wire.producer.metric("opsqueue_chunks_reserved") == 2


# --- credit ---


def test_chunks_come_as_they_become_available_until_the_credit_is_used(wire: Wire) -> None:
    consumer = wire.consumer(FEATURES)
    credit = Credit(consumer, 5)
    wire.producer.wait_for_parked(1)
    first = wire.producer.insert(3)
    assert credit.wait_for(3) == [(first, 0), (first, 1), (first, 2)]
    second = wire.producer.insert(4)
    assert credit.wait_for(5)[3:] == [(second, 0), (second, 1)]
    consumer.settle()
    assert wire.producer.metric("opsqueue_chunks_reserved") == 5
    credit.add(1)
    assert credit.wait_for(6)[5:] == [(second, 2)]
    assert [each["id"] for each in credit.described] == [first, second]
    assert credit.withdraw() == 0


def test_a_withdrawn_credit_ends_with_what_was_left_and_nothing_follows(wire: Wire) -> None:
    consumer = wire.consumer(FEATURES)
    credit = Credit(consumer, 5000)
    submission = wire.producer.insert(130)
    credit.wait_for(130)
    assert credit.withdraw() == 5000 - 130
    late = wire.producer.insert(1)
    consumer.settle()
    wire.producer.wait_for_parked(0)
    assert wire.consumer().reserve_ids() == [(late, 0)]
    # The name is free again.
    again = Credit(consumer, 1, nonce=credit.nonce)
    consumer.say(report((submission, [129], "again")))
    assert again.wait_for(1) == [(submission, 129)]
    assert again.retries[submission, 129] == 1


@pytest.mark.parametrize("count", [1, 63, 1000, 3000])
def test_withdrawing_while_chunks_flow_loses_none(wire: Wire, count: int) -> None:
    submission = wire.producer.insert(count + 200)
    consumer = wire.consumer(FEATURES)
    credit = Credit(consumer, count)
    left = credit.withdraw()
    assert len(credit.got) == count - left
    assert wire.producer.metric("opsqueue_chunks_reserved") == len(credit.got)
    assert credit.got == [(submission, chunk) for chunk in range(len(credit.got))]


def test_several_credits_of_one_connection_have_strategies_of_their_own(wire: Wire) -> None:
    submission = wire.producer.insert(10)
    consumer = wire.consumer(FEATURES)
    oldest = Credit(consumer, 2)
    assert oldest.wait_for(2) == [(submission, 0), (submission, 1)]
    newest = Credit(consumer, 2, "Newest", nonce=2000)
    assert newest.wait_for(2) == [(submission, 9), (submission, 8)]
    oldest.add(1)
    assert oldest.wait_for(3)[2:] == [(submission, 2)]


def test_a_credit_that_can_never_be_served_is_refused(wire: Wire) -> None:
    consumer = wire.consumer(FEATURES)
    credit = Credit(consumer, 2, "Fastest")
    credit.add(3)
    credit.hear()
    assert "strategy" in (credit.refused or "")
    submission = wire.producer.insert(1)
    assert packed_answer(consumer, consumer.ask()).got == [(submission, 0)]
    without = wire.consumer("compact")
    Credit(without, 2, "Fastest")
    assert without.end()[0] == 1008


def test_a_large_credit_takes_turns_with_those_who_wait(wire: Wire) -> None:
    greedy, other, reference = wire.consumer(FEATURES), wire.consumer(FEATURES), wire.consumer()
    hoard = Credit(greedy, 60_000)
    wire.producer.wait_for_parked(1)
    modest = Credit(other, 100)
    wire.producer.wait_for_parked(2)
    nonce = reference.ask(10)
    wire.producer.wait_for_parked(3)
    submission = wire.producer.insert(64 + 64 + 10 + 64 + 36 + 30)
    assert modest.wait_for(100)[:64] == [(submission, chunk) for chunk in range(64, 128)]
    assert [reserved.id for reserved in reference.chunks(nonce)] == [(submission, 128 + at) for at in range(10)]
    assert hoard.wait_for(64 + 64 + 30)[:65] == [(submission, chunk) for chunk in [*range(64), 138]]
    assert hoard.sizes == [64, 64, 30]


def test_consumers_with_credits_and_consumers_of_the_reference_share_a_submission(wire: Wire) -> None:
    compact, reference = wire.consumer(FEATURES), wire.consumer()
    submission = wire.producer.insert(500)
    credit = Credit(compact, 40)
    seen = 0
    for turn in range(9):
        if turn < 8:
            reference.complete(*reference.reserve_ids(20))
        else:
            credit.add(60)
        some = [chunk for _, chunk in credit.wait_for(seen + (30 if turn < 8 else 100))[seen:]]
        seen += len(some)
        compact.say(report((submission, some, None)))
        credit.add(30 if turn < 8 else 0)
    reference.settle()
    wire.producer.wait_for_state(submission, "Completed")
    assert len(set(credit.got)) == len(credit.got) == 340


class Worker:
    """A consumer whose credit grows, shrinks and ends at random; it knows which chunks are its own."""

    def __init__(self, wire: Wire, source: random.Random) -> None:
        self._wire = wire
        self._source = source
        self._names = 1000
        self.done: set[ChunkId] = set()
        self.begin()

    def begin(self) -> None:
        self.consumer = self._wire.consumer(FEATURES)
        self.held: list[ChunkId] = []
        self.open()

    def open(self) -> None:
        self._names += 1
        strategy = self._source.choice(["Oldest", "Newest", "Random"])
        self.credit = Credit(self.consumer, self._source.randrange(200), strategy, nonce=self._names)

    def listen(self) -> None:
        """Take what has come; `withdraw` and this are the only places where chunks become its own."""
        self.credit.settle()
        self.take()

    def take(self) -> None:
        self.held += self.credit.got
        self.credit.got = []

    def end_some(self) -> None:
        """Report some of its chunks, or give them back."""
        count = self._source.randrange(len(self.held) + 1)
        self._source.shuffle(self.held)
        some, self.held = self.held[:count], self.held[count:]
        done = self._source.random() < 0.6
        if done:
            self.done.update(some)
        elif some and self._source.random() < 0.5:
            for chunk in some:
                self.consumer.about("ReleaseChunk", chunk)
            return
        for at in range(0, len(some), 50):
            self.consumer.say(
                report(*((number, [chunk], None if done else "again") for number, chunk in some[at : at + 50]))
            )

    def step(self) -> None:
        choice = self._source.random()
        if choice < 0.4:
            self.end_some()
        elif choice < 0.7:
            self.credit.add(self._source.randrange(1, 100))
        elif choice < 0.9:
            self.credit.withdraw()
            self.take()
            self.open()
        elif choice < 0.94:
            self.consumer.drop()
            self.begin()
        self.listen()


@pytest.mark.parametrize("seed", range(4))
def test_whatever_consumers_do_with_their_credits_no_chunk_has_two_holders_and_none_is_lost(
    serve: Serve, seed: int
) -> None:
    wire = serve(max_chunk_retries=1_000_000)
    source = random.Random(seed)
    sizes = [source.randrange(1, 400) for _ in range(5)]
    submissions = [wire.producer.insert(size) for size in sizes]
    every = {(number, chunk) for number, size in zip(submissions, sizes, strict=True) for chunk in range(size)}
    workers = [Worker(wire, source) for _ in range(3)]
    for _ in range(150):
        source.choice(workers).step()
        held = [chunk for worker in workers for chunk in worker.held]
        assert len(held) == len(set(held))
    for worker in workers:
        worker.credit.withdraw()
        worker.take()
    done = set().union(*(worker.done for worker in workers))
    assert done <= every
    held = [chunk for worker in workers for chunk in worker.held]
    assert len(held) == len(set(held))
    assert not done & set(held)
    for worker in workers:
        worker.consumer.drop()
    left = every - done
    with RawConsumer(wire.server.port, FEATURES) as last:
        credit = Credit(last, len(left))
        assert set(credit.wait_for(len(left))) == left
        last.say(report(*((number, [chunk], None) for number, chunk in left)))
        credit.settle()
    for number in submissions:
        wire.producer.wait_for_state(number, "Completed")


# --- the other rules of reservations ---


def test_an_ended_connection_frees_its_chunks_and_its_credit(wire: Wire) -> None:
    for leave in (RawConsumer.drop, RawConsumer.reset, RawConsumer.close):
        submission = wire.producer.insert(10)
        consumer = wire.consumer(FEATURES)
        Credit(consumer, 100).wait_for(10)
        with contextlib.suppress(EndedError):
            leave(consumer)
        wire.producer.wait_for_metric("opsqueue_consumers_connected", 0)
        wire.producer.wait_for_parked(0)
        other = wire.consumer()
        assert other.reserve_ids(20) == [(submission, chunk) for chunk in range(10)]
        other.complete(*[(submission, chunk) for chunk in range(10)])
        other.close()
        wire.producer.wait_for_metric("opsqueue_consumers_connected", 0)


def test_an_expired_chunk_of_a_credit_is_told_and_comes_again_with_its_retry(serve: Serve) -> None:
    wire = serve(reservation_expiration="300ms")
    submission = wire.producer.insert(1)
    consumer = wire.consumer(FEATURES)
    credit = Credit(consumer, 2)
    credit.wait_for(2)
    assert credit.got == [(submission, 0)] * 2
    assert credit.notices[0] == {"ChunkDropped": {**chunk_id((submission, 0)), "reason": "expired"}}
    assert credit.retries[submission, 0] == 1


def test_the_other_extensions_go_on_beside_it(wire: Wire) -> None:
    submission = wire.producer.insert(4)
    consumer = wire.consumer(FEATURES)
    credit = Credit(consumer, 4)
    credit.wait_for(4)
    consumer.about("WorkingOn", (submission, 0))
    consumer.about("ExtendReservation", (submission, 0))
    consumer.about("ReleaseChunk", (submission, 1))
    consumer.about("RetryLater", (submission, 2), delay_ms=1)
    credit.add(2)
    assert sorted(credit.wait_for(6)[4:]) == [(submission, 1), (submission, 2)]
    assert credit.retries[submission, 1] == credit.retries[submission, 2] == 0
    consumer.complete((submission, 0))
    consumer.about("FailSubmission", (submission, 3), reason="enough")
    wire.producer.wait_for_state(submission, "Failed")


def test_held_chunks_of_a_cancelled_submission_are_dropped_and_its_credit_lives(wire: Wire) -> None:
    submission = wire.producer.insert(2)
    consumer = wire.consumer(FEATURES)
    credit = Credit(consumer, 3)
    credit.wait_for(2)
    wire.producer.cancel(submission)
    while len(credit.notices) < 2:
        credit.hear()
    consumer.say(report((submission, [0, 1], None)))
    other = wire.producer.insert(1)
    assert credit.wait_for(3)[2:] == [(other, 0)]


# --- bounds ---


def test_a_consumer_that_does_not_read_is_not_served_more(wire: Wire) -> None:
    total = 200
    wire.producer.insert_direct([bytes(40_000)] * total)
    wire.producer.insert(60_000)
    stuck = wire.consumer(FEATURES, receive_buffer=65536)
    credit = Credit(stuck, 60_000)
    other = wire.consumer()
    # Everything that is still to be had, while the one that does not read holds what it got.
    wait_until(lambda: wire.producer.metric("opsqueue_chunks_reserved") >= total, "its chunks are under way")
    got = 0
    while got < 58_000:
        ids = other.reserve_ids(1000)
        other.complete(*ids)
        got += len(ids)
    most = total + 1024 + 64
    wait_until(lambda: wire.producer.metric("opsqueue_chunks_reserved") <= most, "only the stuck one holds some")
    left = credit.withdraw()
    assert len(credit.got) == 60_000 - left


def test_a_reply_holds_8_mib_and_the_rest_of_a_credit_follows(serve: Serve) -> None:
    wire = serve(max_body_size="64 MiB")
    submission = wire.producer.insert_direct([bytes(3 * MIB)] * 5)
    consumer = wire.consumer(FEATURES)
    credit = Credit(consumer, 5)
    credit.wait_for(5)
    assert sorted(credit.got) == [(submission, chunk) for chunk in range(5)]
    assert max(credit.sizes) <= 2
    assert credit.withdraw() == 0


@pytest.mark.parametrize(
    ("contents", "code"),
    [
        (report((1, [1], None)) | {"x": 1}, 1007),
        ({"ReportChunks": {"reports": [[1, b"\x80", None]]}}, 1007),
        ({"ReportChunks": {"reports": [[1, b"\x01" + b"\xff" * 8 + b"\x3f", None]]}}, 1007),
        ({"ReportChunks": {"reports": [[1, b"\x01\x01", [b""]]]}}, 1007),
        ({"ReportChunks": {}}, 1007),
        ({"OpenCredit": {"chunks": -1, "strategy": "Oldest"}}, 1007),
        ({"OpenCredit": {"chunks": 65537, "strategy": "Oldest"}}, 1008),
        ({"AddCredit": {"credit": "0", "chunks": 1}}, 1007),
        ({"WithdrawCredit": {}}, 1007),
    ],
    ids=lambda value: "" if isinstance(value, int) else repr(value)[:40],
)
def test_hostile_messages_close_with_a_reason_and_free_what_was_held(wire: Wire, contents: Any, code: int) -> None:
    submission = wire.producer.insert(3)
    hostile, other = wire.consumer(FEATURES), wire.consumer()
    Credit(hostile, 3).wait_for(3)
    nonce = other.ask(3)
    wire.producer.wait_for_parked(1)
    hostile.send(frame(cbor2.dumps({"nonce": 5, "contents": contents})))
    ended, reason = hostile.end()
    assert ended == code
    assert reason
    assert [reserved.id for reserved in other.chunks(nonce)] == [(submission, chunk) for chunk in range(3)]


# --- processes that die ---


@pytest.mark.parametrize("role", ["writer", "frontend"])
def test_a_killed_process_ends_its_credits_and_a_new_connection_gets_the_chunks(
    server_factory: ServerFactory, role: str
) -> None:
    server = server_factory(frontends=1)
    with RawProducer(server.port) as producer:
        submission = producer.insert(2000)
    done: set[int] = set()
    for _ in range(3):
        with RawConsumer(server.port, FEATURES) as consumer:
            credit = Credit(consumer, 600)
            credit.wait_for(400)
            some = [chunk for _, chunk in credit.got[:200]]
            consumer.say(report((submission, some, None)))
            credit.settle()
            with RawProducer(server.port) as producer:
                # What a status shows has been committed.
                wait_until(lambda: producer.chunks_done(submission) >= len(done) + 200, "they are done")
            done.update(some)
            server.wait_for_replacement(role, of=server.kill_child(role))
            with contextlib.suppress(EndedError, ConnectionResetError):
                while True:
                    consumer.receive()
        server.wait_until_healthy()
    with RawConsumer(server.port, FEATURES) as consumer, RawProducer(server.port) as producer:
        credit = Credit(consumer, 2000 - len(done))
        left = {chunk for _, chunk in credit.wait_for(2000 - len(done))}
        assert left == set(range(2000)) - done
        consumer.say(report((submission, sorted(left), None)))
        wait_until(lambda: producer.state(submission) == "Completed", "all are done")


# --- our client ---


def test_our_client_and_a_raw_consumer_of_the_reference_share_a_submission(wire: Wire, tmp_path: Path) -> None:
    store = f"file://{tmp_path}"
    producer = ProducerClient(wire.server.address, store)
    reference = wire.consumer()
    numbers = list(range(400))
    submission = producer.insert_submission(numbers, chunk_size=4)
    stolen = reference.reserve_ids(7, "Newest")
    # Reserved and let go: the client gets them, with a retry each, when they have failed here.
    for chunk in stolen:
        reference.fail(chunk, "not for me")
    reference.settle()
    consumer = ConsumerClient(wire.server.address, store)
    seen: list[int] = []

    def work() -> None:
        def callback(number: int) -> int:
            seen.append(number)
            if len(seen) == len(numbers):
                raise KeyboardInterrupt
            return number * 2

        consumer.run_each_op(callback, strategy=Strategy.Oldest())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(60)
    assert not thread.is_alive()
    assert sorted(seen) == numbers
    again = ConsumerClient(wire.server.address, store)
    [last] = again.reserve_chunks(10)
    assert last.submission_prefix is not None
    again.complete_chunk(last.submission_id, last.submission_prefix, last.chunk_index, last.input_content)
    wire.producer.wait_for_state(submission.id, "Completed")


def test_our_client_gets_retries_and_metadata_in_the_packed_form(wire: Wire, tmp_path: Path) -> None:
    store = f"file://{tmp_path}"
    producer = ProducerClient(wire.server.address, store)
    submission = producer.insert_submission_chunks([b"a", b"b", b"c"], metadata=b"about")
    consumer = ConsumerClient(wire.server.address, store)
    first = consumer.reserve_chunks(3, Strategy.Oldest())
    assert [chunk.retries for chunk in first] == [0, 0, 0]
    consumer.fail_chunk(submission, first[1].submission_prefix, first[1].chunk_index, "no")
    [again] = consumer.reserve_chunks(3)
    assert (again.retries, again.submission_metadata, again.input_content) == (1, b"about", b"b")
    assert again.submission_prefix == first[0].submission_prefix
    for chunk in (first[0], again, first[2]):
        consumer.complete_chunk(chunk.submission_id, chunk.submission_prefix, chunk.chunk_index, b"out")
    wire.producer.wait_for_state(submission.id, "Completed")

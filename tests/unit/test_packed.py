"""The compact messages' bytes: packed indexes, reports and replies, as docs/protocol.md has them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import cbor2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opsqueue._speedups import compact as speedups
from opsqueue.protocol import consumer, packed
from opsqueue.protocol import strategy as strategies
from opsqueue.protocol.consumer import ClientMessage, PackedChunks, PackedGroup, ReportChunks, decode_client
from opsqueue.protocol.errors import MessageError
from opsqueue.protocol.packed import Report, pack_indexes, pack_numbers, unpack_indexes, unpack_numbers
from tests.integration.standin_writer import (
    CREDIT,
    CREDIT_ADD,
    CREDIT_OPEN,
    CREDIT_WITHDRAW,
    ON_CREDIT,
    REPORT,
    RESERVED,
    RUN_FAILED,
    RUN_HAS_OUTPUT,
    WITHDRAWN,
    Record,
    Run,
    a_submission,
    description_of,
    reserved,
    withdrawn,
)
from tests.unit.consumer_feed import Feed, frame

COMPACT = 255
VECTORS = [
    json.loads(line) for line in (Path(__file__).parent.parent / "vectors" / "compact.jsonl").read_text().splitlines()
]
FROM_CONSUMERS = [vector for vector in VECTORS if vector["direction"] == "consumer to server"]
FROM_SERVERS = [vector for vector in VECTORS if vector["direction"] == "server to consumer"]
REPORTS = [vector for vector in FROM_CONSUMERS if vector["name"].startswith("report")]
PACKED = [vector for vector in FROM_SERVERS if vector["name"].startswith("packed")]
S = 7530361328473473024

indexes = st.integers(0, 2**63 - 1) | st.integers(0, 300)


def _named(vectors: list[dict[str, Any]]) -> Any:
    return pytest.mark.parametrize("vector", vectors, ids=[vector["name"] for vector in vectors])


def refuse(message: bytes) -> Any:
    raise AssertionError(f"went to the general decoder: {message.hex()}")


@pytest.fixture(scope="module")
def hot() -> Iterator[Feed]:
    feed = Feed(features=COMPACT, decode=refuse)
    yield feed
    feed.close()


@pytest.fixture(scope="module")
def feed() -> Iterator[Feed]:
    feed = Feed(features=COMPACT)
    yield feed
    feed.close()


# --- vectors ---


def as_json(value: Any) -> Any:
    """The CBOR of a vector in the form of its `value`."""
    if isinstance(value, bytes):
        return {"bytes": value.hex()}
    if isinstance(value, dict):
        return {key: as_json(item) for key, item in value.items()}
    return [as_json(item) for item in value] if isinstance(value, list) else value


@_named(VECTORS)
def test_a_vector_is_the_cbor_of_its_value(vector: dict[str, Any]) -> None:
    assert as_json(cbor2.loads(bytes.fromhex(vector["hex"]))) == vector["value"]


@_named(FROM_CONSUMERS)
def test_a_consumers_vector_is_read_and_written_byte_for_byte(vector: dict[str, Any]) -> None:
    data = bytes.fromhex(vector["hex"])
    assert consumer.encode_client(decode_client(data)) == data


@_named(FROM_SERVERS)
def test_a_servers_vector_is_read_and_written_byte_for_byte(vector: dict[str, Any]) -> None:
    data = bytes.fromhex(vector["hex"])
    assert consumer.encode_server(consumer.decode_server(data)) == data


def meaning(report: Report) -> list[Any]:
    said: list[Any] = ["failed" if isinstance(report.outcome, str) else "done", report.submission_id]
    said.append(list(report.chunks))
    if isinstance(report.outcome, tuple):
        said.append([output.hex() for output in report.outcome])
    elif report.outcome is not None:
        said.append(report.outcome)
    return said


@_named(REPORTS)
def test_a_report_means_what_its_vector_says(vector: dict[str, Any]) -> None:
    contents = decode_client(bytes.fromhex(vector["hex"])).contents
    assert isinstance(contents, ReportChunks)
    assert [meaning(report) for report in contents.reports] == vector["meaning"]


@_named(PACKED)
def test_packed_chunks_mean_what_their_vector_says(vector: dict[str, Any]) -> None:
    message = consumer.decode_server(bytes.fromhex(vector["hex"]))
    assert isinstance(message, PackedChunks)
    for group, said in zip(message.groups, vector["meaning"], strict=True):
        submission = group.submission if isinstance(group.submission, int) else group.submission.id
        assert submission == said["submission"]
        assert (not isinstance(group.submission, int)) == said["described"]
        assert group.chunks_done == said["chunks_done"]
        assert list(group.chunks) == said["chunks"]
        assert list(group.retries) == said["retries"]
        assert (group.inputs and [content.hex() for content in group.inputs]) == said["inputs"]


@_named(REPORTS)
def test_a_reports_vector_takes_the_hot_path_to_its_record(hot: Feed, vector: dict[str, Any]) -> None:
    data = bytes.fromhex(vector["hex"])
    hot.receive(frame(data))
    assert hot.records() == expected(decode_client(data), hot.connection.number)


def test_a_credits_messages_take_the_hot_path_to_their_records() -> None:
    feed = Feed(features=COMPACT, decode=refuse)
    by_name = {vector["name"]: frame(bytes.fromhex(vector["hex"])) for vector in FROM_CONSUMERS}
    number = feed.connection.number
    feed.receive(by_name["open_credit"])
    assert feed.records() == [Record(CREDIT, number, nonce=0, argument=CREDIT_OPEN, max=256, tail=b"O")]
    feed.receive(by_name["open_credit_prefer_distinct"])
    [record] = feed.records()
    assert record.tail == strategies.canonical(strategies.PreferDistinct("company", strategies.Random()))
    feed.receive(by_name["add_credit"])
    assert feed.records() == [Record(CREDIT, number, nonce=0, argument=CREDIT_ADD, max=64)]
    feed.receive(by_name["withdraw_credit"])
    assert feed.records() == [Record(CREDIT, number, nonce=0, argument=CREDIT_WITHDRAW)]
    feed.frames()
    feed.hub.handle_record(WITHDRAWN, withdrawn(number, 0, 192))
    [answer] = feed.frames()
    [said] = [vector for vector in FROM_SERVERS if vector["name"] == "credit_withdrawn"]
    assert answer.payload.hex() == said["hex"]
    feed.close()


@_named(PACKED)
def test_a_packed_vector_is_what_the_server_writes(vector: dict[str, Any]) -> None:
    message = consumer.decode_server(bytes.fromhex(vector["hex"]))
    assert isinstance(message, PackedChunks)
    described = {S: a_submission(S)}
    inputs: dict[tuple[int, int], bytes] = {}
    chunks = []
    known = []
    for group in message.groups:
        if isinstance(group.submission, int):
            number = group.submission
            known.append(number)
        else:
            number = group.submission.id
            described[number] = group.submission
        for at, chunk in enumerate(group.chunks):
            if group.inputs is not None:
                inputs[number, chunk] = group.inputs[at]
            chunks.append((number, chunk, group.chunks_done, group.retries[at], 0 if group.inputs is None else 2))
    feed = Feed(
        features=COMPACT,
        describe=lambda number: description_of(described[number]),
        direct_input=lambda number, chunk: inputs.get((number, chunk)),
    )
    for nonce, some in ((999, [(number, 0, 0, 0, 0) for number in known]), (message.nonce, chunks)):
        if some:
            ask(feed, nonce)
            feed.frames()
            feed.hub.handle_record(RESERVED, reserved(feed.connection.number, nonce, *some))
    assert feed.frames()[-1].payload.hex() == vector["hex"]
    feed.close()


def ask(feed: Feed, nonce: int) -> None:
    contents = {"WantToReserveChunks": {"max": 4096, "strategy": "Oldest"}}
    feed.receive(frame(cbor2.dumps({"nonce": nonce, "contents": contents})))


# --- round trips ---


def runs_of(chunks: tuple[int, ...]) -> list[tuple[int, int]]:
    """(first, count) of the runs that the indexes are packed into."""
    runs: list[tuple[int, int]] = []
    for chunk in chunks:
        if runs and chunk == sum(runs[-1]):
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((chunk, 1))
    return runs


def expected(message: ClientMessage, connection: int) -> list[Record]:
    """What a report becomes on the ring."""
    contents = message.contents
    assert isinstance(contents, ReportChunks)
    runs: list[Run] = []
    for report in contents.reports:
        if isinstance(report.outcome, tuple):
            pairs = zip(report.chunks, report.outcome, strict=True)
            runs += [Run(report.submission_id, chunk, 1, RUN_HAS_OUTPUT, output) for chunk, output in pairs]
            continue
        flags = RUN_FAILED if report.outcome is not None else 0
        tail = (report.outcome or "").encode()
        runs += [Run(report.submission_id, first, count, flags, tail) for first, count in runs_of(report.chunks)]
    if not runs:
        return []
    return [Record(REPORT, connection, max=sum(run.count for run in runs), runs=tuple(runs))]


@given(st.lists(st.integers(0, 2**64 - 1)))
def test_numbers_come_back(numbers: list[int]) -> None:
    assert unpack_numbers(pack_numbers(numbers), "here") == tuple(numbers)


@st.composite
def some_indexes(draw: st.DrawFn) -> tuple[int, ...]:
    chunks: list[int] = []
    for first, more in draw(st.lists(st.tuples(indexes, st.integers(0, 200)), max_size=8)):
        chunks.extend(range(first, min(first + more, 2**63 - 1) + 1))
    return tuple(chunks)


@given(some_indexes())
def test_indexes_come_back_in_their_order(chunks: tuple[int, ...]) -> None:
    assert unpack_indexes(pack_indexes(chunks), "here") == chunks


@st.composite
def some_reports(draw: st.DrawFn) -> tuple[Report, ...]:
    reports = []
    for chunks in draw(st.lists(some_indexes(), max_size=2)):
        outputs = st.lists(st.binary(max_size=30), min_size=len(chunks), max_size=len(chunks)).map(tuple)
        outcome = draw(st.none() | st.text(max_size=30) | outputs)
        reports.append(Report(draw(indexes), chunks, outcome))
    return tuple(reports)


@given(some_reports(), st.integers(0, 2**64 - 1))
@settings(deadline=None)
def test_reports_come_back_and_reach_the_ring(hot: Feed, reports: tuple[Report, ...], nonce: int) -> None:
    message = ClientMessage(nonce, ReportChunks(reports))
    data = consumer.encode_client(message)
    assert decode_client(data) == message
    hot.receive(frame(data))
    assert hot.records() == expected(message, hot.connection.number)


def unusual(value: Any) -> bytes:
    """The same CBOR in indefinite lengths, byte strings as arrays of integers."""
    if isinstance(value, dict):
        return b"\xbf" + b"".join(unusual(key) + unusual(item) for key, item in reversed(value.items())) + b"\xff"
    if isinstance(value, list | bytes):
        return b"\x9f" + b"".join(unusual(item) for item in value) + b"\xff"
    return cbor2.dumps(value)


@given(some_reports())
@settings(deadline=None)
def test_reports_in_unusual_forms_mean_the_same(feed: Feed, reports: tuple[Report, ...]) -> None:
    message = ClientMessage(1, ReportChunks(reports))
    feed.receive(frame(unusual(cbor2.loads(consumer.encode_client(message)))))
    assert feed.records() == expected(message, feed.connection.number)


@st.composite
def some_groups(draw: st.DrawFn) -> tuple[PackedGroup, ...]:
    groups = []
    for chunks in draw(st.lists(some_indexes(), max_size=3)):
        retries = draw(st.lists(st.integers(0, 2**32 - 1), min_size=len(chunks), max_size=len(chunks)).map(tuple))
        inputs = st.lists(st.binary(max_size=9), min_size=len(chunks), max_size=len(chunks)).map(tuple)
        submission = draw(indexes)
        described = draw(st.sampled_from([submission, a_submission(submission)]))
        groups.append(PackedGroup(described, draw(indexes), chunks, retries, draw(st.none() | inputs)))
    return tuple(groups)


@given(some_groups(), st.integers(0, 2**64 - 1))
def test_packed_chunks_come_back(groups: tuple[PackedGroup, ...], nonce: int) -> None:
    message = PackedChunks(nonce, groups)
    assert consumer.decode_server(consumer.encode_server(message)) == message


reserved_chunks = st.lists(
    st.tuples(st.integers(1, 3), indexes, st.integers(0, 5), st.sampled_from([0, 0, 1, 300]), st.just(0)),
    min_size=1,
    max_size=50,
)


@given(reserved_chunks)
@settings(deadline=None)
def test_what_the_server_packs_is_what_was_reserved(chunks: list[tuple[int, int, int, int, int]]) -> None:
    feed = Feed(features=COMPACT, describe=lambda number: description_of(a_submission(number)))
    ask(feed, 7)
    feed.frames()
    feed.hub.handle_record(RESERVED, reserved(feed.connection.number, 7, *chunks))
    [written] = feed.frames()
    message = consumer.decode_server(written.payload)
    assert isinstance(message, PackedChunks)
    assert consumer.encode_server(message) == written.payload
    got = []
    described = set()
    for group in message.groups:
        number = group.submission if isinstance(group.submission, int) else group.submission.id
        assert isinstance(group.submission, int) == (number in described)
        described.add(number)
        got += [(number, *pair) for pair in zip(group.chunks, group.retries, strict=True)]
    assert got == [(number, chunk, retries) for number, chunk, _, retries, _ in chunks]
    feed.close()


def test_neighbouring_groups_are_of_different_submissions() -> None:
    feed = Feed(features=COMPACT, describe=lambda number: description_of(a_submission(number)))
    ask(feed, 7)
    feed.frames()
    chunks = [(number, chunk, 0, 0, 0) for number in (1, 2, 1) for chunk in (0, 1)]
    feed.hub.handle_record(RESERVED, reserved(feed.connection.number, 7, *chunks))
    message: Any = consumer.decode_server(feed.frames()[0].payload)
    assert len(message.groups) == 3
    numbers = [
        group.submission if isinstance(group.submission, int) else group.submission.id for group in message.groups
    ]
    assert all(first != second for first, second in pairwise(numbers))
    feed.close()


# --- descriptions ---


def test_a_description_is_sent_again_once_64_others_were() -> None:
    feed = Feed(features=COMPACT, describe=lambda number: description_of(a_submission(number)))
    number = feed.connection.number

    def described(*submissions: int) -> list[bool]:
        ask(feed, 7)
        feed.frames()
        feed.hub.handle_record(RESERVED, reserved(number, 7, *((each, 0, 0, 0, 0) for each in submissions)))
        message: Any = consumer.decode_server(feed.frames()[0].payload)
        return [not isinstance(group.submission, int) for group in message.groups]

    limit = packed.REMEMBERED_DESCRIPTIONS
    assert described(*range(limit)) == [True] * limit
    assert described(*range(limit)) == [False] * limit
    assert described(1000, 0, 1, 1000) == [True, True, True, False]
    assert described(2, 3) == [True, True]
    assert described(5, 63) == [False, False]
    feed.close()


# --- limits ---


def test_the_limits_of_both_decoders_are_the_same() -> None:
    assert speedups.REPORT_LIMIT == packed.MAX_CHUNKS
    assert speedups.REMEMBERED_DESCRIPTIONS == packed.REMEMBERED_DESCRIPTIONS


def test_as_many_chunks_as_a_report_may_name_reach_the_ring(hot: Feed) -> None:
    for chunks in (tuple(range(4096)), tuple(range(0, 8192, 2))):
        message = ClientMessage(0, ReportChunks((Report(S, chunks[:96]), Report(S, chunks[96:], "no"))))
        hot.receive(frame(consumer.encode_client(message)))
        assert hot.records() == expected(message, hot.connection.number)


def test_a_text_is_cut_and_stands_once_in_the_record() -> None:
    feed = Feed(features=COMPACT, failure_limit=5)
    message = ClientMessage(0, ReportChunks((Report(S, (1, 3, 5), "äöü"),)))
    feed.receive(frame(consumer.encode_client(message)))
    kind, payload = feed.writer.get() or (0, b"")
    assert kind == REPORT
    assert len(payload) == 16 + 3 * 32 + len("äö".encode())
    feed.close()


# --- what is wrong ---

HOSTILE = {
    "a report of two items": [[[S, b"\x02"]], "not 2 items"],
    "no id": [[["x", b"\x02", None]], "id"],
    "an id beyond 63 bits": [[[2**63, b"\x02", None]], "id"],
    "a number without its end": [[[S, b"\x80", None]], "inside a number"],
    "a number beyond 64 bits": [[[S, b"\xff" * 9 + b"\x02", None]], "64 bits"],
    "a number of eleven bytes": [[[S, b"\x80" * 10 + b"\x01", None]], "64 bits"],
    "a run without its length": [[[S, b"\x03", None]], "no more"],
    "a run of no more": [[[S, b"\x03\x00", None]], "no more"],
    "a run beyond the largest index": [[[S, b"\xff" * 9 + b"\x01\x01", None]], "2^63-1"],
    "a run of 2^62 chunks": [[[S, b"\x01" + b"\xff" * 8 + b"\x3f", None]], "4096"],
    "a chunk too many": [[[S, b"\x01\xff\x1f", None], [S, b"\x02", None]], "chunks"],
    "outputs too few": [[[S, b"\x01\x01", [b""]]], "1 outputs for 2 chunks"],
    "an output that is none": [[[S, b"\x02", [None]]], "an output"],
    "an outcome that is none": [[[S, b"\x02", 7]], "outcome"],
    "reports in a map": [{"a": 1}, "array"],
    "more reports than chunks may be named": [[[S, b"", None]] * 4097, "4097 reports"],
    "the second of two": [[[S, b"\x02", None], [S, b"\x80", None]], "reports[1]"],
}


@pytest.mark.parametrize(("reports", "said"), HOSTILE.values(), ids=HOSTILE.keys())
def test_a_malformed_report_closes_with_1007_and_the_reason(reports: Any, said: str) -> None:
    feed = Feed(features=COMPACT)
    data = cbor2.dumps({"nonce": 0, "contents": {"ReportChunks": {"reports": reports}}})
    with pytest.raises(MessageError):
        decode_client(data)
    feed.receive(frame(data))
    [close] = feed.frames()
    assert close.close_code == 1007
    assert said in close.close_reason
    assert [record.kind for record in feed.records()] == [2]
    feed.close()


@given(st.binary(max_size=40))
@settings(deadline=None)
def test_any_bytes_for_indexes_are_read_alike_by_both_decoders(data: bytes) -> None:
    feed = Feed(features=COMPACT)
    message = cbor2.dumps({"nonce": 0, "contents": {"ReportChunks": {"reports": [[S, data, None]]}}})
    feed.receive(frame(message))
    try:
        contents = decode_client(message).contents
    except MessageError:
        assert feed.frames()[-1].close_code == 1007
    else:
        assert isinstance(contents, ReportChunks)
        # Neighbours may come as runs of their own, so chunks are compared, not runs.
        runs = [run for record in feed.records() for run in record.runs]
        assert [chunk for run in runs for chunk in range(run.first, run.first + run.count)] == [
            chunk for each in contents.reports for chunk in each.chunks
        ]
    feed.close()


@pytest.mark.parametrize(
    ("contents", "said"),
    [
        ({"OpenCredit": {"chunks": 65537, "strategy": "Oldest"}}, "65536"),
        ({"AddCredit": {"credit": 0, "chunks": 65537}}, "65536"),
        ({"AddCredit": {"credit": 0, "chunks": 2**64 - 1}}, "65536"),
        ({"AddCredit": {"credit": 0, "chunks": 65500}}, "65536"),
    ],
    ids=["opened", "added", "added far too much", "together"],
)
def test_too_large_a_credit_closes_with_1008_and_the_reason(contents: Any, said: str) -> None:
    feed = Feed(features=COMPACT)
    open_credit(feed, 0, 100)
    feed.frames()
    feed.receive(frame(cbor2.dumps({"nonce": 1, "contents": contents})))
    [close] = feed.frames()
    assert (close.close_code, said in close.close_reason) == (1008, True)
    feed.close()


def open_credit(feed: Feed, nonce: int, chunks: int) -> None:
    contents = {"OpenCredit": {"chunks": chunks, "strategy": "Oldest"}}
    feed.receive(frame(cbor2.dumps({"nonce": nonce, "contents": contents})))


def test_credits_too_many_or_of_one_name_close_with_1008() -> None:
    for nonces in ([3, 3], list(range(speedups.CREDITS_LIMIT + 1))):
        feed = Feed(features=COMPACT)
        for nonce in nonces[:-1]:
            open_credit(feed, nonce, 1)
        assert len(feed.records()) == len(nonces) - 1
        assert feed.frames() == []
        open_credit(feed, nonces[-1], 1)
        assert feed.frames()[0].close_code == 1008
        feed.close()


def test_messages_about_a_credit_that_is_not_open_do_nothing(feed: Feed) -> None:
    for contents in ({"AddCredit": {"credit": 77, "chunks": 1}}, {"WithdrawCredit": {"credit": 77}}):
        feed.receive(frame(cbor2.dumps({"nonce": 1, "contents": contents})))
    assert feed.records() == []
    assert feed.frames() == []


# --- the writer is told of a credit piece by piece ---


def test_the_writer_has_no_more_of_a_credit_than_its_window() -> None:
    feed = Feed(features=COMPACT, describe=lambda number: description_of(a_submission(number)))
    number = feed.connection.number
    open_credit(feed, 5, 5000)
    assert [record.max for record in feed.records()] == [speedups.CREDIT_WINDOW]
    given = 0
    told = speedups.CREDIT_WINDOW
    while given < 5000:
        chunks = [(1, given + each, 0, 0, 0) for each in range(min(64, told - given))]
        given += len(chunks)
        feed.hub.handle_record(RESERVED, reserved(number, 5, *chunks, flags=ON_CREDIT))
        told += sum(record.max for record in feed.records())
        assert given <= told <= given + speedups.CREDIT_WINDOW
    assert told == 5000
    feed.close()


def test_nothing_is_passed_on_while_the_peer_does_not_read() -> None:
    feed = Feed(features=COMPACT, describe=lambda number: description_of(a_submission(number)))
    number = feed.connection.number
    open_credit(feed, 5, 5000)
    feed.records()
    feed.frames()
    feed.connection.pause_writing()
    for at in range(0, speedups.CREDIT_WINDOW, 64):
        chunks = [(1, at + each, 0, 0, 0) for each in range(64)]
        feed.hub.handle_record(RESERVED, reserved(number, 5, *chunks, flags=ON_CREDIT))
    assert feed.records() == []
    assert feed.frames() == []
    feed.connection.resume_writing()
    assert sum(record.max for record in feed.records()) == speedups.CREDIT_WINDOW
    assert len(feed.frames()) == speedups.CREDIT_WINDOW // 64
    feed.close()


def test_what_cannot_be_described_goes_back_and_is_granted_again() -> None:
    known = {1: a_submission(1)}
    feed = Feed(features=COMPACT, describe=lambda number: description_of(known[number]) if number in known else None)
    number = feed.connection.number
    open_credit(feed, 5, 10)
    feed.records()
    feed.frames()
    chunks = [(1, 0, 0, 0, 0), (2, 0, 0, 0, 0), (1, 1, 0, 0, 0)]
    feed.hub.handle_record(RESERVED, reserved(number, 5, *chunks, flags=ON_CREDIT))
    message: Any = consumer.decode_server(feed.frames()[0].payload)
    assert [group.chunks for group in message.groups] == [(0,), (1,)]
    released, granted = feed.records()
    assert (released.submission, released.chunk) == (2, 0)
    assert (granted.argument, granted.max) == (CREDIT_ADD, 1)
    feed.close()

"""The client's side of compact messages: reports grouped in their order, descriptions remembered."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opsqueue.client.compact import Descriptions, grouped
from opsqueue.protocol import consumer as wire
from opsqueue.protocol.consumer import ChunkId, CompleteChunk, FailChunk, PackedGroup, ReportChunks, WorkingOn
from opsqueue.protocol.errors import MessageError
from opsqueue.protocol.packed import MAX_CHUNKS, REMEMBERED_DESCRIPTIONS, Report
from tests.integration.standin_writer import a_submission

ids = st.builds(ChunkId, st.integers(1, 3), st.integers(0, 9))
messages = st.lists(
    st.builds(CompleteChunk, ids, st.none() | st.binary(max_size=3))
    | st.builds(FailChunk, ids, st.sampled_from(["a", "b"]))
    | st.builds(WorkingOn, ids)
)


def taken_apart(message: wire.ClientContents) -> list[wire.ClientContents]:
    if not isinstance(message, ReportChunks):
        return [message]
    apart: list[wire.ClientContents] = []
    for report in message.reports:
        for at, index in enumerate(report.chunks):
            chunk = ChunkId(report.submission_id, index)
            if isinstance(report.outcome, str):
                apart.append(FailChunk(chunk, report.outcome))
            else:
                apart.append(CompleteChunk(chunk, report.outcome[at] if report.outcome is not None else None))
    return apart


@given(messages)
def test_grouped_messages_say_the_same_in_the_same_order(said: list[wire.ClientContents]) -> None:
    together = list(grouped(said))
    assert [each for message in together for each in taken_apart(message)] == said
    for message in together:
        assert wire.decode_client(wire.encode_client(wire.ClientMessage(0, message))).contents == message


def test_a_lone_report_stays_what_it_is() -> None:
    said = [CompleteChunk(ChunkId(1, 1), None), WorkingOn(ChunkId(1, 2)), FailChunk(ChunkId(1, 2), "no")]
    assert list(grouped(said)) == said


def test_completions_of_one_submission_become_one_report() -> None:
    said = [CompleteChunk(ChunkId(1, index), None) for index in range(10)]
    assert list(grouped(said)) == [ReportChunks((Report(1, tuple(range(10))),))]


def test_a_message_holds_no_more_chunks_than_it_may_and_stays_small() -> None:
    many = [CompleteChunk(ChunkId(1, index), None) for index in range(MAX_CHUNKS + 1)]
    assert [len(taken_apart(message)) for message in grouped(many)] == [MAX_CHUNKS, 1]
    large = [CompleteChunk(ChunkId(1, index), bytes(600_000)) for index in range(5)]
    assert [len(taken_apart(message)) for message in grouped(large)] == [2, 2, 1]


def group(submission: wire.Submission | int, done: int = 0) -> PackedGroup:
    return PackedGroup(submission, done, (4, 5), (0, 2), None)


def test_a_known_submission_comes_with_its_description_and_what_is_done_of_it_now() -> None:
    descriptions = Descriptions()
    pairs = descriptions.unpacked([group(a_submission(7), 1), group(7, 2)])
    assert [(chunk.submission_id, chunk.chunk_index, chunk.retries) for chunk, _ in pairs] == [
        (7, 4, 0),
        (7, 5, 2),
        (7, 4, 0),
        (7, 5, 2),
    ]
    assert [submission for _, submission in pairs] == [
        a_submission(7, chunks_done=1),
        a_submission(7, chunks_done=1),
        a_submission(7, chunks_done=2),
        a_submission(7, chunks_done=2),
    ]


def test_inputs_come_with_their_chunks() -> None:
    packed = PackedGroup(a_submission(7, prefix=None), 0, (0, 1), (0, 0), (b"", b"in"))
    assert [chunk.input_content for chunk, _ in Descriptions().unpacked([packed])] == [b"", b"in"]


def test_only_the_descriptions_that_came_last_are_kept() -> None:
    descriptions = Descriptions()
    for number in range(REMEMBERED_DESCRIPTIONS + 1):
        descriptions.unpacked([group(a_submission(number))])
    assert len(descriptions) == REMEMBERED_DESCRIPTIONS
    assert descriptions.unpacked([group(1)])
    with pytest.raises(MessageError, match="submission 0, which was not described"):
        descriptions.unpacked([group(0)])

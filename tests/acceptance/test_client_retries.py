"""The client's lists, retries and pauses against a real server, and against one that has none of them."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from opsqueue.client.listing import SubmissionPage
from opsqueue.common import DEFAULT_SERIALIZATION_FORMAT, decode_chunk, encode_chunk
from opsqueue.consumer import ConsumerClient, Strategy
from opsqueue.exceptions import (
    InternalProducerClientError,
    ServerLacksFeatureError,
    SubmissionEndedError,
    SubmissionFailedError,
    SubmissionNotFoundError,
    SubmissionNotRetryableError,
)
from opsqueue.producer import ProducerClient, SubmissionId, SubmissionStatus
from tests.conftest import ServerFactory
from tests.integration.client_fakes import FakeServer, running
from tests.support.server import Server


@pytest.fixture
def server(server_factory: ServerFactory) -> Server:
    return server_factory(max_chunk_retries=1)


@pytest.fixture
def producer(server: Server, store_url: str) -> ProducerClient:
    return ProducerClient(server.address, store_url)


def consume(server: Server, store_url: str, chunks: int, broken: set[int]) -> list[int]:
    """Square the operations of so many chunks of one operation, oldest first; fail the `broken`; all that came."""
    client = ConsumerClient(server.address, store_url)
    seen: list[int] = []
    for _ in range(chunks):
        [chunk] = client.reserve_chunks(1, Strategy.Oldest())
        [operation] = decode_chunk(chunk.input_content, DEFAULT_SERIALIZATION_FORMAT)
        seen.append(operation)
        about = (chunk.submission_id, chunk.submission_prefix, chunk.chunk_index)
        if operation in broken:
            client.fail_chunk(*about, f"{operation} is broken")
        else:
            client.complete_chunk(*about, encode_chunk([operation**2], DEFAULT_SERIALIZATION_FORMAT))
    return seen


def test_a_failed_submission_is_retried_and_only_what_was_not_done_is_done_again(
    server: Server, store_url: str, producer: ProducerClient
) -> None:
    submission = producer.insert_submission(range(6), chunk_size=1, strategic_metadata={"customer": 3})
    assert consume(server, store_url, 4, broken={3}) == [0, 1, 2, 3]
    with pytest.raises(SubmissionFailedError, match="3 is broken"):
        producer.blocking_stream_completed_submission(submission, timeout=20)

    [failed] = producer.list_submissions("failed", {"customer": 3}).submissions
    assert isinstance(failed, SubmissionStatus.Failed)
    assert failed.submission.id == submission
    again = producer.retry_submission(submission)
    assert again > submission
    assert producer.retry_submission(submission) == again
    status = producer.get_submission_status(again)
    assert isinstance(status, SubmissionStatus.InProgress)
    assert (status.submission.chunks_done, status.submission.prefix) == (3, failed.submission.prefix)

    assert consume(server, store_url, 3, broken=set()) == [3, 4, 5]
    assert list(producer.blocking_stream_completed_submission(again, timeout=20)) == [0, 1, 4, 9, 16, 25]
    assert producer.get_submission_status(submission) == failed
    assert producer.retry_submission(submission) == again, "a completed retry leaves nothing to do"


def test_a_failed_direct_submission_is_retried_with_its_inputs(
    server: Server, store_url: str, producer: ProducerClient
) -> None:
    contents = [encode_chunk([number], DEFAULT_SERIALIZATION_FORMAT) for number in range(3)]
    submission = producer.inner.insert_submission_direct(contents)
    assert consume(server, store_url, 2, broken={1}) == [0, 1]
    with pytest.raises(SubmissionFailedError):
        producer.blocking_stream_completed_submission(submission, timeout=20)
    again = producer.retry_submission(submission)
    assert consume(server, store_url, 2, broken=set()) == [1, 2]
    assert list(producer.blocking_stream_completed_submission(again, timeout=20)) == [0, 1, 4]


def test_pages_are_followed_by_their_cursor(producer: ProducerClient) -> None:
    made = [producer.insert_submission([number], chunk_size=1) for number in range(5)]
    found: list[SubmissionId] = []
    page = producer.list_submissions(limit=2)
    while True:
        found += [
            status.submission.id for status in page.submissions if isinstance(status, SubmissionStatus.InProgress)
        ]
        if page.cursor is None:
            break
        page = producer.list_submissions(limit=2, cursor=page.cursor)
    assert found == made
    assert producer.list_submissions("completed") == SubmissionPage([], None)
    assert pickle.loads(pickle.dumps(page)) == page


def test_what_cannot_be_retried_raises_why(producer: ProducerClient) -> None:
    submission = producer.insert_submission([1], chunk_size=1)
    with pytest.raises(SubmissionNotRetryableError, match="only a failed one") as raised:
        producer.retry_submission(submission)
    assert (raised.value.submission_id, raised.value.state) == (submission.id, "InProgress")
    with pytest.raises(SubmissionNotFoundError):
        producer.retry_submission(SubmissionId(5))
    with pytest.raises(TypeError):
        producer.retry_submission(5)  # type: ignore[arg-type]


def test_pauses_may_be_repeated_until_the_submission_ends(producer: ProducerClient) -> None:
    submission = producer.insert_submission([1], chunk_size=1)
    for _ in range(2):
        producer.pause_submission(submission)
        assert isinstance(producer.get_submission_status(submission), SubmissionStatus.Paused)
    assert [status.submission.id for status in producer.list_submissions("paused").submissions] == [submission]  # type: ignore[attr-defined]
    for _ in range(2):
        producer.unpause_submission(submission)
        assert not isinstance(producer.get_submission_status(submission), SubmissionStatus.Paused)
    producer.cancel_submission(submission)
    with pytest.raises(SubmissionEndedError, match="Cancelled"):
        producer.pause_submission(submission)
    with pytest.raises(SubmissionNotFoundError):
        producer.unpause_submission(SubmissionId(5))


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"state": "Failed"}, "state"),
        ({"limit": 0}, "limit"),
        ({"limit": 1_001}, "limit"),
        ({"cursor": "no cursor"}, "cursor"),
    ],
)
def test_what_cannot_be_listed_is_a_value_error(
    producer: ProducerClient, arguments: dict[str, Any], named: str
) -> None:
    with pytest.raises(ValueError, match=named):
        producer.list_submissions(**arguments)
    with pytest.raises(TypeError):
        producer.list_submissions(strategic_metadata={"a": "b"})  # type: ignore[dict-item]


def test_a_server_without_them_is_named_as_the_reason(tmp_path: Path) -> None:
    async def like_the_reference(request: web.Request) -> web.Response:
        return web.Response(status=405 if request.path == "/producer/submissions" else 404)

    with running(FakeServer(intercept=like_the_reference)) as fake:
        producer = ProducerClient(f"localhost:{fake.server.port}", tmp_path.as_uri())
        calls: list[Callable[[], object]] = [
            producer.list_submissions,
            lambda: producer.retry_submission(SubmissionId(1)),
            lambda: producer.pause_submission(SubmissionId(1)),
            lambda: producer.unpause_submission(SubmissionId(1)),
        ]
        for call in calls:
            with pytest.raises(ServerLacksFeatureError, match="reference implementation") as raised:
                call()
            assert isinstance(raised.value, InternalProducerClientError)

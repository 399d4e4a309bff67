"""The producer's client below serialization: bytes in, bytes out. Knows no operations and opens no span."""

from __future__ import annotations

import asyncio
import threading
import time
import urllib.parse
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TypeVar

import msgspec

from opsqueue.client import convert, listing, upload
from opsqueue.client.done_chunks import DoneChunks
from opsqueue.client.download import PyChunksAsyncIter, PyChunksIter
from opsqueue.client.http import Answer, Failure, HttpClient
from opsqueue.client.ids import new_prefix
from opsqueue.client.pool import Pool
from opsqueue.client.store import StoreError, open_store, output_path
from opsqueue.client.urls import parse_address
from opsqueue.client.values import (
    SubmissionId,
    SubmissionNotCancellable,
    SubmissionStatus,
    SubmissionStatusCompleted,
)
from opsqueue.client.waiting import Waiting
from opsqueue.exceptions import (
    ChunkRetrievalError,
    InternalProducerClientError,
    SubmissionCancelledError,
    SubmissionFailedError,
    SubmissionNotCancellableError,
    SubmissionNotCompletedYetError,
    SubmissionNotFoundError,
    TooManyMatchingSubmissionsError,
)
from opsqueue.protocol import producer as wire
from opsqueue.protocol.errors import ProtocolError

_SUBMISSIONS = "/producer/submissions"
_JSON = {"Content-Type": "application/json"}
_CARRIER_HEADERS = ("traceparent", "tracestate", "baggage")
#: A server that lists this in the header Opsqueue-Features inserts once for one Idempotency-Key.
_IDEMPOTENCY = "idempotency-key"
_POOL_SIZE = 16
#: Waits of coroutines at a time; more of them poll.
_WAITS = 64

T = TypeVar("T")


def _number(submission_id: SubmissionId) -> int:
    if not isinstance(submission_id, SubmissionId):
        raise TypeError(f"submission_id must be a SubmissionId, not {submission_id!r}")
    return submission_id.id


class ProducerClient:
    """Inserts submissions of encoded chunks and gives their encoded results. Thread-safe."""

    def __init__(
        self, address: str, object_store_url: str, object_store_options: Sequence[tuple[str, str]] = []
    ) -> None:
        self._http = HttpClient(parse_address(address))
        self._store = open_store(object_store_url, object_store_options)
        self._pool = Pool(_POOL_SIZE, "opsqueue-producer")
        #: A wait holds its thread, so waits have threads of their own.
        self._wait_pool = Pool(_WAITS, "opsqueue-wait")
        self._free_waits = threading.Semaphore(_WAITS)

    def server_version(self) -> str:
        """The server's version, such as `v0.40.1`."""
        return _expect(self._http.request("GET", "/producer/version"), "the version").text

    def count_submissions(self) -> int:
        """How many submissions are in progress."""
        answer = self._http.request("GET", _SUBMISSIONS + "/count")
        return _decoded(wire.decode_id, _expect(answer, "the count of submissions"))

    def insert_submission_chunks(
        self,
        chunk_contents: Iterator[bytes],
        metadata: bytes | None = None,
        strategic_metadata: dict[str, int] | None = None,
        chunk_size: int | None = None,
        otel_trace_carrier: Mapping[str, str] = {},  # never changed
    ) -> SubmissionId:
        """Stores the chunks, then inserts them as a submission."""
        prefix = new_prefix()
        # checked before anything is uploaded
        body = _body(wire.SeeObjectStorage(prefix, 0), metadata, strategic_metadata, chunk_size)
        count = upload.Upload(self._store, self._pool, prefix).run(chunk_contents)
        return self._insert_stored(prefix, count, body, otel_trace_carrier)

    async def async_insert_submission_chunks(
        self,
        chunk_contents: Iterator[bytes],
        metadata: bytes | None = None,
        strategic_metadata: dict[str, int] | None = None,
        chunk_size: int | None = None,
        otel_trace_carrier: Mapping[str, str] = {},  # never changed
    ) -> SubmissionId:
        """As `insert_submission_chunks`; the chunks are taken on the loop's thread, the network waits elsewhere."""
        prefix = new_prefix()
        body = _body(wire.SeeObjectStorage(prefix, 0), metadata, strategic_metadata, chunk_size)
        count = await upload.Upload(self._store, self._pool, prefix).run_async(chunk_contents)
        return await self._on_thread(lambda: self._insert_stored(prefix, count, body, otel_trace_carrier))

    async def _on_thread(self, call: Callable[[], T]) -> T:
        return await asyncio.wrap_future(self._pool.submit(call))

    def _insert_stored(
        self, prefix: str, count: int, body: wire.InsertSubmission, carrier: Mapping[str, str]
    ) -> SubmissionId:
        contents = wire.TaggedContents(see_object_storage=wire.SeeObjectStorage(prefix, count))
        body = msgspec.structs.replace(body, tagged_contents=contents)

        def look_up_first(_failure: Failure) -> Answer | None:
            # the try that failed may have been heard: another insert must not make a second submission
            known = self.lookup_submission_id_by_prefix(prefix)
            return None if known is None else Answer(200, b"%d" % known.id)

        answer = self._http.request(
            "POST",
            _SUBMISSIONS,
            body=wire.encode(body),
            headers={**_JSON, **_carrier_headers(carrier)},
            before_retry=look_up_first,
        )
        return SubmissionId(_decoded(wire.decode_id, _expect(answer, "the insert")))

    def insert_submission_direct(
        self,
        chunk_contents: Iterable[bytes],
        metadata: bytes | None = None,
        strategic_metadata: dict[str, int] | None = None,
        chunk_size: int | None = None,
        otel_trace_carrier: Mapping[str, str] = {},  # never changed
    ) -> SubmissionId:
        """Inserts a submission whose chunks travel inside the request: for a few small ones."""
        contents: list[list[int] | None] = [list(memoryview(chunk).tobytes()) for chunk in chunk_contents]
        body = _body(wire.Direct(contents), metadata, strategic_metadata, chunk_size)

        def only_if_harmless(failure: Failure) -> Answer | None:
            if failure.arrived and not self._knows_idempotency_keys():
                raise InternalProducerClientError(
                    f"the insert failed, and the submission may have been made or not: {failure.text}; "
                    "it is not tried again, because this server would insert it twice"
                ) from failure.cause
            return None

        answer = self._http.request(
            "POST",
            _SUBMISSIONS,
            body=wire.encode(body),
            headers={**_JSON, "Idempotency-Key": str(uuid.uuid4()), **_carrier_headers(otel_trace_carrier)},
            before_retry=only_if_harmless,
        )
        return SubmissionId(_decoded(wire.decode_id, _expect(answer, "the insert")))

    def _knows_idempotency_keys(self) -> bool:
        answer = self._http.request("GET", "/producer/version")
        listed = answer.headers.get("opsqueue-features", "")
        return _IDEMPOTENCY in [name.strip() for name in listed.split(",")]

    def cancel_submission(self, submission_id: SubmissionId) -> None:
        """Cancels it. Raises SubmissionNotFoundError and SubmissionNotCancellableError."""
        number = _number(submission_id)
        heard = False

        def note(failure: Failure) -> None:
            nonlocal heard
            heard = heard or failure.arrived

        answer = self._http.request("POST", f"{_SUBMISSIONS}/cancel/{number}", before_retry=note)
        if answer.status == 404:
            raise SubmissionNotFoundError(number)
        if answer.status != 409:
            _expect(answer, "the cancellation")
            return
        reason = convert.not_cancellable(_decoded(wire.decode_not_cancellable, answer))
        if heard and isinstance(reason, SubmissionNotCancellable.Cancelled):
            # by the try whose answer was lost
            return
        chunk = reason.chunk if isinstance(reason, SubmissionNotCancellable.Failed) else None
        raise SubmissionNotCancellableError(reason, chunk)

    def get_submission_status(self, submission_id: SubmissionId) -> SubmissionStatus | None:
        """Its status, None when it is unknown."""
        answer = self._http.request("GET", f"{_SUBMISSIONS}/{_number(submission_id)}")
        return _status(answer)

    def lookup_submission_id_by_prefix(self, prefix: str) -> SubmissionId | None:
        """The newest submission with that prefix."""
        quoted = urllib.parse.quote(prefix, safe="")
        if quoted in (".", ".."):
            # a path segment of dots alone would be taken for a relative one
            quoted = quoted.replace(".", "%2E")
        answer = self._http.request("GET", f"{_SUBMISSIONS}/lookup_id_by_prefix/{quoted}")
        found = _decoded(wire.decode_optional_id, _expect(answer, "the lookup by prefix"))
        return None if found is None else SubmissionId(found)

    def lookup_submission_ids_by_strategic_metadata(self, strategic_metadata: dict[str, int]) -> list[SubmissionId]:
        """Those in progress that have all the pairs, ascending. Raises TooManyMatchingSubmissionsError."""
        answer = self._http.request(
            "POST",
            f"{_SUBMISSIONS}/lookup_ids_by_strategic_metadata",
            body=wire.encode(_checked(strategic_metadata)),
            headers=_JSON,
        )
        if answer.status == 400:
            raise TooManyMatchingSubmissionsError(_decoded(wire.decode_id, answer))
        found = _decoded(wire.decode_ids, _expect(answer, "the lookup by strategic metadata"))
        return [SubmissionId(number) for number in found]

    def list_submissions(
        self,
        state: str | None = None,
        strategic_metadata: dict[str, int] | None = None,
        limit: int = listing.DEFAULT_LIMIT,
        cursor: str | None = None,
    ) -> listing.SubmissionPage:
        """Up to `limit` submissions in that state with all the pairs, ascending by id, from where `cursor` says.

        Raises ServerLacksFeatureError, and ValueError for a state, limit or cursor that there is not.
        """
        return listing.list_submissions(self._http, state, _checked(strategic_metadata), limit, cursor)

    def retry_submission(self, submission_id: SubmissionId) -> SubmissionId:
        """Does a failed submission again, without its done chunks, under the id that is returned.

        Raises SubmissionNotFoundError, SubmissionNotRetryableError and ServerLacksFeatureError.
        """
        return listing.retry_submission(self._http, _number(submission_id))

    def pause_submission(self, submission_id: SubmissionId) -> None:
        """Hand out none of its chunks until it is unpaused. Nothing happens when it is paused already.

        Raises SubmissionNotFoundError, SubmissionEndedError and ServerLacksFeatureError.
        """
        self._set_paused(submission_id, True)

    def unpause_submission(self, submission_id: SubmissionId) -> None:
        """The reverse of `pause_submission`; raises the same."""
        self._set_paused(submission_id, False)

    def _set_paused(self, submission_id: SubmissionId, paused: bool) -> None:
        number = _number(submission_id)
        listing.set_paused(self._http, number, paused, lambda: self.get_submission_status(submission_id))

    def is_completed(self, submission_id: SubmissionId) -> bool:
        """Whether it is completed. Raises SubmissionNotFoundError."""
        status = self.get_submission_status(submission_id)
        if status is None:
            raise SubmissionNotFoundError(submission_id.id)
        return isinstance(status, SubmissionStatus.Completed)

    def try_stream_completed_submission_chunks(self, submission_id: SubmissionId) -> PyChunksIter:
        """Its results. Raises SubmissionNotCompletedYetError and SubmissionFailedError."""
        status = self.get_submission_status(submission_id)
        if isinstance(status, SubmissionStatus.Failed):
            raise SubmissionFailedError(status.submission, status.chunk)
        if not isinstance(status, SubmissionStatus.Completed):
            state = "not known to the server" if status is None else type(status).__name__
            raise SubmissionNotCompletedYetError(
                f"submission {submission_id.id} is not completed, it is {state}", submission_id
            )
        return self._results(status)

    def blocking_stream_completed_submission_chunks(
        self, submission_id: SubmissionId, timeout: float | None = None
    ) -> PyChunksIter:
        """Waits for its end, at most `timeout` seconds; then its results.

        Raises TimeoutError, SubmissionFailedError, SubmissionCancelledError and SubmissionNotFoundError.
        """
        waiting = self._waiting(submission_id, timeout)
        while True:
            status = _ended(submission_id, self._status_of(submission_id, waiting))
            if status is not None:
                return self._results(status)
            time.sleep(waiting.pause())

    async def async_stream_completed_submission_chunks(self, submission_id: SubmissionId) -> PyChunksAsyncIter:
        """As `blocking_stream_completed_submission_chunks`, without blocking the event loop."""
        waiting = self._waiting(submission_id, None)
        while True:
            found = await self._status_on_thread(submission_id, waiting)
            status = _ended(submission_id, found)
            if status is not None:
                return PyChunksAsyncIter(*self._result_source(status))
            await asyncio.sleep(waiting.pause())

    async def _status_on_thread(self, submission_id: SubmissionId, waiting: Waiting) -> SubmissionStatus | None:
        """The status, after a wait on a thread of its own; when those are all taken, at once on a common one."""
        if not self._free_waits.acquire(blocking=False):
            return await self._on_thread(lambda: self._status_of(submission_id, waiting, at_once=True))
        future = self._wait_pool.submit(lambda: self._status_of(submission_id, waiting))
        # when the thread is free, not when a cancelled task is
        future.add_done_callback(lambda _: self._free_waits.release())
        return await asyncio.shield(asyncio.wrap_future(future))

    def _status_of(
        self, submission_id: SubmissionId, waiting: Waiting, *, at_once: bool = False
    ) -> SubmissionStatus | None:
        answer = waiting.ask(f"{_SUBMISSIONS}/{_number(submission_id)}", at_once=at_once)
        return _status(answer)

    def _waiting(self, submission_id: SubmissionId, timeout: float | None) -> Waiting:
        return Waiting(self._http, timeout, f"submission {_number(submission_id)} did not end")

    def done_chunks(self, submission_id: SubmissionId) -> DoneChunks:
        """Which of its chunks are done, to be refreshed as often as wanted. Against our own server only."""
        number = _number(submission_id)
        return DoneChunks(number, lambda timeout: Waiting(self._http, timeout, f"submission {number} did not change"))

    def _results(self, status: SubmissionStatusCompleted) -> PyChunksIter:
        return PyChunksIter(*self._result_source(status))

    def _result_source(self, status: SubmissionStatusCompleted) -> tuple[Callable[[int], bytes], int, Pool]:
        submission = status.submission
        store, http, number, prefix = self._store, self._http, submission.id.id, submission.prefix

        def stored(index: int) -> bytes:
            try:
                return store.get(output_path(prefix or "", index))
            except StoreError as error:
                raise ChunkRetrievalError(
                    f"the result of chunk {index} of submission {number} could not be fetched: {error}"
                ) from error

        def direct(index: int) -> bytes:
            try:
                answer = http.request("GET", f"{_SUBMISSIONS}/{number}/chunks/{index}/output")
                return _expect(answer, "the output").body
            except InternalProducerClientError as error:
                raise ChunkRetrievalError(
                    f"the result of chunk {index} of submission {number} could not be fetched: {error}"
                ) from error

        return (direct if prefix is None else stored), submission.chunks_total, self._pool


def _status(answer: Answer) -> SubmissionStatus | None:
    found = _decoded(wire.decode_status, _expect(answer, "the status"))
    return None if found is None else convert.status(found)


def _ended(submission_id: SubmissionId, status: SubmissionStatus | None) -> SubmissionStatusCompleted | None:
    """The status if it is completed, None while it goes on; raises for every other end."""
    if status is None:
        raise SubmissionNotFoundError(submission_id.id)
    if isinstance(status, SubmissionStatus.Failed):
        raise SubmissionFailedError(status.submission, status.chunk)
    if isinstance(status, SubmissionStatus.Cancelled):
        raise SubmissionCancelledError(status.submission)
    return status if isinstance(status, SubmissionStatus.Completed) else None


def _checked(strategic_metadata: dict[str, int] | None) -> dict[str, int]:
    if strategic_metadata is None:
        return {}
    for name, value in strategic_metadata.items():
        if not isinstance(name, str) or not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"strategic_metadata must map str to int, not {name!r} to {value!r}")
        if not -(2**63) <= value < 2**63:
            raise OverflowError(f"strategic_metadata {name!r}: {value} does not fit into 64 bits with a sign")
    return dict(strategic_metadata)


def _body(
    contents: wire.ChunkContents,
    metadata: bytes | None,
    strategic_metadata: dict[str, int] | None,
    chunk_size: int | None,
) -> wire.InsertSubmission:
    return wire.InsertSubmission.of(
        contents,
        metadata=None if metadata is None else memoryview(metadata).tobytes(),
        strategic_metadata=_checked(strategic_metadata),
        chunk_size=chunk_size,
    )


def _carrier_headers(carrier: Mapping[str, str]) -> dict[str, str]:
    return {
        name: value
        for name, value in carrier.items()
        if name in _CARRIER_HEADERS and value.isascii() and value.isprintable()
    }


def _expect(answer: Answer, what: str) -> Answer:
    if answer.status != 200:
        raise InternalProducerClientError(f"the server answered {what} with status {answer.status}: {answer.text}")
    return answer


def _decoded(decode: Callable[[bytes], T], answer: Answer) -> T:
    try:
        return decode(answer.body)
    except ProtocolError as error:
        raise InternalProducerClientError(f"the server's answer cannot be read: {error}") from error

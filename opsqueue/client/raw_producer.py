"""The producer's client below serialization: bytes in, bytes out. Knows no operations and opens no span."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from typing import TypeVar

from opsqueue.client import listing, spans, streaming, upload
from opsqueue.client.bytes_like import BytesLike
from opsqueue.client.done_chunks import COMPLETED, DoneChunks
from opsqueue.client.download import PyChunksAsyncIter, PyChunksIter, Start
from opsqueue.client.exchange import Call
from opsqueue.client.ids import new_prefix
from opsqueue.client.pool import Pool, ready
from opsqueue.client.producer_calls import ProducerCalls, completed_status, insert_body, number_of, submission_of
from opsqueue.client.store import open_store, output_path
from opsqueue.client.store_error import StoreError
from opsqueue.client.urls import parse_address
from opsqueue.client.values import (
    AnySubmission,
    SubmissionCompleted,
    SubmissionId,
    SubmissionStatus,
)
from opsqueue.client.waiting import Waiting
from opsqueue.exceptions import ChunkRetrievalError, InternalProducerClientError, SubmissionNotFoundError
from opsqueue.protocol import producer as wire

_POOL_SIZE = 16
#: Waits of coroutines at a time; more of them poll.
_WAITS = 64

T = TypeVar("T")


class ProducerClient:
    """Inserts submissions of encoded chunks and gives their encoded results. Thread-safe."""

    def __init__(
        self, address: str, object_store_url: str, object_store_options: Sequence[tuple[str, str]] = []
    ) -> None:
        # imported late: half of all that `import opsqueue.producer` would take, and of no use without a client
        from opsqueue.client.http import HttpClient

        server = parse_address(address)
        self.calls = ProducerCalls(server)
        self._http = HttpClient(server)
        self._store = open_store(object_store_url, object_store_options)
        self._pool = Pool(_POOL_SIZE, "opsqueue-producer")
        #: A wait holds its thread, so waits have threads of their own.
        self._wait_pool = Pool(_WAITS, "opsqueue-wait")
        self._free_waits = threading.Semaphore(_WAITS)

    def run(self, call: Call[T]) -> T:
        """The result of one of `calls`, made on this thread."""
        return self._http.run(call)

    def server_version(self) -> str:
        """The server's version, such as `v0.40.1`."""
        return self.run(self.calls.server_version())

    def count_submissions(self) -> int:
        """How many submissions are in progress."""
        return self.run(self.calls.count_submissions())

    def insert_submission_chunks(
        self,
        chunk_contents: Iterator[BytesLike],
        metadata: bytes | None = None,
        strategic_metadata: dict[str, int] | None = None,
        chunk_size: int | None = None,
        otel_trace_carrier: Mapping[str, str] = {},  # never changed
    ) -> SubmissionId:
        """Stores the chunks, then inserts them as a submission. `chunk_size`: operations in each, for people.

        Raises ChunksStorageError; TypeError and OverflowError for metadata that cannot be sent.
        """
        prefix = new_prefix()
        # checked before anything is uploaded
        body = insert_body(wire.SeeObjectStorage(prefix, 0), metadata, strategic_metadata, chunk_size)
        with spans.producing("insert", "send"):
            count = self._upload(prefix, chunk_contents)
            return self.run(self.calls.insert_stored(prefix, count, body, otel_trace_carrier))

    def _upload(self, prefix: str, chunk_contents: Iterable[BytesLike]) -> int:
        with spans.producing("upload", "create"):
            return upload.Upload(self._store, self._pool, prefix).run(chunk_contents)

    def find_or_insert_chunks(
        self,
        chunk_contents: Iterator[BytesLike],
        *,
        key: str | None,
        prefix: str | None,
        metadata: bytes | None = None,
        strategic_metadata: dict[str, int] | None = None,
        chunk_size: int | None = None,
        otel_trace_carrier: Mapping[str, str] = {},  # never changed
    ) -> SubmissionId:
        """The submission in progress or completed that has the key or the prefix; else as `insert_submission_chunks`.

        Raises SubmissionConflictError, ServerLacksFeatureError for a key that the server would not keep, and TypeError
        unless one of the two is given.
        """
        if (key is None) == (prefix is None):
            raise TypeError("give either key or prefix")
        found = self.run(self.calls.find_usable(key, prefix))
        if found is not None:
            return found
        place = new_prefix() if prefix is None else prefix
        body = insert_body(wire.SeeObjectStorage(place, 0), metadata, strategic_metadata, chunk_size)
        with spans.producing("insert", "send"):
            count = self._upload(place, chunk_contents)
            return self.run(self.calls.insert_stored(place, count, body, otel_trace_carrier, key))

    async def async_insert_submission_chunks(
        self,
        chunk_contents: Iterator[BytesLike],
        metadata: bytes | None = None,
        strategic_metadata: dict[str, int] | None = None,
        chunk_size: int | None = None,
        otel_trace_carrier: Mapping[str, str] = {},  # never changed
    ) -> SubmissionId:
        """As `insert_submission_chunks`; the chunks are taken on the loop's thread, the network waits elsewhere."""
        prefix = new_prefix()
        body = insert_body(wire.SeeObjectStorage(prefix, 0), metadata, strategic_metadata, chunk_size)
        with spans.producing("insert", "send"):
            with spans.producing("upload", "create"):
                count = await upload.Upload(self._store, self._pool, prefix).run_async(chunk_contents)
            return await self._on_thread(
                lambda: self.run(self.calls.insert_stored(prefix, count, body, otel_trace_carrier))
            )

    async def _on_thread(self, call: Callable[[], T]) -> T:
        import asyncio  # most programs do without

        return await asyncio.wrap_future(self._pool.submit(call))

    def insert_submission_direct(
        self,
        chunk_contents: Iterable[BytesLike],
        metadata: bytes | None = None,
        strategic_metadata: dict[str, int] | None = None,
        chunk_size: int | None = None,
        otel_trace_carrier: Mapping[str, str] = {},  # never changed
    ) -> SubmissionId:
        """Inserts a submission whose chunks travel inside the request: for a few small ones.

        `chunk_size`: operations in each, for people. Raises TypeError and OverflowError for metadata that cannot be
        sent.
        """
        return self.run(
            self.calls.insert_direct(chunk_contents, metadata, strategic_metadata, chunk_size, otel_trace_carrier)
        )

    def cancel_submission(self, submission_id: SubmissionId) -> None:
        """Cancels it. Raises SubmissionNotFoundError and SubmissionNotCancellableError."""
        self.run(self.calls.cancel_submission(submission_id))

    def get_submission_status(self, submission_id: SubmissionId) -> SubmissionStatus | None:
        """Its status, None when it is unknown."""
        return self.run(self.calls.get_submission_status(submission_id))

    def lookup_submission_id_by_prefix(self, prefix: str) -> SubmissionId | None:
        """The newest submission with that prefix."""
        return self.run(self.calls.lookup_submission_id_by_prefix(prefix))

    def lookup_submission_ids_by_strategic_metadata(self, strategic_metadata: dict[str, int]) -> list[SubmissionId]:
        """Those in progress that have all the pairs, ascending. Raises TooManyMatchingSubmissionsError."""
        return self.run(self.calls.lookup_submission_ids_by_strategic_metadata(strategic_metadata))

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
        return self.run(self.calls.list_submissions(state, strategic_metadata, limit, cursor))

    def retry_submission(self, submission_id: SubmissionId) -> SubmissionId:
        """Does a failed submission again, without its done chunks, under the id that is returned.

        Raises SubmissionNotFoundError, SubmissionNotRetryableError and ServerLacksFeatureError.
        """
        return self.run(self.calls.retry_submission(submission_id))

    def pause_submission(self, submission_id: SubmissionId) -> None:
        """Hand out none of its chunks until it is unpaused. Nothing happens when it is paused already.

        Raises SubmissionNotFoundError, SubmissionEndedError and ServerLacksFeatureError.
        """
        self.run(self.calls.set_paused(submission_id, True))

    def unpause_submission(self, submission_id: SubmissionId) -> None:
        """The reverse of `pause_submission`; raises as `pause_submission` does."""
        self.run(self.calls.set_paused(submission_id, False))

    def is_completed(self, submission_id: SubmissionId) -> bool:
        """Whether it is completed. Raises SubmissionNotFoundError."""
        return self.run(self.calls.is_completed(submission_id))

    def try_stream_completed_submission_chunks(self, submission_id: SubmissionId) -> PyChunksIter:
        """Its results. Raises SubmissionNotCompletedYetError and SubmissionFailedError.

        ChunkRetrievalError comes at a result that is missing.
        """
        return self.results(self.run(self.calls.completed(submission_id)).submission)

    def blocking_stream_completed_submission_chunks(
        self, submission_id: SubmissionId, timeout: float | None = None
    ) -> PyChunksIter:
        """Waits for its end, at most `timeout` seconds; then its results.

        Raises TimeoutError, SubmissionFailedError, SubmissionCancelledError and SubmissionNotFoundError;
        ChunkRetrievalError at a result that is missing.
        """
        return self.results(self.run(self.calls.wait_completed(submission_id, timeout)).submission)

    async def async_stream_completed_submission_chunks(self, submission_id: SubmissionId) -> PyChunksAsyncIter:
        """As `blocking_stream_completed_submission_chunks`, without blocking the event loop."""
        import asyncio

        waiting = self.calls.waiting(submission_id, None)
        while True:
            status = await self._status_on_thread(submission_id, waiting)
            if not isinstance(status, SubmissionStatus.InProgress):
                submission = completed_status(status).submission
                return PyChunksAsyncIter(
                    self.result_source(submission), submission.chunks_total, self._fetching(submission)
                )
            await asyncio.sleep(waiting.pause())

    async def _status_on_thread(self, submission_id: SubmissionId, waiting: Waiting) -> SubmissionStatus:
        """The status, after a wait on a thread of its own; when those are all taken, at once on a common one."""
        import asyncio

        status = self.calls.status_after_wait
        if not self._free_waits.acquire(blocking=False):
            return await self._on_thread(lambda: self.run(status(submission_id, waiting, at_once=True)))
        future = self._wait_pool.submit(lambda: self.run(status(submission_id, waiting)))
        # when the thread is free, not when a cancelled task is
        future.add_done_callback(lambda _: self._free_waits.release())
        return await asyncio.shield(asyncio.wrap_future(future))

    def done_chunks(self, submission_id: SubmissionId) -> DoneChunks:
        """Which of its chunks are done, to be refreshed as often as wanted. Against our own server only."""
        return DoneChunks(
            number_of(submission_id),
            lambda timeout: self.calls.waiting_for_change(submission_id, timeout),
            self.run,
        )

    def results(self, submission: SubmissionCompleted) -> PyChunksIter:
        """The results of a completed submission, in order."""
        return PyChunksIter(self.result_source(submission), submission.chunks_total, self._fetching(submission))

    def _fetching(self, submission: AnySubmission) -> Start:
        """How results are fetched: at once where that takes no time, else on the pool."""
        pool, store, direct = self._pool, self._store, submission.prefix is None

        def start(fetch: Callable[[], bytes]) -> Future[bytes]:
            return ready(fetch) if not direct and store.is_quick(0) else pool.submit(fetch)

        return start

    def result_source(self, submission: AnySubmission) -> Callable[[int], bytes]:
        """A function from a chunk's index to its result. It blocks, and raises ChunkRetrievalError."""
        number, prefix = submission.id.id, submission.prefix
        store, http, calls = self._store, self._http, self.calls

        def fetch(index: int) -> bytes:
            try:
                if prefix is None:
                    return http.run(calls.direct_output(number, index))
                return store.get(output_path(prefix, index))
            except (StoreError, InternalProducerClientError) as error:
                raise ChunkRetrievalError(
                    f"the result of chunk {index} of submission {number} could not be fetched: {error}"
                ) from error

        return fetch

    def stream_submission_chunks(self, submission_id: SubmissionId, *, ordered: bool) -> Iterator[tuple[int, bytes]]:
        """Each chunk's index and result as soon as it is done, in order of the index if `ordered`.

        At the end raises SubmissionFailedError and SubmissionCancelledError; before, SubmissionNotFoundError and
        ChunkRetrievalError.
        """
        view = self.done_chunks(submission_id)
        status = self.get_submission_status(submission_id)
        if status is None:
            raise SubmissionNotFoundError(submission_id.id)
        fetch, start = self.result_source(submission_of(status)), self._fetching(submission_of(status))
        yield from streaming.stream(
            streaming.Finished(view, ordered=ordered),
            lambda: view.refresh(streaming.WAIT_S),
            lambda index: start(partial(fetch, index)),
            lambda: view.ended,
        )
        if view.state != COMPLETED:  # the server may have forgotten a completed one while its results were read
            self.run(self.calls.wait_completed(submission_id))

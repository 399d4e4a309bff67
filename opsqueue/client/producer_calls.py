"""What a producer asks a server, as calls whose steps a driver takes: paths, bodies, what each status means."""

from __future__ import annotations

import operator
import urllib.parse
import uuid
from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

import msgspec

from opsqueue.client import convert, listing, meters
from opsqueue.client.bytes_like import BytesLike, content_of
from opsqueue.client.exchange import Answer, Call, Exchange, Failure, Sleep
from opsqueue.client.urls import ServerAddress
from opsqueue.client.values import (
    AnySubmission,
    SubmissionId,
    SubmissionNotCancellable,
    SubmissionStatus,
    SubmissionStatusCompleted,
)
from opsqueue.client.waiting import Waiting
from opsqueue.exceptions import (
    InternalProducerClientError,
    ServerLacksFeatureError,
    SubmissionCancelledError,
    SubmissionConflictError,
    SubmissionFailedError,
    SubmissionNotCancellableError,
    SubmissionNotCompletedYetError,
    SubmissionNotFoundError,
    TooManyMatchingSubmissionsError,
)
from opsqueue.protocol import producer as wire
from opsqueue.protocol.errors import ProtocolError

SUBMISSIONS = "/producer/submissions"
_JSON = {"Content-Type": "application/json"}
_CARRIER_HEADERS = ("traceparent", "tracestate", "baggage")
#: A server that lists this in the header Opsqueue-Features inserts once for one Idempotency-Key.
IDEMPOTENCY = "idempotency-key"
#: The same for the lookup of a submission by that key.
KEY_LOOKUP = "key-lookup"

T = TypeVar("T")


def number_of(submission_id: SubmissionId) -> int:
    """The number in an id. Raises TypeError for anything else."""
    if not isinstance(submission_id, SubmissionId):
        raise TypeError(f"submission_id must be a SubmissionId, not {submission_id!r}")
    return submission_id.id


class ProducerCalls:
    """The calls to one server. Each raises InternalProducerClientError when the server cannot be reached or read."""

    def __init__(self, address: ServerAddress) -> None:
        self._exchange = Exchange(address)

    def server_version(self, *, deadline: float | None = None) -> Call[str]:
        """The server's version, such as `v0.40.1`. `deadline` as in Exchange.request."""
        answer = yield from self._exchange.request("GET", "/producer/version", deadline=deadline)
        return expect(answer, "the version").text

    def features(self) -> Call[frozenset[str]]:
        """What the server offers producers beyond the reference implementation."""
        answer = yield from self._exchange.request("GET", "/producer/version")
        listed = answer.headers.get("opsqueue-features", "")
        return frozenset(name.strip() for name in listed.split(",") if name.strip())

    def count_submissions(self) -> Call[int]:
        """How many submissions are in progress."""
        answer = yield from self._exchange.request("GET", SUBMISSIONS + "/count")
        return decoded(wire.decode_id, expect(answer, "the count of submissions"))

    def insert_stored(
        self,
        prefix: str,
        count: int,
        body: wire.InsertSubmission,
        carrier: Mapping[str, str],
        key: str | None = None,
    ) -> Call[SubmissionId]:
        """Inserts a submission of `count` chunks that are stored under `prefix`; once for a `key`.

        Raises SubmissionConflictError when another submission with the prefix or the key is in progress.
        """
        contents = wire.TaggedContents(see_object_storage=wire.SeeObjectStorage(prefix, count))
        body = msgspec.structs.replace(body, tagged_contents=contents)

        def look_up_first(_failure: Failure) -> Call[Answer | None]:
            # the try that failed may have been heard: another insert must not make a second submission
            if key is not None:
                # the server itself knows that
                return None
            # not one that failed long ago, which the caller wants to do again
            known = yield from self.find_usable(None, prefix)
            return None if known is None else Answer(200, b"%d" % known.id)

        answer = yield from self._exchange.request(
            "POST",
            SUBMISSIONS,
            body=wire.encode(body),
            headers={**_JSON, **_carrier_headers(carrier), **({} if key is None else {"Idempotency-Key": key})},
            before_retry=look_up_first,
        )
        if answer.status == 409:
            raise SubmissionConflictError(answer.text)
        submission_id = SubmissionId(decoded(wire.decode_id, expect(answer, "the insert")))
        meters.sent(count)
        return submission_id

    def insert_direct(
        self,
        chunk_contents: Iterable[BytesLike],
        metadata: bytes | None,
        strategic_metadata: dict[str, int] | None,
        chunk_size: int | None,
        carrier: Mapping[str, str],
    ) -> Call[SubmissionId]:
        """Inserts a submission whose chunks travel inside the request."""
        contents: list[list[int] | None] = [list(content_of(chunk, "a chunk")) for chunk in chunk_contents]
        body = insert_body(wire.Direct(contents), metadata, strategic_metadata, chunk_size)

        def only_if_harmless(failure: Failure) -> Call[Answer | None]:
            if failure.arrived and IDEMPOTENCY not in (yield from self.features()):
                raise InternalProducerClientError(
                    f"the insert failed, and the submission may have been made or not: {failure.text}; "
                    "it is not tried again, because this server would insert it twice"
                ) from failure.cause
            return None

        answer = yield from self._exchange.request(
            "POST",
            SUBMISSIONS,
            body=wire.encode(body),
            headers={**_JSON, "Idempotency-Key": str(uuid.uuid4()), **_carrier_headers(carrier)},
            before_retry=only_if_harmless,
        )
        return SubmissionId(decoded(wire.decode_id, expect(answer, "the insert")))

    def cancel_submission(self, submission_id: SubmissionId) -> Call[None]:
        """Cancels it. Raises SubmissionNotFoundError and SubmissionNotCancellableError."""
        number = number_of(submission_id)
        heard = False

        def note(failure: Failure) -> Call[Answer | None]:
            nonlocal heard
            heard = heard or failure.arrived
            return None
            yield  # a call without steps

        answer = yield from self._exchange.request("POST", f"{SUBMISSIONS}/cancel/{number}", before_retry=note)
        if answer.status == 404:
            raise SubmissionNotFoundError(number)
        if answer.status != 409:
            expect(answer, "the cancellation")
            return
        reason = convert.not_cancellable(decoded(wire.decode_not_cancellable, answer))
        if heard and isinstance(reason, SubmissionNotCancellable.Cancelled):
            # by the try whose answer was lost
            return
        chunk = reason.chunk if isinstance(reason, SubmissionNotCancellable.Failed) else None
        raise SubmissionNotCancellableError(reason, chunk)

    def get_submission_status(self, submission_id: SubmissionId) -> Call[SubmissionStatus | None]:
        """Its status, None when it is unknown."""
        answer = yield from self._exchange.request("GET", f"{SUBMISSIONS}/{number_of(submission_id)}")
        return _status(answer)

    def lookup_submission_id_by_prefix(
        self, prefix: str, *, deadline: float | None = None
    ) -> Call[SubmissionId | None]:
        """The newest submission with that prefix. `deadline` as in Exchange.request."""
        path = f"{SUBMISSIONS}/lookup_id_by_prefix/{_segment(prefix)}"
        answer = yield from self._exchange.request("GET", path, deadline=deadline)
        found = decoded(wire.decode_optional_id, expect(answer, "the lookup by prefix"))
        return None if found is None else SubmissionId(found)

    def lookup_submission_id_by_key(self, key: str) -> Call[SubmissionId | None]:
        """The newest submission that was inserted with `key`. Raises ServerLacksFeatureError."""
        if KEY_LOOKUP not in (yield from self.features()):
            raise ServerLacksFeatureError(
                "this server does not offer find_or_insert by key; an opsqueue server of this version does, "
                "the reference implementation does not"
            )
        answer = yield from self._exchange.request("GET", f"{SUBMISSIONS}/lookup_id_by_key/{_segment(key)}")
        found = decoded(wire.decode_optional_id, expect(answer, "the lookup by key"))
        return None if found is None else SubmissionId(found)

    def find_usable(self, key: str | None, prefix: str | None) -> Call[SubmissionId | None]:
        """The submission with the key or the prefix that is in progress or completed; None: one has to be inserted."""
        if key is not None:
            found = yield from self.lookup_submission_id_by_key(key)
        else:
            found = yield from self.lookup_submission_id_by_prefix(prefix or "")
        if found is None:
            return None
        status = yield from self.get_submission_status(found)
        usable = isinstance(status, SubmissionStatus.InProgress | SubmissionStatus.Completed)
        return found if usable else None

    def lookup_submission_ids_by_strategic_metadata(
        self, strategic_metadata: dict[str, int]
    ) -> Call[list[SubmissionId]]:
        """Those in progress that have all the pairs, ascending. Raises TooManyMatchingSubmissionsError."""
        answer = yield from self._exchange.request(
            "POST",
            f"{SUBMISSIONS}/lookup_ids_by_strategic_metadata",
            body=wire.encode(checked_metadata(strategic_metadata)),
            headers=_JSON,
        )
        if answer.status == 400:
            raise TooManyMatchingSubmissionsError(decoded(wire.decode_id, answer))
        found = decoded(wire.decode_ids, expect(answer, "the lookup by strategic metadata"))
        return [SubmissionId(number) for number in found]

    def list_submissions(
        self,
        state: str | None = None,
        strategic_metadata: dict[str, int] | None = None,
        limit: int = listing.DEFAULT_LIMIT,
        cursor: str | None = None,
    ) -> Call[listing.SubmissionPage]:
        """One page, ascending by id. Raises ServerLacksFeatureError and ValueError."""
        return listing.list_submissions(self._exchange, state, checked_metadata(strategic_metadata), limit, cursor)

    def retry_submission(self, submission_id: SubmissionId) -> Call[SubmissionId]:
        """Raises SubmissionNotFoundError, SubmissionNotRetryableError and ServerLacksFeatureError."""
        return listing.retry_submission(self._exchange, number_of(submission_id))

    def set_paused(self, submission_id: SubmissionId, paused: bool) -> Call[None]:
        """Raises SubmissionNotFoundError, SubmissionEndedError and ServerLacksFeatureError."""
        number = number_of(submission_id)
        return listing.set_paused(self._exchange, number, paused, lambda: self.get_submission_status(submission_id))

    def is_completed(self, submission_id: SubmissionId) -> Call[bool]:
        """Whether it is completed. Raises SubmissionNotFoundError."""
        status = yield from self.get_submission_status(submission_id)
        if status is None:
            raise SubmissionNotFoundError(submission_id.id)
        return isinstance(status, SubmissionStatus.Completed)

    def completed(self, submission_id: SubmissionId) -> Call[SubmissionStatusCompleted]:
        """Its status, if it is completed. Raises SubmissionNotCompletedYetError and SubmissionFailedError."""
        status = yield from self.get_submission_status(submission_id)
        if isinstance(status, SubmissionStatus.Failed):
            raise SubmissionFailedError(status.submission, status.chunk)
        if not isinstance(status, SubmissionStatus.Completed):
            state = "not known to the server" if status is None else type(status).__name__
            raise SubmissionNotCompletedYetError(
                f"submission {submission_id.id} is not completed, it is {state}", submission_id
            )
        return status

    def wait(self, submission_id: SubmissionId, timeout: float | None = None) -> Call[SubmissionStatus]:
        """Waits for its end, at most `timeout` seconds. Raises TimeoutError and SubmissionNotFoundError."""
        waiting = self.waiting(submission_id, timeout)
        while True:
            status = yield from self.status_after_wait(submission_id, waiting)
            if not isinstance(status, SubmissionStatus.InProgress):
                return status
            yield Sleep(waiting.pause())

    def wait_completed(
        self, submission_id: SubmissionId, timeout: float | None = None
    ) -> Call[SubmissionStatusCompleted]:
        """As `wait`. Raises SubmissionFailedError and SubmissionCancelledError, too."""
        return completed_status((yield from self.wait(submission_id, timeout)))

    def status_after_wait(
        self, submission_id: SubmissionId, waiting: Waiting, *, at_once: bool = False
    ) -> Call[SubmissionStatus]:
        """Its status, after a wait of the server's for its end. Raises SubmissionNotFoundError."""
        answer = yield from waiting.ask(f"{SUBMISSIONS}/{number_of(submission_id)}", at_once=at_once)
        status = _status(answer)
        if status is None:
            raise SubmissionNotFoundError(submission_id.id)
        return status

    def waiting(self, submission_id: SubmissionId, timeout: float | None) -> Waiting:
        """The requests of one wait for its end."""
        return Waiting(self._exchange, timeout, f"submission {number_of(submission_id)} did not end")

    def waiting_for_change(self, submission_id: SubmissionId, timeout: float | None) -> Waiting:
        """The requests of one wait for a change of which chunks are done."""
        return Waiting(self._exchange, timeout, f"submission {number_of(submission_id)} did not change")

    def direct_output(self, number: int, index: int) -> Call[bytes]:
        """The result of a chunk that travelled inside the insert."""
        answer = yield from self._exchange.request("GET", f"{SUBMISSIONS}/{number}/chunks/{index}/output")
        return expect(answer, "the output").body


def completed_status(status: SubmissionStatus) -> SubmissionStatusCompleted:
    """The status of an ended submission if it is completed; raises for every other end."""
    if isinstance(status, SubmissionStatus.Failed):
        raise SubmissionFailedError(status.submission, status.chunk)
    if isinstance(status, SubmissionStatus.Cancelled):
        raise SubmissionCancelledError(status.submission)
    if not isinstance(status, SubmissionStatus.Completed):
        raise TypeError(f"{status!r} is not the status of a submission that has ended")
    return status


def submission_of(status: SubmissionStatus) -> AnySubmission:
    """The submission in a status of any kind."""
    match status:
        case SubmissionStatus.InProgress(submission=going):
            return going
        case SubmissionStatus.Completed(submission=completed):
            return completed
        case SubmissionStatus.Failed(submission=failed):
            return failed
        case SubmissionStatus.Cancelled(submission=cancelled):
            return cancelled
    raise TypeError(f"{status!r} is no status of a submission")


def _status(answer: Answer) -> SubmissionStatus | None:
    found = decoded(wire.decode_status, expect(answer, "the status"))
    return None if found is None else convert.status(found)


def _segment(text: str) -> str:
    """`text` as one segment of a path."""
    quoted = urllib.parse.quote(text, safe="")
    # a path segment of dots alone would be taken for a relative one
    return quoted.replace(".", "%2E") if quoted in (".", "..") else quoted


def checked_metadata(strategic_metadata: dict[str, int] | None) -> dict[str, int]:
    """The same, if it can be sent. Raises TypeError and OverflowError."""
    if strategic_metadata is None:
        return {}
    for name, value in strategic_metadata.items():
        if not isinstance(name, str) or not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"strategic_metadata must map str to int, not {name!r} to {value!r}")
        if not -(2**63) <= value < 2**63:
            raise OverflowError(f"strategic_metadata {name!r}: {value} does not fit into 64 bits with a sign")
    return dict(strategic_metadata)


def insert_body(
    contents: wire.ChunkContents,
    metadata: bytes | None,
    strategic_metadata: dict[str, int] | None,
    chunk_size: int | None,
) -> wire.InsertSubmission:
    """The body of an insert. Raises TypeError and OverflowError for metadata that cannot be sent."""
    encoded = None if metadata is None else content_of(metadata, "metadata")
    try:
        size = None if chunk_size is None else operator.index(chunk_size)
    except TypeError as error:
        raise TypeError(f"chunk_size must be an int, not {chunk_size!r}") from error
    return wire.InsertSubmission.of(
        contents,
        metadata=encoded,
        strategic_metadata=checked_metadata(strategic_metadata),
        chunk_size=size,
    )


def _carrier_headers(carrier: Mapping[str, str]) -> dict[str, str]:
    return {
        name: value
        for name, value in carrier.items()
        if name in _CARRIER_HEADERS and value.isascii() and value.isprintable()
    }


def expect(answer: Answer, what: str) -> Answer:
    """The answer, if its status is 200. Raises InternalProducerClientError."""
    if answer.status != 200:
        raise InternalProducerClientError(f"the server answered {what} with status {answer.status}: {answer.text}")
    return answer


def decoded(decode: Callable[[bytes], T], answer: Answer) -> T:
    """The body as `decode` reads it. Raises InternalProducerClientError."""
    try:
        return decode(answer.body)
    except ProtocolError as error:
        raise InternalProducerClientError(f"the server's answer cannot be read: {error}") from error

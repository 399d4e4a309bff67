"""The producers' endpoints: what is asked of the writer, what is read from the file, and which answer it makes.

Holds no state of submissions. The writer says what is unfinished, the file what has ended; both only what is durable.
"""

from __future__ import annotations

from collections.abc import Iterator

from aiohttp import web

from opsqueue.protocol import producer as wire
from opsqueue.server import requests
from opsqueue.server.frontend import errors, statuses
from opsqueue.server.frontend.answers import Answer, bytes_answer, empty_answer, json_answer, refused
from opsqueue.server.frontend.body import BodyReader
from opsqueue.server.frontend.inserts import InsertLimits, may_repeat, to_request
from opsqueue.server.frontend.lookups import Lookups
from opsqueue.server.frontend.routing import Endpoint
from opsqueue.server.frontend.waits import Waits
from opsqueue.server.frontend.writer_client import WriterClient, WriterRestartedError
from opsqueue.server.reader import SubmissionStatus, TooManyError

#: A submission that ends between the writer's word and the look into the file is asked for again, this often.
ATTEMPTS = 4

_SUBMISSIONS = "/producer/submissions"


class ProducerEndpoints:
    """Handlers of /producer/submissions and below."""

    def __init__(
        self,
        writer: WriterClient,
        lookups: Lookups,
        bodies: BodyReader,
        waits: Waits,
        limits: InsertLimits,
        max_returned: int,
    ) -> None:
        self._writer = writer
        self._waits = waits
        self._lookups = lookups
        self._bodies = bodies
        self._limits = limits
        self._max_returned = max_returned

    def endpoints(self) -> Iterator[Endpoint]:
        yield Endpoint("POST", _SUBMISSIONS, self.insert)
        yield Endpoint("GET", _SUBMISSIONS + "/count", self.count)
        yield Endpoint("GET", _SUBMISSIONS + "/count_completed", self.count_completed)
        yield Endpoint("GET", _SUBMISSIONS + "/{id}", self.status)
        yield Endpoint("POST", _SUBMISSIONS + "/cancel/{id}", self.cancel)
        yield Endpoint("POST", _SUBMISSIONS + "/pause/{id}", self.pause)
        yield Endpoint("POST", _SUBMISSIONS + "/unpause/{id}", self.unpause)
        yield Endpoint("GET", _SUBMISSIONS + "/lookup_id_by_prefix/{prefix}", self.lookup_by_prefix)
        yield Endpoint("GET", _SUBMISSIONS + "/lookup_id_by_key/{key}", self.lookup_by_key)
        yield Endpoint("POST", _SUBMISSIONS + "/lookup_ids_by_strategic_metadata", self.lookup_by_strategic_metadata)
        yield Endpoint("GET", _SUBMISSIONS + "/{id}/chunks/{index}/output", self.output)

    async def insert(self, request: web.BaseRequest) -> Answer:
        """Store a submission; its id, once it is durable."""
        body = await self._bodies.read_json(request, wire.decode_insert)
        insert = to_request(body, request.headers, self._limits)
        match await self._store(insert):
            case requests.Inserted(submission=submission):
                return json_answer(b"%d" % submission)
            case requests.Conflict(submission=submission):
                identity = "this Idempotency-Key" if insert.idempotency_key else f"prefix {insert.prefix!r}"
                raise errors.conflicting_insert(submission, identity)
            case reply:
                raise refused(reply)

    async def _store(self, insert: requests.Insert) -> requests.Reply:
        try:
            return await self._writer.ask(insert)
        except WriterRestartedError:
            if not may_repeat(insert):
                raise
            return await self._writer.ask(insert)

    async def status(self, request: web.BaseRequest, submission: int) -> Answer:
        """The submission's status, `null` when it is unknown; with `?wait=` once it has ended or time is over."""
        wait = self._waits.of(request)
        waiting = wait.asked
        while True:
            body, ended = await self._status(submission)
            if ended or not waiting:
                return wait.mark(json_answer(body))
            waiting = await self._waits.park(request, wait, requests.Watch(submission, None))

    async def _status(self, submission: int) -> tuple[bytes, bool]:
        """The status as JSON, and whether it is one that stays."""
        for _ in range(ATTEMPTS):
            match await self._writer.ask(requests.Status(submission)):
                case requests.Progress() as progress:
                    description = self._lookups.point.description(submission)
                    if description is not None:
                        return statuses.unfinished(submission, description, progress), False
                case requests.NotHeld():
                    row = await self._row(submission)
                    if row is None:
                        return b"null", True
                    if (ended := statuses.ended(row)) is not None:
                        return ended, True
                case reply:
                    raise refused(reply)
        raise _changing(submission)

    async def _row(self, submission: int) -> SubmissionStatus | None:
        return await self._lookups.on_thread(lambda reader: reader.status(submission))

    async def cancel(self, request: web.BaseRequest, submission: int) -> Answer:
        """Cancel an unfinished submission; 404 when it is unknown, 409 with its status when it has ended."""
        for _ in range(ATTEMPTS):
            match await self._writer.ask(requests.Cancel(submission)):
                case requests.Done():
                    return empty_answer()
                case requests.NotHeld():
                    row = await self._row(submission)
                    if row is None:
                        raise errors.unknown_submission(submission)
                    if (ended := statuses.ended(row)) is not None:
                        raise errors.not_cancellable(ended)
                case reply:
                    raise refused(reply)
        raise _changing(submission)

    async def pause(self, request: web.BaseRequest, submission: int) -> Answer:
        """Hand out no more chunks of a submission in progress."""
        return await self._set_paused(submission, True)

    async def unpause(self, request: web.BaseRequest, submission: int) -> Answer:
        """Hand out the chunks of a paused submission again."""
        return await self._set_paused(submission, False)

    async def _set_paused(self, submission: int, paused: bool) -> Answer:
        match await self._writer.ask(requests.Pause(submission, paused)):
            case requests.Done():
                return empty_answer()
            case requests.NotHeld():
                raise errors.unknown_submission(submission)
            case reply:
                raise refused(reply)

    async def count(self, request: web.BaseRequest) -> Answer:
        """Submissions in progress, paused ones included."""
        return json_answer(b"%d" % (await self._counts()).in_progress)

    async def count_completed(self, request: web.BaseRequest) -> Answer:
        """Completed submissions that are not forgotten yet."""
        return json_answer(b"%d" % (await self._counts()).completed)

    async def _counts(self) -> requests.Counted:
        reply = await self._writer.ask(requests.Counts())
        if not isinstance(reply, requests.Counted):
            raise refused(reply)
        return reply

    async def lookup_by_prefix(self, request: web.BaseRequest, prefix: str) -> Answer:
        """The newest submission with this prefix, `null` when there is none."""
        found = await self._lookups.on_thread(lambda reader: reader.lookup_by_prefix(prefix))
        return json_answer(b"null" if found is None else b"%d" % found)

    async def lookup_by_key(self, request: web.BaseRequest, key: str) -> Answer:
        """The newest submission that was inserted with this Idempotency-Key, `null` when there is none."""
        found = await self._lookups.on_thread(lambda reader: reader.lookup_by_key(key))
        return json_answer(b"null" if found is None else b"%d" % found)

    async def lookup_by_strategic_metadata(self, request: web.BaseRequest) -> Answer:
        """Unfinished submissions that have all the given pairs, ascending; 400 with the maximum when there are more."""
        # Producers parse a 400 of this path as the maximum, so malformed JSON is a 422 here.
        pairs = await self._bodies.read_json(request, wire.decode_strategic_metadata, bad_json_is_wrong_shape=True)
        try:
            found = await self._lookups.on_thread(
                lambda reader: reader.lookup_by_strategic_metadata(pairs, self._max_returned)
            )
        except TooManyError:
            raise errors.too_many_matches(self._max_returned) from None
        return json_answer(wire.encode(found))

    async def output(self, request: web.BaseRequest, submission: int, index: int) -> Answer:
        """The output of a done chunk of a direct submission."""
        content = await self._lookups.on_thread(lambda reader: reader.direct_output(submission, index))
        if content is None:
            raise errors.unknown_path()
        return bytes_answer(content)


def _changing(submission: int) -> errors.HttpError:
    return errors.unavailable(f"submission {submission} is changing; try again")

"""POST /producer/submissions/retry/{id}: a failed submission is done again. Decides nothing: the journal does."""

from __future__ import annotations

from collections.abc import Iterator

from aiohttp import web

from opsqueue.protocol.listing import NotRetryable, encode_not_retryable
from opsqueue.server import requests
from opsqueue.server.frontend import errors
from opsqueue.server.frontend.answers import Answer, json_answer, refused
from opsqueue.server.frontend.inserts import InsertLimits, check_count
from opsqueue.server.frontend.lookups import Lookups
from opsqueue.server.frontend.routing import Endpoint
from opsqueue.server.frontend.statuses import STATE_NAMES
from opsqueue.server.frontend.writer_client import WriterClient, WriterRestartedError
from opsqueue.server.writer.batch import State

_WORDS = {
    State.IN_PROGRESS: "is in progress",
    State.PAUSED: "is paused",
    State.COMPLETED: "is completed",
    State.CANCELLED: "was cancelled",
}


class RetryEndpoints:
    """Handler of retries."""

    def __init__(self, writer: WriterClient, lookups: Lookups, limits: InsertLimits) -> None:
        self._writer = writer
        self._lookups = lookups
        self._limits = limits

    def endpoints(self) -> Iterator[Endpoint]:
        yield Endpoint("POST", "/producer/submissions/retry/{id}", self.retry)

    async def retry(self, request: web.BaseRequest, submission: int) -> Answer:
        """The id of the submission that does it again, once that is durable; 404 when unknown, 409 when not failed."""
        description = self._lookups.point.description(submission)
        if description is None:
            raise errors.unknown_submission(submission)
        check_count(description.chunks_total, self._limits)
        match await self._ask(requests.Retry(submission, description.chunks_total)):
            case requests.Inserted(submission=retry):
                return json_answer(b"%d" % retry)
            case requests.NotHeld():
                raise errors.unknown_submission(submission)
            case requests.NotRetryable() as reply:
                raise errors.not_retryable(encode_not_retryable(_refusal(submission, reply)))
            case reply:
                raise refused(reply)

    async def _ask(self, retry: requests.Retry) -> requests.Reply:
        try:
            return await self._writer.ask(retry)
        except WriterRestartedError:
            return await self._writer.ask(retry)  # one that was stored is found again


def _refusal(submission: int, reply: requests.NotRetryable) -> NotRetryable:
    state = State(reply.state)
    if state is not State.FAILED:
        reason = f"submission {submission} {_WORDS[state]}; only a failed one can be retried"
    elif reply.conflict is not None:
        reason = (
            f"submission {reply.conflict}, which is unfinished, has the same prefix or Idempotency-Key as submission "
            f"{submission}; wait for it, or cancel it"
        )
    else:
        reason = (
            f"which chunks of submission {submission} are done is no longer known, because it is being forgotten "
            "(--max-submission-age); insert it again"
        )
    return NotRetryable(submission, STATE_NAMES[state], reason)

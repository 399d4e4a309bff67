"""Lists of submissions, retries of failed ones, and pauses: the requests of a producer that only our own server knows.

Each raises ServerLacksFeatureError against a server without them, such as the reference implementation.
"""

from __future__ import annotations

import operator
import urllib.parse
from collections.abc import Callable, Mapping
from typing import Final, TypeVar

import msgspec

from opsqueue.client import convert
from opsqueue.client.exchange import Answer, Call, Exchange
from opsqueue.client.values import SubmissionId, SubmissionStatus
from opsqueue.exceptions import (
    InternalProducerClientError,
    ServerLacksFeatureError,
    SubmissionEndedError,
    SubmissionNotFoundError,
    SubmissionNotRetryableError,
)
from opsqueue.protocol import listing as wire
from opsqueue.protocol.errors import ProtocolError
from opsqueue.protocol.listing import DEFAULT_LIMIT
from opsqueue.protocol.producer import decode_id

__all__ = ["DEFAULT_LIMIT", "SubmissionPage", "list_submissions", "retry_submission", "set_paused"]

_SUBMISSIONS: Final = "/producer/submissions"
#: The states by which submissions can be listed.
STATES: Final = ("in_progress", "paused", "completed", "failed", "cancelled")

T = TypeVar("T")


class SubmissionPage(msgspec.Struct, frozen=True):
    """Some submissions: `submissions`, ascending by id. `cursor` gives the next ones; None: there are no more.

    A page with few submissions, or none, may have a cursor: the server looks at a bounded number of them for each page.
    """

    submissions: list[SubmissionStatus]
    cursor: str | None


def list_submissions(
    exchange: Exchange,
    state: str | None,
    strategic_metadata: Mapping[str, int],
    limit: int,
    cursor: str | None,
) -> Call[SubmissionPage]:
    """One page. Raises ValueError and TypeError for what cannot be asked for, before anything is sent."""
    query = _query(state, strategic_metadata, limit, cursor)
    answer = yield from exchange.request("GET", f"{_SUBMISSIONS}?{urllib.parse.urlencode(query)}")
    if answer.status == 422:
        raise ValueError(f"the server refused the question: {answer.text}")
    _check(answer, "the list of submissions", "lists no submissions")
    statuses, following = _decoded(wire.decode_page, answer)
    return SubmissionPage([convert.status(status) for status in statuses], following)


def _query(
    state: str | None, strategic_metadata: Mapping[str, int], limit: int, cursor: str | None
) -> list[tuple[str, str]]:
    limit = operator.index(limit)
    if not 1 <= limit <= wire.LARGEST_LIMIT:
        raise ValueError(f"limit must be from 1 to {wire.LARGEST_LIMIT}, not {limit}")
    query = [("limit", str(limit))]
    if state is not None:
        if state not in STATES:
            raise ValueError(f"state must be None or one of {', '.join(STATES)}, not {state!r}")
        query.append(("state", state))
    if cursor is not None:
        if not isinstance(cursor, str):
            raise TypeError(f"cursor must be the one of a SubmissionPage, or None, not {cursor!r}")
        query.append(("cursor", cursor))
    query += [(f"meta.{name}", str(value)) for name, value in strategic_metadata.items()]
    return query


def retry_submission(exchange: Exchange, number: int) -> Call[SubmissionId]:
    """Raises SubmissionNotFoundError and SubmissionNotRetryableError. Asked again it finds its retry."""
    answer = yield from exchange.request("POST", f"{_SUBMISSIONS}/retry/{number}")
    if _names(answer, number):
        raise SubmissionNotFoundError(number)
    if answer.status == 409:
        refusal = _decoded(wire.decode_not_retryable, answer)
        raise SubmissionNotRetryableError(number, refusal.state, refusal.reason)
    _check(answer, "the retry", "retries no submissions")
    return SubmissionId(_decoded(decode_id, answer))


def set_paused(
    exchange: Exchange, number: int, paused: bool, status: Callable[[], Call[SubmissionStatus | None]]
) -> Call[None]:
    """Nothing happens when it is so already. Raises SubmissionNotFoundError and SubmissionEndedError.

    `status` asks for the submission's status, to tell why the server refused.
    """
    verb = "pause" if paused else "unpause"
    answer = yield from exchange.request("POST", f"{_SUBMISSIONS}/{verb}/{number}")
    if not _names(answer, number):
        _check(answer, f"the request to {verb}", "pauses no submissions")
        return
    # unknown, ended, or so already: perhaps by a try whose answer was lost
    found = yield from status()
    if found is None:
        raise SubmissionNotFoundError(number)
    if not isinstance(found, SubmissionStatus.InProgress):
        raise SubmissionEndedError(number, type(found).__name__)
    if isinstance(found, SubmissionStatus.Paused) != paused:
        raise InternalProducerClientError(f"submission {number} is being paused and unpaused by others; try again")


def _names(answer: Answer, number: int) -> bool:
    """A 404 about this submission; one without its id is about the endpoint."""
    return answer.status == 404 and answer.body.strip() == b"%d" % number


def _check(answer: Answer, what: str, lack: str) -> None:
    if answer.status in (404, 405):
        raise ServerLacksFeatureError(
            f"this server {lack} (status {answer.status}); an opsqueue server of this version does, "
            "the reference implementation does not"
        )
    if answer.status != 200:
        raise InternalProducerClientError(f"the server answered {what} with status {answer.status}: {answer.text}")


def _decoded(decode: Callable[[bytes], T], answer: Answer) -> T:
    try:
        return decode(answer.body)
    except ProtocolError as error:
        raise InternalProducerClientError(f"the server's answer cannot be read: {error}") from error

"""Requests to the producers' endpoints as steps: tries, pauses, retries. Does no I/O: a driver takes the steps.

A request is tried again after a failed connection, a timeout, a reset and the statuses 500, 502, 503 and 504, with
jittered backoff, at most 100 times and for 5 minutes. Whether that could do harm is the caller's to say.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Generator
from typing import TypeAlias, TypeVar

import msgspec

from opsqueue.client.backoff import LARGEST_S, Backoff
from opsqueue.client.urls import ServerAddress
from opsqueue.exceptions import InternalProducerClientError

logger = logging.getLogger("opsqueue.producer")

MAX_TRIES = 100
MAX_SECONDS = 300.0
RETRIED = frozenset((500, 502, 503, 504))
#: Seconds to connect, and of silence before an answer; a server says 503 long before.
CONNECT_S = 10.0
READ_S = 60.0
#: Seconds that a try has at least, also when its caller's deadline is nearer.
SHORTEST_S = 0.1

T = TypeVar("T")


class Answer(msgspec.Struct, frozen=True):
    """An answer that is not going to be retried; the headers' names are in lower case."""

    status: int
    body: bytes
    headers: dict[str, str] = msgspec.field(default_factory=dict)

    @property
    def text(self) -> str:
        """The beginning of the body, to be shown to a person."""
        return self.body[:1000].decode(errors="replace").strip()


class Failure(msgspec.Struct, frozen=True):
    """A try that came to nothing. `arrived`: the server may have acted on it; `final`: trying again is of no use."""

    text: str
    arrived: bool
    cause: Exception | None = None
    retry_after_s: float = 0.0
    final: bool = False


class Try(msgspec.Struct, frozen=True):
    """One request to be made now. The driver answers the step with an Answer or a Failure."""

    method: str
    #: Below the server's base.
    path: str
    body: bytes | None
    headers: dict[str, str]
    #: Seconds to connect and of silence.
    connect_s: float
    read_s: float


class Sleep(msgspec.Struct, frozen=True):
    """A pause. The driver answers the step with None."""

    seconds: float


Step: TypeAlias = Try | Sleep
Outcome: TypeAlias = Answer | Failure | None
#: Yields steps, returns what was asked for.
Call: TypeAlias = Generator[Step, Outcome, T]
#: Asked before each retry: an answer to use instead, or None to go on. It may raise.
BeforeRetry: TypeAlias = Callable[[Failure], Call[Answer | None]]


class Exchange:
    """Requests to one server."""

    def __init__(self, address: ServerAddress) -> None:
        self._base = address.http

    def request(
        self,
        method: str,
        path: str,
        *,
        body: bytes | None = None,
        headers: dict[str, str] | None = None,
        before_retry: BeforeRetry | None = None,
        deadline: float | None = None,
    ) -> Call[Answer]:
        """The answer to a request below the server's base, whatever its status, unless it is one that is retried.

        `deadline` is of time.monotonic(); without an answer by then TimeoutError is raised. Raises
        InternalProducerClientError with the cause.
        """
        backoff = Backoff()
        give_up = time.monotonic() + MAX_SECONDS
        attempt = 0
        while True:
            attempt += 1
            outcome = yield _try(method, path, body, headers or {}, deadline)
            if isinstance(outcome, Answer):
                return outcome
            if not isinstance(outcome, Failure):
                raise TypeError(f"a try has to be answered, not with {outcome!r}")
            pause = max(backoff.next(), min(outcome.retry_after_s, LARGEST_S))
            url = self._base + path
            if outcome.final:
                raise _failed(method, url, outcome, attempt)
            if deadline is not None and time.monotonic() + pause > deadline:
                raise TimeoutError(f"{method} {url} had no answer in time: {outcome.text}") from outcome.cause
            if attempt == MAX_TRIES or time.monotonic() + pause > give_up:
                raise _failed(method, url, outcome, attempt)
            level = logging.WARNING if attempt == 5 else logging.DEBUG
            logger.log(level, "%s %s failed, trying again: %s", method, url, outcome.text)
            yield Sleep(pause)
            instead = (yield from before_retry(outcome)) if before_retry is not None else None
            if instead is not None:
                return instead


def unavailable(status: int, text: str, retry_after: str | None) -> Failure:
    """What an answer with one of the statuses RETRIED is taken for."""
    seconds = float(retry_after) if retry_after is not None and retry_after.isdecimal() else 0.0
    return Failure(f"status {status} {text}", arrived=status != 503, retry_after_s=seconds)


def _try(method: str, path: str, body: bytes | None, headers: dict[str, str], deadline: float | None) -> Try:
    if deadline is None:
        return Try(method, path, body, headers, CONNECT_S, READ_S)
    # the last question may be asked at the deadline itself
    left = max(deadline - time.monotonic(), SHORTEST_S)
    return Try(method, path, body, headers, min(CONNECT_S, left), min(READ_S, left))


def _failed(method: str, url: str, failure: Failure, attempts: int) -> InternalProducerClientError:
    error = InternalProducerClientError(f"{method} {url} failed after {attempts} tries: {failure.text}")
    error.__cause__ = failure.cause
    return error

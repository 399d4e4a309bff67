"""HTTP to the producers' endpoints: connections, time limits, retries. Knows no endpoint and no JSON.

A request is tried again after a failed connection, a timeout, a reset and the statuses 500, 502, 503 and 504, with
jittered backoff, at most 100 times and for 5 minutes. Whether that could do harm is the caller's to say.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import urllib3
from urllib3.exceptions import ConnectTimeoutError, HTTPError, NewConnectionError, SSLError

from opsqueue.client.backoff import LARGEST_S, Backoff
from opsqueue.client.urls import ServerAddress
from opsqueue.exceptions import InternalProducerClientError
from opsqueue.protocol.version import own_version

logger = logging.getLogger("opsqueue.producer")

MAX_TRIES = 100
MAX_SECONDS = 300.0
_RETRIED = frozenset((500, 502, 503, 504))
_CONNECTIONS = 16
_USER_AGENT = f"opsqueue/{own_version().removeprefix('v')}"
#: Seconds to connect, and of silence before an answer; a server says 503 long before.
CONNECT_S = 10.0
READ_S = 60.0
#: Seconds that a try has at least, also when its caller's deadline is nearer.
SHORTEST_S = 0.1
_TIMEOUT = urllib3.Timeout(connect=CONNECT_S, read=READ_S)


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer that is not going to be retried."""

    status: int
    body: bytes
    headers: dict[str, str] = field(default_factory=dict)

    @property
    def text(self) -> str:
        """The beginning of the body, to be shown to a person."""
        return self.body[:1000].decode(errors="replace").strip()


@dataclass(frozen=True, slots=True)
class Failure:
    """A try that came to nothing. `arrived`: the server may have acted on it."""

    text: str
    arrived: bool
    cause: Exception | None = None
    retry_after_s: float = 0.0


#: Asked before each retry: an answer to use instead, or None to go on. It may raise.
BeforeRetry = Callable[[Failure], Answer | None]


class HttpClient:
    """Requests to one server. Thread-safe; connections are kept, one pool per process."""

    def __init__(self, address: ServerAddress) -> None:
        self._address = address
        self._lock = threading.Lock()
        self._pool: urllib3.HTTPConnectionPool | None = None
        self._pid = 0

    def request(
        self,
        method: str,
        path: str,
        *,
        body: bytes | None = None,
        headers: dict[str, str] | None = None,
        before_retry: BeforeRetry | None = None,
        deadline: float | None = None,
    ) -> Answer:
        """The answer to a request below the server's base, whatever its status, unless it is one that is retried.

        `deadline` is of time.monotonic(); without an answer by then TimeoutError is raised. Raises
        InternalProducerClientError with the cause.
        """
        backoff = Backoff()
        give_up = time.monotonic() + MAX_SECONDS
        attempt = 0
        while True:
            attempt += 1
            outcome = self._try(method, path, body, headers or {}, _timeout(deadline))
            if isinstance(outcome, Answer):
                return outcome
            pause = max(backoff.next(), min(outcome.retry_after_s, LARGEST_S))
            if deadline is not None and time.monotonic() + pause > deadline:
                raise TimeoutError(
                    f"{method} {self._url(path)} had no answer in time: {outcome.text}"
                ) from outcome.cause
            if attempt == MAX_TRIES or time.monotonic() + pause > give_up:
                raise self.failed(method, path, outcome, attempt)
            level = logging.WARNING if attempt == 5 else logging.DEBUG
            logger.log(level, "%s %s failed, trying again: %s", method, self._url(path), outcome.text)
            time.sleep(pause)
            instead = before_retry(outcome) if before_retry is not None else None
            if instead is not None:
                return instead

    def try_once(self, method: str, path: str) -> Answer | Failure:
        """One try without a body."""
        return self._try(method, path, None, {}, _TIMEOUT)

    def failed(self, method: str, path: str, failure: Failure, attempts: int) -> InternalProducerClientError:
        """The error that a request ends with, its cause attached."""
        error = InternalProducerClientError(f"{method} {self._url(path)} failed after {attempts} tries: {failure.text}")
        error.__cause__ = failure.cause
        return error

    def _url(self, path: str) -> str:
        return self._address.http + path

    def _try(
        self, method: str, path: str, body: bytes | None, headers: dict[str, str], timeout: urllib3.Timeout
    ) -> Answer | Failure:
        pool = self._connections()
        headers = {"User-Agent": _USER_AGENT, **headers}
        try:
            response = pool.urlopen(
                method,
                self._address.path + path,
                body=body,
                headers=headers,
                retries=False,
                redirect=False,
                timeout=timeout,
            )
        except (NewConnectionError, ConnectTimeoutError) as error:
            return Failure(str(error), arrived=False, cause=error)
        except SSLError as error:
            failure = Failure(f"the connection is not secure: {error}", arrived=False, cause=error)
            if "CERTIFICATE_VERIFY_FAILED" in str(error):
                # trying again does not make a certificate trusted
                raise self.failed(method, path, failure, 1) from error
            return failure
        except (HTTPError, OSError) as error:
            return Failure(f"{type(error).__name__}: {error}", arrived=True, cause=error)
        if response.status in _RETRIED:
            answer = Answer(response.status, response.data)
            return Failure(
                f"status {response.status} {answer.text}",
                arrived=response.status != 503,
                retry_after_s=_seconds(response.headers.get("Retry-After")),
            )
        return Answer(response.status, response.data, {name.lower(): text for name, text in response.headers.items()})

    def _connections(self) -> urllib3.HTTPConnectionPool:
        with self._lock:
            if self._pool is None or self._pid != os.getpid():
                # a forked child must not write into its parent's connections
                self._pid = os.getpid()
                kind = urllib3.HTTPSConnectionPool if self._address.secure else urllib3.HTTPConnectionPool
                self._pool = kind(
                    self._address.host,
                    self._address.port,
                    timeout=_TIMEOUT,
                    maxsize=_CONNECTIONS,
                )
                _resolve(self._address.host)
            return self._pool


def _timeout(deadline: float | None) -> urllib3.Timeout:
    if deadline is None:
        return _TIMEOUT
    # the last question may be asked at the deadline itself
    left = max(deadline - time.monotonic(), SHORTEST_S)
    return urllib3.Timeout(connect=min(CONNECT_S, left), read=min(READ_S, left))


def _seconds(text: str | None) -> float:
    return float(text) if text is not None and text.isdecimal() else 0.0


def _resolve(host: str) -> None:
    """Waits for the resolver on another thread: getaddrinfo does not let go of a signal, a wait does."""
    if threading.current_thread() is not threading.main_thread() or host == "localhost" or host[-1:].isdigit():
        return
    done = threading.Event()

    def look_up() -> None:
        try:
            socket.getaddrinfo(host, None)
        except OSError as error:
            # the connection that follows fails of the same cause and reports it
            logger.debug("%s cannot be resolved: %s", host, error)
        finally:
            done.set()

    threading.Thread(target=look_up, name="opsqueue-resolve", daemon=True).start()
    done.wait()

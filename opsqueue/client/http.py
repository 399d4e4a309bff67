"""Takes the steps of requests with blocking connections. Decides nothing."""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from typing import TypeVar

import urllib3
from urllib3.exceptions import ConnectTimeoutError, HTTPError, NewConnectionError, SSLError

from opsqueue.client.exchange import RETRIED, Answer, Call, Failure, Outcome, Sleep, Try, unavailable
from opsqueue.client.urls import ServerAddress
from opsqueue.protocol.version import own_version

logger = logging.getLogger("opsqueue.producer")

_CONNECTIONS = 16
_USER_AGENT = f"opsqueue/{own_version().removeprefix('v')}"

T = TypeVar("T")


class HttpClient:
    """Connections to one server. Thread-safe; they are kept, one pool per process."""

    def __init__(self, address: ServerAddress) -> None:
        self._address = address
        self._lock = threading.Lock()
        self._pool: urllib3.HTTPConnectionPool | None = None
        self._pid = 0

    def run(self, call: Call[T]) -> T:
        """Takes all steps of a call and gives its result; raises what it raises."""
        outcome: Outcome = None
        while True:
            try:
                step = call.send(outcome)
            except StopIteration as end:
                return end.value  # type: ignore[no-any-return]  # StopIteration does not say of what type
            if isinstance(step, Sleep):
                time.sleep(step.seconds)
                outcome = None
            else:
                outcome = self._try(step)

    def _try(self, step: Try) -> Answer | Failure:
        pool = self._connections()
        headers = {"User-Agent": _USER_AGENT, **step.headers}
        try:
            response = pool.urlopen(
                step.method,
                self._address.path + step.path,
                body=step.body,
                headers=headers,
                retries=False,
                redirect=False,
                timeout=urllib3.Timeout(connect=step.connect_s, read=step.read_s),
            )
        except (NewConnectionError, ConnectTimeoutError) as error:
            return Failure(str(error), arrived=False, cause=error)
        except SSLError as error:
            # trying again does not make a certificate trusted
            final = "CERTIFICATE_VERIFY_FAILED" in str(error)
            return Failure(f"the connection is not secure: {error}", arrived=False, cause=error, final=final)
        except (HTTPError, OSError) as error:
            return Failure(f"{type(error).__name__}: {error}", arrived=True, cause=error)
        answer = Answer(response.status, response.data, {name.lower(): text for name, text in response.headers.items()})
        if answer.status in RETRIED:
            return unavailable(answer.status, answer.text, answer.headers.get("retry-after"))
        return answer

    def _connections(self) -> urllib3.HTTPConnectionPool:
        with self._lock:
            if self._pool is None or self._pid != os.getpid():
                # a forked child must not write into its parent's connections
                self._pid = os.getpid()
                kind = urllib3.HTTPSConnectionPool if self._address.secure else urllib3.HTTPConnectionPool
                self._pool = kind(self._address.host, self._address.port, maxsize=_CONNECTIONS)
                _resolve(self._address.host)
            return self._pool


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

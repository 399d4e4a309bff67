"""How a client waits for a submission: the server's own wait where it offers one, else polling. Reads no status.

A server that waits says so in each answer (the header Opsqueue-Wait-Ms); one that does not know waits ignores the query
and answers at once. So every answer that came sooner than a second is followed by a pause, of 10 ms doubling to 5 s:
a server without waits, or one that cannot wait now (it stops, its writer is being replaced, its limit is reached), is
polled, never asked in a busy loop.
"""

from __future__ import annotations

import time
from typing import Final

from opsqueue.client.backoff import Backoff
from opsqueue.client.exchange import Answer, Call, Exchange, Failure

#: What is asked for at once; proxies and the client's own limit on silence (60 s) allow it.
LONGEST_WAIT_S: Final = 30.0
#: An answer that took this long was waited for.
WAITED_S: Final = 1.0
#: Seconds for the answer to a wait that ends just before the caller's time does.
ANSWER_S: Final = 0.1
WAIT_HEADER: Final = "opsqueue-wait-ms"


class Waiting:
    """The requests of one wait for one thing. For one caller at a time."""

    def __init__(self, exchange: Exchange, timeout: float | None, what: str) -> None:
        self._exchange = exchange
        self._timeout = timeout
        self._what = what
        self._deadline = None if timeout is None else time.monotonic() + timeout
        self._pauses = Backoff(jitter=False)
        self._waited = False

    def ask(self, path: str, *, at_once: bool = False) -> Call[Answer]:
        """The answer to a GET, after a wait of the server's if it offers one and `at_once` does not forbid it."""
        seconds = 0.0 if at_once else self._seconds()
        begun = time.monotonic()
        if seconds < ANSWER_S:
            answer = yield from self._exchange.request("GET", path, deadline=self._deadline)
        else:

            def without_wait(_failure: Failure) -> Call[Answer | None]:
                # 503 may mean that too many wait: what is so now is answered all the same
                return (yield from self._exchange.request("GET", path, deadline=self._deadline))

            joint = "&" if "?" in path else "?"
            answer = yield from self._exchange.request(
                "GET",
                f"{path}{joint}wait={int(seconds * 1000)}ms",
                before_retry=without_wait,
                deadline=self._deadline,
            )
        self._waited = WAIT_HEADER in answer.headers and time.monotonic() - begun >= WAITED_S
        return answer

    def _seconds(self) -> float:
        if self._deadline is None:
            return LONGEST_WAIT_S
        return min(LONGEST_WAIT_S, self._deadline - time.monotonic() - ANSWER_S)

    def pause(self) -> float:
        """Seconds to let pass before the next `ask`. Raises TimeoutError when the time is over."""
        if self._waited:
            self._pauses = Backoff(jitter=False)
        pause = 0.0 if self._waited else self._pauses.next()
        if self._deadline is None:
            return pause
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError(f"{self._what} within {self._timeout} s")
        return min(pause, left)

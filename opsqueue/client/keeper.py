"""What goes on while a loop's callback runs: reserving the next chunks in time, extending reservations. One thread.

It sleeps while nothing is being worked on, and is never waited for.
"""

from __future__ import annotations

import logging
import threading
import time

from opsqueue.client.in_hand import InHand
from opsqueue.client.session import ConnectionLostError
from opsqueue.exceptions import OpsqueueInternalError
from opsqueue.protocol import consumer as wire

logger = logging.getLogger("opsqueue.consumer")


class Keeper:
    """Looks after what one loop has in hand. Started by the first chunk."""

    def __init__(self, in_hand: InHand) -> None:
        self._in_hand = in_hand
        self._changed = threading.Condition()
        self._asleep = False
        self._ended = False
        self._extended_at = 0.0
        self._thread: threading.Thread | None = None

    def notice(self) -> None:
        """A callback is about to run."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="opsqueue-keeper", daemon=True)
            self._thread.start()
        elif self._asleep:
            with self._changed:
                self._changed.notify()

    def end(self) -> None:
        """Nothing is to be looked after any more."""
        self._ended = True
        with self._changed:
            self._changed.notify()

    def _run(self) -> None:
        while not self._ended:
            if self._in_hand.running is None:
                with self._changed:
                    # set before the last look: who begins a callback sees it, or is seen
                    self._asleep = True
                    if self._in_hand.running is None and not self._ended:
                        self._changed.wait()
                    self._asleep = False
                continue
            try:
                pause = self._look()
            except ConnectionLostError as error:
                # the loop's thread will meet the same
                logger.debug("%s", error)
                pause = 1.0
            except OpsqueueInternalError as error:
                logger.debug("the connection ended while a callback ran: %s", error)
                pause = 1.0
            with self._changed:
                if not self._ended:
                    self._changed.wait(pause)

    def _look(self) -> float:
        now = time.monotonic()
        pause = self._in_hand.tend(now)
        connection, running = self._in_hand.connection, self._in_hand.running
        reservation_s = connection.reservation_s
        if running is None or reservation_s is None or not connection.knows(wire.EXTEND):
            return pause
        due = max(running[1], self._extended_at) + reservation_s / 3
        if now >= due:
            self._in_hand.extend()
            self._extended_at = now
            due = now + reservation_s / 3
        return min(pause, due - now)

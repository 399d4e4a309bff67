"""What goes on while a loop has chunks in hand: reserving the next in time, extending reservations. One thread.

It sleeps while there is nothing to look after, and is never waited for.
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
        """The loop has taken a chunk."""
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
            if self._in_hand.idle:
                with self._changed:
                    # set before the last look: who takes a chunk sees it, or is seen
                    self._asleep = True
                    if self._in_hand.idle and not self._ended:
                        self._changed.wait()
                    self._asleep = False
                self._extended_at = time.monotonic()
                continue
            try:
                pause = self._look()
            except ConnectionLostError as error:
                # the loop's thread will meet the same
                logger.debug("%s", error)
                pause = 1.0
            except OpsqueueInternalError as error:
                logger.debug("the connection ended while chunks were in hand: %s", error)
                pause = 1.0
            with self._changed:
                if not self._ended:
                    self._changed.wait(pause)

    def _look(self) -> float:
        now = time.monotonic()
        pause = self._in_hand.tend(now)
        connection = self._in_hand.connection
        reservation_s = connection.reservation_s
        if reservation_s is None or not connection.knows(wire.EXTEND):
            return pause
        due = self._extended_at + reservation_s / 3
        if now >= due:
            self._in_hand.extend()
            self._extended_at = now
            due = now + reservation_s / 3
        return min(pause, due - now)

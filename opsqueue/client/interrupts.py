"""Ctrl-C while a consumer's loop runs: raised in the callback, noted elsewhere, so that nothing is left half done.

Python raises KeyboardInterrupt between any two instructions of the main thread: in the middle of a request that the
server is about to answer, too. asyncio's Runner takes SIGINT over for the same reason, under the same conditions.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType


class Interrupts:
    """Takes SIGINT over while entered: on the main thread, and only where nobody has set a handler of their own."""

    def __init__(self, wake: Callable[[], None]) -> None:
        self._wake = wake
        self._installed = False
        #: How often it was pressed.
        self.count = 0
        #: Whether the next one is raised as KeyboardInterrupt. From the second on, all are.
        self.raised = False

    def __bool__(self) -> bool:
        """Whether it was pressed."""
        return self.count > 0

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is not threading.main_thread():
            return self
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            try:
                signal.signal(signal.SIGINT, self._pressed)
            except ValueError:
                # a subinterpreter's main thread: signals do not come here
                return self
            self._installed = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # a callback may have set another one meanwhile
        if self._installed and signal.getsignal(signal.SIGINT) == self._pressed:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def _pressed(self, number: int, frame: FrameType | None) -> None:
        self.count += 1
        if self.raised or self.count > 1:
            raise KeyboardInterrupt
        self._wake()

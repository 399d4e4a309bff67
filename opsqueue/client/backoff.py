"""How long to wait before trying again. Counts nothing but its own tries."""

from __future__ import annotations

import random

FIRST_S = 0.010
LARGEST_S = 5.0


class Backoff:
    """Seconds from 10 ms doubling to 5 s, each between half of that and the whole when jittered."""

    def __init__(self, *, jitter: bool = True) -> None:
        self._jitter = jitter
        self._next = FIRST_S

    def next(self) -> float:
        """The seconds to wait now."""
        seconds = self._next
        self._next = min(LARGEST_S, seconds * 2)
        return seconds * random.uniform(0.5, 1.0) if self._jitter else seconds

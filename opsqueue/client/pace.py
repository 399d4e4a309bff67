"""How many chunks a loop should have reserved ahead: from how long chunks take and how long they take to arrive.

A pure calculation over measured seconds. What is ahead covers the time that a chunk needs to arrive, with a margin, and
is asked for as late as that allows: a chunk that waits here is a chunk that another consumer might work on.
"""

from __future__ import annotations

from math import ceil
from typing import Final

#: Seconds of work that may wait here beyond what an arrival takes; also covers a thread that wakes late.
SLACK_S: Final = 0.02
#: What waits here may wait for this share of a reservation's time at most.
SHARE: Final = 0.01
#: Seconds after which chunks that wait go back, when the callback takes longer than the ones before.
LONGEST_WAIT_S: Final = 1.0
#: Arrivals vary: this times the usual one is counted on.
_MARGIN: Final = 1.5
_WEIGHT: Final = 0.3


class Average:
    """An average in which the last values count most."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value: float | None = None

    def add(self, value: float) -> None:
        """Takes a value into account."""
        self.value = value if self.value is None else self.value + _WEIGHT * (value - self.value)


class Pace:
    """The pace of one loop. `limit`: chunks ahead at most; `reservation_s`: of the server, None when it is unknown."""

    def __init__(self, limit: int, reservation_s: float | None) -> None:
        self.limit = limit
        self._share_s = None if reservation_s is None else reservation_s * SHARE
        self._chunk = Average()
        self._fetch = Average()
        self._answer_s = 0.0

    def processed(self, seconds: float) -> None:
        """A chunk was worked on for so long."""
        self._chunk.add(seconds)

    def fetched(self, seconds: float) -> None:
        """An input took so long to come from the object store."""
        self._fetch.add(seconds)

    def answered(self, seconds: float) -> None:
        """A reservation was answered after so long: the shortest of late count, the others had to wait for work."""
        self._answer_s = seconds if not self._answer_s else min(seconds, self._answer_s * 1.1)

    @property
    def chunk_s(self) -> float | None:
        """Seconds that a chunk takes here; None before the first has ended."""
        return self._chunk.value

    @property
    def arrival_s(self) -> float:
        """Seconds from asking for a chunk to having its input, with a margin."""
        return _MARGIN * (self._answer_s + (self._fetch.value or 0.0))

    @property
    def longest_wait_s(self) -> float:
        """Seconds that a chunk may wait here."""
        return LONGEST_WAIT_S if self._share_s is None else min(LONGEST_WAIT_S, self._share_s)

    def wanted(self, ahead: int, running_s: float | None) -> int:
        """How many chunks to ask for now, beside `ahead` that are here or asked for.

        `running_s`: for how long the callback has been running, None between two of them.
        """
        chunk_s = self._chunk.value
        if chunk_s is None or not self.limit:
            return 0
        cover_s = self.arrival_s + SLACK_S
        target = self._target(chunk_s, cover_s)
        left_s = 0.0 if running_s is None else max(0.0, chunk_s - running_s)
        if 2 * ahead > target or ahead >= target or left_s + ahead * chunk_s >= cover_s:
            return 0
        return target - ahead

    def due_s(self, ahead: int, running_s: float) -> float | None:
        """In how many seconds `wanted` will want something, if the callback goes on; None: not while it does."""
        chunk_s = self._chunk.value
        if chunk_s is None or not self.limit:
            return None
        cover_s = self.arrival_s + SLACK_S
        target = self._target(chunk_s, cover_s)
        if 2 * ahead > target or ahead >= target:
            return None
        return max(0.0, chunk_s - running_s + ahead * chunk_s - cover_s)

    def _target(self, chunk_s: float, cover_s: float) -> int:
        target = self.limit if chunk_s <= 0 else min(self.limit, ceil(cover_s / chunk_s))
        if self._share_s is not None and chunk_s > 0:
            target = min(target, int(self._share_s / chunk_s))
        return target

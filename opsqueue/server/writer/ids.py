"""Submission ids: snowflakes that never repeat and never go back. Knows no clock and no file; both are passed in.

An id is 41 bits of milliseconds since the Unix epoch, 10 bits of instance, 12 bits of sequence (WIRE section 3).
"""

from __future__ import annotations

SEQUENCE_BITS = 12
INSTANCE_BITS = 10
LAST_SEQUENCE = (1 << SEQUENCE_BITS) - 1

#: How far ahead the mark in the journal is put, in milliseconds. After a crash ids start behind the mark.
MARK_AHEAD_MS = 10_000


class SubmissionIds:
    """Makes ids above every id that was made before, also across restarts and steps of the clock.

    `mark_ms` is what the journal holds: all ids made so far lie at or below it. An id above it is good only once the
    journal has stored a new mark: whoever stores ids asks `mark_to_store` and stores it with them.
    """

    def __init__(self, instance: int, mark_ms: int) -> None:
        if not 0 <= instance < 1 << INSTANCE_BITS:
            raise ValueError(f"an instance is a number from 0 to {(1 << INSTANCE_BITS) - 1}, not {instance}")
        self._instance = instance
        self._mark_ms = mark_ms
        self._last_ms = mark_ms
        self._sequence = LAST_SEQUENCE

    def next(self, now_ms: int) -> int:
        """The next id at `now_ms`, milliseconds since the Unix epoch."""
        if now_ms > self._last_ms:
            self._last_ms = now_ms
            self._sequence = 0
        elif self._sequence < LAST_SEQUENCE:
            self._sequence += 1
        else:
            self._last_ms += 1
            self._sequence = 0
        return (self._last_ms << (INSTANCE_BITS + SEQUENCE_BITS)) | (self._instance << SEQUENCE_BITS) | self._sequence

    def mark_to_store(self) -> int | None:
        """A new mark that the next batch must carry, or None while the stored one covers every id made."""
        return self.next_mark() if self._last_ms > self._mark_ms else None

    def next_mark(self) -> int:
        """A mark ahead of every id made."""
        return max(self._last_ms, self._mark_ms) + MARK_AHEAD_MS

    def mark_stored(self, mark_ms: int) -> None:
        """The journal holds this mark."""
        self._mark_ms = max(self._mark_ms, mark_ms)

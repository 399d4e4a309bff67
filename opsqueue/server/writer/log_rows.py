"""The entries of a log row, in Python: for the few rows that need a closer look, and for tests. The engine has its own.

Format in docs/journal.md. Decides nothing.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

_KIND_MASK = 0x0F
_SAME_SUBMISSION = 0x10
_KNOWN_BITS = _KIND_MASK | _SAME_SUBMISSION


class EventKind(enum.IntEnum):
    COMPLETION = 1
    #: The chunk's retry count goes up by one.
    RETRY = 2
    #: The chunk's crash count goes up by one.
    CRASH = 3


@dataclass(frozen=True, slots=True)
class LogEvent:
    kind: EventKind
    submission: int
    chunk: int


def varint(value: int) -> bytes:
    """LEB128."""
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def read_varint(data: bytes, at: int) -> tuple[int, int]:
    """A LEB128 number below 2**63 and the position after it. Raises ValueError."""
    result = 0
    for i in range(9):
        if at + i >= len(data):
            raise ValueError(f"byte {at}: a number is cut off")
        byte = data[at + i]
        result |= (byte & 0x7F) << (7 * i)
        if byte < 0x80:
            return result, at + i + 1
    raise ValueError(f"byte {at}: a number is too large")


def decode_events(row: bytes) -> Iterator[LogEvent]:
    """The entries in order. Raises ValueError at what makes no sense."""
    at = 0
    submission: int | None = None
    while at < len(row):
        tag = row[at]
        if tag & ~_KNOWN_BITS or tag & _KIND_MASK not in (1, 2, 3):
            raise ValueError(f"byte {at}: unknown tag {tag:#04x}")
        if not tag & _SAME_SUBMISSION:
            submission, after = read_varint(row, at + 1)
        elif submission is None:
            raise ValueError(f"byte {at}: there is no previous submission")
        else:
            after = at + 1
        chunk, at = read_varint(row, after)
        yield LogEvent(EventKind(tag & _KIND_MASK), submission, chunk)


def encode_events(events: Iterable[LogEvent]) -> bytes:
    """The log row of these entries."""
    out = bytearray()
    previous: int | None = None
    for event in events:
        if event.submission == previous:
            out.append(event.kind | _SAME_SUBMISSION)
        else:
            out.append(event.kind)
            out += varint(event.submission)
            previous = event.submission
        out += varint(event.chunk)
    return bytes(out)


def keep_events(row: bytes, keep: Callable[[LogEvent], bool]) -> bytes:
    """The row without the entries that `keep` refuses."""
    return encode_events(event for event in decode_events(row) if keep(event))

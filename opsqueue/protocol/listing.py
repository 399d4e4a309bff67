"""A page of submissions as JSON, and why a submission cannot be retried. No HTTP, no I/O.

These bodies are ours; the reference has nothing like them.
"""

from __future__ import annotations

from typing import Final

import msgspec
from msgspec import Struct

from opsqueue.protocol.producer import U63, Status, TaggedStatus, decode, encode

#: Submissions in a page, unless asked otherwise and at most.
DEFAULT_LIMIT: Final = 100
LARGEST_LIMIT: Final = 1_000


class _EncodedPage(Struct, frozen=True):
    submissions: list[msgspec.Raw]
    next: str | None


class _Page(Struct, frozen=True):
    submissions: list[TaggedStatus]
    next: str | None


class NotRetryable(Struct, frozen=True):
    """The body of a 409 to a retry. `state` is the submission's, as a status names it; `reason` is for people."""

    id: U63
    state: str
    reason: str


_page_decoder = msgspec.json.Decoder(_Page)
_not_retryable_decoder = msgspec.json.Decoder(NotRetryable)


def encode_page(statuses: list[bytes], following: str | None) -> bytes:
    """`statuses` are JSON already; `following` is the cursor of the next page, None after the last."""
    return encode(_EncodedPage([msgspec.Raw(status) for status in statuses], following))


def decode_page(data: bytes) -> tuple[list[Status], str | None]:
    """Statuses, and the cursor of the next page. Raises ProtocolError."""
    page = decode(_page_decoder, data, "the page of submissions")
    return [tagged.status for tagged in page.submissions], page.next


def encode_not_retryable(refusal: NotRetryable) -> bytes:
    """As JSON."""
    return encode(refusal)


def decode_not_retryable(data: bytes) -> NotRetryable:
    """Raises ProtocolError."""
    return decode(_not_retryable_decoder, data, "the refusal of the retry")

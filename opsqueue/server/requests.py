"""The cold records between front-end and writer: one msgpack message each, typed. docs/records.md lists them in words.

Every request is answered exactly once, by a reply with the same request number; a reply that a commit must cover is
sent after that commit. Texts that a producer sends are checked by the front-end; the writer trusts sizes, not identity.
"""

from __future__ import annotations

import msgspec

#: Bytes that the engine promises a submission beside its bits.
SUBMISSION_BYTES = 256


def worst_case_bytes(chunks: int) -> int:
    """Memory that so many chunks may come to need: a quarter byte each (WIRE section 3), and the submission itself."""
    return chunks // 4 + SUBMISSION_BYTES


class Insert(msgspec.Struct, tag="insert", frozen=True):
    """A submission to store. Answered by Inserted, Conflict or Unavailable."""

    prefix: str | None
    #: Chunks; for a direct submission len(contents).
    count: int
    #: None unless direct: the input of each chunk.
    contents: list[bytes] | None
    idempotency_key: str | None
    #: 16 bytes over count or contents, chunk_size, metadata and strategic_metadata.
    fingerprint: bytes
    chunk_size: int
    metadata: bytes | None
    strategic_metadata: dict[str, int]
    #: JSON text.
    otel_trace_carrier: str
    paused: bool


class Cancel(msgspec.Struct, tag="cancel", frozen=True):
    """Answered by Done, or NotHeld (unknown or ended: the file says which), or Unavailable."""

    submission: int


class Pause(msgspec.Struct, tag="pause", frozen=True):
    """Pause or unpause a submission. Answered by Done, NotHeld (unknown, ended, or in that state) or Unavailable."""

    submission: int
    paused: bool


class Status(msgspec.Struct, tag="status", frozen=True):
    """Answered by Progress, or NotHeld when the file holds the whole truth."""

    submission: int


class Counts(msgspec.Struct, tag="counts", frozen=True):
    """Answered by Counted."""


class Ping(msgspec.Struct, tag="ping", frozen=True):
    """Answered by Done when the writer runs and its last commit succeeded, else by Unavailable."""


Request = Insert | Cancel | Pause | Status | Counts | Ping


class Inserted(msgspec.Struct, tag="inserted", frozen=True):
    """The submission is durable under this id; `known`: it was before."""

    submission: int
    known: bool


class Conflict(msgspec.Struct, tag="conflict", frozen=True):
    """Another submission with the same prefix or key, but other contents, is in progress."""

    submission: int


class Unavailable(msgspec.Struct, tag="unavailable", frozen=True):
    """Nothing was stored; try again later. `storage_full`: answered 507 instead of 503."""

    reason: str
    retry_after_s: int
    storage_full: bool


class Done(msgspec.Struct, tag="done", frozen=True):
    """It is so, durably."""


class NotHeld(msgspec.Struct, tag="not_held", frozen=True):
    """The writer holds no such submission: what the file says now is final."""


class Progress(msgspec.Struct, tag="progress", frozen=True):
    """An unfinished submission, as far as commits cover it."""

    chunks_done: int
    paused: bool


class Counted(msgspec.Struct, tag="counted", frozen=True):
    """Submissions in progress (paused ones too), and completed ones that are not forgotten yet."""

    in_progress: int
    completed: int


Reply = Inserted | Conflict | Unavailable | Done | NotHeld | Progress | Counted

encode = msgspec.msgpack.Encoder().encode
decode_request = msgspec.msgpack.Decoder(Request).decode
decode_reply = msgspec.msgpack.Decoder(Reply).decode

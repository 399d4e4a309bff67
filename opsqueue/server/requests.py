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


class Retry(msgspec.Struct, tag="retry", frozen=True):
    """Do a failed submission again. Answered by Inserted, NotRetryable, NotHeld (unknown) or Unavailable."""

    submission: int
    #: Its chunks.
    count: int


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


class Progresses(msgspec.Struct, tag="progresses", frozen=True):
    """The chunks done of several submissions at once. Answered by Progressed."""

    submissions: list[int]


class Counts(msgspec.Struct, tag="counts", frozen=True):
    """Answered by Counted."""


class Ping(msgspec.Struct, tag="ping", frozen=True):
    """Answered by Done when the writer runs and its last commit succeeded, else by Unavailable."""


class Watch(msgspec.Struct, tag="watch", frozen=True):
    """Answered by Done when the submission has ended or, with `beyond`, when it may have more chunks done than that.

    The commit that covers this has succeeded then; what is so now must still be asked for.
    """

    submission: int
    beyond: int | None


class Unwatch(msgspec.Struct, tag="unwatch", frozen=True):
    """The request of that number, a Watch, is not answered any more unless it has been. Answered by Done."""

    watch: int


class DoneBlocks(msgspec.Struct, tag="done_blocks", frozen=True):
    """Which blocks have done chunks, changed after a change number. Answered by Blocks or NotHeld.

    Epoch 0 and `at` 0: all. `at` above 0 goes on with an answer that had a `next`, whose numbers these are then.
    """

    submission: int
    epoch: int
    since: int
    upto: int
    at: int


Request = Insert | Retry | Cancel | Pause | Status | Progresses | Counts | Ping | Watch | Unwatch | DoneBlocks


class Inserted(msgspec.Struct, tag="inserted", frozen=True):
    """The submission is durable under this id; `known`: it was before."""

    submission: int
    known: bool


class Conflict(msgspec.Struct, tag="conflict", frozen=True):
    """Another submission with the same prefix or key, but other contents, is in progress."""

    submission: int


class NotRetryable(msgspec.Struct, tag="not_retryable", frozen=True):
    """`state` is the submission's; `conflict`: it has failed, but this unfinished one has its prefix or key.

    A failed one without a conflict: which of its chunks are done is no longer known.
    """

    state: int
    conflict: int | None


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


class Progressed(msgspec.Struct, tag="progressed", frozen=True):
    """Done chunks in the order of the question, as far as commits cover them; None: the file holds the whole truth."""

    chunks_done: list[int | None]


class Counted(msgspec.Struct, tag="counted", frozen=True):
    """Submissions in progress (paused ones too), and completed ones that are not forgotten yet."""

    in_progress: int
    completed: int


class Blocks(msgspec.Struct, tag="blocks", frozen=True):
    """Changed blocks of 4,096 chunks of a submission, as far as commits cover it.

    `reset`: not a change but all there is, because the asker's number was none or is not known. `since` and `upto` are
    what this answer tells (the changes after the one, up to the other), `next` where it goes on, None at its end.
    """

    state: int
    chunks_total: int
    chunks_done: int
    epoch: int
    since: int
    upto: int
    next: int | None
    reset: bool
    #: (first block, how many): all chunks of these are done.
    runs: list[tuple[int, int]]
    #: (block, bitmap): bit i of byte j, the least significant first, is chunk 8 j + i of the block.
    blocks: list[tuple[int, bytes]]


Reply = Inserted | Conflict | NotRetryable | Unavailable | Done | NotHeld | Progress | Progressed | Counted | Blocks

encode = msgspec.msgpack.Encoder().encode
decode_request = msgspec.msgpack.Decoder(Request).decode
decode_reply = msgspec.msgpack.Decoder(Reply).decode

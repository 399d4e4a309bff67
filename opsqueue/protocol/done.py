"""Which chunks of a submission are done, as JSON: blocks of 4,096 chunks that changed. No HTTP, no I/O.

This endpoint is ours; the reference has nothing like it. Bitmaps are base64 text, as msgspec writes bytes.
"""

from __future__ import annotations

from typing import Final

import msgspec
from msgspec import Struct

from opsqueue.protocol.producer import U63, decode, encode

#: Chunks of a block, and bytes of its bitmap.
BLOCK_CHUNKS: Final = 4_096


class DoneChunks(Struct, frozen=True):
    """The answer to GET /producer/submissions/{id}/done."""

    id: U63
    #: InProgress, Paused, Completed, Failed or Cancelled.
    state: str
    chunks_total: U63
    chunks_done: U63
    #: To be sent back as ?since=.
    change: str
    #: Forget what was known before: this is all there is, not what changed.
    reset: bool
    #: Ask again at once: this answer was at its bound.
    more: bool
    #: (first block, how many): all chunks of these are done.
    done: list[tuple[U63, U63]]
    #: (block, bitmap): bit i of byte j, the least significant first, is chunk 8 j + i of the block.
    blocks: list[tuple[U63, bytes]]


_decoder: msgspec.json.Decoder[DoneChunks | None] = msgspec.json.Decoder(DoneChunks | None)


def encode_done(done: DoneChunks) -> bytes:
    """As JSON."""
    return encode(done)


def decode_done(data: bytes) -> DoneChunks | None:
    """None when the submission is unknown. Raises ProtocolError."""
    return decode(_decoder, data, "the done chunks")

"""Block rows (docs/journal.md) of a submission from the chunks of it that are not done. Reads and writes no file."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from opsqueue.server.writer.batch import BlockRow
from opsqueue.server.writer.log_rows import varint
from opsqueue.server.writer.recovery import BLOCK_CHUNKS


def block_rows(
    submission: int, chunks_total: int, not_done: Iterable[tuple[int, int]], reached: Callable[[int], None]
) -> Iterator[BlockRow]:
    """The rows that are needed: of blocks with a chunk that is done or has retries.

    `not_done`: (chunk, retries) of every chunk that is not done, in order. `reached` is told the first chunk of each
    block that has one.
    """
    open_block, done, attempts = -1, bytearray(), bytearray()
    for chunk, retries in not_done:
        block, offset = divmod(chunk, BLOCK_CHUNKS)
        if block != open_block:
            yield from _closed(submission, open_block, done, attempts)
            yield from _all_done(submission, open_block + 1, block)
            reached(block * BLOCK_CHUNKS)
            open_block, done, attempts = block, _all_bits(block, chunks_total), bytearray()
        done[offset >> 3] &= ~(1 << (offset & 7))
        if retries:
            attempts += varint(offset) + varint(retries) + varint(0)
    yield from _closed(submission, open_block, done, attempts)
    yield from _all_done(submission, open_block + 1, -(-chunks_total // BLOCK_CHUNKS))


def _all_bits(block: int, chunks_total: int) -> bytearray:
    length = min(BLOCK_CHUNKS, chunks_total - block * BLOCK_CHUNKS)
    return bytearray(((1 << length) - 1).to_bytes((length + 7) // 8, "little"))


def _closed(submission: int, block: int, done: bytearray, attempts: bytearray) -> Iterator[BlockRow]:
    if any(done) or attempts:
        yield BlockRow(submission, block, bytes(done), bytes(attempts))


def _all_done(submission: int, first: int, end: int) -> Iterator[BlockRow]:
    for block in range(first, end):
        yield BlockRow(submission, block, b"", b"")

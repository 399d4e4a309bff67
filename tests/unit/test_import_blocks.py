"""Block rows of an import say what the reference's rows said."""

from __future__ import annotations

import random
from collections.abc import Mapping

import pytest

from opsqueue._speedups.block_rows import checked
from opsqueue.server.importing.block_rows import block_rows
from opsqueue.server.writer.log_rows import read_varint
from opsqueue.server.writer.recovery import BLOCK_CHUNKS


def read(total: int, not_done: Mapping[int, int]) -> tuple[set[int], dict[int, int], list[int]]:
    """The chunks that are done, the retries, and the block numbers of the rows, which a start must accept."""
    reached: list[int] = []
    rows = list(block_rows(7, total, sorted(not_done.items()), reached.append))
    assert reached == sorted({chunk // BLOCK_CHUNKS * BLOCK_CHUNKS for chunk in not_done})
    assert len(list(checked(((*row[:2], 1, *row[2:], total, 0) for row in rows), {}))) == len(rows)
    done: set[int] = set()
    retries: dict[int, int] = {}
    for row in rows:
        first = row.block * BLOCK_CHUNKS
        length = min(BLOCK_CHUNKS, total - first)
        done |= {first + i for i in range(length) if not row.done or row.done[i // 8] >> i % 8 & 1}
        at = 0
        while at < len(row.attempts):
            offset, at = read_varint(row.attempts, at)
            retries[first + offset], at = read_varint(row.attempts, at)
            crashes, at = read_varint(row.attempts, at)
            assert crashes == 0
    return done, retries, [row.block for row in rows]


@pytest.mark.parametrize("total", [1, 8, 4_095, 4_096, 4_097, 12_288, 20_001])
@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 1.0])
def test_rows_say_which_chunks_are_done_and_how_often_others_failed(total: int, share: float) -> None:
    chance = random.Random(total)
    not_done = {chunk: chance.choice((0, 0, 0, 1, 300)) for chunk in range(total) if chance.random() < share}
    done, retries, _ = read(total, not_done)
    assert done == set(range(total)) - set(not_done)
    assert retries == {chunk: count for chunk, count in not_done.items() if count}


def test_blocks_in_which_nothing_happened_have_no_row() -> None:
    assert read(12_288, dict.fromkeys(range(12_288), 0)) == (set(), {}, [])
    done, retries, blocks = read(12_288, {chunk: int(chunk == 5_000) for chunk in range(4_096, 12_288)})
    assert (done, retries, blocks) == (set(range(4_096)), {5_000: 1}, [0, 1])

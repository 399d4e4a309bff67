"""Writes block rows, many in one statement. Decides nothing, reads nothing."""

from __future__ import annotations

from collections.abc import Sequence

import apsw

from opsqueue._speedups.bitmaps import pack
from opsqueue.server.sql import queries
from opsqueue.server.writer.batch import BlockRow

_WRITE_BLOCKS = queries("journal")["write_blocks"]
#: Statements that write several blocks, by how many.
_VALUES = "(?, ?, ?, ?, ?, ?)"
_STATEMENTS = {count: _WRITE_BLOCKS.replace(_VALUES, ", ".join([_VALUES] * count)) for count in (64, 16, 4, 1)}


def write_blocks(connection: apsw.Connection, batch: int, rows: Sequence[BlockRow]) -> None:
    """Within the caller's transaction. Raises apsw.Error.

    Many in one statement: between two statements this thread may have to wait for the interpreter's lock.
    """
    at = 0
    for count, statement in _STATEMENTS.items():
        while len(rows) - at >= count:
            values: list[int | bytes] = []
            for row in rows[at : at + count]:
                packed = pack(row.done)
                done, packing = (row.done, 0) if packed is None else (packed, 1)
                values += (row.submission, row.block, batch, done, row.attempts, packing)
            connection.execute(statement, values)
            at += count

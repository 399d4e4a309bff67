"""Writes block rows, many in one statement. Decides nothing, reads nothing."""

from __future__ import annotations

from collections.abc import Sequence

import apsw

from opsqueue.server.sql import queries
from opsqueue.server.writer.batch import BlockRow

_WRITE_BLOCKS = queries("journal")["write_blocks"]
#: Statements that write several blocks, by how many.
_STATEMENTS = {
    count: _WRITE_BLOCKS.replace("(?, ?, ?, ?, ?)", ", ".join(["(?, ?, ?, ?, ?)"] * count)) for count in (64, 16, 4, 1)
}


def write_blocks(connection: apsw.Connection, batch: int, rows: Sequence[BlockRow]) -> None:
    """Within the caller's transaction. Raises apsw.Error.

    Many in one statement: between two statements this thread may have to wait for the interpreter's lock.
    """
    at = 0
    for count, statement in _STATEMENTS.items():
        while len(rows) - at >= count:
            values: list[int | bytes] = []
            for row in rows[at : at + count]:
                values += (row.submission, row.block, batch, row.done, row.attempts)
            connection.execute(statement, values)
            at += count

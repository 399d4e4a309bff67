"""Brings a database to the newest schema version, one numbered script at a time. Never goes back."""

from __future__ import annotations

from collections.abc import Sequence

import apsw

from opsqueue.server.sql import Migration, migrations


def migrate(connection: apsw.Connection, steps: Sequence[Migration] | None = None) -> int:
    """Run what user_version says is missing, each step in a transaction of its own; how many ran. Raises apsw.Error."""
    ran = 0
    for step in migrations() if steps is None else steps:
        if step.version <= connection.pragma("user_version"):
            continue
        connection.execute("BEGIN IMMEDIATE")
        try:
            connection.execute(step.script)
            connection.pragma("user_version", step.version)
            connection.execute("COMMIT")
        except apsw.Error:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise
        ran += 1
    return ran

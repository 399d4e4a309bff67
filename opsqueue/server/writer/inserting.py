"""Stores a new submission, or finds that it is known: the one decision that is made inside a transaction."""

from __future__ import annotations

import apsw
import msgspec

from opsqueue.server.requests import Insert
from opsqueue.server.sql import queries
from opsqueue.server.writer.batch import InsertOutcome, InsertResult, NewSubmission, State

#: A failed or cancelled submission is still the answer to its repeated insert for so long (WIRE section 3).
REPEATED_WITHIN_US = 60_000_000

_SQL = queries("journal")
_NEWEST_BY_PREFIX = _SQL["newest_by_prefix"]
_NEWEST_BY_KEY = _SQL["newest_by_key"]
_INSERT = _SQL["insert"]
_INSERT_STRATEGIC = _SQL["insert_strategic"]
_INSERT_DIRECT_INPUT = _SQL["insert_direct_input"]

_encode_json = msgspec.json.Encoder().encode


def insert(connection: apsw.Connection, new: NewSubmission) -> InsertOutcome:
    """Within the caller's transaction. Raises apsw.Error."""
    known = _known(connection, new)
    if known is not None:
        return known
    _store(connection, new.submission, new.insert, new.now_us)
    return InsertOutcome(InsertResult.NEW, new.submission)


def _known(connection: apsw.Connection, new: NewSubmission) -> InsertOutcome | None:
    """None: to be stored."""
    wanted = new.insert
    row = None
    if wanted.idempotency_key is not None:
        row = connection.execute(_NEWEST_BY_KEY, (wanted.idempotency_key,)).fetchone()
    if row is None and wanted.prefix is not None:
        row = connection.execute(_NEWEST_BY_PREFIX, (wanted.prefix,)).fetchone()
    if row is None:
        return None
    submission, state, ended_us, fingerprint = row
    unfinished = state in (State.IN_PROGRESS, State.PAUSED)
    if fingerprint != wanted.fingerprint:
        return InsertOutcome(InsertResult.CONFLICT, submission) if unfinished else None
    if unfinished or state == State.COMPLETED or new.now_us - ended_us <= REPEATED_WITHIN_US:
        return InsertOutcome(InsertResult.KNOWN, submission)
    return None


def _store(connection: apsw.Connection, submission: int, wanted: Insert, now_us: int) -> None:
    empty = wanted.count == 0
    unfinished = State.PAUSED if wanted.paused else State.IN_PROGRESS
    state = State.COMPLETED if empty else unfinished
    connection.execute(
        _INSERT,
        (
            submission,
            int(state),
            wanted.count,
            wanted.chunk_size,
            int(wanted.contents is not None),
            now_us if empty else None,
            wanted.fingerprint,
            wanted.prefix,
            wanted.idempotency_key,
            _encode_json(wanted.strategic_metadata).decode(),
            wanted.otel_trace_carrier,
            wanted.metadata,
        ),
    )
    if empty:
        return
    if wanted.strategic_metadata:
        connection.executemany(
            _INSERT_STRATEGIC, ((key, value, submission) for key, value in wanted.strategic_metadata.items())
        )
    if wanted.contents is not None:
        connection.executemany(
            _INSERT_DIRECT_INPUT, ((submission, index, content) for index, content in enumerate(wanted.contents))
        )

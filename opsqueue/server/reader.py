"""The read side of the file: what never changes or may be a moment old. Never writes, never waits for the writer.

One instance belongs to one thread. A call opens a snapshot and closes it before it returns: a longer one would keep the
WAL from being checkpointed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import apsw
import msgspec

from opsqueue._speedups.bitmaps import unpack
from opsqueue.server.lru import ByteLru
from opsqueue.server.sql import queries
from opsqueue.server.writer.batch import State

#: Bytes of descriptions and direct inputs that an instance keeps.
CACHE_BYTES = 64 * 1024 * 1024
#: How long a read waits for a lock; a reader of a WAL needs one only while the file is recovered or removed.
BUSY_TIMEOUT_MS = 1000
#: Looking for the rarest of several pairs counts each up to this many.
RARE_PAIR = 1000

_SQL = queries("reader")
_DESCRIPTION = _SQL["description"]
_STATUS = _SQL["status"]
_DIRECT_INPUT = _SQL["direct_input"]
_DIRECT_OUTPUT = _SQL["direct_output"]
_NEWEST_BY_PREFIX = _SQL["newest_by_prefix"]
_NEWEST_BY_KEY = _SQL["newest_by_key"]
_BLOCKS = _SQL["blocks"]
_UNFINISHED = _SQL["unfinished"]
_COUNT_PAIR = _SQL["count_pair"]
_UNFINISHED_WITH_PAIR = _SQL["unfinished_with_pair"]
_UNFINISHED_WITH_PAIRS = _SQL["unfinished_with_pairs"]

_AFTER = _SQL["after"]
_AFTER_UNFINISHED = _SQL["after_unfinished"]
_AFTER_RARE_STATE = _SQL["after_rare_state"]
_AFTER_WITH_PAIR = _SQL["after_with_pair"]

_RARE_STATES = (State.PAUSED, State.FAILED, State.CANCELLED)

_decode_pairs = msgspec.json.Decoder(dict[str, int]).decode


class ReadError(Exception):
    """The database {path} cannot be read: {reason}; look at the disk and at the writer's log."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__((type(self).__doc__ or "").format(path=path, reason=reason))


class TooManyError(Exception):
    """More than {limit} submissions match; ask for fewer, or raise --max-submissions-returned."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        super().__init__((type(self).__doc__ or "").format(limit=limit))


@dataclass(frozen=True, slots=True)
class Description:
    """What a submission is; the same from its insert until it is forgotten."""

    prefix: str | None
    chunks_total: int
    chunk_size: int
    metadata: bytes | None
    strategic_metadata: dict[str, int]
    #: JSON text.
    otel_trace_carrier: str
    #: The chunks' inputs are in the file, not in the object store.
    direct: bool


@dataclass(frozen=True, slots=True)
class SubmissionStatus:
    """A submission's row. `chunks_done` counts only once the submission has ended; then `ended_us` is set."""

    submission: int
    state: State
    chunks_done: int
    #: Microseconds since the Unix epoch; None while unfinished.
    ended_us: int | None
    #: The next three for State.FAILED only; the input for a direct submission only.
    failed_chunk: int | None
    failure: str | None
    failed_chunk_input: bytes | None
    description: Description


class Reader:
    """Reads one database file; opens it with the first call, and again after a failure. Methods raise ReadError."""

    def __init__(self, path: str, cache_bytes: int = CACHE_BYTES) -> None:
        self._path = path
        self._connection: apsw.Connection | None = None
        self._cache: ByteLru[int | tuple[int, int], Description | bytes] = ByteLru(cache_bytes)

    def description(self, submission: int) -> Description | None:
        """None: unknown, or forgotten."""
        cached = self._cache.get(submission)
        if isinstance(cached, Description):
            return cached
        row = self._row(_DESCRIPTION, (submission,))
        if row is None:
            return None
        prefix, chunks_total, chunk_size, direct, pairs, carrier, metadata = row
        found = self._describe(submission, prefix, chunks_total, chunk_size, metadata, pairs, carrier, direct)
        self._cache.put(submission, found, len(prefix or "") + len(metadata or b"") + 4 * len(pairs) + len(carrier))
        return found

    def status(self, submission: int) -> SubmissionStatus | None:
        """None: unknown, or forgotten."""
        row = self._row(_STATUS, (submission,))
        if row is None:
            return None
        state, prefix, chunks_total, chunks_done, chunk_size, direct, pairs, carrier, ended_us, *failed, metadata = row
        failed_chunk, failure, failed_input = failed
        description = self._describe(submission, prefix, chunks_total, chunk_size, metadata, pairs, carrier, direct)
        return SubmissionStatus(
            submission, State(state), chunks_done, ended_us, failed_chunk, failure, failed_input, description
        )

    def direct_input(self, submission: int, chunk: int) -> bytes | None:
        """A chunk's input; None: not direct, out of range, or forgotten."""
        cached = self._cache.get((submission, chunk))
        if isinstance(cached, bytes):
            return cached
        content = self._bytes(_DIRECT_INPUT, submission, chunk)
        if content is not None:
            self._cache.put((submission, chunk), content, len(content))
        return content

    def direct_output(self, submission: int, chunk: int) -> bytes | None:
        """A done chunk's output; None: there is none."""
        return self._bytes(_DIRECT_OUTPUT, submission, chunk)

    def blocks(self, submission: int, first: int, limit: int) -> list[tuple[int, bytes]]:
        """(block, bitmap) of `limit` stored blocks from `first` on, ascending; an empty bitmap: all are done."""
        rows = self._rows(_BLOCKS, (submission, first, limit))
        return [(block, unpack(done) if packing else done) for block, done, packing in rows]

    def lookup_by_prefix(self, prefix: str) -> int | None:
        """The newest submission with this prefix, whatever its state."""
        row = self._row(_NEWEST_BY_PREFIX, (prefix,))
        return None if row is None else row[0]

    def lookup_by_key(self, key: str) -> int | None:
        """The newest submission with this Idempotency-Key, whatever its state."""
        row = self._row(_NEWEST_BY_KEY, (key,))
        return None if row is None else row[0]

    def lookup_by_strategic_metadata(self, pairs: Mapping[str, int], limit: int) -> list[int]:
        """Unfinished submissions (paused ones too) with all pairs, ascending. Raises TooManyError above `limit`."""
        found = [row[0] for row in self._matching(pairs, limit + 1)]
        if len(found) > limit:
            raise TooManyError(limit)
        return found

    def candidates(
        self, after: int, state: State | None, pair: tuple[str, int] | None, limit: int
    ) -> list[tuple[int, State, dict[str, int]]]:
        """(id, state, strategic metadata) of `limit` submissions above id `after`, ascending, by the narrowest index.

        All that have this state and this pair are among them, others may be too. Fewer than `limit`: there are no more.
        """
        if pair is not None and state in (State.IN_PROGRESS, State.PAUSED):
            rows = self._rows(_AFTER_WITH_PAIR, (*pair, after, limit))
        elif state in _RARE_STATES:
            rows = self._rows(_AFTER_RARE_STATE, (int(state), after, limit))
        elif state is State.IN_PROGRESS:
            rows = self._rows(_AFTER_UNFINISHED, (after, limit))
        else:
            rows = self._rows(_AFTER, (after, limit))
        return [(submission, State(number), self._pairs(submission, text)) for submission, number, text in rows]

    def rarest(self, pairs: Mapping[str, int]) -> tuple[str, int]:
        """The pair, of at least one, that the fewest unfinished submissions have, about."""
        if len(pairs) == 1:
            return next(iter(pairs.items()))
        return min(pairs.items(), key=lambda pair: self._rows(_COUNT_PAIR, (*pair, RARE_PAIR))[0][0])

    def _matching(self, pairs: Mapping[str, int], at_most: int) -> list[tuple[Any, ...]]:
        if not pairs:
            return self._rows(_UNFINISHED, (at_most,))
        if len(pairs) == 1:
            ((key, value),) = pairs.items()
            return self._rows(_UNFINISHED_WITH_PAIR, (key, value, at_most))
        key, value = self.rarest(pairs)
        others = msgspec.json.encode([pair for pair in pairs.items() if pair[0] != key]).decode()
        return self._rows(_UNFINISHED_WITH_PAIRS, (key, value, others, at_most))

    def close(self) -> None:
        """Close the file; a later call opens it again."""
        if self._connection is not None:
            self._connection.close(True)
            self._connection = None

    def _describe(
        self,
        submission: int,
        prefix: str | None,
        chunks_total: int,
        chunk_size: int,
        metadata: bytes | None,
        pairs: str,
        carrier: str,
        direct: int,
    ) -> Description:
        strategic = self._pairs(submission, pairs)
        return Description(prefix, chunks_total, chunk_size, metadata, strategic, carrier, bool(direct))

    def _pairs(self, submission: int, text: str) -> dict[str, int]:
        try:
            return _decode_pairs(text)
        except msgspec.MsgspecError as error:
            raise ReadError(self._path, f"strategic_metadata of submission {submission}: {error}") from error

    def _bytes(self, sql: str, submission: int, chunk: int) -> bytes | None:
        row = self._row(sql, (submission, chunk))
        return None if row is None else row[0]

    def _row(self, sql: str, bindings: tuple[apsw.SQLiteValue, ...]) -> tuple[Any, ...] | None:
        rows = self._rows(sql, bindings)
        return rows[0] if rows else None

    def _rows(self, sql: str, bindings: tuple[apsw.SQLiteValue, ...]) -> list[tuple[Any, ...]]:
        try:
            if self._connection is None:
                self._connection = self._open()
            return self._connection.execute(sql, bindings).fetchall()
        except OverflowError:
            return []  # an integer that no column can hold is in no row
        except apsw.Error as error:
            self._abandon()
            raise ReadError(self._path, str(error)) from error

    def _open(self) -> apsw.Connection:
        connection = apsw.Connection(self._path, flags=apsw.SQLITE_OPEN_READONLY)
        connection.set_busy_timeout(BUSY_TIMEOUT_MS)
        # Checkpoints are the writer's, also when this connection is the last to close.
        connection.config(apsw.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, 1)
        # One plan per query, whatever the values.
        connection.config(apsw.SQLITE_DBCONFIG_ENABLE_QPSG, 1)
        return connection

    def _abandon(self) -> None:
        """After a failure the next call opens the file anew: it may have been replaced, or recovered by the writer."""
        if self._connection is not None:
            self._connection.close(True)
            self._connection = None

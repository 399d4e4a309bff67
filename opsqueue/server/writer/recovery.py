"""Reads at start what the engine must know: unfinished submissions, their blocks, and the log. Changes nothing.

What contradicts itself is refused with its table and row; nothing is guessed or left out.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator
from typing import Any

import apsw
import msgspec

from opsqueue._speedups.block_rows import checked
from opsqueue._speedups.log_packing import mentioned, unpack
from opsqueue.server.errors import DamagedDatabaseError
from opsqueue.server.sql import queries
from opsqueue.server.writer.batch import Loaded, LoadedSubmission, RecoverySink, State
from opsqueue.server.writer.log_rows import EventKind, LogEvent, keep_events

#: Chunks of a block.
BLOCK_CHUNKS = 4096

_SQL = queries("recovery")
_LOG = _SQL["log"]
_UNFINISHED = _SQL["unfinished"]
_ENDED = _SQL["ended"]
_UNFINISHED_BLOCKS = _SQL["unfinished_blocks"]
_BLOCKS_OF = _SQL["blocks_of"]
_FAILED_OR_CANCELLED = _SQL["failed_or_cancelled"]
_LAST_LOGGED = _SQL["last_logged"]
_COUNT_ENDED = _SQL["count_ended"]
_MARK = _SQL["mark"]

#: The states by number: looking one up is quicker than making one.
_STATES = {state.value: state for state in State}

#: A submission's strategic metadata from its column. Raises ValueError.
strategic_pairs = msgspec.json.Decoder(dict[str, int]).decode


def _checked_submissions(rows: Iterable[tuple[Any, ...]]) -> Iterator[LoadedSubmission]:
    """There may be a million. Raises ValueError naming the row that makes no sense."""
    for submission, state, chunks_total, chunk_size, direct, pairs in rows:
        try:
            strategic = strategic_pairs(pairs)
        except ValueError as error:
            raise ValueError(f"row {submission}: {error}") from error
        if chunks_total <= 0:
            raise ValueError(f"row {submission}: {chunks_total} chunks")
        if state not in _STATES:
            raise ValueError(f"row {submission}: {state} is no state")
        yield LoadedSubmission(submission, _STATES[state], chunks_total, chunk_size, direct == 1, strategic)


class Recovery:
    """One pass over the file at `path`. Raises DamagedDatabaseError, or apsw.Error."""

    def __init__(self, connection: apsw.Connection, path: str, sink: RecoverySink) -> None:
        self._connection = connection
        self._path = path
        self._sink = sink
        #: Blocks that hold attempts, and the batch that wrote them: they count these already.
        self._attempts_as_of: dict[tuple[int, int], int] = {}

    def run(self) -> Loaded:
        last_logged, mentions = self._read_log()
        completed = self._count_completed()
        ended = self._submissions(mentions)
        self._blocks(ended)
        self._events()
        last_batch = max(last_logged, self._mark("last_batch"))
        return Loaded(last_batch=last_batch, id_mark_ms=self._mark("id_mark_ms"), completed=completed)

    def _read_log(self) -> tuple[int, set[int]]:
        """The last batch in the log, and the failed and cancelled submissions that it is about."""
        mentions = set[int]()
        among = frozenset(row[0] for row in self._connection.execute(_FAILED_OR_CANCELLED))
        if among:
            for batch, events in self._connection.execute(_LOG):
                try:
                    mentions |= mentioned(events, among)
                except ValueError as error:
                    raise self._damaged(f"table log, row {batch}: {error}") from error
        ((last,),) = self._connection.execute(_LAST_LOGGED)
        return last, mentions

    def _count_completed(self) -> int:
        ((completed, unknown),) = self._connection.execute(_COUNT_ENDED)
        if unknown is not None:
            raise self._damaged(f"table submissions, row {unknown}: unknown state")
        return int(completed)

    def _submissions(self, mentions: set[int]) -> list[int]:
        """Gives all to the sink by id; returns the ended ones among them."""
        ended = list(self._ended(mentions))
        unfinished: Iterable[tuple[Any, ...]] = self._connection.execute(_UNFINISHED)
        rows = heapq.merge(unfinished, ended) if ended else unfinished
        try:
            self._sink.load_submissions(_checked_submissions(rows))
        except ValueError as error:
            raise self._damaged(f"table submissions, {error}") from error
        return [row[0] for row in ended]

    def _ended(self, mentions: set[int]) -> Iterator[tuple[Any, ...]]:
        """Failed and cancelled submissions that the log is about, by id."""
        for submission in sorted(mentions):
            yield from self._connection.execute(_ENDED, (submission,))

    def _blocks(self, ended: list[int]) -> None:
        try:
            self._load(self._connection.execute(_UNFINISHED_BLOCKS))
            for submission in ended:
                self._load(self._connection.execute(_BLOCKS_OF, (submission,)))
        except ValueError as error:
            raise self._damaged(f"table blocks, {error}") from error

    def _load(self, rows: Iterable[tuple[Any, ...]]) -> None:
        self._sink.load_blocks(checked(rows, self._attempts_as_of))

    def _events(self) -> None:
        newest_block = max(self._attempts_as_of.values(), default=-1)
        for batch, events in self._connection.execute(_LOG):
            try:
                events = unpack(events)
                if batch <= newest_block:
                    events = self._without_counted(batch, events)
                if events:
                    self._sink.events(events)
            except ValueError as error:
                raise self._damaged(f"table log, row {batch}: {error}") from error

    def _without_counted(self, batch: int, events: bytes) -> bytes:
        """The log row without the retries and crashes that a block written later or with it counts already.

        A completion may come twice; an attempt may not.
        """

        def uncounted(event: LogEvent) -> bool:
            if event.kind is EventKind.COMPLETION:
                return True
            return self._attempts_as_of.get((event.submission, event.chunk // BLOCK_CHUNKS), -1) < batch

        return keep_events(events, uncounted)

    def _mark(self, name: str) -> int:
        row = self._connection.execute(_MARK, (name,)).fetchone()
        return 0 if row is None else row[0]

    def _damaged(self, what: str) -> DamagedDatabaseError:
        return DamagedDatabaseError(path=self._path, what=what)

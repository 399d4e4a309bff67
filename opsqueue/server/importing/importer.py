"""One import: every submission of a reference server's file into a database of ours, in one transaction.

Whole or not at all: when anything fails, nothing of it is in the new file, and a file that it made is removed again.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice

import apsw
import msgspec

from opsqueue.server.frontend.inserts import fingerprint
from opsqueue.server.importing.block_rows import block_rows
from opsqueue.server.importing.errors import PrefixInUseError
from opsqueue.server.importing.reference_file import ReferenceFile
from opsqueue.server.importing.reference_rows import OldSubmission, ReferenceRows
from opsqueue.server.sql import queries
from opsqueue.server.writer.batch import JournalOptions, State
from opsqueue.server.writer.blocks import write_blocks
from opsqueue.server.writer.database_file import acquire_lock, exists, open_for_writing, startup_error
from opsqueue.server.writer.ids import INSTANCE_BITS, SEQUENCE_BITS

_SQL = queries("importing")
_JOURNAL = queries("journal")
_INSERT = _SQL["insert"]
_INSERT_OUTPUT = _SQL["insert_direct_output"]
_INSERT_INPUT = _JOURNAL["insert_direct_input"]
_INSERT_STRATEGIC = _JOURNAL["insert_strategic"]
_SET_MARK = _JOURNAL["set_mark"]

#: Block rows that are held at once.
_BLOCKS_AT_ONCE = 64

_encode_json = msgspec.json.Encoder().encode


@dataclass(slots=True)
class Summary:
    """What an import did: numbers of submissions and chunks, and the seconds it took."""

    unfinished: int = 0
    completed: int = 0
    failed: int = 0
    cancelled: int = 0
    #: Chunks of unfinished submissions.
    waiting: int = 0
    retried: int = 0
    done: int = 0
    #: Submissions that an earlier import brought over, whether they are still there or not.
    known: int = 0
    seconds: float = 0.0


def import_reference(old: str, options: JournalOptions, progress: Callable[[int, int], None]) -> Summary:
    """Bring the submissions of the reference's file `old` into the database that `options` names; made if absent.

    `progress` is called with (chunks seen, chunks of all unfinished submissions). Raises a StartupError; then nothing
    was imported.
    """
    begun = time.monotonic()
    with contextlib.ExitStack() as stack:
        file = ReferenceFile(old)
        stack.callback(file.close)
        exists(options.path)  # says what is wrong with it before a lock file is made
        stack.callback(os.close, acquire_lock(options.path))
        made = not exists(options.path)
        try:
            summary = _into(file, options, progress)
        except BaseException:
            if made:
                _remove(options.path)
            raise
    summary.seconds = time.monotonic() - begun
    return summary


def _into(file: ReferenceFile, options: JournalOptions, progress: Callable[[int, int], None]) -> Summary:
    connection = open_for_writing(options)
    try:
        connection.execute("BEGIN IMMEDIATE")
        summary = Importer(connection, file, progress).run()
        file.check_unchanged()
        connection.execute("COMMIT")
        if not options.external_checkpoints:
            connection.wal_checkpoint("main", apsw.SQLITE_CHECKPOINT_TRUNCATE)
            # The last connection to close may now remove the empty WAL.
            connection.config(apsw.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, 0)
    except apsw.Error as error:
        raise startup_error(options.path, error) from error
    finally:
        connection.close(True)  # rolls back what is not committed
    return summary


def _remove(path: str) -> None:
    path = os.path.realpath(path)
    for name in (path, path + "-wal", path + "-shm"):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)


class Importer:
    """Writes into `connection`, within the caller's transaction. Raises DamagedReferenceError or apsw.Error."""

    def __init__(self, connection: apsw.Connection, file: ReferenceFile, progress: Callable[[int, int], None]) -> None:
        self._connection = connection
        self._file = file
        self._rows = ReferenceRows(file)
        self._progress = progress
        self._mark = f"imported {file.origin:016x}"
        self._summary = Summary()
        self._batch = self._value("last_batch") + 1
        #: Ids up to it came over before; some may have been forgotten since.
        self._imported_through = self._value("mark", self._mark)
        #: Where no submission can be known, none is looked up.
        self._was_empty = bool(self._value("is_empty"))
        self._now_us = time.time_ns() // 1_000
        self._total = 0
        self._seen = 0

    def run(self) -> Summary:
        """All of it."""
        self._total = self._rows.total()
        self._progress(0, self._total)
        last = 0
        self._check_prefixes()
        for old in self._rows.submissions():
            last = max(last, old.id)
            if self._is_known(old.id):
                self._summary.known += 1
            else:
                self._bring(old)
        self._set_marks(last)
        self._progress(self._total, self._total)
        return self._summary

    def _check_prefixes(self) -> None:
        """Before anything is written: two of one prefix inside the old file are two submissions there as well."""
        if self._was_empty:
            return
        for old in self._rows.submissions():
            if old.state is not State.IN_PROGRESS:
                break
            if old.prefix is None or self._is_known(old.id):
                continue
            row = self._connection.execute(_SQL["unfinished_with_prefix"], (old.prefix, old.id)).fetchone()
            if row is not None:
                raise PrefixInUseError(path=self._file.path, submission=old.id, other=row[0])

    def _is_known(self, submission: int) -> bool:
        if submission <= self._imported_through:
            return True
        if self._was_empty:
            return False
        return self._connection.execute(_SQL["is_known"], (submission,)).fetchone() is not None

    def _bring(self, old: OldSubmission) -> None:
        not_done, retried = self._rows.summary_of_not_done(old)
        done = old.chunks_total - not_done
        state, ended_us = old.state, old.ended_us
        if state is State.IN_PROGRESS:
            if old.chunks_done is not None and done > old.chunks_done:
                lost = done - old.chunks_done
                raise self._file.damaged(f"submission {old.id}: {lost} chunks are neither waiting nor done")
            if not not_done:
                # empty, or the reference lost its end by counting a chunk twice
                state, ended_us = State.COMPLETED, self._now_us
        elif state in (State.FAILED, State.CANCELLED) and not not_done:
            # its chunks are forgotten already: which were done is not known
            done = old.chunks_done or 0
        strategic = self._rows.strategic_metadata(old.id)
        self._store(old, state, ended_us, done, strategic)
        if state is State.IN_PROGRESS and strategic:
            pairs = [(key, value, old.id) for key, value in strategic.items()]
            self._connection.executemany(_INSERT_STRATEGIC, pairs)
        if not_done and state is not State.COMPLETED:
            self._write_blocks(old)
        if old.prefix is None:
            self._copy_contents(old, state)
        self._count(state, not_done, retried, done)

    def _store(
        self, old: OldSubmission, state: State, ended_us: int | None, done: int, strategic: dict[str, int]
    ) -> None:
        values = (
            old.id,
            int(state),
            old.chunks_total,
            old.chunk_size,
            int(old.prefix is None),
            0 if ended_us is None else done,
            ended_us,
            old.failed_chunk,
            # Nothing looks for that of a direct one, which has no prefix and no key.
            fingerprint(old.chunks_total, None, old.chunk_size, old.metadata, strategic),
            old.prefix,
            _encode_json(strategic).decode(),
            old.otel_trace_carrier,
            old.failure,
            old.metadata,
        )
        try:
            self._connection.execute(_INSERT, values)
        except apsw.ConstraintError as error:
            raise self._file.damaged(f"submission {old.id} is there twice, or makes no sense ({error})") from error

    def _write_blocks(self, old: OldSubmission) -> None:
        rows = block_rows(old.id, old.chunks_total, self._rows.not_done(old), self._reached)
        while True:
            with self._rows.reading():
                some = list(islice(rows, _BLOCKS_AT_ONCE))
            if not some:
                return
            write_blocks(self._connection, self._batch, some)

    def _reached(self, chunk: int) -> None:
        self._progress(min(self._seen + chunk, self._total), self._total)

    def _copy_contents(self, old: OldSubmission, state: State) -> None:
        if state is not State.COMPLETED:
            inputs = ((old.id, chunk, content) for chunk, content in self._rows.inputs(old))
            self._connection.executemany(_INSERT_INPUT, inputs)
        outputs = ((old.id, chunk, content) for chunk, content in self._rows.outputs(old))
        self._connection.executemany(_INSERT_OUTPUT, outputs)

    def _count(self, state: State, not_done: int, retried: int, done: int) -> None:
        summary = self._summary
        match state:
            case State.COMPLETED:
                summary.completed += 1
            case State.FAILED:
                summary.failed += 1
            case State.CANCELLED:
                summary.cancelled += 1
            case _:
                summary.unfinished += 1
                summary.waiting += not_done
                summary.retried += retried
                summary.done += done
                self._seen += not_done + done
                self._progress(self._seen, self._total)

    def _set_marks(self, last: int) -> None:
        id_mark_ms = max(self._value("mark", "id_mark_ms"), last >> (INSTANCE_BITS + SEQUENCE_BITS))
        for name, value in (
            ("last_batch", self._batch),
            ("id_mark_ms", id_mark_ms),
            (self._mark, max(last, self._imported_through)),
        ):
            self._connection.execute(_SET_MARK, (name, value))

    def _value(self, query: str, *values: str) -> int:
        ((value,),) = self._connection.execute(_SQL[query], values)
        return int(value)

"""What a reference server's tables say, as values: submissions, and the chunks of one. In streams, each row checked.

A chunk of an unfinished submission is in `chunks` until it is done. `chunks_completed` cannot tell which are done: the
reference forgets its rows after --max-submission-age, also those of a submission that still runs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import apsw
import msgspec

from opsqueue.server.importing.reference_file import ReferenceFile
from opsqueue.server.sql import queries
from opsqueue.server.writer.batch import State

_SQL = queries("importing")
#: Midnight of 1970-01-01 as a Julian day, and a day in microseconds.
_EPOCH_JULIAN_DAY: Final = 2440587.5
_DAY_US: Final = 86_400_000_000
_LARGEST: Final = 2**63 - 1
#: What the reference takes when no size was given.
_DEFAULT_CHUNK_SIZE: Final = 1

_carrier = msgspec.json.Decoder(dict[str, str]).decode


@dataclass(frozen=True, slots=True)
class OldSubmission:
    """One submission as the reference knew it. `state` is IN_PROGRESS, COMPLETED, FAILED or CANCELLED."""

    id: int
    state: State
    #: None: a direct submission.
    prefix: str | None
    chunks_total: int
    #: As the reference counted; None: it did not say. It counts a chunk twice that is reported twice.
    chunks_done: int | None
    chunk_size: int
    otel_trace_carrier: str
    metadata: bytes | None
    #: Microseconds since the Unix epoch; None: unfinished.
    ended_us: int | None
    failed_chunk: int | None
    failure: str | None


class ReferenceRows:
    """Everything that is brought over, from `file`. Raises DamagedReferenceError, which names
    the submission."""

    def __init__(self, file: ReferenceFile) -> None:
        self._file = file
        self._has_cancelled = "submissions_cancelled" in file.tables

    def total(self) -> int:
        """Chunks of all unfinished submissions."""
        ((total,),) = self._read("old_total")
        return int(total)

    def submissions(self) -> Iterator[OldSubmission]:
        """The unfinished ones by id, then the ended ones."""
        yield from self._submissions("old_unfinished", "submissions", State.IN_PROGRESS)
        yield from self._submissions("old_completed", "submissions_completed", State.COMPLETED)
        yield from self._submissions("old_failed", "submissions_failed", State.FAILED)
        if self._has_cancelled:
            yield from self._submissions("old_cancelled", "submissions_cancelled", State.CANCELLED)

    def strategic_metadata(self, submission: int) -> dict[str, int]:
        """Its pairs."""
        return dict(self._read("old_strategic", submission))

    def summary_of_not_done(self, old: OldSubmission) -> tuple[int, int]:
        """How many of its chunks are not done (they wait, or its end skipped them), and how many of these have retries.

        Checks all of them.
        """
        query = _by_end(old, "old_waiting_summary", "old_not_done_summary")
        ((count, first, last, least_retries, retried),) = self._read(query, old.id)
        if count > old.chunks_total:
            raise self._file.damaged(f"submission {old.id} of {old.chunks_total} chunks has {count} that wait")
        if count:
            self._check_chunk(old, first)
            self._check_chunk(old, last)
        if least_retries < 0:
            raise self._file.damaged(f"table chunks, submission {old.id}: a chunk with {least_retries} retries")
        return count, retried

    def not_done(self, old: OldSubmission) -> Iterator[tuple[int, int]]:
        """Chunk and retries of each that is not done, in order. Raises apsw.Error instead; see `reading`."""
        return self._file.connection.execute(_SQL[_by_end(old, "old_waiting", "old_not_done")], (old.id,))

    @contextmanager
    def reading(self) -> Iterator[None]:
        """An apsw.Error inside is this file's: raises DamagedReferenceError."""
        try:
            yield
        except apsw.Error as error:
            raise self._file.damaged(str(error)) from error

    def inputs(self, old: OldSubmission) -> Iterator[tuple[int, bytes]]:
        """Chunk and input of each that is not done; one that was inserted without a content has an empty one."""
        for chunk, content in self._read(_by_end(old, "old_inputs", "old_not_done_inputs"), old.id):
            yield chunk, self._bytes(old, chunk, content or b"")

    def outputs(self, old: OldSubmission) -> Iterator[tuple[int, bytes]]:
        """Chunk and output of each that is done, as far as the reference still has it."""
        for chunk, content in self._read("old_outputs", old.id):
            self._check_chunk(old, chunk)
            yield chunk, self._bytes(old, chunk, content)

    def _submissions(self, query: str, table: str, state: State) -> Iterator[OldSubmission]:
        for row in self._read(query):
            yield self._submission(row, table, state)

    def _submission(self, row: tuple[Any, ...], table: str, state: State) -> OldSubmission:
        (submission, prefix, total, done, size, carrier, metadata, ended, failed_chunk, failure) = row
        checks: tuple[tuple[bool, str], ...] = (
            (_is_count(submission) and submission > 0, "its id is not a positive number"),
            (prefix is None or isinstance(prefix, str), "its prefix is not a text"),
            (_is_count(total), f"{total!r} chunks"),
            (done is None or _is_count(done), f"{done!r} chunks done"),
            (size is None or _is_count(size), f"chunk size {size!r}"),
            (metadata is None or isinstance(metadata, bytes), "its metadata are not bytes"),
            (state is State.IN_PROGRESS or isinstance(ended, int | float), f"it ended at {ended!r}"),
            (failed_chunk is None or _is_count(failed_chunk), f"chunk {failed_chunk!r} failed"),
            (_is_carrier(carrier), "its trace carrier is not a JSON object of texts"),
        )
        for holds, what in checks:
            if not holds:
                raise self._file.damaged(f"table {table}, row {submission!r}: {what}")
        if isinstance(failure, bytes):
            failure = failure.decode(errors="replace")
        return OldSubmission(
            id=submission,
            state=state,
            prefix=prefix,
            chunks_total=total,
            chunks_done=done,
            chunk_size=_DEFAULT_CHUNK_SIZE if size is None else size,
            otel_trace_carrier=carrier,
            metadata=metadata,
            ended_us=None if ended is None else round((ended - _EPOCH_JULIAN_DAY) * _DAY_US),
            failed_chunk=failed_chunk,
            failure=(failure or "") if state is State.FAILED else None,
        )

    def _check_chunk(self, old: OldSubmission, chunk: int) -> None:
        if not 0 <= chunk < old.chunks_total:
            raise self._file.damaged(f"submission {old.id} of {old.chunks_total} chunks has a chunk {chunk}")

    def _bytes(self, old: OldSubmission, chunk: int, content: object) -> bytes:
        if not isinstance(content, bytes):
            raise self._file.damaged(f"submission {old.id}, chunk {chunk}: its content is not bytes")
        return content

    def _read(self, query: str, *values: int) -> Iterator[tuple[Any, ...]]:
        with self.reading():
            yield from self._file.connection.execute(_SQL[query], values)


def _by_end(old: OldSubmission, unfinished: str, ended: str) -> str:
    return unfinished if old.state is State.IN_PROGRESS else ended


def _is_count(value: object) -> bool:
    return isinstance(value, int) and 0 <= value <= _LARGEST


def _is_carrier(text: object) -> bool:
    try:
        return isinstance(text, str) and isinstance(_carrier(text), dict)
    except msgspec.DecodeError:
        return False

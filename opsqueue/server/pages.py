"""One page of submissions from the file: which they are, and where the next page begins. Asks nobody else.

A page costs a bounded number of rows and bytes, whatever the file holds: one that has looked at enough ends early, even
without a submission, and says where to go on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from opsqueue.server.reader import Reader, SubmissionStatus
from opsqueue.server.writer.batch import State

#: Rows that are looked at for one page, and in one go.
ROWS_A_PAGE = 10_000
ROWS_AT_ONCE = 1_000
#: Bytes of metadata, failures and inputs after which a page ends; they take about four times as many as JSON.
BYTES_A_PAGE = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Filter:
    """Which submissions are wanted. `state` None: any. Every pair must match."""

    state: State | None = None
    pairs: Mapping[str, int] = field(default_factory=dict)

    def takes(self, state: State, strategic: Mapping[str, int]) -> bool:
        """Whether a submission in this state with this strategic metadata is wanted."""
        return self.state in (None, state) and all(strategic.get(key) == value for key, value in self.pairs.items())


@dataclass(frozen=True, slots=True)
class Page:
    """Submissions by id. `last`: the next page is what comes after this id; None: there is nothing more."""

    rows: list[SubmissionStatus]
    last: int | None


def read_page(reader: Reader, wanted: Filter, after: int, limit: int) -> Page:
    """At most `limit` submissions above id `after`. Raises ReadError."""
    rows: list[SubmissionStatus] = []
    looked_at = size = 0
    pair = reader.rarest(wanted.pairs) if wanted.pairs else None
    while looked_at < ROWS_A_PAGE:
        found = reader.candidates(after, wanted.state, pair, ROWS_AT_ONCE)
        for submission, state, strategic in found:
            if wanted.takes(state, strategic):
                if len(rows) == limit or size > BYTES_A_PAGE:
                    return Page(rows, after)
                row = reread(reader, wanted, submission)
                if row is not None:
                    rows.append(row)
                    size += _size(row)
            after = submission
        if len(found) < ROWS_AT_ONCE:
            return Page(rows, None)
        looked_at += len(found)
    return Page(rows, after)


def reread(reader: Reader, wanted: Filter, submission: int) -> SubmissionStatus | None:
    """The submission as it is now; None when it is not wanted any more, or forgotten. Raises ReadError."""
    row = reader.status(submission)
    return row if row is not None and wanted.takes(row.state, row.description.strategic_metadata) else None


def _size(row: SubmissionStatus) -> int:
    return len(row.description.metadata or b"") + len(row.failure or "") + len(row.failed_chunk_input or b"")

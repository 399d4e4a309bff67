"""Pages read from a file: bounded work whatever it holds, by indexes, and every submission once."""

from __future__ import annotations

from collections.abc import Iterator

import apsw
import pytest

from opsqueue.server.pages import ROWS_A_PAGE, Filter, read_page
from opsqueue.server.reader import Reader
from opsqueue.server.sql import queries
from opsqueue.server.writer.batch import Batch, JournalOptions, State
from opsqueue.server.writer.journal import SqliteJournal
from tests.support.journals import ended, new_submission

#: More than two pages look at; every 5,000th has failed, every 7th has the pair that counts.
TOTAL = 2 * ROWS_A_PAGE + 3_000
EVERY = 5_000


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Completed submissions, but for the failed ones and the last 100, which are in progress."""
    path = str(tmp_path_factory.mktemp("pages") / "queue.db")
    journal = SqliteJournal(JournalOptions(path))
    inserts = tuple(
        new_submission(number, strategic={"seventh": number % 7, "all": 1}) for number in range(1, TOTAL + 1)
    )
    ends = tuple(ended(number, State.COMPLETED if number % EVERY else State.FAILED) for number in range(1, TOTAL - 99))
    assert journal.apply(Batch(1, inserts=inserts)).failure is None
    assert journal.apply(Batch(2, ended=ends)).failure is None
    journal.close()
    return path


@pytest.fixture
def reader(path: str) -> Iterator[Reader]:
    made = Reader(path)
    yield made
    made.close()


def all_pages(reader: Reader, wanted: Filter, limit: int) -> tuple[list[int], int]:
    """Ids in order, and how many pages it took."""
    found: list[int] = []
    after: int | None = -1
    pages = 0
    while after is not None:
        page = read_page(reader, wanted, after, limit)
        assert len(page.rows) <= limit
        found += [row.submission for row in page.rows]
        after = page.last
        pages += 1
    return found, pages


def test_what_matches_nothing_is_looked_for_in_bounded_pieces(reader: Reader) -> None:
    page = read_page(reader, Filter(State.COMPLETED, {"nobody": 1}), -1, 10)
    assert (page.rows, page.last) == ([], ROWS_A_PAGE)
    assert all_pages(reader, Filter(State.COMPLETED, {"nobody": 1}), 10) == ([], 3)
    assert all_pages(reader, Filter(None, {"nobody": 1}), 10) == ([], 3)


@pytest.mark.parametrize("limit", [1, 3, 1_000])
def test_few_among_many_are_found_without_looking_at_the_others(reader: Reader, limit: int) -> None:
    failed = list(range(EVERY, TOTAL - 99, EVERY))
    found, pages = all_pages(reader, Filter(State.FAILED), limit)
    assert (found, pages) == (failed, -(-len(failed) // limit))
    unfinished, pages = all_pages(reader, Filter(State.IN_PROGRESS, {"seventh": 3, "all": 1}), 1_000)
    assert (unfinished, pages) == ([n for n in range(TOTAL - 99, TOTAL + 1) if n % 7 == 3], 1)
    assert all_pages(reader, Filter(State.PAUSED), limit) == ([], 1)


@pytest.mark.parametrize("limit", [999, 1_000])
def test_every_match_comes_once_in_order(reader: Reader, limit: int) -> None:
    assert all_pages(reader, Filter(), limit)[0] == list(range(1, TOTAL + 1))
    seventh = [number for number in range(1, TOTAL + 1) if number % 7 == 2]
    assert all_pages(reader, Filter(None, {"seventh": 2}), limit)[0] == seventh
    completed = [number for number in range(1, TOTAL - 99) if number % EVERY]
    assert all_pages(reader, Filter(State.COMPLETED), limit)[0] == completed


def test_no_page_sorts_or_scans(path: str) -> None:
    texts = queries("reader")
    for name in ("after", "after_unfinished", "after_rare_state", "after_with_pair"):
        connection = apsw.Connection(path, flags=apsw.SQLITE_OPEN_READONLY)
        connection.config(apsw.SQLITE_DBCONFIG_ENABLE_QPSG, 1)
        text = texts[name]
        rows = connection.execute("EXPLAIN QUERY PLAN " + text, (None,) * text.count("?")).fetchall()
        plan = [str(row[3]) for row in rows]
        assert not any("SCAN" in step or "TEMP B-TREE" in step for step in plan), (name, plan)
        connection.close()

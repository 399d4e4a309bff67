"""Retries in the writer: at any moment after the failure it knows what was done, in memory or in the block table."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from opsqueue.server import requests
from opsqueue.server.writer import folding
from opsqueue.server.writer.batch import State
from tests.support.bare_writer import BareWriter, bare_writer
from tests.support.server import wait_until


def inserted(reply: requests.Reply) -> int:
    assert isinstance(reply, requests.Inserted), reply
    return reply.submission


def fail_after(writer: BareWriter, submission: int, done: list[int]) -> None:
    """Complete these and fail the next one, over connection 1; nothing is waited for."""
    [held] = writer.reserve(1)
    assert held.submission == submission
    for chunk in done:
        writer.complete(1, submission, chunk)
    writer.fail(1, submission, held.chunk, b"no")


def chunks_of(writer: BareWriter, submission: int, maximum: int = 100) -> list[int]:
    held = writer.reserve(1, maximum)
    assert {each.submission for each in held} == {submission}
    assert {each.retries for each in held} == {0}
    return [each.chunk for each in held]


def test_a_retry_right_behind_the_failure_has_what_was_done(tmp_path: Path) -> None:
    with bare_writer(tmp_path / "q.db", max_chunk_retries=1) as writer:
        writer.open(1)
        submission = inserted(writer.insert("p", 9))
        fail_after(writer, submission, [2, 3, 8])
        asked = [writer.ask(requests.Retry(submission, 9)) for _ in range(3)]
        answers = [writer.answer(number) for number in asked]
        again = inserted(answers[0])
        assert answers == [requests.Inserted(again, known) for known in (False, True, True)]
        assert writer.call(requests.Progresses([submission, again, 5])) == requests.Progressed([None, 3, None])
        assert chunks_of(writer, again) == [0, 1, 4, 5, 6, 7]
        assert writer.call(requests.Counts()) == requests.Counted(in_progress=1, completed=0)


def test_a_retry_of_what_fails_only_now_is_refused_or_made_never_half(tmp_path: Path) -> None:
    with bare_writer(tmp_path / "q.db", max_chunk_retries=1) as writer:
        submission = inserted(writer.insert("p", 9))
        assert writer.call(requests.Retry(submission, 9)) == requests.NotRetryable(State.IN_PROGRESS, None)
        cancel = writer.ask(requests.Cancel(submission))
        refused = writer.ask(requests.Retry(submission, 9))
        assert writer.answer(cancel) == requests.Done()
        assert writer.answer(refused) == requests.NotRetryable(State.CANCELLED, None)
        assert writer.call(requests.Retry(5, 9)) == requests.NotHeld()


@pytest.mark.parametrize("killed", [False, True])
def test_what_was_done_is_found_in_the_block_table_once_it_is_folded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed: bool
) -> None:
    monkeypatch.setattr(folding, "FOLD_AFTER_ROWS", 1)  # inherited by the forked writer
    path = tmp_path / "q.db"
    total = 3 * 4096
    done = [0, 5, 4096, *range(8192, total)]
    with bare_writer(path, max_chunk_retries=1) as writer:
        submission = inserted(writer.insert("p", total))
        writer.open(1)
        held = writer.reserve(1, 2)
        for chunk in done:
            writer.complete(1, submission, chunk)
        writer.fail(1, submission, held[1].chunk, b"no")

        def folded() -> bool:
            writer.status(submission)  # each answer may go with a commit, which folds
            with closing(sqlite3.connect(path)) as database:
                log = database.execute("SELECT count(*) FROM log").fetchone()[0]
                blocks = database.execute("SELECT count(*) FROM blocks").fetchone()[0]
                return bool(log == 0 and blocks == 3)

        wait_until(folded, "the log is folded into blocks")
        if killed:
            writer.kill()
            writer.start()
        again = inserted(writer.call(requests.Retry(submission, total)))
        if killed:
            writer.kill()
            writer.start()
            writer.open(1)
        assert writer.status(again) == requests.Progress(len(done), False)
        expected = sorted(set(range(total)) - set(done))
        given: list[int] = []
        while len(given) < len(expected):
            given += chunks_of(writer, again, 4096)
        assert given == expected
        assert inserted(writer.call(requests.Retry(submission, total))) == again


def test_retries_at_once_and_ends_meanwhile_are_counted_right(tmp_path: Path) -> None:
    with bare_writer(tmp_path / "q.db", max_chunk_retries=1) as writer:
        writer.open(1)
        failed = []
        for number in range(5):
            failed.append(inserted(writer.insert(f"p{number}", 4)))
            fail_after(writer, failed[-1], [1, 2])
        asked = [writer.ask(requests.Retry(submission, 4)) for submission in failed]
        retries = [inserted(writer.answer(number)) for number in asked]
        assert writer.call(requests.Counts()) == requests.Counted(in_progress=5, completed=0)
        for submission in retries:
            writer.complete(1, submission, 0)
            writer.complete(1, submission, 3)
        assert writer.call(requests.Progresses(retries)) == requests.Progressed([None] * 5)
        assert writer.call(requests.Counts()) == requests.Counted(in_progress=0, completed=5)

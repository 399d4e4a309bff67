"""A disk that refuses writes, under a whole writer process: memory and file agree, nothing applied is lost.

The refusal is the kernel's: a limit on the size of files that the writer may write, set and lifted while it runs.
"""

import resource
from pathlib import Path

import pytest

from opsqueue.server import requests
from opsqueue.server.writer import commits, folding
from opsqueue.server.writer.batch import State
from tests.support.bare_writer import BareWriter, bare_writer


def refuse_writes(writer: BareWriter) -> None:
    resource.prlimit(writer.pid, resource.RLIMIT_FSIZE, (1, resource.RLIM_INFINITY))


def allow_writes(writer: BareWriter) -> None:
    resource.prlimit(writer.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def inserted(reply: requests.Reply) -> int:
    assert isinstance(reply, requests.Inserted), reply
    return reply.submission


def test_while_commits_fail_staged_changes_are_refused_and_consumers_go_on(tmp_path: Path) -> None:
    with bare_writer(tmp_path / "q.db") as writer:
        submission = inserted(writer.insert("p", 10))
        writer.open(1)
        refuse_writes(writer)
        assert isinstance(writer.insert("q", 1), requests.Unavailable)
        assert isinstance(writer.call(requests.Cancel(submission)), requests.Unavailable)
        assert isinstance(writer.call(requests.Pause(submission, True)), requests.Unavailable)
        assert isinstance(writer.call(requests.Ping()), requests.Unavailable)
        for chunk in range(4):
            [held] = writer.reserve(1)
            assert held.chunk == chunk, "a refused cancel and a refused pause leave it handed out"
            writer.complete(1, submission, chunk)
        allow_writes(writer)
        assert writer.status(submission) == requests.Progress(chunks_done=4, paused=False)
        assert writer.call(requests.Ping()) == requests.Done()
        writer.kill()
        writer.start()
        assert writer.status(submission) == requests.Progress(chunks_done=4, paused=False)
        assert writer.call(requests.Counts()) == requests.Counted(in_progress=1, completed=0)


def test_a_status_waits_for_the_commit_that_covers_it_however_long_commits_fail(tmp_path: Path) -> None:
    with bare_writer(tmp_path / "q.db") as writer:
        submission = inserted(writer.insert("p", 2))
        writer.open(1)
        writer.reserve(1, 2)
        refuse_writes(writer)
        writer.complete(1, submission, 0)
        asked = writer.ask(requests.Status(submission))
        for _ in range(3):
            assert isinstance(writer.insert("q", 1), requests.Unavailable)  # three commits more that failed
        assert not writer.has_answered(asked)
        allow_writes(writer)
        assert writer.answer(asked) == requests.Progress(chunks_done=1, paused=False)


def test_an_end_that_could_not_be_stored_is_stored_later_and_survives(tmp_path: Path) -> None:
    with bare_writer(tmp_path / "q.db", max_chunk_retries=1) as writer:
        completed = inserted(writer.insert("p", 1))
        failed = inserted(writer.insert("q", 1))
        writer.open(1)
        writer.reserve(1, 2)
        refuse_writes(writer)
        writer.complete(1, completed, 0)
        writer.fail(1, failed, 0, b"boom")
        assert isinstance(writer.insert("r", 1), requests.Unavailable)
        allow_writes(writer)
        assert writer.status(completed) == requests.NotHeld()
        assert writer.status(failed) == requests.NotHeld()
        writer.kill()
        writer.start()
        assert writer.call(requests.Counts()) == requests.Counted(in_progress=0, completed=1)


def test_a_writer_killed_while_commits_fail_loses_only_what_nobody_was_told(tmp_path: Path) -> None:
    with bare_writer(tmp_path / "q.db") as writer:
        submission = inserted(writer.insert("p", 5))
        writer.open(1)
        writer.reserve(1, 5)
        writer.complete(1, submission, 0)
        assert writer.status(submission) == requests.Progress(chunks_done=1, paused=False)
        refuse_writes(writer)
        writer.complete(1, submission, 1)
        assert isinstance(writer.insert("q", 1), requests.Unavailable)
        writer.kill()
        writer.start()
        assert writer.status(submission) == requests.Progress(chunks_done=1, paused=False)
        writer.open(1)
        assert [held.chunk for held in writer.reserve(1, 9)] == [1, 2, 3, 4]


def test_a_writer_that_cannot_store_for_long_takes_nothing_more_until_it_can_and_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(commits, "LARGEST_CARRIED_BYTES", 200)
    with bare_writer(tmp_path / "q.db") as writer:
        submission = inserted(writer.insert("p", 3_000))
        writer.open(1)
        held = writer.reserve(1, 400)
        refuse_writes(writer)
        with writer.stopped():  # it finds all of this at once
            for each in held:
                writer.complete(1, submission, each.chunk)
            insert = writer.ask_insert("q", 1)
        # Answered by the commit that fails with more than it may carry; from then on nothing is taken.
        assert isinstance(writer.answer(insert), requests.Unavailable)
        nonce = writer.want(1, 1)
        asked = writer.ask(requests.Status(submission))
        assert not writer.has_answered(asked)
        allow_writes(writer)
        assert writer.answer(asked) == requests.Progress(chunks_done=400, paused=False)
        writer.until(lambda: nonce in writer.reserved)
        writer.kill()
        writer.start()
        assert writer.status(submission) == requests.Progress(chunks_done=400, paused=False)


def test_a_retry_that_cannot_be_stored_is_refused_and_complete_when_it_can(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folding, "FOLD_AFTER_ROWS", 1)  # inherited by the forked writer: it folds all the time
    with bare_writer(tmp_path / "q.db", max_chunk_retries=1) as writer:
        writer.open(1)
        for number in range(20):
            submission = inserted(writer.insert(f"p{number}", 9))
            writer.reserve(1)
            refuse_writes(writer)
            writer.complete(1, submission, 5)
            assert isinstance(writer.insert("q", 1), requests.Unavailable)
            writer.fail(1, submission, 0, b"boom")
            for _ in range(number % 3 + 1):
                assert isinstance(writer.call(requests.Retry(submission, 9)), requests.Unavailable)
            allow_writes(writer)
            if number % 2:
                writer.kill()
                writer.start()
                writer.open(1)
            again = until_stored(writer, requests.Retry(submission, 9), submission)
            assert writer.status(again) == requests.Progress(chunks_done=1, paused=False)
            assert writer.call(requests.Cancel(again)) == requests.Done()


def until_stored(writer: BareWriter, retry: requests.Retry, submission: int) -> int:
    """The retry's id. A killed writer may have forgotten the failure, which no commit had stored: it fails again."""
    while True:
        match writer.call(retry):
            case requests.Inserted(submission=again):
                return again
            case requests.Unavailable():
                pass
            case requests.NotRetryable(state=State.IN_PROGRESS):
                writer.complete(1, submission, 5)
                [held] = writer.reserve(1)
                writer.fail(1, submission, held.chunk, b"boom")
            case reply:
                raise AssertionError(reply)

"""The journal's thread: one batch at a time, outcomes and failures reach the loop, nothing is lost at the end."""

from __future__ import annotations

import os
import select
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from opsqueue.server.writer.batch import Batch, Journal, JournalOptions, Loaded, Outcome, RecoverySink, State
from opsqueue.server.writer.journal import SqliteJournal
from opsqueue.server.writer.journal_thread import JournalThread
from tests.support.journals import Collected, ended, new_submission

WITHIN_MS = 20_000


class Wakes:
    """The loop's side of `wake`."""

    def __init__(self) -> None:
        self.fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def wake(self) -> None:
        os.eventfd_write(self.fd, 1)

    def wait(self) -> None:
        poll = select.poll()
        poll.register(self.fd, select.POLLIN)
        assert poll.poll(WITHIN_MS), "the thread did not wake the loop"
        os.eventfd_read(self.fd)


@pytest.fixture
def wakes() -> Iterator[Wakes]:
    made = Wakes()
    yield made
    os.close(made.fd)


class ScriptedJournal:
    """A journal whose commits wait until the test lets them go; a fault can be put into any call."""

    def __init__(self, apply_error: BaseException | None = None, maintain_error: BaseException | None = None) -> None:
        self.entered = threading.Event()
        self.go = threading.Event()
        self.closed = False
        self.maintained = threading.Semaphore(0)
        self.mask: set[int] = set()
        self._apply_error = apply_error
        self._maintain_error = maintain_error

    def load(self, sink: RecoverySink) -> Loaded:
        return Loaded(0, 0, 0)

    def apply(self, batch: Batch) -> Outcome:
        self.mask = set(signal.pthread_sigmask(signal.SIG_BLOCK, ()))
        self.entered.set()
        assert self.go.wait(WITHIN_MS / 1000)
        if self._apply_error is not None:
            raise self._apply_error
        return Outcome(batch.number)

    def maintain(self) -> bool:
        if self._maintain_error is not None:
            raise self._maintain_error
        self.maintained.release()
        return False

    def close(self) -> None:
        self.closed = True


def test_a_scripted_journal_is_a_journal() -> None:
    journal: Journal = ScriptedJournal()
    assert journal.load(Collected()) == Loaded(0, 0, 0)


def test_it_is_busy_until_the_outcome_is_taken(wakes: Wakes) -> None:
    journal = ScriptedJournal()
    thread = JournalThread(journal, wakes.wake)
    assert not thread.busy
    assert thread.poll() is None
    thread.submit(Batch(1))
    assert journal.entered.wait(WITHIN_MS / 1000)
    assert thread.busy
    assert thread.poll() is None
    with pytest.raises(RuntimeError, match="batch 2"):
        thread.submit(Batch(2))
    journal.go.set()
    wakes.wait()
    assert thread.busy
    assert thread.poll() == Outcome(1)
    assert not thread.busy
    assert thread.poll() is None
    thread.submit(Batch(2))
    wakes.wait()
    assert thread.poll() == Outcome(2)
    assert thread.close(timeout=20)
    assert journal.closed
    assert thread.failed is None


def test_no_signal_is_delivered_to_it_and_the_callers_mask_is_as_before(wakes: Wakes) -> None:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    journal = ScriptedJournal()
    thread = JournalThread(journal, wakes.wake)
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before
    journal.go.set()
    thread.submit(Batch(1))
    wakes.wait()
    assert {signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD} <= journal.mask
    thread.close(timeout=20)


def test_it_cleans_up_while_nothing_is_to_be_stored(wakes: Wakes) -> None:
    journal = ScriptedJournal()
    thread = JournalThread(journal, wakes.wake)
    assert journal.maintained.acquire(timeout=20)
    assert journal.maintained.acquire(timeout=20), "and again after a while"
    thread.close(timeout=20)


def test_it_cleans_up_between_batches_that_come_without_a_break(wakes: Wakes) -> None:
    journal = ScriptedJournal()
    journal.go.set()
    thread = JournalThread(journal, wakes.wake)
    number = 0
    for _ in range(2):
        while not journal.maintained.acquire(blocking=False):
            number += 1
            thread.submit(Batch(number))
            wakes.wait()
            assert thread.poll() is not None
    thread.close(timeout=20)


@pytest.mark.parametrize("where", ["apply_error", "maintain_error"])
def test_an_unexpected_error_reaches_the_loop(wakes: Wakes, where: str) -> None:
    error = ZeroDivisionError("a mistake")
    journal = ScriptedJournal(**{where: error})
    journal.go.set()
    thread = JournalThread(journal, wakes.wake)
    if where == "apply_error":
        thread.submit(Batch(1))
    wakes.wait()
    assert thread.failed is error
    assert thread.close(timeout=20)


def test_closing_gives_up_after_its_time(wakes: Wakes) -> None:
    journal = ScriptedJournal()
    thread = JournalThread(journal, wakes.wake)
    thread.submit(Batch(1))
    assert journal.entered.wait(WITHIN_MS / 1000)
    assert not thread.close(timeout=0.01)
    journal.go.set()
    assert thread.close(timeout=20)


def test_closing_finishes_the_batch_in_hand(wakes: Wakes, tmp_path: Path) -> None:
    options = JournalOptions(str(tmp_path / "queue.db"))
    thread = JournalThread(SqliteJournal(options), wakes.wake)
    thread.submit(Batch(1, inserts=(new_submission(1),)))
    assert thread.close(timeout=20)
    outcome = thread.poll()
    assert outcome is not None
    assert outcome.failure is None
    collected = Collected()
    journal = SqliteJournal(options)
    journal.load(collected)
    journal.close()
    assert collected.states == {1: State.IN_PROGRESS}


def test_old_submissions_are_forgotten_in_the_background(wakes: Wakes, tmp_path: Path) -> None:
    options = JournalOptions(str(tmp_path / "queue.db"), max_submission_age_s=0)
    thread = JournalThread(SqliteJournal(options), wakes.wake)
    thread.submit(Batch(1, inserts=(new_submission(1),)))
    wakes.wait()
    assert thread.poll() is not None
    thread.submit(Batch(2, ended=(ended(1, State.COMPLETED),)))
    wakes.wait()
    assert thread.poll() is not None
    forgotten, number = 0, 2
    while not forgotten:
        number += 1
        thread.submit(Batch(number, id_mark_ms=number))
        wakes.wait()
        outcome = thread.poll()
        assert outcome is not None
        forgotten = outcome.forgotten_completed
    assert thread.close(timeout=20)

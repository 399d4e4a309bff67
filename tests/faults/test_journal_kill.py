"""SIGKILL at random moments of a scripted load: what was acknowledged is in the file, and nothing of it by half.

A child of a warmed-up process applies batches and says each number that is acknowledged; what batch n holds depends on
the seed and n alone, so that the parent can say exactly what the file must hold.
"""

from __future__ import annotations

import contextlib
import os
import random
import select
import signal
import struct
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from opsqueue.server.reader import Reader
from opsqueue.server.writer.batch import (
    Batch,
    BlockRow,
    DirectOutput,
    EndedSubmission,
    Journal,
    JournalOptions,
    NewRetry,
    NewSubmission,
    PauseChange,
    State,
)
from opsqueue.server.writer.journal import SqliteJournal
from opsqueue.server.writer.log_rows import EventKind, LogEvent, encode_events, read_varint, varint
from tests.support.journals import Collected, new_submission

#: Runs; each starts from the file that some run before it left, so that recovery of a recovered file is tested too.
RUNS = 240
#: Runs that share a file one after the other.
RUNS_A_FILE = 4
BLOCK = 4096
COUNT = struct.Struct("<q")


@dataclass
class Submission:
    total: int
    state: State = State.IN_PROGRESS
    done: set[int] = field(default_factory=set)
    retries: Counter[int] = field(default_factory=Counter)
    outputs: dict[int, bytes] = field(default_factory=dict)
    direct: bool = False
    #: The first of those that have the same inputs: a submission, its retry, the retry's retry and so on.
    first: int = 0


@dataclass
class Script:
    """Batches 1, 2, 3 … of a seed, and the state that they lead to."""

    seed: int
    number: int = 0
    submissions: dict[int, Submission] = field(default_factory=dict)
    id_mark_ms: int = 0
    _fold_through: int | None = None
    _fold_left: list[tuple[int, int]] = field(default_factory=list)
    _dirty: set[tuple[int, int]] = field(default_factory=set)

    def next(self) -> Batch:
        self.number += 1
        rng = random.Random(f"{self.seed}.{self.number}")
        inserts = self._insert(rng)
        events, outputs = self._work(rng)
        ended = self._end(rng, exclude={new.submission for new in inserts})
        pauses = self._pause(rng, exclude={new.submission for new in inserts})
        retries = self._retry(rng)
        blocks, log_through = self._fold(rng)
        if rng.random() < 0.1:
            self.id_mark_ms = self.number
        return Batch(
            self.number,
            events=encode_events(events),
            ended=tuple(one for one in ended if one.state is not State.CANCELLED),
            cancelled=tuple(one for one in ended if one.state is State.CANCELLED),
            pauses=pauses,
            inserts=inserts,
            retries=retries,
            outputs=outputs,
            blocks=blocks,
            log_through=log_through,
            id_mark_ms=self.id_mark_ms if self.id_mark_ms == self.number else None,
        )

    def _unfinished(self) -> list[int]:
        return [one for one, it in self.submissions.items() if it.state in (State.IN_PROGRESS, State.PAUSED)]

    def _insert(self, rng: random.Random) -> tuple[NewSubmission, ...]:
        made = []
        while not self.submissions or rng.random() < 0.3:
            submission = len(self.submissions) + 1
            if rng.random() < 0.3:
                contents = [rng.randbytes(rng.randrange(3000)) for _ in range(rng.randint(1, 20))]
                made.append(new_submission(submission, contents=contents))
                self.submissions[submission] = Submission(len(contents), direct=True, first=submission)
            else:
                total = rng.choice([1, 7, 4096, 4097, 20_000])
                made.append(new_submission(submission, count=total, strategic={"n": submission % 3}))
                self.submissions[submission] = Submission(total, first=submission)
        return tuple(made)

    def _work(self, rng: random.Random) -> tuple[list[LogEvent], tuple[DirectOutput, ...]]:
        events, outputs = [], []
        for _ in range(rng.choice([0, 1, 5, 200])):
            unfinished = self._unfinished()
            if not unfinished:
                break
            submission = rng.choice(unfinished)
            it = self.submissions[submission]
            chunk = rng.randrange(it.total)
            if chunk in it.done:
                continue
            if rng.random() < 0.2:
                it.retries[chunk] += 1
                events.append(LogEvent(EventKind.RETRY, submission, chunk))
            else:
                it.done.add(chunk)
                events.append(LogEvent(EventKind.COMPLETION, submission, chunk))
                if it.direct:
                    it.outputs[chunk] = rng.randbytes(rng.randrange(3000))
                    outputs.append(DirectOutput(submission, chunk, it.outputs[chunk]))
            self._dirty.add((submission, chunk // BLOCK))
        return events, tuple(outputs)

    def _end(self, rng: random.Random, exclude: set[int]) -> list[EndedSubmission]:
        ended = []
        for submission in self._unfinished():
            it = self.submissions[submission]
            if submission in exclude:
                continue
            if len(it.done) == it.total:
                it.state = State.COMPLETED
            elif rng.random() < 0.02:
                it.state = rng.choice([State.FAILED, State.CANCELLED])
            else:
                continue
            failed = it.state is State.FAILED
            ended.append(
                EndedSubmission(
                    submission, it.state, len(it.done), self.number, 0 if failed else None, "no" if failed else None
                )
            )
        return ended

    def _retry(self, rng: random.Random) -> tuple[NewRetry, ...]:
        """Of one that has failed, while nothing works on the same inputs; its blocks come along, as from the engine."""
        busy = {it.first for it in self.submissions.values() if it.state not in (State.FAILED, State.CANCELLED)}
        failed = [one for one, it in self.submissions.items() if it.state is State.FAILED and it.first not in busy]
        if not failed or rng.random() > 0.3:
            return ()
        submission = rng.choice(failed)
        it = self.submissions[submission]
        retry = len(self.submissions) + 1
        self.submissions[retry] = Submission(
            it.total, done=set(it.done), outputs=dict(it.outputs), direct=it.direct, first=it.first
        )
        blocks = [self._block(submission, block) for block in sorted({chunk // BLOCK for chunk in it.done})]
        return (NewRetry(retry, submission, it.total, tuple((row.block, row.done) for row in blocks)),)

    def _pause(self, rng: random.Random, exclude: set[int]) -> tuple[PauseChange, ...]:
        changes = []
        for submission in self._unfinished():
            if submission not in exclude and rng.random() < 0.05:
                it = self.submissions[submission]
                paused = it.state is State.IN_PROGRESS
                it.state = State.PAUSED if paused else State.IN_PROGRESS
                changes.append(PauseChange(submission, paused))
        return tuple(changes)

    def _fold(self, rng: random.Random) -> tuple[tuple[BlockRow, ...], int | None]:
        if self._fold_through is None:
            if rng.random() > 0.2:
                return (), None
            self._fold_through = self.number
            self._fold_left = sorted(self._dirty)
            self._dirty = set()
        now, self._fold_left = self._fold_left[:3], self._fold_left[3:]
        through = None
        if not self._fold_left:
            through, self._fold_through = self._fold_through, None
        return tuple(self._block(*key) for key in now), through

    def _block(self, submission: int, block: int) -> BlockRow:
        it = self.submissions[submission]
        begin = block * BLOCK
        chunks = min(BLOCK, it.total - begin)
        done = bytearray((chunks + 7) // 8)
        attempts = bytearray()
        for i in range(chunks):
            if begin + i in it.done:
                done[i // 8] |= 1 << i % 8
            if it.retries[begin + i]:
                attempts += varint(i) + varint(it.retries[begin + i]) + varint(0)
        all_done = all(begin + i in it.done for i in range(chunks))
        return BlockRow(submission, block, b"" if all_done else bytes(done), bytes(attempts))


def loaded_attempts(collected: Collected) -> Counter[tuple[int, int]]:
    """Retries per (submission, chunk), from blocks and log."""
    found: Counter[tuple[int, int]] = Counter()
    for row in collected.blocks:
        at = 0
        while at < len(row.attempts):
            offset, at = read_varint(row.attempts, at)
            count, at = read_varint(row.attempts, at)
            _, at = read_varint(row.attempts, at)
            found[row.submission, row.block * BLOCK + offset] += count
    for event in collected.log:
        if event.kind is EventKind.RETRY:
            found[event.submission, event.chunk] += 1
    return found


def assert_holds(path: str, collected: Collected, script: Script) -> None:
    """The file is exactly what the batches up to the script's number make it."""
    unfinished = {
        submission: it for submission, it in script.submissions.items() if it.state in (State.IN_PROGRESS, State.PAUSED)
    }
    states = {key: state for key, state in collected.states.items() if state in (State.IN_PROGRESS, State.PAUSED)}
    assert states == {submission: it.state for submission, it in unfinished.items()}
    done = {(submission, chunk) for submission, chunk in collected.done() if submission in unfinished}
    assert done == {(submission, chunk) for submission, it in unfinished.items() for chunk in it.done}
    retries = {key: count for key, count in loaded_attempts(collected).items() if key[0] in unfinished}
    assert retries == {
        (submission, chunk): count for submission, it in unfinished.items() for chunk, count in it.retries.items()
    }
    reader = Reader(path)
    for submission, it in script.submissions.items():
        status = reader.status(submission)
        assert status is not None
        assert status.state is it.state
        assert status.description.chunks_total == it.total
        if it.state in (State.COMPLETED, State.FAILED, State.CANCELLED):
            assert status.chunks_done == len(it.done)
        for chunk, content in it.outputs.items():
            assert reader.direct_output(submission, chunk) == content
    assert reader.status(len(script.submissions) + 1) is None
    for value in range(3):
        expected = [one for one, it in unfinished.items() if not it.direct and it.first % 3 == value]
        assert reader.lookup_by_strategic_metadata({"n": value}, 10_000) == expected
    reader.close()


def matching_script(seed: int, acknowledged: int, path: str) -> int:
    """Batches of the seed that the file holds: those acknowledged, or one more that was on its way."""
    collected = Collected()
    journal = SqliteJournal(JournalOptions(path))
    journal.load(collected)
    journal.close()
    mismatch: AssertionError | None = None
    for batches in (acknowledged, acknowledged + 1):
        script = Script(seed)
        while script.number < batches:
            script.next()
        try:
            assert_holds(path, collected, script)
        except AssertionError as error:
            mismatch = mismatch or error
        else:
            return batches
    raise AssertionError(f"seed {seed}, {acknowledged} acknowledged") from mismatch


def load_until_killed(path: str, seed: int, begin: int, options: JournalOptions, acknowledge: int) -> None:
    """In the child: apply the seed's batches after `begin`, saying each number once its commit has succeeded."""
    script = Script(seed)
    while script.number < begin:
        script.next()
    journal: Journal = SqliteJournal(options)
    journal.load(Collected())
    os.write(acknowledge, COUNT.pack(begin))
    while True:
        batch = script.next()
        outcome = journal.apply(batch)
        if outcome.failure is not None:
            os.write(acknowledge, COUNT.pack(-1))
            return
        os.write(acknowledge, COUNT.pack(batch.number))


def run_and_kill(path: str, seed: int, begin: int, options: JournalOptions, after_s: float) -> int:
    """The last number that the child acknowledged before it was killed, `after_s` seconds after it was ready."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):  # whatever it is, the parent sees the pipe end too early
            os.close(read)
            load_until_killed(path, seed, begin, options, write)
        os._exit(1)
    os.close(write)
    said = bytearray(os.read(read, COUNT.size))
    # Not waiting for anything to happen: this is the random moment.
    select.select([], [], [], after_s)
    os.kill(child, signal.SIGKILL)
    while part := os.read(read, 65_536):
        said += part
    os.close(read)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), "the child ended by itself"
    numbers = [number for (number,) in COUNT.iter_unpack(said[: len(said) // COUNT.size * COUNT.size])]
    assert -1 not in numbers, "a commit failed"
    return numbers[-1]


@pytest.mark.timeout(300)
def test_what_was_acknowledged_survives_sigkill_and_nothing_is_half_there(tmp_path: Path) -> None:
    seen_batches = 0
    begun = time.monotonic()
    for first in range(0, RUNS, RUNS_A_FILE):
        path = str(tmp_path / f"{first}.db")
        batches = 0
        for run in range(RUNS_A_FILE):
            rng = random.Random(first * 1000 + run)
            # A tiny limit makes every few commits a checkpoint, so that kills hit those as well.
            options = JournalOptions(path, checkpoint_bytes=rng.choice([40_000, 16 * 1024 * 1024]))
            acknowledged = run_and_kill(path, first, batches, options, rng.uniform(0, 0.06))
            seen = matching_script(first, acknowledged, path)
            assert seen >= batches
            batches = seen
        seen_batches += batches
        for entry in tmp_path.iterdir():
            entry.unlink()
    assert seen_batches > RUNS, f"too little was tested in {time.monotonic() - begun:.0f} s"


def test_a_kill_during_creation_leaves_no_file_or_a_whole_one(tmp_path: Path) -> None:
    for run in range(30):
        path = tmp_path / f"{run}.db"
        child = os.fork()
        if child == 0:
            SqliteJournal(JournalOptions(str(path)))
            signal.pause()
        select.select([], [], [], random.Random(run).uniform(0, 0.012))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        journal = SqliteJournal(JournalOptions(str(path)))
        collected = Collected()
        journal.load(collected)
        journal.close()
        assert collected == Collected()

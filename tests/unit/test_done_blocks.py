"""Done blocks against a model: what changed since a number is told once, and old numbers are recognised."""

from __future__ import annotations

import random

import pytest

from opsqueue._speedups.done_blocks import DoneBlocks
from opsqueue._speedups.scripted import ScriptedEngine
from opsqueue.server import requests
from opsqueue.server.writer import watches
from opsqueue.server.writer.batch import State
from opsqueue.server.writer.gathering import Asker
from opsqueue.server.writer.watches import Watches

BLOCK = 4_096
HUGE = 10**9


@pytest.fixture
def engine() -> ScriptedEngine:
    engine = ScriptedEngine(seed=5)
    engine.advance(10)
    engine.open_connection(1, 0)
    return engine


class Follower:
    """What a client knows: it applies answers and nothing else."""

    def __init__(self, source: Watches, submission: int) -> None:
        self._source = source
        self._submission = submission
        self._number = (0, 0, 0, 0)
        self.bitmaps: dict[int, bytes | None] = {}
        self.resets = 0
        self.blocks_seen = 0

    def ask(self) -> requests.Blocks:
        epoch, since, upto, at = self._number
        answer = self._source.blocks(requests.DoneBlocks(self._submission, epoch, since, upto, at))
        if answer.reset:
            self.bitmaps.clear()
            self.resets += 1
        for first, count in answer.runs:
            self.bitmaps.update(dict.fromkeys(range(first, first + count)))
        self.bitmaps.update(answer.blocks)
        self.blocks_seen += len(answer.blocks) + len(answer.runs)
        more = answer.next is not None
        self._number = (answer.epoch, answer.since if more else 0, answer.upto, answer.next or 0)
        return answer

    def ask_all(self) -> None:
        while self.ask().next is not None:
            pass

    def done(self, total: int) -> set[int]:
        found: set[int] = set()
        for block, bitmap in self.bitmaps.items():
            start, length = block * BLOCK, min(BLOCK, total - block * BLOCK)
            if bitmap is None:
                found.update(range(start, start + length))
                continue
            assert len(bitmap) == (length + 7) // 8
            found.update(start + at for at in range(length) if bitmap[at >> 3] >> (at & 7) & 1)
        return found


@pytest.mark.parametrize("total", [1, 5, 4095, 4096, 4097, 3 * BLOCK, 70 * BLOCK + 13])
@pytest.mark.parametrize("bound", [1, 3, 1024])
def test_a_follower_knows_what_is_done_however_it_asks(
    engine: ScriptedEngine, monkeypatch: pytest.MonkeyPatch, total: int, bound: int
) -> None:
    monkeypatch.setattr(watches, "BLOCKS_AN_ANSWER", bound)
    chance = random.Random(total * bound)
    source = Watches(engine)
    engine.add_submission(5, total, 1, {}, direct=False)
    left = list(range(total))
    chance.shuffle(left)
    done: set[int] = set()
    followers = [Follower(source, 5) for _ in range(3)]
    while len(left) > 1:
        some = [left.pop() for _ in range(min(len(left) - 1, chance.choice((1, 2, 50, 5000))))]
        for chunk in some:
            assert engine.complete_chunk(1, 5, chunk)
            if chance.random() < 0.001:
                chance.choice(followers).ask()  # in the middle of a round
        done.update(some)
        chance.choice(followers).ask_all()
    for follower in followers:
        follower.ask_all()
        follower.ask_all()  # a number in mid-round may need a second one
        assert follower.done(total) == done
        seen = follower.blocks_seen
        follower.ask_all()
        assert follower.blocks_seen == seen
        assert follower.resets <= 1


def test_of_a_billion_chunks_only_the_changed_blocks_are_told(engine: ScriptedEngine) -> None:
    engine.add_submission(5, HUGE, 1, {}, direct=False)
    follower = Follower(Watches(engine), 5)
    follower.ask_all()
    assert follower.blocks_seen == 0
    chunks = {7, BLOCK, BLOCK + 1, HUGE - 1}
    for chunk in chunks:
        assert engine.complete_chunk(1, 5, chunk)
    follower.ask_all()
    assert follower.blocks_seen == 3
    assert follower.done(HUGE) == chunks
    assert follower.resets == 1


def test_done_blocks_are_told_as_runs(engine: ScriptedEngine) -> None:
    total = 5 * BLOCK + 7
    engine.add_submission(5, total, 1, {}, direct=False)
    follower = Follower(Watches(engine), 5)
    for chunk in range(total - 1):
        assert engine.complete_chunk(1, 5, chunk)
    answer = follower.ask()
    assert answer.runs == [(0, 5)]
    assert [block for block, _ in answer.blocks] == [5]


def test_numbers_of_another_writer_or_put_aside_begin_anew(
    engine: ScriptedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watches, "FOLLOWED_BYTES", 1)
    engine.add_submission(5, 10 * BLOCK, 1, {}, direct=False)
    engine.add_submission(6, 10 * BLOCK, 1, {}, direct=False)
    source = Watches(engine)
    follower, other = Follower(source, 5), Follower(source, 6)
    assert engine.complete_chunk(1, 5, 0)
    follower.ask_all()
    other.ask_all()  # takes the place of the first
    assert engine.complete_chunk(1, 5, 5000)
    follower.ask_all()
    assert follower.resets == 2
    assert follower.done(10 * BLOCK) == {0, 5000}
    monkeypatch.setattr(follower, "_source", Watches(engine))
    monkeypatch.setattr(follower._source, "_epoch", 3)
    follower.ask_all()
    assert follower.resets == 3
    answer = source.blocks(requests.DoneBlocks(5, source._epoch, 0, 99, 0))  # a change that never was
    assert answer.reset


def test_a_failed_submission_tells_what_was_done(engine: ScriptedEngine) -> None:
    engine.add_submission(5, 3 * BLOCK, 1, {}, direct=False)
    follower = Follower(Watches(engine), 5)
    follower.ask_all()
    [(_, chunk, *_rest)] = engine.reserve_chunks(1, b"O", 1)
    assert engine.complete_chunk(1, 5, 9000)
    assert engine.fail_whole_submission(1, 5, chunk, b"no")
    assert follower.ask().state == State.FAILED
    assert follower.done(3 * BLOCK) == {9000}
    assert follower.resets == 1


def test_who_waits_for_a_change_is_woken_by_the_batch_that_holds_it(engine: ScriptedEngine) -> None:
    engine.add_submission(5, 10, 1, {}, direct=False)
    source = Watches(engine)
    change, end, other = Asker(0, 0, 1), Asker(0, 0, 2), Asker(1, 0, 3)
    assert source.add(change, 5, 0)
    assert source.add(end, 5, None)
    assert source.add(other, 5, 0)
    assert source.woken([]) == []
    source.remove(other)
    assert engine.complete_chunk(1, 5, 3)
    assert source.woken([]) == [change]
    assert not source.add(change, 5, 0)  # so already
    assert source.add(change, 5, 1)
    assert sorted(source.woken([5]), key=lambda asker: asker.request) == [change, end]
    assert len(source) == 0


def test_a_new_incarnation_of_a_front_end_drops_what_the_old_one_waited_for(engine: ScriptedEngine) -> None:
    engine.add_submission(5, 10, 1, {}, direct=False)
    source = Watches(engine)
    assert source.add(Asker(0, 0, 1), 5, None)
    assert source.add(Asker(1, 0, 1), 5, None)
    assert source.add(Asker(0, 1, 1), 5, 0)
    assert source.ended(5) == [Asker(1, 0, 1), Asker(0, 1, 1)]


def test_watched_submissions_that_come_and_go_take_no_room(engine: ScriptedEngine) -> None:
    """More than the list of changed submissions has room for at first; each is told once."""
    done = DoneBlocks(engine)
    for submission in range(1, 501):
        engine.add_submission(submission, 3, 1, {}, direct=False)
        done.watch(submission)
        done.watch(submission)
        assert engine.complete_chunk(1, submission, 0)
        assert engine.complete_chunk(1, submission, 1)
        if submission % 2:
            done.watch(submission)
            done.unwatch(submission)
    assert done.take_changed() == list(range(1, 501))
    assert done.take_changed() == []

"""Who waits for a submission is told once, however many wait for the same one, and nothing is kept after that."""

from __future__ import annotations

import pytest

from opsqueue._speedups.scripted import ScriptedEngine
from opsqueue.server.writer.gathering import Asker
from opsqueue.server.writer.watches import Watches

MANY = 20_000


@pytest.fixture
def engine() -> ScriptedEngine:
    engine = ScriptedEngine()
    engine.add_submission(1, 10, 1, {}, direct=False)
    return engine


def test_as_many_as_wait_for_one_submission_are_told_of_its_end(engine: ScriptedEngine) -> None:
    watches = Watches(engine)
    askers = [Asker(number % 3, 1, number) for number in range(MANY)]
    for number, asker in enumerate(askers):
        assert watches.add(asker, 1, None if number % 2 else 0)
    assert sorted(watches.ended(1), key=lambda asker: asker.request) == askers
    assert len(watches) == 0
    assert watches.ended(1) == []


def test_those_who_wait_for_a_change_are_told_and_the_others_wait_on(engine: ScriptedEngine) -> None:
    watches = Watches(engine)
    change, end, gone = Asker(0, 1, 1), Asker(0, 1, 2), Asker(0, 1, 3)
    for asker, beyond in ((change, 0), (end, None), (gone, 0)):
        assert watches.add(asker, 1, beyond)
    watches.remove(gone)
    engine.open_connection(1, 0)
    engine.complete_chunk(1, 1, 3)
    assert watches.woken([]) == [change]
    engine.complete_chunk(1, 1, 4)
    assert watches.woken([]) == []
    assert watches.ended(1) == [end]


def test_a_replaced_front_ends_waits_go(engine: ScriptedEngine) -> None:
    watches = Watches(engine)
    for number in range(MANY):
        assert watches.add(Asker(0, 1, number), 1, 0)
    assert watches.add(Asker(0, 2, 0), 1, None)
    assert watches.ended(1) == [Asker(0, 2, 0)]

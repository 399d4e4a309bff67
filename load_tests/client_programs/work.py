"""Operations of a known length, for the queue and for what it is compared with."""

from __future__ import annotations

import time


def no_op(operation: int) -> int:
    return operation


def rounds_of(seconds: float) -> int:
    """How many rounds of `spin` take so long on this machine now."""
    best = min(_timed(20_000) for _ in range(20))
    return max(1, int(20_000 * seconds / best))


def _timed(rounds: int) -> float:
    begun = time.perf_counter()
    spin(rounds)
    return time.perf_counter() - begun


def spin(rounds: int) -> int:
    """Keeps a core busy; the operation is the number of rounds."""
    total = 0
    for number in range(rounds):
        total += number
    return total


def spin_all(chunk: list[int]) -> list[int]:
    return [spin(rounds) for rounds in chunk]


def rest(_operation: int) -> int:
    """Takes 0.1 s and no processor."""
    time.sleep(0.1)
    return 0

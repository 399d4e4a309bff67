from collections.abc import Sequence

from opsqueue._speedups.board import Board
from opsqueue._speedups.dispatch import Dispatch
from opsqueue._speedups.engine import Engine

class Rounds:
    def __init__(
        self, engine: Engine, dispatch: Dispatch, board: Board, slot: int, rings: Sequence[int], others: Sequence[int]
    ) -> None: ...
    def run(self, until: float, *, until_change: bool, receiving: bool) -> list[int]: ...

from collections.abc import Callable, Sequence

from opsqueue._speedups.board import Board
from opsqueue._speedups.engine import Engine
from opsqueue._speedups.ring import Endpoint

class Dispatch:
    frontend_count: int
    parked: int
    bad_frontends: list[int]
    def __init__(
        self,
        engine: Engine,
        endpoints: Sequence[Endpoint],
        board: Board,
        slot: int,
        on_request: Callable[[int, int, int, bytes], None],
        on_output: Callable[[int, int, bytes], None],
    ) -> None: ...
    def turn(self) -> bool: ...
    def serve(self) -> int: ...
    def has_changes(self) -> bool: ...
    def take_events(self) -> bytes: ...
    def take_ended(self) -> list[tuple[int, int, int, int | None, str | None]]: ...
    def reply(self, index: int, incarnation: int, request: int, payload: bytes) -> None: ...

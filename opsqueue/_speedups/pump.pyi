import asyncio
from collections.abc import Callable

from opsqueue._speedups.board import Board
from opsqueue._speedups.consumer import ConsumerHub
from opsqueue._speedups.ring import Endpoint

class FrontendPump:
    endpoint: Endpoint
    hub: ConsumerHub
    def __init__(
        self,
        endpoint: Endpoint,
        hub: ConsumerHub,
        board: Board,
        slot: int,
        loop: asyncio.AbstractEventLoop,
        on_reply: Callable[[int, bytes], None],
        on_writer_restart: Callable[[], None],
        on_broken: Callable[[str], None],
    ) -> None: ...
    def start(self) -> None: ...
    def stop(self) -> None: ...
    def wake(self) -> None: ...
    def turn(self) -> None: ...
    def send_request(self, request: int, payload: bytes) -> bool: ...
    def flush_requests(self) -> None: ...
    def room(self) -> asyncio.Future[None]: ...

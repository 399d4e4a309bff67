import asyncio
from collections.abc import Callable

from opsqueue._speedups.board import Board
from opsqueue._speedups.ring import Endpoint

LARGEST_FRAME: int
LARGEST_MESSAGE: int
PARKED_LIMIT: int
ASKED_LIMIT: int
LINGER_S: float
REISSUE_S: float
HEARTBEAT: bytes
RESERVE: int
COMPLETE: int
FAIL: int
WORKING_ON: int
RELEASE: int
EXTEND: int
RETRY_LATER: int
FAIL_SUBMISSION: int
REPORT: int
OPEN_CREDIT: int
ADD_CREDIT: int
WITHDRAW_CREDIT: int

#: (kind, nonce, submission, chunk, argument, content); kind 0: a request to refuse, with content as its reason.
Decoded = tuple[int, int, int, int, int, bytes | str | None]

class BadRecordError(Exception): ...

class ConsumerConnection:
    number: int
    features: int
    parked: int
    def __init__(
        self, hub: ConsumerHub, features: int, on_end: Callable[[BaseException | None], None] | None
    ) -> None: ...
    def start(self, transport: asyncio.Transport, init: bytes, received: bytes) -> None: ...
    def connection_made(self, transport: asyncio.BaseTransport) -> None: ...
    def get_buffer(self, sizehint: int) -> memoryview: ...
    def buffer_updated(self, nbytes: int) -> None: ...
    def eof_received(self) -> bool | None: ...
    def pause_writing(self) -> None: ...
    def resume_writing(self) -> None: ...
    def connection_lost(self, exc: Exception | None) -> None: ...
    def reissue(self, nonce: int) -> None: ...
    def reissue_credits(self) -> None: ...
    def end_transport(self) -> None: ...

class ConsumerHub:
    heartbeat_interval: float
    max_missable: int
    failure_limit: int
    endpoint: Endpoint
    def __init__(
        self,
        endpoint: Endpoint,
        board: Board,
        slot: int,
        loop: asyncio.AbstractEventLoop,
        describe: Callable[[int], tuple[bytes, bytes] | None],
        direct_input: Callable[[int, int], bytes | None],
        decode: Callable[[bytes], Decoded],
        *,
        heartbeat_interval: float,
        max_missable: int,
        failure_limit: int = ...,
        description_limit: int = ...,
    ) -> None: ...
    def enter(self, connection: ConsumerConnection) -> None: ...
    @property
    def connections(self) -> list[ConsumerConnection]: ...
    @property
    def connected(self) -> int: ...
    @property
    def open_transports(self) -> int: ...
    @property
    def blocked_connections(self) -> int: ...
    def shut_all(self, code: int, reason: bytes) -> None: ...
    def writer_gone(self) -> None: ...
    def beat(self) -> None: ...
    def stop(self) -> None: ...
    def handle_record(self, kind: int, payload: bytes) -> None: ...

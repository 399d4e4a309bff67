from collections.abc import Sequence

class Consumers:
    chunks: int
    replies: int
    seconds_ns: int
    cpu_ns: int
    def __init__(self, sockets: Sequence[int], max_chunks: int, strategy: bytes) -> None: ...
    def run(self, seconds: float, stop_after: int = 0) -> None: ...
    def latencies_us(self) -> list[float]: ...

class PacedConsumers(Consumers):
    longest_ns: int
    longest_at_ns: int
    longest_overdue_ns: int
    late: int
    def run_paced(self, seconds: float, requests_per_second: float) -> None: ...

class CompactConsumers(Consumers): ...

class Inserters:
    done: int
    refused: int
    seconds_ns: int
    cpu_ns: int
    def __init__(self, sockets: Sequence[int]) -> None: ...
    def run(self, requests: list[bytes]) -> None: ...

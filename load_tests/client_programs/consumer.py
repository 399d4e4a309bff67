"""A consumer of the benchmark: `consumer.py ADDRESS STORE_URL FUNCTION DELAY_MS`. Ends with a line on its input.

Prints "ready" when it is, and at its end the seconds that its function took and those from its first call to its last.
"""

from __future__ import annotations

import sys
import threading
import time
from typing import Any

from load_tests.client_programs import work
from opsqueue.client.store import Store
from opsqueue.consumer import ConsumerClient


class DelayedStore:
    """A store whose every call takes so much longer."""

    def __init__(self, store: Store, seconds: float) -> None:
        self._store = store
        self._seconds = seconds

    def put(self, path: str, data: bytes) -> None:
        time.sleep(self._seconds)
        self._store.put(path, data)

    def get(self, path: str) -> bytes:
        time.sleep(self._seconds)
        return self._store.get(path)

    def is_quick(self, _size: int) -> bool:
        return False


def main() -> None:
    address, store_url, name, delay_ms = sys.argv[1:]
    function = getattr(work, name)
    client = ConsumerClient(address, store_url)
    if float(delay_ms):
        client.inner._store = DelayedStore(client.inner._store, float(delay_ms) / 1000)  # type: ignore[assignment]
    busy = 0.0
    begun: float | None = None
    ended = 0.0

    def timed(operation: Any) -> Any:
        nonlocal busy, begun, ended
        now = time.perf_counter()
        begun = now if begun is None else begun
        result = function(operation)
        ended = time.perf_counter()
        busy += ended - now
        return result

    def stop() -> None:
        sys.stdin.readline()
        client.stop()

    threading.Thread(target=stop, daemon=True).start()
    print("ready", flush=True)
    client.run_each_op(timed if name == "rest" else function)
    print(busy, ended - (begun or ended), flush=True)


if __name__ == "__main__":
    main()

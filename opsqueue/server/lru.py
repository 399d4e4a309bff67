"""A cache bounded in bytes that forgets what was used longest ago. Knows nothing of what it keeps but its size."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")

#: What an entry costs beside its content: keys, links and objects.
ENTRY_OVERHEAD_BYTES = 256


class ByteLru(Generic[K, V]):
    """Holds entries of at most `limit` bytes together. Not for several threads."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._entries: OrderedDict[K, tuple[V, int]] = OrderedDict()
        self._bytes = 0

    @property
    def bytes(self) -> int:
        return self._bytes

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: K) -> V | None:
        """What was put, now the youngest."""
        entry = self._entries.get(key)
        if entry is None:
            return None
        self._entries.move_to_end(key)
        return entry[0]

    def put(self, key: K, value: V, size: int) -> None:
        """Keep `value`, which holds `size` bytes; one that could never fit beside others is not kept."""
        size += ENTRY_OVERHEAD_BYTES
        if size > self._limit // 4:
            return
        old = self._entries.pop(key, None)
        if old is not None:
            self._bytes -= old[1]
        self._entries[key] = (value, size)
        self._bytes += size
        while self._bytes > self._limit:
            self._bytes -= self._entries.popitem(last=False)[1][1]

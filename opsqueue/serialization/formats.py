"""What a serialization format is; nothing of any one of them."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

__all__ = ["SerializationFormat"]


@runtime_checkable
class SerializationFormat(Protocol):
    """Any module or object with `dumps` and `loads`: `opsqueue.serialization.json`, `pickle`, or one of your own."""

    def dumps(self, obj: Any, /) -> bytes:
        """`obj`, a tuple of operations, as bytes."""

    def loads(self, data: bytes, /) -> Any:
        """The sequence of operations that `dumps` wrote."""

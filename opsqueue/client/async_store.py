"""An object store under asyncio: buckets natively, local files at once, or on threads where the disk is slow."""

from __future__ import annotations

import asyncio

from opsqueue.client.pool import Pool
from opsqueue.client.store import BucketStore, Store

_POOL_SIZE = 8


class AsyncStore:
    """The same store for coroutines. Raises StoreError."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._pool = Pool(_POOL_SIZE, "opsqueue-store")

    async def put(self, path: str, data: bytes) -> None:
        """Stores an object, whole or not at all, over one that is there."""
        store = self._store
        if isinstance(store, BucketStore):
            await store.put_async(path, data)
        elif store.is_quick(len(data)):
            store.put(path, data)
        else:
            await asyncio.shield(asyncio.wrap_future(self._pool.submit(lambda: store.put(path, data))))

    async def get(self, path: str) -> bytes:
        """An object's bytes."""
        store = self._store
        if isinstance(store, BucketStore):
            return await store.get_async(path)
        if store.is_quick(0):
            return store.get(path)
        return await asyncio.shield(asyncio.wrap_future(self._pool.submit(lambda: store.get(path))))

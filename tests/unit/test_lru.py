"""A cache bounded in bytes."""

from __future__ import annotations

from opsqueue.server.lru import ENTRY_OVERHEAD_BYTES, ByteLru


def test_what_was_used_longest_ago_goes_first() -> None:
    entry = ENTRY_OVERHEAD_BYTES + 100
    cache: ByteLru[str, int] = ByteLru(4 * entry)
    for number, key in enumerate("abcd"):
        cache.put(key, number, 100)
    assert cache.get("a") == 0
    cache.put("e", 4, 100)
    assert cache.get("b") is None
    assert [cache.get(key) for key in "acde"] == [0, 2, 3, 4]
    assert cache.bytes == 4 * entry


def test_the_limit_is_in_bytes() -> None:
    cache: ByteLru[int, int] = ByteLru(100_000)
    for number in range(1000):
        cache.put(number, number, 10_000)
        assert cache.bytes <= 100_000
    assert len(cache) == 9


def test_an_entry_put_again_counts_once() -> None:
    cache: ByteLru[int, str] = ByteLru(100_000)
    cache.put(1, "old", 1000)
    cache.put(1, "new", 2000)
    assert cache.get(1) == "new"
    assert cache.bytes == 2000 + ENTRY_OVERHEAD_BYTES


def test_what_would_push_out_most_others_is_not_kept() -> None:
    cache: ByteLru[int, str] = ByteLru(10_000)
    cache.put(1, "small", 1)
    cache.put(2, "large", 9_000)
    assert cache.get(2) is None
    assert cache.get(1) == "small"

"""The cache of submissions' descriptions: bounded in bytes, keeps what is used."""

from __future__ import annotations

from opsqueue._speedups.descriptions import DescriptionCache


def test_a_description_is_read_once_and_an_unknown_one_every_time() -> None:
    asked: list[int] = []

    def describe(submission: int) -> tuple[bytes, bytes] | None:
        asked.append(submission)
        return None if submission == 5 else (b"before", b"after")

    cache = DescriptionCache(describe, 10_000)
    for submission in (1, 1, 2, 1, 5, 5, 1):
        found = cache.find(submission)
        assert found == (None if submission == 5 else (b"before", b"after"))
    assert asked == [1, 2, 5, 5]


def test_the_cache_stays_below_its_limit_and_keeps_what_is_in_use() -> None:
    asked: list[int] = []

    def describe(submission: int) -> tuple[bytes, bytes]:
        asked.append(submission)
        return b"x" * 700, b"y" * 44  # 1,000 bytes with what an entry costs

    cache = DescriptionCache(describe, 10_000)
    for submission in range(100):
        cache.find(submission)
        cache.find(10**6)
        assert cache.size <= 10_000
        assert len(cache) <= 10
    assert asked.count(10**6) == 1
    assert len(asked) == 101


def test_a_description_larger_than_the_limit_is_given_all_the_same() -> None:
    cache = DescriptionCache(lambda submission: (b"x" * 5000, b""), 1000)
    assert cache.find(1) == (b"x" * 5000, b"")
    assert cache.find(2) == (b"x" * 5000, b"")
    assert len(cache) == 1

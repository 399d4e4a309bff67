"""Durations, sizes, numbers and switches as people write them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opsqueue.server.values import (
    BadValueError,
    format_size,
    parse_duration,
    parse_integer,
    parse_size,
    parse_switch,
)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("10 minutes", 600),
        ("1h 30m", 5400),
        ("1h30m", 5400),
        ("500ms", 0.5),
        (" 1 hour ", 3600),
        ("2days 1s", 172_801),
        ("1.5s", 1.5),
        ("1w", 604_800),
        ("1M", 30.44 * 86_400),
        ("1m", 60),
        ("250us", 0.00025),
        ("7 ns", 7e-9),
        ("0", 0),
        ("0s", 0),
    ],
)
def test_a_duration_is_numbers_with_units(text: str, seconds: float) -> None:
    assert parse_duration(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", "  ", "10", "ten minutes", "10 parsecs", "1h 30", "-5s", "1h,30m", "5 S", "101y"])
def test_what_is_no_duration_is_refused(text: str) -> None:
    with pytest.raises(BadValueError, match="duration"):
        parse_duration(text)


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("16 MiB", 16 * 2**20),
        ("64KiB", 2**16),
        ("1.5 GB", 1_500_000_000),
        ("1048576", 2**20),
        ("1,024", 1024),
        ("2 tib", 2**41),
        ("0", 0),
        ("12 b", 12),
    ],
)
def test_a_size_is_bytes_or_a_number_with_a_unit(text: str, count: int) -> None:
    assert parse_size(text) == count


@pytest.mark.parametrize("text", ["", "big", "16 MiBs", "-1", "1 2", "1e6", "9999999 TiB"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(BadValueError, match="size"):
        parse_size(text)


@given(st.integers(0, 2**62))
def test_a_formatted_size_reads_back(count: int) -> None:
    assert parse_size(format_size(count)) == count


@given(st.integers(0, 2**63 - 1))
def test_a_number_reads_back_with_and_without_separators(number: int) -> None:
    assert parse_integer(str(number)) == parse_integer(f"{number:,}") == parse_integer(f"{number:_}") == number


@pytest.mark.parametrize("text", ["", "1.0", "x", "0x10", "- 1", "1 000"])
def test_what_is_no_whole_number_is_refused(text: str) -> None:
    with pytest.raises(BadValueError, match="whole number"):
        parse_integer(text)


def test_a_switch_is_on_or_off() -> None:
    assert [parse_switch(text) for text in ("true", "YES", "on", "1")] == [True] * 4
    assert [parse_switch(text) for text in ("false", "no", "Off", "0")] == [False] * 4
    with pytest.raises(BadValueError, match="true or false"):
        parse_switch("maybe")

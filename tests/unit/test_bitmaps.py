"""Packed bitmaps: what is packed comes back, in fewer bytes; what is not packed is refused."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opsqueue._speedups.bitmaps import pack, unpack

BITS = 4096
BYTES = BITS // 8


def _bitmap(positions: set[int]) -> bytes:
    return sum(1 << position for position in positions).to_bytes(BYTES, "little")


def _random(share: float, seed: int = 1) -> bytes:
    chooser = random.Random(seed)
    return _bitmap({position for position in range(BITS) if chooser.random() < share})


@given(st.sets(st.integers(0, BITS - 1), max_size=700), st.booleans())
def test_what_is_packed_comes_back(positions: set[int], inverted: bool) -> None:
    bitmap = _bitmap(set(range(BITS)) - positions if inverted else positions)
    packed = pack(bitmap)
    assert packed is not None
    assert len(packed) < BYTES
    assert unpack(packed) == bitmap


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("share", [0.0, 0.001, 0.01, 0.1, 0.2, 0.5, 0.9, 0.99, 1.0])
def test_bitmaps_of_every_density_come_back(share: float, seed: int) -> None:
    bitmap = _random(share, seed)
    packed = pack(bitmap)
    assert packed is None or unpack(packed) == bitmap


@pytest.mark.parametrize(
    "positions",
    [
        set[int](), {0}, {BITS - 1}, {0, BITS - 1}, set(range(BITS)), set(range(0, BITS, 16)), set(range(512)),
        set(range(BITS - 700, BITS)), set(range(BITS)) - {0}, set(range(BITS)) - {BITS - 1}, {*range(64), BITS - 1},
        {*range(300), *range(4000, 4096)},
    ],
)  # fmt: skip
def test_bitmaps_of_every_shape_come_back(positions: set[int]) -> None:
    bitmap = _bitmap(positions)
    packed = pack(bitmap)
    assert packed is not None
    assert unpack(packed) == bitmap


def test_a_tenth_of_the_bits_takes_half_the_bytes() -> None:
    packed = pack(_random(0.1))
    assert packed is not None
    assert len(packed) < 260


def test_what_would_not_be_much_shorter_or_is_no_whole_block_is_left_as_it_is() -> None:
    assert pack(_random(0.5)) is None
    assert pack(bytes(BYTES - 1)) is None
    assert pack(b"") is None


@given(st.binary(max_size=600))
def test_garbage_is_refused_or_is_a_bitmap(garbage: bytes) -> None:
    try:
        bitmap = unpack(garbage)
    except ValueError:
        return
    assert len(bitmap) == BYTES


def test_every_change_of_a_packed_bitmap_is_refused_or_is_another_bitmap() -> None:
    bitmap = _random(0.01)
    packed = pack(bitmap)
    assert packed is not None
    for place in range(len(packed)):
        for bit in range(8):
            changed = bytearray(packed)
            changed[place] ^= 1 << bit
            try:
                assert unpack(bytes(changed)) != bitmap
            except ValueError:
                continue
    for size in range(len(packed)):
        with pytest.raises(ValueError, match="no packed bitmap"):
            unpack(packed[:size])
    with pytest.raises(ValueError, match="no packed bitmap"):
        unpack(packed + b"\0")

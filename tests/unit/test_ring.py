"""Rings and channels within one process: layout, bounds, epochs, fragments."""

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opsqueue._speedups.ring import Channel, Endpoint, Ring

CAPACITY = 65536
HEADER = 8


def connected(channel: Channel) -> tuple[Endpoint, Endpoint]:
    writer, frontend = channel.writer_end(), channel.frontend_end()
    while not (writer.connected and frontend.connected):
        writer.poll()
        frontend.poll()
    return writer, frontend


@pytest.mark.parametrize("capacity", [0, 4096, 65535, 100_000, 1 << 31])
def test_a_capacity_that_cannot_work_is_refused_with_the_bounds(capacity: int) -> None:
    with pytest.raises(ValueError, match=f"a power of two from 64 KiB to 1 GiB, not {capacity}"):
        Ring(capacity)


def test_records_are_invisible_until_they_are_published() -> None:
    writer, frontend = connected(Channel(CAPACITY))
    frontend.send(3, b"not yet")
    assert writer.get() is None
    frontend.publish()
    assert writer.get() == (3, b"not yet")
    assert writer.get() is None


@given(st.lists(st.binary(max_size=16_000), max_size=60))
def test_any_records_come_out_as_they_went_in_however_they_wrap(payloads: list[bytes]) -> None:
    writer, frontend = connected(Channel(CAPACITY))
    expected: list[bytes] = []
    for payload in payloads:
        while not frontend.send(7, payload):
            frontend.publish()
            assert writer.get() == (7, expected.pop(0))
            writer.release()
        expected.append(payload)
    frontend.publish()
    while (record := writer.get()) is not None:
        assert record == (7, expected.pop(0))
    assert expected == []


def test_a_full_ring_refuses_and_takes_records_again_once_room_is_released() -> None:
    writer, frontend = connected(Channel(CAPACITY))
    sent = 0
    while frontend.send(1, b"x" * 1000):
        sent += 1
    assert sent == CAPACITY // (1000 + HEADER)
    frontend.publish()
    assert writer.get() is not None
    assert not frontend.send(1, b"x" * 1000), "room counts from its release, not from the read"
    writer.release()
    assert frontend.send(1, b"x" * 1000)


def test_a_record_over_a_quarter_of_the_ring_must_go_in_parts() -> None:
    _, frontend = connected(Channel(CAPACITY))
    with pytest.raises(ValueError, match="this ring takes 16376 in one piece"):
        frontend.send(1, bytes(CAPACITY // 4))


def test_parts_of_several_large_records_may_interleave() -> None:
    writer, frontend = connected(Channel(CAPACITY))
    large = {frontend.begin_parts(): bytes([value]) * 100_000 for value in (1, 2, 3)}
    offsets = dict.fromkeys(large, 0)
    received = []
    while any(offsets[stream] < 100_000 for stream in large):
        for stream, content in large.items():
            if offsets[stream] < len(content):
                offsets[stream] = frontend.part(stream, 9, content, offsets[stream])
        frontend.send(5, b"small")
        frontend.publish()
        while (record := writer.get()) is not None:
            if record[0] == 9:
                received.append(record[1])
        writer.release()
    assert sorted(received) == sorted(large.values())


def test_a_sleeping_consumer_is_signalled_once_and_an_awake_one_is_not() -> None:
    ring = Channel(CAPACITY).up
    ring.put(1, b"a")
    assert ring.publish_records() is False
    ring.take()
    channel = Channel(CAPACITY)
    writer, frontend = connected(channel)
    assert writer.prepare_to_sleep()
    frontend.send(1, b"a")
    assert channel.up.publish_records() is True
    frontend.send(1, b"b")
    assert channel.up.publish_records() is False
    assert not writer.prepare_to_sleep(), "there is something to read"


def test_a_consumer_that_starts_again_sees_nothing_that_was_meant_for_its_predecessor() -> None:
    channel = Channel(CAPACITY)
    writer, frontend = connected(channel)
    writer.send(1, b"for the first")
    writer.publish()
    second = channel.frontend_end()
    writer.send(1, b"sent before the writer noticed")
    writer.publish()
    assert second.poll() == 0
    assert second.get() is None
    assert writer.poll() == 1
    writer.send(1, b"for the second")
    writer.publish()
    assert second.poll() == 2
    assert second.get() == (1, b"for the second")
    assert second.get() is None
    del frontend


def test_what_a_producer_left_unread_or_unpublished_is_discarded_when_it_starts_again() -> None:
    channel = Channel(CAPACITY)
    writer, frontend = connected(channel)
    frontend.send(1, b"published")
    frontend.publish()
    frontend.send(1, b"never published")
    second = channel.frontend_end()
    assert writer.poll() == 1
    assert second.poll() == 2
    second.send(2, b"fresh")
    second.publish()
    assert writer.get() == (2, b"fresh")


def test_both_sides_may_start_again_at_the_same_time() -> None:
    channel = Channel(CAPACITY)
    connected(channel)
    writer, frontend = connected(channel)
    frontend.send(4, b"up")
    frontend.publish()
    writer.send(5, b"down")
    writer.publish()
    assert writer.get() == (4, b"up")
    assert frontend.get() == (5, b"down")


@pytest.mark.parametrize(
    "damage",
    [
        struct.pack("<II", 20_000, 1),  # longer than a record may be
        struct.pack("<II", 12_000, 1),  # longer than what was published
        struct.pack("<IIQIIII", 32, 48, 1, 5, 0xFFFFFFFF, 0, 8),  # a fragment of a record that is too large
        struct.pack("<IIQIIII", 32, 48, 1, 5, 100, 50, 8),  # a part without its beginning
        struct.pack("<IIQIIII", 32, 48, 1, 5, 100, 0, 99),  # a part longer than its record
    ],
)
def test_a_damaged_ring_is_reported_and_never_read_past_its_end(damage: bytes) -> None:
    channel = Channel(CAPACITY)
    writer, frontend = connected(channel)
    frontend.send(48, bytes(32))
    frontend.publish()
    channel.up.poke(0, damage)
    with pytest.raises(ValueError, match="not valid"):
        writer.get()

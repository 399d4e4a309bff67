"""The log row's format: two decoders that agree, on good rows and on bad ones."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opsqueue._speedups.log_packing import mentioned as stored_mentions
from opsqueue._speedups.log_packing import pack, unpack
from opsqueue._speedups.log_rows import mentioned
from opsqueue.server.writer.log_rows import EventKind, LogEvent, decode_events, encode_events, keep_events

numbers = st.integers(0, 2**63 - 1) | st.integers(0, 300)
events = st.lists(st.builds(LogEvent, st.sampled_from(EventKind), numbers | st.sampled_from([1, 2]), numbers))


@given(events)
def test_what_is_encoded_is_decoded(log: list[LogEvent]) -> None:
    row = encode_events(log)
    assert list(decode_events(row)) == log
    assert mentioned(row) == {event.submission for event in log}


@given(events, events)
def test_rows_can_be_joined(first: list[LogEvent], second: list[LogEvent]) -> None:
    assert list(decode_events(encode_events(first) + encode_events(second))) == first + second


@given(events)
def test_entries_can_be_left_out(log: list[LogEvent]) -> None:
    kept = keep_events(encode_events(log), lambda event: event.kind is not EventKind.RETRY)
    assert list(decode_events(kept)) == [event for event in log if event.kind is not EventKind.RETRY]


@given(st.binary(max_size=40) | events.map(lambda log: encode_events(log)[:-1]))
def test_both_decoders_refuse_the_same_rows(row: bytes) -> None:
    try:
        expected = {event.submission for event in decode_events(row)}
    except ValueError:
        with pytest.raises(ValueError, match="byte"):
            mentioned(row)
    else:
        assert mentioned(row) == expected


def test_the_format_is_as_documented() -> None:
    log = [
        LogEvent(EventKind.COMPLETION, 300, 5),
        LogEvent(EventKind.RETRY, 300, 128),
        LogEvent(EventKind.CRASH, 2, 0),
    ]
    assert encode_events(log).hex(" ") == "01 ac 02 05 12 80 01 03 02 00"


def as_stored(entries: list[LogEvent]) -> tuple[list[LogEvent], list[LogEvent]]:
    """Retries and crashes in their order, completions sorted: what a packed row keeps of its entries."""
    completions = [event for event in entries if event.kind is EventKind.COMPLETION]
    others = [event for event in entries if event.kind is not EventKind.COMPLETION]
    return others, sorted(completions, key=lambda event: (event.submission, event.chunk))


@given(events)
def test_a_packed_row_holds_what_its_entries_say(entries: list[LogEvent]) -> None:
    row = encode_events(entries)
    packed = pack(row)
    assert len(packed) <= len(row)
    assert as_stored(list(decode_events(unpack(packed)))) == as_stored(entries)
    everybody = frozenset(mentioned(row))
    assert stored_mentions(packed, everybody) == everybody
    some = frozenset(sorted(everybody)[::2]) | {2**62}
    assert stored_mentions(packed, some) == some & everybody


@given(events.filter(bool), st.data())
def test_a_packed_row_that_is_cut_off_is_refused_or_says_less(entries: list[LogEvent], data: st.DataObject) -> None:
    packed = pack(encode_events(entries))
    cut = packed[: data.draw(st.integers(0, len(packed) - 1))]
    try:
        left = list(decode_events(unpack(cut)))
    except ValueError:
        return
    assert len(left) <= len(entries)
    stored_mentions(cut, frozenset())


@pytest.mark.parametrize(
    "row",
    [
        pytest.param(b"\x80", id="nothing follows"),
        pytest.param(b"\x80\x05\x02", id="its entries are cut off"),
        pytest.param(b"\x80\x00\x01", id="a group is cut off"),
        pytest.param(b"\x80\x00\x01\x03\x00\x01", id="chunks are missing"),
        pytest.param(b"\x80\x00" + b"\xff" * 9 + b"\x00\x00", id="a submission is too large"),
        pytest.param(b"\x80\x01\x07", id="its entries make no sense"),
        pytest.param(b"\x41\x01\x01", id="an unknown tag"),
    ],
)
def test_a_stored_row_that_makes_no_sense_is_refused(row: bytes) -> None:
    with pytest.raises(ValueError, match="byte"):
        list(decode_events(unpack(row)))
    with pytest.raises(ValueError, match="byte"):
        stored_mentions(row, frozenset())


def test_a_row_of_random_completions_takes_half_its_entries_room() -> None:
    chosen = random.Random(7)
    submissions = [1_790_000_000_000 + number << 20 for number in range(10_000)]
    entries = [
        LogEvent(EventKind.COMPLETION, chosen.choice(submissions), chosen.randrange(100_000)) for _ in range(20_000)
    ]
    row = encode_events(entries)
    assert len(pack(row)) < len(row) / 2

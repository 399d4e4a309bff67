"""The log row's format: two decoders that agree, on good rows and on bad ones."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

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

"""Packed chunk indexes and reports of the feature compact (docs/protocol.md, "Compact messages"); no envelopes.

A run is one or more consecutive indexes in rising order; packed, it is one or two numbers in LEB128.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Final, TypeAlias

import msgspec

from opsqueue.protocol.errors import MessageError
from opsqueue.protocol.fields import U63_MAX, U64_MAX, read_array, read_bytes, read_integer, shown

#: Chunks that one message may name.
MAX_CHUNKS: Final = 4096
#: Submissions whose description a client keeps, those that came last; the server describes all others again.
REMEMBERED_DESCRIPTIONS: Final = 64
#: What a chunk came to: done, with its output inside the messages; done; failed, and why.
Outcome: TypeAlias = "tuple[bytes, ...] | str | None"


class Report(msgspec.Struct, frozen=True):
    """Chunks of one submission that ended in the same way, in their order.

    `outcome`: None for done; one output for each chunk for done, of a direct submission; a text for failed.
    """

    submission_id: int
    chunks: tuple[int, ...]
    outcome: Outcome = None


def _numbers(packed: bytes, where: str) -> Iterator[int]:
    value = shift = 0
    for byte in packed:
        value |= (byte & 0x7F) << shift
        if value > U64_MAX or shift > 63:
            raise MessageError(f"{where} has a number that does not fit into 64 bits")
        if byte < 0x80:
            yield value
            value = shift = 0
        else:
            shift += 7
    if shift:
        raise MessageError(f"{where} ends inside a number")


def unpack_numbers(packed: bytes, where: str) -> tuple[int, ...]:
    """Numbers in LEB128. Raises MessageError."""
    return tuple(_numbers(packed, where))


def pack_numbers(numbers: Iterable[int]) -> bytes:
    """Numbers of 0 to 2**64 - 1 in LEB128, each in its shortest form."""
    packed = bytearray()
    for number in numbers:
        while number >= 0x80:
            packed.append(number & 0x7F | 0x80)
            number >>= 7
        packed.append(number)
    return bytes(packed)


def unpack_indexes(packed: bytes, where: str, limit: int = MAX_CHUNKS) -> tuple[int, ...]:
    """The indexes that the runs stand for, at most `limit`. Raises MessageError."""
    numbers = _numbers(packed, where)
    indexes: list[int] = []
    for number in numbers:
        first, more = number >> 1, 0
        if number & 1:
            more = next(numbers, 0)
            if more == 0:
                raise MessageError(f"{where} has a run of {first} and no more")
            if first + more > U63_MAX:
                raise MessageError(f"{where} has a run beyond 2^63-1")
        if len(indexes) + 1 + more > limit:
            raise MessageError(f"{where} names more than {limit} chunks, which is what is left of one message's")
        indexes.extend(range(first, first + more + 1))
    return tuple(indexes)


def pack_indexes(indexes: Iterable[int]) -> bytes:
    """The indexes in their order, neighbours that rise by one as runs."""
    numbers: list[int] = []
    first, length = 0, 0
    for index in indexes:
        if length and index == first + length:
            length += 1
            continue
        if length:
            numbers += _run(first, length)
        first, length = index, 1
    if length:
        numbers += _run(first, length)
    return pack_numbers(numbers)


def _run(first: int, length: int) -> tuple[int, ...]:
    return (first << 1,) if length == 1 else (first << 1 | 1, length - 1)


def read_reports(value: object, where: str) -> tuple[Report, ...]:
    """Reports as they stand in ReportChunks. Raises MessageError."""
    reports: list[Report] = []
    left = MAX_CHUNKS
    given = read_array(value, where)
    if len(given) > MAX_CHUNKS:
        raise MessageError(f"{where} has {len(given)} reports, it may have {MAX_CHUNKS}")
    for number, item in enumerate(given):
        report = _read_report(item, f"{where}[{number}]", left)
        left -= len(report.chunks)
        reports.append(report)
    return tuple(reports)


def _read_report(value: object, where: str, limit: int) -> Report:
    parts = read_array(value, where)
    if len(parts) != 3:
        raise MessageError(f"{where} must be a submission's id, its chunks and their outcome, not {len(parts)} items")
    submission = read_integer(parts[0], 0, U63_MAX, f"{where}: the submission's id")
    chunks = unpack_indexes(read_bytes(parts[1], f"{where}: the chunks"), f"{where}: the chunks", limit)
    outcome = parts[2]
    if outcome is None or isinstance(outcome, str):
        return Report(submission, chunks, outcome)
    if not isinstance(outcome, list):
        raise MessageError(f"{where}: the outcome must be null, an array of outputs or a text, not {shown(outcome)}")
    if len(outcome) != len(chunks):
        raise MessageError(f"{where} has {len(outcome)} outputs for {len(chunks)} chunks")
    return Report(submission, chunks, tuple(read_bytes(output, f"{where}: an output") for output in outcome))


def reports_to_wire(reports: Iterable[Report]) -> list[object]:
    """The items of ReportChunks."""
    return [
        [
            report.submission_id,
            pack_indexes(report.chunks),
            list(report.outcome) if isinstance(report.outcome, tuple) else report.outcome,
        ]
        for report in reports
    ]

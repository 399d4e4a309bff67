"""The feature compact on the client's side: reports put together, packed replies taken apart. No sockets."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from msgspec.structs import replace

from opsqueue.protocol import consumer as wire
from opsqueue.protocol.errors import MessageError
from opsqueue.protocol.packed import MAX_CHUNKS, REMEMBERED_DESCRIPTIONS, Outcome, Report

#: Bytes of outputs and failures beyond which a message takes no more reports.
_ENOUGH_BYTES = 1024 * 1024


class Descriptions:
    """The submissions that a server has described on one connection, as far as it takes them for known."""

    def __init__(self) -> None:
        self._known: dict[int, wire.Submission] = {}

    def __len__(self) -> int:
        return len(self._known)

    def unpacked(self, groups: Iterable[wire.PackedGroup]) -> list[tuple[wire.Chunk, wire.Submission]]:
        """Every chunk with its submission. Raises MessageError for a submission that was not described."""
        pairs: list[tuple[wire.Chunk, wire.Submission]] = []
        for group in groups:
            submission = replace(self._submission(group.submission), chunks_done=group.chunks_done)
            inputs = group.inputs or (None,) * len(group.chunks)
            pairs.extend(
                (wire.Chunk(submission.id, index, content, retries), submission)
                for index, content, retries in zip(group.chunks, inputs, group.retries, strict=True)
            )
        return pairs

    def _submission(self, given: wire.Submission | int) -> wire.Submission:
        if isinstance(given, int):
            if given not in self._known:
                raise MessageError(f"PackedChunks names submission {given}, which was not described")
            return self._known[given]
        self._known.pop(given.id, None)
        self._known[given.id] = given
        if len(self._known) > REMEMBERED_DESCRIPTIONS:
            del self._known[next(iter(self._known))]
        return given


def grouped(messages: Iterable[wire.ClientContents]) -> Iterator[wire.ClientContents]:
    """The same messages in the same order, neighbouring reports about chunks put into one."""
    waiting: list[wire.CompleteChunk | wire.FailChunk] = []
    size = 0
    for message in messages:
        if not isinstance(message, wire.CompleteChunk | wire.FailChunk):
            yield from _together(waiting)
            waiting, size = [], 0
            yield message
            continue
        if len(waiting) == MAX_CHUNKS or size >= _ENOUGH_BYTES:
            yield from _together(waiting)
            waiting, size = [], 0
        waiting.append(message)
        size += len(_outcome(message) or "")
    yield from _together(waiting)


def _outcome(message: wire.CompleteChunk | wire.FailChunk) -> bytes | str | None:
    return message.output_content if isinstance(message, wire.CompleteChunk) else message.failure


def _together(messages: list[wire.CompleteChunk | wire.FailChunk]) -> Iterator[wire.ClientContents]:
    if len(messages) < 2:
        yield from messages
        return
    reports: list[Report] = []
    for message in messages:
        chunk, outcome = message.id, _outcome(message)
        packed: Outcome = (outcome,) if isinstance(outcome, bytes) else outcome
        last = reports[-1] if reports else None
        if last is None or last.submission_id != chunk.submission_id:
            reports.append(Report(chunk.submission_id, (chunk.chunk_index,), packed))
        elif isinstance(last.outcome, tuple) and isinstance(packed, tuple):
            reports[-1] = Report(last.submission_id, (*last.chunks, chunk.chunk_index), (*last.outcome, *packed))
        elif last.outcome == packed:
            reports[-1] = Report(last.submission_id, (*last.chunks, chunk.chunk_index), packed)
        else:
            reports.append(Report(chunk.submission_id, (chunk.chunk_index,), packed))
    yield wire.ReportChunks(tuple(reports))

"""Which chunks of a submission are done, kept up to date by what has changed. Keeps bitmaps, downloads no results."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from typing import Final

from opsqueue.client.exchange import Answer, Call, Sleep
from opsqueue.client.waiting import Waiting
from opsqueue.exceptions import InternalProducerClientError, SubmissionNotFoundError
from opsqueue.protocol.done import BLOCK_CHUNKS, decode_done
from opsqueue.protocol.errors import ProtocolError

COMPLETED: Final = "Completed"
_ENDED: Final = frozenset((COMPLETED, "Failed", "Cancelled"))


class DoneView:
    """A view of one submission, as of the last refresh. Does no I/O: `refreshing` gives the steps."""

    def __init__(self, submission: int, waiting: Callable[[float | None], Waiting]) -> None:
        self._submission = submission
        self._waiting = waiting
        self._change = "0"
        #: Bitmaps by block; None: all chunks of the block are done.
        self._blocks: dict[int, bytes | None] = {}
        self._changed: dict[int, bytes | None] | None = None
        self.state: str = "InProgress"
        self.chunks_total: int = 0
        self.chunks_done: int = 0

    @property
    def ended(self) -> bool:
        """The submission is completed, failed or cancelled: nothing will change."""
        return self.state in _ENDED

    def is_done(self, chunk: int) -> bool:
        """Whether the chunk was done at the last refresh."""
        if not 0 <= chunk < self.chunks_total:
            return False
        block, offset = divmod(chunk, BLOCK_CHUNKS)
        if block not in self._blocks:
            return False
        bitmap = self._blocks[block]
        return bitmap is None or bool(bitmap[offset >> 3] >> (offset & 7) & 1)

    def follow(self) -> None:
        """From now on `news` gives the chunks that turn out to be done."""
        self._changed = dict.fromkeys(self._blocks, b"")

    def news(self) -> Iterator[int]:
        """The chunks that are done and that the last call did not give, ascending. Needs `follow`."""
        changed, self._changed = self._changed or {}, {}
        for block in sorted(changed):
            fresh = self._bits(block, self._blocks.get(block, b"")) & ~self._bits(block, changed[block])
            first = block * BLOCK_CHUNKS
            while fresh:
                lowest = fresh & -fresh
                yield first + lowest.bit_length() - 1
                fresh ^= lowest

    def _bits(self, block: int, bitmap: bytes | None) -> int:
        if bitmap is None:
            return (1 << min(BLOCK_CHUNKS, self.chunks_total - block * BLOCK_CHUNKS)) - 1
        return int.from_bytes(bitmap, "little")

    def refreshing(self, wait: float = 0.0) -> Call[bool]:
        """Ask the server what has changed, waiting up to `wait` seconds for a change; False: nothing has."""
        waiting = self._waiting(wait if wait > 0 else None)
        while True:
            try:
                answer = yield from waiting.ask(self._path(), at_once=wait <= 0)
            except TimeoutError:
                return False
            more, changed = self._take(answer)
            if more:
                yield from self._take_all()
            if changed or self.ended or wait <= 0:
                return changed
            try:
                pause = waiting.pause()
            except TimeoutError:
                return False
            yield Sleep(pause)

    def _take_all(self) -> Call[None]:
        """What an answer had no room for; that is there, and waits for nothing."""
        rest = self._waiting(None)
        more = True
        while more:
            more, _ = self._take((yield from rest.ask(self._path(), at_once=True)))

    def _path(self) -> str:
        return f"/producer/submissions/{self._submission}/done?since={self._change}"

    def _take(self, answer: Answer) -> tuple[bool, bool]:
        if answer.status != 200:
            raise InternalProducerClientError(
                f"the server does not say which chunks are done: status {answer.status} {answer.text}"
            )
        try:
            found = decode_done(answer.body)
        except ProtocolError as error:
            raise InternalProducerClientError(f"the server's answer cannot be read: {error}") from error
        if found is None:
            raise SubmissionNotFoundError(self._submission)
        news = bool(found.done or found.blocks or found.more) or (found.state != self.state)
        before = dict(self._blocks) if found.reset else self._blocks
        blocks: dict[int, bytes | None] = {}
        for first, count in found.done:
            blocks.update(dict.fromkeys(range(first, first + count)))
        blocks.update(found.blocks)
        if self._changed is not None:
            for block in blocks:
                self._changed.setdefault(block, before.get(block, b""))
        if found.reset:
            self._blocks.clear()
        self._blocks.update(blocks)
        self.state = found.state
        self.chunks_total = found.chunks_total
        self.chunks_done = found.chunks_done
        self._change = found.change
        return found.more, news


class DoneChunks(DoneView):
    """What `ProducerClient.done_chunks` gives. For one thread."""

    def __init__(
        self,
        submission: int,
        waiting: Callable[[float | None], Waiting],
        run: Callable[[Call[bool]], bool],
    ) -> None:
        super().__init__(submission, waiting)
        self._run = run

    def refresh(self, wait: float = 0.0) -> bool:
        """Ask the server what has changed, waiting up to `wait` seconds for a change; False: nothing has.

        Only changed blocks of 4,096 chunks travel. Raises SubmissionNotFoundError, and InternalProducerClientError for
        a server that does not offer this, such as the reference implementation.
        """
        return self._run(self.refreshing(wait))


class AsyncDoneChunks(DoneView):
    """What `AsyncProducerClient.done_chunks` gives. For one task."""

    def __init__(
        self,
        submission: int,
        waiting: Callable[[float | None], Waiting],
        run: Callable[[Call[bool]], Awaitable[bool]],
    ) -> None:
        super().__init__(submission, waiting)
        self._run = run

    async def refresh(self, wait: float = 0.0) -> bool:
        """As `DoneChunks.refresh`: whether something has changed, after up to `wait` seconds for a change.

        Raises SubmissionNotFoundError and InternalProducerClientError.
        """
        return await self._run(self.refreshing(wait))

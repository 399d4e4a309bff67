"""GET /producer/submissions/{id}/done: which chunks are done, as blocks that changed. Keeps nothing between requests.

The writer knows an unfinished submission's changes, the file the blocks of one that has ended. A change number is text
for those who get it: `epoch-number` in hexadecimal, with where to go on when an answer was at its bound.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from dataclasses import dataclass

from aiohttp import web

from opsqueue.protocol import done as wire
from opsqueue.server import requests
from opsqueue.server.frontend import errors
from opsqueue.server.frontend.answers import Answer, json_answer, refused
from opsqueue.server.frontend.lookups import Lookups
from opsqueue.server.frontend.routing import MAX_INTEGER, Endpoint
from opsqueue.server.frontend.statuses import STATE_NAMES
from opsqueue.server.frontend.waits import Waits, single_query
from opsqueue.server.frontend.writer_client import WriterClient
from opsqueue.server.reader import SubmissionStatus
from opsqueue.server.writer.batch import State

#: Block rows read from the file for one answer.
BLOCKS_AN_ANSWER = 1_024
#: Answers of one front-end that the writer makes at a time.
QUESTIONS_AT_A_TIME = 2
#: A submission that ends between the writer's word and the look into the file is asked for again, this often.
ATTEMPTS = 4
#: The epoch of answers that were read from the file: what has ended changes no more.
FILE_EPOCH = 1

_NUMBER = re.compile(r"([0-9a-f]{1,16})-([0-9a-f]{1,16})(?:-([0-9a-f]{1,16})-([0-9a-f]{1,8}))?", re.ASCII)


@dataclass(frozen=True, slots=True)
class ChangeNumber:
    """What a client has seen: changes up to `upto`; with `at` above 0, those after `since` in the blocks below `at`."""

    epoch: int = 0
    upto: int = 0
    since: int = 0
    at: int = 0

    @classmethod
    def parse(cls, text: str | None) -> ChangeNumber:
        """From ?since=; nothing and `0` are the beginning. Raises HttpError 422."""
        if text is None or text == "0":
            return cls()
        match = _NUMBER.fullmatch(text)
        numbers = [int(part, 16) for part in match.groups(default="0")] if match else [MAX_INTEGER + 1]
        if max(numbers) > MAX_INTEGER:
            raise errors.bad_query("since", text, "0 or the `change` of an earlier answer")
        return cls(*numbers)

    def __str__(self) -> str:
        ended = f"{self.epoch:x}-{self.upto:x}"
        return f"{ended}-{self.since:x}-{self.at:x}" if self.at else ended


class DoneEndpoints:
    """Handler of the done chunks."""

    def __init__(self, writer: WriterClient, lookups: Lookups, waits: Waits) -> None:
        self._writer = writer
        self._lookups = lookups
        self._waits = waits
        # An answer may be half a megabyte: many at once would hold up the writer, and fill memory on both sides.
        self._asking = asyncio.Semaphore(QUESTIONS_AT_A_TIME)

    def endpoints(self) -> Iterator[Endpoint]:
        yield Endpoint("GET", "/producer/submissions/{id}/done", self.done)

    async def done(self, request: web.BaseRequest, submission: int) -> Answer:
        """What is done, whole or since a change number; waits for a change if asked to. `null` when it is unknown."""
        wait = self._waits.of(request)
        number = ChangeNumber.parse(single_query(request, "since"))
        waiting = wait.asked
        while True:
            found, beyond = await self._look(submission, number)
            if beyond is None or not waiting:
                return wait.mark(json_answer(b"null" if found is None else wire.encode_done(found)))
            waiting = await self._waits.park(request, wait, requests.Watch(submission, beyond))

    async def _look(self, submission: int, number: ChangeNumber) -> tuple[wire.DoneChunks | None, int | None]:
        """The answer as of now; and if it tells nothing new, the change beyond which there is something."""
        question = requests.DoneBlocks(submission, number.epoch, number.since, number.upto, number.at)
        for _ in range(ATTEMPTS):
            async with self._asking:
                reply = await self._writer.ask(question)
            match reply:
                case requests.Blocks() as blocks:
                    return _from_writer(submission, number, blocks)
                case requests.NotHeld():
                    row = await self._lookups.on_thread(lambda reader: reader.status(submission))
                    if row is None:
                        return None, None
                    if row.state not in (State.IN_PROGRESS, State.PAUSED):
                        return await self._from_file(number, row), None
                case _:
                    raise refused(reply)
        raise errors.unavailable(f"submission {submission} is changing; try again")

    async def _from_file(self, number: ChangeNumber, row: SubmissionStatus) -> wire.DoneChunks:
        """Of a submission that has ended. Whoever has seen as many changes as there are has seen them all."""
        total, done = row.description.chunks_total, row.chunks_done
        seen = number.epoch != 0 and number.at == 0 and number.upto == done
        goes_on = number.epoch == FILE_EPOCH and number.at > 0
        first = number.at if goes_on else 0
        runs: list[tuple[int, int]] = []
        blocks: list[tuple[int, bytes]] = []
        at = 0
        if row.state is State.COMPLETED:
            runs = [] if seen or total == 0 else [(0, -(-total // wire.BLOCK_CHUNKS))]
        elif not seen:
            rows = await self._lookups.on_thread(lambda reader: reader.blocks(row.submission, first, BLOCKS_AN_ANSWER))
            runs = [(block, 1) for block, bitmap in rows if not bitmap]
            blocks = [(block, bitmap) for block, bitmap in rows if any(bitmap)]
            at = rows[-1][0] + 1 if len(rows) == BLOCKS_AN_ANSWER else 0
        return wire.DoneChunks(
            id=row.submission,
            state=STATE_NAMES[row.state],
            chunks_total=total,
            chunks_done=done,
            change=str(ChangeNumber(FILE_EPOCH, done, 0, at)),
            reset=not seen and not goes_on,
            more=at > 0,
            done=runs,
            blocks=blocks,
        )


def _from_writer(submission: int, number: ChangeNumber, blocks: requests.Blocks) -> tuple[wire.DoneChunks, int | None]:
    more = blocks.next is not None
    # Counted with the bits, so that the number of set bits is this one when the answer is whole.
    answer = wire.DoneChunks(
        id=submission,
        state=STATE_NAMES[State(blocks.state)],
        chunks_total=blocks.chunks_total,
        chunks_done=blocks.chunks_done,
        change=str(ChangeNumber(blocks.epoch, blocks.upto, blocks.since if more else 0, blocks.next or 0)),
        reset=blocks.reset,
        more=more,
        done=blocks.runs,
        blocks=blocks.blocks,
    )
    unfinished = blocks.state in (State.IN_PROGRESS, State.PAUSED)
    # A number that is not known any more is said at once, also when nothing is done: the client forgets what it had.
    # The rest of an answer is no news in itself and is never waited for, empty or not.
    nothing_new = number.at == 0 and not (blocks.runs or blocks.blocks or more or (blocks.reset and number.epoch))
    return answer, blocks.upto if unfinished and nothing_new else None

"""GET /producer/submissions: pages of submissions as statuses. Keeps nothing between requests.

The file says which submissions there are and how those came to be that have ended; the writer, how far the others are.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import partial

from aiohttp import web

from opsqueue.protocol import listing as wire
from opsqueue.server import requests
from opsqueue.server.frontend import errors, statuses
from opsqueue.server.frontend.answers import Answer, json_answer, refused
from opsqueue.server.frontend.lookups import Lookups
from opsqueue.server.frontend.routing import MAX_INTEGER, Endpoint
from opsqueue.server.frontend.waits import single_query
from opsqueue.server.frontend.writer_client import WriterClient
from opsqueue.server.pages import Filter, Page, read_page, reread
from opsqueue.server.reader import Reader, SubmissionStatus
from opsqueue.server.writer.batch import State

#: Submissions that end between the look into the file and the writer's word are looked at again, this often.
ATTEMPTS = 4
#: Pairs that a query may have.
MAX_PAIRS = 64
#: What a filter on strategic metadata begins with.
_META = "meta."

_STATES = {state.name.lower(): state for state in State}
_CURSOR = re.compile(r"[0-9a-f]{1,16}", re.ASCII)
_INTEGER = re.compile(r"-?[0-9]{1,19}", re.ASCII)


class ListEndpoints:
    """Handler of the list of submissions."""

    def __init__(self, writer: WriterClient, lookups: Lookups) -> None:
        self._writer = writer
        self._lookups = lookups

    def endpoints(self) -> Iterator[Endpoint]:
        yield Endpoint("GET", "/producer/submissions", self.submissions)

    async def submissions(self, request: web.BaseRequest) -> Answer:
        """A page of the submissions that the query asks for, and a cursor when there may be more."""
        wanted, after, limit = _filter(request), _after(request), _limit(request)
        if wanted is None:
            return json_answer(wire.encode_page([], None))
        page = await self._lookups.on_thread(lambda reader: read_page(reader, wanted, after, limit))
        return json_answer(await self._with_progress(wanted, page))

    async def _with_progress(self, wanted: Filter, page: Page) -> bytes:
        rows = {row.submission: row for row in page.rows}
        progress: dict[int, int] = {}
        for _ in range(ATTEMPTS):
            unknown = [number for number, row in rows.items() if _unfinished(row) and number not in progress]
            if not unknown:
                return await self._lookups.on_thread(partial(_encode, rows, progress, page.last))
            reply = await self._writer.ask(requests.Progresses(unknown))
            if not isinstance(reply, requests.Progressed):
                raise refused(reply)
            said = dict(zip(unknown, reply.chunks_done, strict=True))
            progress |= {number: done for number, done in said.items() if done is not None}
            ended = [number for number, done in said.items() if done is None]
            if ended:
                rows = await self._lookups.on_thread(partial(_again, wanted, rows, frozenset(ended)))
        raise errors.unavailable("the listed submissions are changing; try again")


def _again(
    wanted: Filter, rows: dict[int, SubmissionStatus], numbers: frozenset[int], reader: Reader
) -> dict[int, SubmissionStatus]:
    """`rows` with these as they are now; without those that are not wanted any more."""
    fresh = {number: reread(reader, wanted, number) if number in numbers else row for number, row in rows.items()}
    return {number: row for number, row in fresh.items() if row is not None}


def _unfinished(row: SubmissionStatus) -> bool:
    return row.state in (State.IN_PROGRESS, State.PAUSED)


def _encode(rows: dict[int, SubmissionStatus], progress: dict[int, int], last: int | None, _: Reader) -> bytes:
    """On the reader's thread, because many statuses take a while."""
    found = [_status(row, progress.get(number, 0)) for number, row in rows.items()]
    return wire.encode_page(found, None if last is None else f"{last:x}")


def _status(row: SubmissionStatus, chunks_done: int) -> bytes:
    ended = statuses.ended(row)
    if ended is not None:
        return ended
    progress = requests.Progress(chunks_done, row.state is State.PAUSED)
    return statuses.unfinished(row.submission, row.description, progress)


def _filter(request: web.BaseRequest) -> Filter | None:
    """What the query asks for; None: two values for one key, which no submission has. Raises HttpError 422."""
    name = single_query(request, "state")
    if name is not None and name not in _STATES:
        raise errors.bad_query("state", name, f"one of {', '.join(_STATES)}")
    query = request.rel_url.query.items() if "?" in request.raw_path else ()
    given = [(parameter, text) for parameter, text in query if parameter.startswith(_META)]
    if len(given) > MAX_PAIRS:
        raise errors.wrong_shape(
            f"the request's query has {len(given)} pairs ?{_META}KEY=VALUE, it may have {MAX_PAIRS}"
        )
    pairs: dict[str, int] = {}
    for parameter, text in given:
        key, value = parameter.removeprefix(_META), _value(parameter, text)
        if pairs.setdefault(key, value) != value:
            return None
    return Filter(None if name is None else _STATES[name], pairs)


def _value(parameter: str, text: str) -> int:
    value = int(text) if _INTEGER.fullmatch(text) else MAX_INTEGER + 1
    if not -MAX_INTEGER - 1 <= value <= MAX_INTEGER:
        raise errors.bad_query(parameter, text, "a signed 64-bit integer")
    return value


def _limit(request: web.BaseRequest) -> int:
    text = single_query(request, "limit")
    if text is None:
        return wire.DEFAULT_LIMIT
    limit = int(text) if _INTEGER.fullmatch(text) else 0
    if not 1 <= limit <= wire.LARGEST_LIMIT:
        raise errors.bad_query("limit", text, f"an integer from 1 to {wire.LARGEST_LIMIT}")
    return limit


def _after(request: web.BaseRequest) -> int:
    """Ids begin above it; -1 at the beginning."""
    text = single_query(request, "cursor")
    if text is None:
        return -1
    after = int(text, 16) if _CURSOR.fullmatch(text) else MAX_INTEGER + 1
    if after > MAX_INTEGER:
        raise errors.bad_query("cursor", text, "the `next` of an earlier page")
    return after

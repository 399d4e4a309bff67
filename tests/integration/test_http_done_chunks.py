"""Which chunks are done, over HTTP: small answers for huge submissions, the same after restarts, all states' ends."""

from __future__ import annotations

import base64
import json
import random
from typing import Any

import pytest

from tests.conftest import ServerFactory
from tests.support.raw_consumer import RawConsumer
from tests.support.raw_producer import RawProducer
from tests.support.server import Server
from tests.support.waits import ParkedWait

BLOCK = 4_096
HUGE = 10**9
PARKED = "opsqueue_waits_parked"


class Follower:
    """A client of the endpoint, written from docs/http_api.md."""

    def __init__(self, producer: RawProducer, submission: int) -> None:
        self._producer = producer
        self._submission = submission
        self.change = "0"
        self.state = ""
        self.done: set[int] = set()
        self.resets = 0
        #: Bytes of the last answer's body, and how many answers there were.
        self.size = 0
        self.answers = 0

    def refresh(self) -> None:
        more = True
        while more:
            status, body = self._producer.ask(
                "GET", f"/producer/submissions/{self._submission}/done?since={self.change}"
            )
            assert status == 200, body
            self.size = len(body)
            self.answers += 1
            more = self.apply(json.loads(body))

    def apply(self, answer: dict[str, Any]) -> bool:
        total = answer["chunks_total"]
        if answer["reset"]:
            self.resets += 1
            self.done.clear()
        for first, count in answer["done"]:
            self.done.update(range(first * BLOCK, min(total, (first + count) * BLOCK)))
        for block, text in answer["blocks"]:
            bits = base64.b64decode(text)
            self.done -= set(range(block * BLOCK, (block + 1) * BLOCK))
            self.done.update(
                block * BLOCK + at for at in range(min(BLOCK, total - block * BLOCK)) if bits[at >> 3] >> (at & 7) & 1
            )
        self.change, self.state = answer["change"], answer["state"]
        return bool(answer["more"])


def waiting(submission: int, change: str) -> str:
    return f"/producer/submissions/{submission}/done?since={change}&wait=60s"


def complete(server: Server, submission: int, chunks: set[int]) -> None:
    with RawConsumer(server.port) as consumer:
        consumer.complete(*((submission, chunk) for chunk in chunks))
        consumer.settle()


def test_a_few_of_a_billion_chunks_cost_a_few_blocks(server: Server) -> None:
    chance = random.Random(1)
    with RawProducer(server.port) as producer:
        submission = producer.insert(HUGE)
        follower = Follower(producer, submission)
        follower.refresh()
        assert (follower.done, follower.size < 300) == (set(), True)
        expected: set[int] = set()
        for _ in range(3):
            some = {chance.randrange(HUGE) for _ in range(20)}
            complete(server, submission, some)
            expected |= some
            follower.refresh()
            assert follower.done == expected
            assert follower.size < 20 * 720 + 300
        follower.refresh()
        assert follower.size < 300
        assert follower.resets == 1


def test_an_answer_is_bounded_and_goes_on(server: Server) -> None:
    with RawProducer(server.port) as producer:
        submission = producer.insert(3_000 * BLOCK)
        chunks = {block * BLOCK + 5 for block in range(2_500)}
        complete(server, submission, chunks)
        follower = Follower(producer, submission)
        follower.refresh()
        assert follower.done == chunks
        assert follower.answers == 3
        assert follower.size < 1_024 * 720


def test_a_wait_is_answered_with_the_chunks_that_were_done_meanwhile(server: Server) -> None:
    with RawProducer(server.port) as producer:
        submission = producer.insert(10)
        follower = Follower(producer, submission)
        for round_, chunk in enumerate((3, 7, 1)):
            follower.refresh()
            with ParkedWait(
                server.port, f"/producer/submissions/{submission}/done?since={follower.change}&wait=60s"
            ) as wait:
                producer.wait_for_metric(PARKED, 1)
                complete(server, submission, {chunk})
                follower.apply(wait.answer().json)
            assert len(follower.done) == round_ + 1
            assert chunk in follower.done
        assert follower.resets == 1


def test_the_rest_of_an_answer_that_holds_nothing_is_not_waited_for(server: Server) -> None:
    with RawProducer(server.port) as producer:
        submission = producer.insert(2_000 * BLOCK)
        chunks = {block * BLOCK + 5 for block in range(1_024)}  # as many blocks as an answer has, then untouched ones
        complete(server, submission, chunks)
        follower = Follower(producer, submission)
        status, body = producer.ask("GET", f"/producer/submissions/{submission}/done?since=0")
        assert status == 200
        assert follower.apply(json.loads(body))
        with ParkedWait(server.port, waiting(submission, follower.change)) as wait:
            answer = wait.answer().json  # at once: nobody completes anything
        assert not follower.apply(answer)
        assert follower.done == chunks
        with ParkedWait(server.port, waiting(submission, follower.change)) as wait:
            producer.wait_for_metric(PARKED, 1)
            complete(server, submission, {6})
            follower.apply(wait.answer().json)
        assert follower.done == chunks | {6}


def test_hundreds_who_ask_for_everything_at_once_are_all_answered(server: Server) -> None:
    with RawProducer(server.port) as producer:
        submission = producer.insert(500 * BLOCK)
        chunks = {block * BLOCK + 5 for block in range(500)}
        complete(server, submission, chunks)
        asked = [ParkedWait(server.port, f"/producer/submissions/{submission}/done?since=0") for _ in range(200)]
        for each in asked:
            with each:
                assert len(each.answer().json["blocks"]) == 500


@pytest.mark.parametrize("how", ["restart", "kill", "kill-writer"])
def test_after_a_restart_a_follower_begins_anew_and_knows_the_same(server_factory: ServerFactory, how: str) -> None:
    server = server_factory()
    total = 20 * BLOCK + 9
    chunks = set(random.Random(2).sample(range(total), 500)) | set(range(BLOCK, 2 * BLOCK))
    with RawProducer(server.port) as producer:
        submission = producer.insert(total)
        complete(server, submission, chunks)
        follower = Follower(producer, submission)
        follower.refresh()
        assert follower.done == chunks
    if how == "kill-writer":
        server.wait_for_replacement("writer", server.kill_child("writer"))
    else:
        server.restart(kill=how == "kill")
    server.wait_until_healthy()
    with RawProducer(server.port) as producer:
        again = Follower(producer, submission)
        again.change = follower.change
        again.done = {total - 1}  # wrong, so that a missed reset shows
        # an unknown number is said at once, not waited with
        with ParkedWait(
            server.port, f"/producer/submissions/{submission}/done?since={follower.change}&wait=60s"
        ) as wait:
            again.apply(wait.answer().json)
        assert again.resets == 1
        assert again.done == chunks
        complete(server, submission, {total - 1})
        again.refresh()
        assert again.done == chunks | {total - 1}
        assert again.resets == 1


@pytest.mark.parametrize("end", ["cancelled", "failed", "completed"])
def test_of_an_ended_submission_the_file_tells_what_was_done(server_factory: ServerFactory, end: str) -> None:
    server = server_factory(max_chunk_retries=1)
    total = 3 * BLOCK
    chunks = set(range(total)) if end == "completed" else {1, 5000, *range(2 * BLOCK, 3 * BLOCK)}
    with RawProducer(server.port) as producer, RawConsumer(server.port) as consumer:
        submission = producer.insert(total)
        [held] = consumer.reserve_ids()
        follower = Follower(producer, submission)
        follower.refresh()
        complete(server, submission, chunks)
        if end == "cancelled":
            producer.cancel(submission)
        elif end == "failed":
            consumer.fail(held, "no")
        producer.wait_for_state(submission, end.capitalize())
        follower.refresh()
        assert (follower.state, follower.done) == (end.capitalize(), chunks)
    # After a restart the writer has forgotten it as soon as its blocks are in the block table.
    server.restart()
    with RawProducer(server.port) as producer:
        late = Follower(producer, submission)
        late.refresh()
        assert (late.state, late.done) == (end.capitalize(), chunks)
        follower._producer = producer
        follower.refresh()
        assert (follower.state, follower.done) == (end.capitalize(), chunks)


@pytest.mark.parametrize(
    "since", ["-1", "x", "1-", "1-2-3", "1-2-3-4-5", "1-2-3-fffffffff", "8000000000000000-1", "1&since=2"]
)
def test_a_change_that_never_was_one_is_422(server: Server, since: str) -> None:
    with RawProducer(server.port) as producer:
        submission = producer.insert(3)
        status, text = producer.ask("GET", f"/producer/submissions/{submission}/done?since={since}")
        assert status == 422
        assert b"since" in text


@pytest.mark.parametrize("since", ["1-2", "5-0-0-1", "7fffffffffffffff-7fffffffffffffff", "1-9-9-ffffffff", "1-0-5-3"])
def test_a_made_up_change_begins_anew(server: Server, since: str) -> None:
    with RawProducer(server.port) as producer:
        submission = producer.insert(3)
        complete(server, submission, {1})
        follower = Follower(producer, submission)
        follower.change = since
        follower.refresh()
        assert (follower.resets, follower.done) == (1, {1})

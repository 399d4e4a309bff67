"""The writer as a process of its own: rings in, SQLite behind, killed and recovered."""

import os
import signal
import time
from pathlib import Path

from opsqueue._speedups.board import SlotState
from opsqueue.server import requests
from opsqueue.server.context import frontend_slot
from tests.support.bare_writer import bare_writer


def submission_of(reply: requests.Reply) -> int:
    assert isinstance(reply, requests.Inserted), reply
    return reply.submission


def test_a_chunk_goes_from_insert_to_done(tmp_path: Path) -> None:
    with bare_writer(tmp_path / "q.db") as writer:
        submission = submission_of(writer.insert("p", 3))
        writer.open(1)
        held = writer.reserve(1, 2)
        assert [(each.submission, each.chunk) for each in held] == [(submission, 0), (submission, 1)]
        writer.complete(1, submission, 0)
        assert writer.status(submission) == requests.Progress(chunks_done=1, paused=False)
        writer.complete(1, submission, 1)
        [last] = writer.reserve(1, 5)
        writer.complete(1, submission, last.chunk)
        assert writer.status(submission) == requests.NotHeld()
        assert writer.call(requests.Counts()) == requests.Counted(in_progress=0, completed=1)
        assert writer.stop() == 0


def test_a_parked_request_is_answered_as_soon_as_an_insert_is_durable(tmp_path: Path) -> None:
    with bare_writer(tmp_path / "q.db") as writer:
        writer.open(1)
        nonce = writer.want(1, 10)
        submission = submission_of(writer.insert("p", 2))
        writer.until(lambda: nonce in writer.reserved)
        assert [each.submission for each in writer.reserved[nonce]] == [submission] * 2


def test_parked_requests_are_served_in_the_order_of_their_arrival(tmp_path: Path) -> None:
    with bare_writer(tmp_path / "q.db") as writer:
        for connection in range(5):
            writer.open(connection)
        nonces = [writer.want(connection) for connection in range(5)]
        submission_of(writer.insert("p", 3))
        writer.until(lambda: len(writer.reserved) == 3)
        assert sorted(writer.reserved) == nonces[:3]
        assert [writer.reserved[nonce][0].chunk for nonce in nonces[:3]] == [0, 1, 2]
        writer.close(0)
        writer.until(lambda: nonces[3] in writer.reserved)
        assert writer.reserved[nonces[3]][0].chunk == 0


def test_what_was_acknowledged_survives_a_kill_and_reservations_do_not(tmp_path: Path) -> None:
    with bare_writer(tmp_path / "q.db") as writer:
        submission = submission_of(writer.insert("p", 10))
        writer.open(1)
        held = writer.reserve(1, 6)
        for each in held[:4]:
            writer.complete(1, submission, each.chunk)
        assert writer.status(submission) == requests.Progress(chunks_done=4, paused=False)
        writer.kill()
        writer.start()
        assert writer.status(submission) == requests.Progress(chunks_done=4, paused=False)
        writer.open(2)
        assert [each.chunk for each in writer.reserve(2, 10)] == [4, 5, 6, 7, 8, 9]


def test_retries_survive_a_kill_and_the_last_one_fails_the_submission(tmp_path: Path) -> None:
    with bare_writer(tmp_path / "q.db", max_chunk_retries=3) as writer:
        submission = submission_of(writer.insert("p", 1))
        for retries in range(3):
            writer.open(retries)
            [held] = writer.reserve(retries)
            assert held.retries == retries
            writer.fail(retries, submission, 0, b"boom")
            if retries < 2:
                assert writer.status(submission) == requests.Progress(chunks_done=0, paused=False)
                writer.kill()
                writer.start()
        assert writer.status(submission) == requests.NotHeld()


def test_a_retried_insert_gives_the_known_id_and_a_different_one_conflicts(tmp_path: Path) -> None:
    with bare_writer(tmp_path / "q.db") as writer:
        first = submission_of(writer.insert("p", 3))
        assert writer.insert("p", 3) == requests.Inserted(first, known=True)
        assert writer.insert("p", 4) == requests.Conflict(first)
        writer.kill()
        writer.start()
        assert writer.insert("p", 3) == requests.Inserted(first, known=True)


def test_ids_grow_over_restarts(tmp_path: Path) -> None:
    with bare_writer(tmp_path / "q.db") as writer:
        last = 0
        for number in range(4):
            for step in range(20):
                made = submission_of(writer.insert(f"{number}-{step}", 1))
                assert made > last
                last = made
            writer.kill()
            writer.start()


def test_a_cancelled_submission_is_gone_for_good_and_its_chunks_are_not_handed_out(tmp_path: Path) -> None:
    with bare_writer(tmp_path / "q.db") as writer:
        submission = submission_of(writer.insert("p", 3))
        writer.open(1, features=4)
        writer.reserve(1)
        assert writer.call(requests.Cancel(submission)) == requests.Done()
        writer.until(lambda: writer.dropped == [(submission, 0, 1)])
        assert writer.call(requests.Cancel(submission)) == requests.NotHeld()
        nonce = writer.want(1)
        other = submission_of(writer.insert("q", 1))
        writer.until(lambda: nonce in writer.reserved)
        assert writer.reserved[nonce][0].submission == other
        writer.kill()
        writer.start()
        assert writer.call(requests.Cancel(submission)) == requests.NotHeld()
        assert writer.call(requests.Counts()) == requests.Counted(in_progress=1, completed=0)


def test_a_paused_submission_is_not_handed_out_until_it_is_unpaused(tmp_path: Path) -> None:
    with bare_writer(tmp_path / "q.db") as writer:
        submission = submission_of(writer.insert("p", 1, paused=True))
        writer.open(1)
        nonce = writer.want(1)
        assert writer.status(submission) == requests.Progress(chunks_done=0, paused=True)
        assert nonce not in writer.reserved
        assert writer.call(requests.Pause(submission, True)) == requests.NotHeld()
        assert writer.call(requests.Pause(submission, False)) == requests.Done()
        writer.until(lambda: nonce in writer.reserved)


def test_an_insert_beyond_the_memory_limit_is_unavailable_and_consumers_go_on(tmp_path: Path) -> None:
    with bare_writer(tmp_path / "q.db", memory_limit=1 << 20) as writer:
        submission = submission_of(writer.insert("small", 1000))
        refused = writer.insert("large", 1 << 24)
        assert isinstance(refused, requests.Unavailable)
        assert "--memory-limit" in refused.reason
        writer.open(1)
        assert writer.reserve(1)[0].submission == submission


def test_inserts_on_their_way_to_the_disk_count_against_the_memory_limit(tmp_path: Path) -> None:
    with bare_writer(tmp_path / "q.db", memory_limit=1 << 20) as writer:
        asked = []
        for number in range(200):
            asked.append(writer.ask_insert(f"p{number}", 3_000_000))
            writer.call(requests.Counts())  # answered at once: the next insert comes while this one is being stored
        replies = [writer.answer(number) for number in asked]
        assert sum(isinstance(reply, requests.Inserted) for reply in replies) == 1


def test_thousands_of_parked_requests_are_answered_without_a_pause(tmp_path: Path) -> None:
    with bare_writer(tmp_path / "q.db") as writer:
        writer.open(1)
        for _ in range(12_500):
            writer.want(1)
        assert writer.status(1) == requests.NotHeld()  # so all are parked
        writer.insert("p", 12_500)
        begun = time.monotonic()
        writer.until(lambda: len(writer.reserved) == 12_500)
        # the loop looks at 4,096 at a time; sleeping in between would take a second each
        assert time.monotonic() - begun < 0.9


def test_a_billion_chunks_are_inserted_and_handed_out_from_both_ends(tmp_path: Path) -> None:
    count = 1_000_000_000
    with bare_writer(tmp_path / "q.db") as writer:
        submission_of(writer.insert("p", count))
        writer.open(1)
        assert [each.chunk for each in writer.reserve(1, 2, b"O")] == [0, 1]
        assert [each.chunk for each in writer.reserve(1, 2, b"N")] == [count - 1, count - 2]
        assert 2 <= writer.reserve(1, 1, b"R")[0].chunk < count - 2


def test_a_damaged_ring_ends_its_front_end_only(tmp_path: Path) -> None:
    with bare_writer(tmp_path / "q.db") as writer:
        submission = submission_of(writer.insert("p", 1))
        frontend = os.fork()
        if frontend == 0:
            writer.board.start(frontend_slot(0), SlotState.SERVING)
            signal.pause()
            os._exit(0)
        while writer.board.pid(frontend_slot(0)) != frontend:
            os.sched_yield()
        writer.send(99, b"no such kind")
        assert os.WTERMSIG(os.waitpid(frontend, 0)[1]) == signal.SIGKILL
        writer.replace_frontend()
        assert writer.status(submission) == requests.Progress(chunks_done=0, paused=False)

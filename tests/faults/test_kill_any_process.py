"""kill -9 of any one process under load: nothing acknowledged is lost, and the work goes on by itself."""

import contextlib
import json
import random
import threading
import urllib.error
import urllib.request
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from opsqueue.producer import ProducerClient
from tests.conftest import ServerFactory
from tests.support.processes import python_process
from tests.support.server import Server

SUBMISSIONS = 6
OPERATIONS = 600
CHUNK_SIZE = 5
KILLS = 5


def produce(server: Server, store_url: str, results: list[list[int]], enough: Callable[[], bool]) -> None:
    """One submission after the other: at least `SUBMISSIONS` of them, and more until it is `enough`."""
    client = ProducerClient(server.address, store_url)
    while len(results) < SUBMISSIONS or not enough():
        results.append(list(client.run_submission(range(OPERATIONS), chunk_size=CHUNK_SIZE)))


class Watcher:
    """Polls every submission that it is told of: what a status once said must never go back."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._done: dict[int, int] = {}
        self._ended: set[int] = set()
        self.wrong: list[str] = []
        self.looks = 0

    def look(self) -> None:
        for submission in self._all():
            try:
                with urllib.request.urlopen(
                    f"{self._server.url}/producer/submissions/{submission}", timeout=5
                ) as answer:
                    status = json.load(answer)
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                continue  # the server is being killed: it may refuse, it may not lie
            self.looks += 1
            self._check(submission, status)

    def _all(self) -> set[int]:
        request = urllib.request.Request(
            f"{self._server.url}/producer/submissions/lookup_ids_by_strategic_metadata",
            data=b"{}",
            headers={"Content-Type": "application/json"},
        )
        # While the server is being killed it may refuse; then those known already are looked at.
        with (
            contextlib.suppress(urllib.error.URLError, ConnectionError, TimeoutError),
            urllib.request.urlopen(request, timeout=5) as answer,
        ):
            for submission in json.load(answer):
                self._done.setdefault(submission, 0)
        return set(self._done)

    def _check(self, submission: int, status: object) -> None:
        match status:
            case {"InProgress": {"chunks_done": int(done)}}:
                if submission in self._ended or done < self._done[submission]:
                    self.wrong.append(f"{submission}: {done} done after {self._done[submission]}")
                self._done[submission] = done
            case {"Completed": _}:
                self._ended.add(submission)
            case _:
                self.wrong.append(f"{submission}: {status}")


def run_under_kills(server: Server, store_url: str, kill: Callable[[], None], consumers: int = 2) -> Watcher:
    """Producers and consumers at work while `kill` strikes again and again; every result is checked."""
    results: list[list[int]] = []
    errors: list[BaseException] = []
    strikes = 0

    def producing() -> None:
        try:
            produce(server, store_url, results, enough=lambda: strikes == KILLS)
        except BaseException as error:
            errors.append(error)

    watcher = Watcher(server)
    producer = threading.Thread(target=producing, daemon=True)
    with ExitStack() as stack:
        for _ in range(consumers):
            stack.enter_context(python_process("echo_consumer", server.address, store_url))
        producer.start()
        source = random.Random(3)
        while producer.is_alive():
            watcher.look()
            if strikes < KILLS and source.random() < 0.3:
                kill()
                strikes += 1
        producer.join()
    assert not errors, errors
    assert len(results) >= SUBMISSIONS
    assert results == [list(range(OPERATIONS))] * len(results)
    assert strikes == KILLS
    return watcher


@pytest.mark.parametrize("role", ["writer", "frontend"])
@pytest.mark.parametrize("frontends", [1, 2])
def test_a_killed_server_process_is_replaced_and_no_result_is_lost(
    server_factory: ServerFactory, store_url: str, role: str, frontends: int
) -> None:
    server = server_factory(frontends=frontends)

    def kill() -> None:
        server.wait_for_replacement(role, of=server.kill_child(role))
        server.wait_until_healthy()  # a writer killed again and again before it serves ends the server, by design

    watcher = run_under_kills(server, store_url, kill)
    assert watcher.looks > 0
    assert watcher.wrong == []


def test_a_killed_and_restarted_service_loses_no_result(server_factory: ServerFactory, store_url: str) -> None:
    server = server_factory()
    watcher = run_under_kills(server, store_url, lambda: (server.restart(kill=True), None)[1])
    assert watcher.wrong == []


def test_killed_consumers_cost_nothing_but_time(server: Server, store_url: str, tmp_path: Path) -> None:
    results: list[list[int]] = []
    killing_is_over = threading.Event()
    producer = threading.Thread(target=produce, args=(server, store_url, results, killing_is_over.is_set))
    with python_process("echo_consumer", server.address, store_url):
        producer.start()
        for _ in range(10):
            with python_process("echo_consumer", server.address, store_url) as victim:
                victim.kill()
        killing_is_over.set()
        producer.join(100)
    assert not producer.is_alive()
    assert results == [list(range(OPERATIONS))] * len(results)

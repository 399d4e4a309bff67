"""What producers see of a writer that is killed: only 200s and 503s, and nothing that was acknowledged is lost."""

from __future__ import annotations

import os
import signal
import threading

from tests.conftest import ServerFactory
from tests.integration.test_http_producers import Producer, fresh
from tests.support.server import wait_until

#: Producers that insert all the time, and how often the writer is killed meanwhile.
PRODUCERS = 4
KILLS = 3


class InsertLoop(threading.Thread):
    """Inserts one submission after the other until it is told to stop; a 503 is tried again with the same prefix."""

    def __init__(self, port: int, stop: threading.Event) -> None:
        super().__init__()
        self._producer = Producer(port)
        self._stop_event = stop
        self.acknowledged: dict[str, int] = {}
        self.refused = 0
        self.unexpected: list[tuple[int, object]] = []

    def run(self) -> None:
        prefix = fresh()
        while not self._stop_event.is_set():
            code, answer = self._producer.stored(prefix)
            if code == 200:
                self.acknowledged[prefix] = answer
                prefix = fresh()
            elif code == 503:
                self.refused += 1
            else:
                self.unexpected.append((code, answer))
        self._producer.close()


def test_inserts_survive_a_killed_writer_and_make_one_submission_each(server_factory: ServerFactory) -> None:
    server = server_factory(frontends=2)
    stop = threading.Event()
    loops = [InsertLoop(server.port, stop) for _ in range(PRODUCERS)]
    for loop in loops:
        loop.start()
    try:
        for _ in range(KILLS):
            before = {id(loop): len(loop.acknowledged) for loop in loops}
            wait_until(lambda: all(len(loop.acknowledged) > before[id(loop)] + 5 for loop in loops), "inserts go on")  # noqa: B023
            [writer] = server.pids()["writer"]
            os.kill(writer, signal.SIGKILL)
            wait_until(lambda: server.pids().get("writer", [writer]) != [writer], "the writer is replaced")  # noqa: B023
        settled = {id(loop): len(loop.acknowledged) for loop in loops}
        wait_until(lambda: all(len(loop.acknowledged) > settled[id(loop)] for loop in loops), "inserts go on")
    finally:
        stop.set()
        for loop in loops:
            loop.join()
    assert [loop.unexpected for loop in loops] == [[]] * PRODUCERS
    producer = Producer(server.port)
    acknowledged = {prefix: submission for loop in loops for prefix, submission in loop.acknowledged.items()}
    assert len(set(acknowledged.values())) == len(acknowledged)
    for prefix, submission in acknowledged.items():
        assert producer.status(submission)["InProgress"]["prefix"] == prefix
    code, count = producer.ask("GET", "/producer/submissions/count")
    assert code == 200
    # A last insert of each loop may be stored without its answer having been seen.
    assert len(acknowledged) <= count <= len(acknowledged) + PRODUCERS
    producer.close()

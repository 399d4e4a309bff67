"""Producers and consumers for locust: `make load` with its web page, or headless with `LOAD="--headless -u 20 -t 1m"`.

For mixed load that looks like an application's, watched while it runs. A Python user costs more than the server does
for the same request: how fast the server is, `make bench` says.
"""

from __future__ import annotations

# First: it replaces what blocks, such as sockets, by what lets other users go on meanwhile.
from locust import FastHttpUser, User, between, constant, events, tag, task  # isort: skip

import json
import socket
import uuid
from argparse import ArgumentParser
from typing import Any
from urllib.parse import urlsplit

from load_tests import peers
from load_tests.strategies import CASES, CUSTOMERS, metadata
from load_tests.waiting_consumer import WaitingConsumer
from opsqueue.protocol.strategy import to_wire


@events.init_command_line_parser.add_listener
def add_options(parser: ArgumentParser) -> None:
    """Also shown on locust's page."""
    parser.add_argument("--chunks", type=int, default=100, help="chunks of a producer's submission (default 100)")
    parser.add_argument(
        "--strategy",
        choices=list(CASES),
        default="Oldest",
        help="of every consumer (default Oldest)",
    )


class Producer(FastHttpUser):
    """Inserts, asks how its submissions are doing, and cancels one now and then."""

    wait_time = between(0.05, 0.2)
    network_timeout = connection_timeout = 10.0

    def on_start(self) -> None:
        self._submissions: list[int] = []
        self._inserted = 0

    @task(10)
    def insert(self) -> None:
        self._inserted += 1
        body = {
            "chunk_contents": {
                "SeeObjectStorage": {
                    "prefix": f"load-{uuid.uuid4()}",
                    "count": self.environment.parsed_options.chunks,
                }
            },
            "metadata": None,
            "strategic_metadata": metadata(self._inserted % CUSTOMERS),
            "chunk_size": 1,
        }
        with self.client.post("/producer/submissions", json=body, name="insert", catch_response=True) as answer:
            if answer.status_code == 200:
                self._submissions.append(json.loads(answer.text))
            else:
                answer.failure(f"{answer.status_code}: {answer.text[:200]}")

    @task(10)
    def status(self) -> None:
        if self._submissions:
            self.client.get(f"/producer/submissions/{self._submissions[-1]}", name="status")

    @task(2)
    def count(self) -> None:
        self.client.get("/producer/submissions/count", name="count")

    @task(1)
    def cancel(self) -> None:
        """409 when it has ended by itself, 404 when it was forgotten: both are right."""
        if not self._submissions:
            return
        submission = self._submissions.pop(0)
        path = f"/producer/submissions/cancel/{submission}"
        with self.client.post(path, name="cancel", catch_response=True) as answer:
            if answer.status_code in (200, 404, 409):
                answer.success()


class Consumer(User):
    """Completes one chunk after the other over WebSocket and CBOR; connects anew when its connection ends."""

    wait_time = constant(0)

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self._connection: socket.socket | None = None
        self._consumer: WaitingConsumer | None = None

    @tag("consumer")
    @task
    def lifecycle(self) -> None:
        try:
            if self._consumer is None:
                self._connect()
            assert self._consumer is not None
            # Includes the wait for work when there is none, and the completion of the chunk before.
            with self.environment.events.request.measure("WS", "complete and reserve"):
                self._consumer.ask()
                self._consumer.held()
        except OSError:  # counted as a failure by `measure`
            self._disconnect()

    def on_stop(self) -> None:
        self._disconnect()

    def _connect(self) -> None:
        assert self.host is not None
        strategy = CASES[self.environment.parsed_options.strategy]
        with self.environment.events.request.measure("WS", "connect"):
            self._connection = peers.consumer(urlsplit(self.host).netloc)
            self._consumer = WaitingConsumer(self._connection, to_wire(strategy))

    def _disconnect(self) -> None:
        if self._connection is not None:
            self._connection.close()
        self._connection = self._consumer = None

"""What producers may rely on, asked of the whole server: durable answers, idempotent inserts, pauses, lookups."""

from __future__ import annotations

import http.client
import json
import uuid
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any
from urllib.parse import quote

import cbor2
import pytest
from websockets.sync.client import ClientConnection, connect

from tests.conftest import ServerFactory
from tests.support.server import Server

SUBMISSIONS = "/producer/submissions"


class Producer:
    """One keep-alive connection; every call gives the status and the JSON, or the text, or None for an empty body."""

    def __init__(self, port: int) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)

    def ask(self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None) -> tuple[int, Any]:
        sent = dict(headers or {})
        raw = None
        if body is not None:
            raw = json.dumps(body).encode()
            sent["Content-Type"] = "application/json"
        self._connection.request(method, path, raw, sent)
        response = self._connection.getresponse()
        content = response.read()
        if response.headers["Content-Type"] == "application/json":
            return response.status, json.loads(content)
        if response.headers["Content-Type"] == "application/octet-stream":
            return response.status, content
        return response.status, content.decode() or None

    def insert(self, contents: dict[str, Any], headers: dict[str, str] | None = None, **fields: Any) -> tuple[int, Any]:
        return self.ask("POST", SUBMISSIONS, {"chunk_contents": contents, **fields}, headers)

    def stored(self, prefix: str, count: int = 2, **fields: Any) -> tuple[int, Any]:
        return self.insert({"SeeObjectStorage": {"prefix": prefix, "count": count}}, **fields)

    def status(self, submission: int) -> Any:
        code, status = self.ask("GET", f"{SUBMISSIONS}/{submission}")
        assert code == 200
        return status

    def cancel(self, submission: int) -> tuple[int, Any]:
        return self.ask("POST", f"{SUBMISSIONS}/cancel/{submission}")

    def close(self) -> None:
        self._connection.close()


class Consumer:
    """A raw consumer."""

    def __init__(self, port: int) -> None:
        self._ends = ExitStack()
        connecting = connect(f"ws://127.0.0.1:{port}/consumer", compression=None)
        self._socket: ClientConnection = self._ends.enter_context(connecting)
        self._nonce = 0
        assert "Init" in self._receive()

    def _receive(self) -> dict[str, Any]:
        decoded: dict[str, Any] = cbor2.loads(self._socket.recv(timeout=10))  # type: ignore[arg-type]
        return decoded

    def _send(self, contents: dict[str, Any]) -> None:
        self._socket.send(cbor2.dumps({"nonce": self._nonce, "contents": contents}))
        self._nonce += 1

    def ask_for_chunks(self, maximum: int = 1) -> None:
        self._send({"WantToReserveChunks": {"max": maximum, "strategy": "Oldest"}})

    def chunks(self) -> list[tuple[dict[str, Any], dict[str, Any]]]:
        found: list[tuple[dict[str, Any], dict[str, Any]]] = self._receive()["Sync"]["contents"]["ChunksReserved"]["Ok"]
        return found

    def complete(self, chunk: dict[str, Any], output: bytes | None) -> None:
        chunk_id = {"submission_id": chunk["submission_id"], "chunk_index": chunk["chunk_index"]}
        self._send({"CompleteChunk": {"id": chunk_id, "output_content": output}})

    def close(self) -> None:
        self._ends.close()


@pytest.fixture
def producer(server: Server) -> Iterator[Producer]:
    made = Producer(server.port)
    yield made
    made.close()


@pytest.fixture
def consumer(server: Server) -> Iterator[Consumer]:
    made = Consumer(server.port)
    yield made
    made.close()


def fresh() -> str:
    return str(uuid.uuid4())


def test_the_same_insert_again_gives_the_known_id_and_a_different_one_a_conflict(producer: Producer) -> None:
    prefix = fresh()
    code, first = producer.stored(prefix, metadata=[1], strategic_metadata={"a": 1, "b": 2}, chunk_size=3)
    assert code == 200
    again = producer.stored(prefix, metadata=[1], strategic_metadata={"b": 2, "a": 1}, chunk_size=3)
    assert again == (200, first)
    code, text = producer.stored(prefix, 3, metadata=[1], strategic_metadata={"a": 1, "b": 2}, chunk_size=3)
    assert code == 409
    assert str(first) in text
    assert producer.ask("GET", SUBMISSIONS + "/count") == (200, 1)


def test_a_direct_insert_is_known_by_its_key_and_without_one_is_new_each_time(producer: Producer) -> None:
    contents = {"Direct": {"contents": [[1], None]}}
    first = producer.insert(contents, {"Idempotency-Key": "once"})
    assert first[0] == 200
    assert producer.insert(contents, {"Idempotency-Key": "once"}) == first
    assert producer.insert({"Direct": {"contents": [[2]]}}, {"Idempotency-Key": "once"})[0] == 409
    assert producer.insert(contents)[1] != producer.insert(contents)[1]


def test_a_cancelled_prefix_is_found_and_its_insert_known_for_a_while(producer: Producer) -> None:
    prefix = fresh() + "/with a slash and a ü"
    _, submission = producer.stored(prefix)
    assert producer.cancel(submission) == (200, None)
    assert producer.stored(prefix) == (200, submission)
    assert producer.ask("GET", f"{SUBMISSIONS}/lookup_id_by_prefix/{quote(prefix, safe='')}") == (200, submission)
    code, newer = producer.stored(prefix, 5)
    assert (code, newer != submission) == (200, True)
    assert producer.ask("GET", f"{SUBMISSIONS}/lookup_id_by_prefix/{quote(prefix, safe='')}") == (200, newer)


def test_a_huge_submission_is_accepted_and_one_beyond_the_memory_limit_refused(producer: Producer) -> None:
    code, submission = producer.stored(fresh(), 10**9)
    assert code == 200
    assert producer.status(submission)["InProgress"]["chunks_total"] == 10**9
    assert producer.stored(fresh(), 2**63 - 1)[0] == 413
    assert producer.cancel(submission) == (200, None)


def test_a_paused_submission_hands_out_nothing_until_it_is_unpaused(producer: Producer, consumer: Consumer) -> None:
    _, submission = producer.stored(fresh(), paused=True)
    assert producer.status(submission)["Paused"]["chunks_done"] == 0
    assert producer.ask("POST", f"{SUBMISSIONS}/pause/{submission}") == (404, submission)
    consumer.ask_for_chunks(2)
    assert producer.ask("POST", f"{SUBMISSIONS}/unpause/{submission}") == (200, None)
    assert [chunk["chunk_index"] for chunk, _ in consumer.chunks()] == [0, 1]
    assert producer.ask("POST", f"{SUBMISSIONS}/unpause/{submission}") == (404, submission)
    assert producer.ask("POST", f"{SUBMISSIONS}/pause/{submission}") == (200, None)
    assert "Paused" in producer.status(submission)
    assert producer.ask("POST", f"{SUBMISSIONS}/pause/12345") == (404, 12345)
    assert producer.cancel(submission) == (200, None)
    assert "Cancelled" in producer.status(submission)


def test_outputs_of_a_direct_submission_can_be_read_back(producer: Producer, consumer: Consumer) -> None:
    _, submission = producer.insert({"Direct": {"contents": [[1, 2], None]}})
    output = f"{SUBMISSIONS}/{submission}/chunks/{{}}/output".format
    assert producer.ask("GET", output(0)) == (404, None)
    consumer.ask_for_chunks(2)
    (first, description), (second, _) = consumer.chunks()
    assert (first["input_content"], second["input_content"]) == (b"\x01\x02", b"")
    assert description["prefix"] is None
    consumer.complete(first, b"\x00\xffone")
    consumer.complete(second, b"")
    while "Completed" not in producer.status(submission):
        pass
    assert producer.ask("GET", output(0)) == (200, b"\x00\xffone")
    assert producer.ask("GET", output(1)) == (200, b"")
    assert producer.ask("GET", output(2)) == (404, None)
    assert producer.ask("GET", f"{SUBMISSIONS}/5/chunks/0/output") == (404, None)
    assert producer.ask("GET", output("x"))[0] == 400


def test_lookups_by_metadata_find_what_has_every_pair(producer: Producer) -> None:
    ids = [
        producer.stored(fresh(), strategic_metadata=pairs)[1]
        for pairs in ({"a": 1}, {"a": 1, "b": -(2**63)}, {"a": 2, "b": 2**63 - 1}, {})
    ]
    path = SUBMISSIONS + "/lookup_ids_by_strategic_metadata"
    assert producer.ask("POST", path, {"a": 1}) == (200, ids[:2])
    assert producer.ask("POST", path, {"a": 1, "b": -(2**63)}) == (200, ids[1:2])
    assert producer.ask("POST", path, {"a": 1, "b": 7}) == (200, [])
    assert producer.ask("POST", path, {}) == (200, ids)


def test_the_trace_context_of_an_insert_is_kept_and_given_to_consumers(producer: Producer, consumer: Consumer) -> None:
    headers = {"traceparent": "00-" + "a" * 32 + "-" + "b" * 16 + "-01", "tracestate": "k=v", "baggage": "c=d"}
    _, submission = producer.insert({"Direct": {"contents": [[1]]}}, headers)
    assert json.loads(producer.status(submission)["InProgress"]["otel_trace_carrier"]) == headers
    consumer.ask_for_chunks()
    [(chunk, description)] = consumer.chunks()
    assert json.loads(description["otel_trace_carrier"]) == headers
    consumer.complete(chunk, b"out")
    while "Completed" not in (status := producer.status(submission)):
        pass
    assert json.loads(status["Completed"]["otel_trace_carrier"]) == headers


def test_what_happened_shows_in_the_metrics_under_both_names(producer: Producer, consumer: Consumer) -> None:
    _, submission = producer.insert({"Direct": {"contents": [[1]]}}, chunk_size=7)
    consumer.ask_for_chunks()
    [(chunk, _)] = consumer.chunks()

    def metric(name: str) -> float:
        lines = producer.ask("GET", "/metrics")[1].splitlines()
        return float(next(line.rsplit(" ", 1)[1] for line in lines if line.startswith(name + " ")))

    assert metric("opsqueue_chunks_reserved") == metric("reserver_chunks_reserved_count") == 1
    assert metric("operations_in_backlog_count") == 7
    assert metric("consumers_connected_count") == 1
    consumer.complete(chunk, b"")
    while "Completed" not in producer.status(submission):
        pass
    assert metric("opsqueue_submissions_inserted_total") == metric("submissions_completed_count") == 1
    assert metric("opsqueue_chunks_completed_total") == 1
    assert metric("chunks_in_backlog_count") == metric("opsqueue_chunks_reserved") == 0
    assert metric("submissions_complete_duration_seconds_count") == 1
    assert producer.ask("GET", SUBMISSIONS + "/count_completed") == (200, 1)


def test_more_matches_than_configured_are_a_400_with_the_bare_maximum(server_factory: ServerFactory) -> None:
    producer = Producer(server_factory(max_submissions_returned=1).port)
    path = SUBMISSIONS + "/lookup_ids_by_strategic_metadata"
    _, only = producer.stored(fresh(), strategic_metadata={"a": 1})
    assert producer.ask("POST", path, {"a": 1}) == (200, [only])
    producer.stored(fresh(), strategic_metadata={"a": 1})
    assert producer.ask("POST", path, {"a": 1}) == (400, 1)
    assert producer.ask("POST", path, {}) == (400, 1)
    producer.close()


def test_connections_spread_evenly_over_the_front_ends(server_factory: ServerFactory) -> None:
    server = server_factory(frontends=2)
    producers = [Producer(server.port) for _ in range(12)]
    for each in producers:
        assert each.ask("GET", "/ping") == (200, "pong")
    text: str = producers[0].ask("GET", "/metrics")[1]
    open_connections = [
        int(line.rsplit(" ", 1)[1]) for line in text.splitlines() if line.startswith("opsqueue_connections{")
    ]
    assert sum(open_connections) == 12
    assert abs(open_connections[0] - open_connections[1]) <= 2
    for each in producers:
        each.close()


def test_a_stopped_server_closes_idle_connections_and_goes_within_a_second(server: Server) -> None:
    idle = Producer(server.port)
    assert idle.ask("GET", "/version")[0] == 200
    assert server.stop() < 1
    with pytest.raises((http.client.HTTPException, ConnectionError)):
        idle.ask("GET", "/version")

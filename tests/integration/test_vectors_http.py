"""Every HTTP exchange captured from the reference server, replayed: same status, content type and shape from ours."""

from __future__ import annotations

import http.client
import json
import re
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import cbor2
import pytest
from websockets.sync.client import ClientConnection, connect

from tests.support.server import Server

VECTORS = Path(__file__).parents[1] / "vectors" / "http.jsonl"
#: What the reference's client sent with the captured inserts.
TRACEPARENT = "00-9f3784413fe4619ae863ff13dfa09abd-e1161d3ca0ee920a-01"
TIME = re.compile(r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z$")
VERSION = re.compile(r"^v\d+\.\d+\.\d+\S*$")
SMALLEST_REAL_ID = 1 << 52
#: The reference forgets these two when a submission ends, we keep them.
KEPT_BY_US = {"chunk_size", "otel_trace_carrier"}


class Consumer:
    """A raw consumer: one WebSocket, one request at a time."""

    def __init__(self, port: int) -> None:
        self._ends = ExitStack()
        connecting = connect(f"ws://127.0.0.1:{port}/consumer", compression=None)
        self._socket: ClientConnection = self._ends.enter_context(connecting)
        self._nonce = 0
        assert "Init" in self._receive()

    def _receive(self) -> dict[str, Any]:
        frame = self._socket.recv(timeout=10)
        assert isinstance(frame, bytes)
        decoded: dict[str, Any] = cbor2.loads(frame)
        return decoded

    def _send(self, contents: dict[str, Any]) -> int:
        nonce, self._nonce = self._nonce, self._nonce + 1
        self._socket.send(cbor2.dumps({"nonce": nonce, "contents": contents}))
        return nonce

    def reserve(self) -> dict[str, Any]:
        """One chunk, the oldest."""
        nonce = self._send({"WantToReserveChunks": {"max": 1, "strategy": "Oldest"}})
        while "Sync" not in (answer := self._receive()):
            pass
        assert answer["Sync"]["nonce"] == nonce
        [[chunk, _]] = answer["Sync"]["contents"]["ChunksReserved"]["Ok"]
        found: dict[str, Any] = chunk
        return found

    def _id(self, chunk: dict[str, Any]) -> dict[str, Any]:
        return {"submission_id": chunk["submission_id"], "chunk_index": chunk["chunk_index"]}

    def complete(self, chunk: dict[str, Any]) -> None:
        self._send({"CompleteChunk": {"id": self._id(chunk), "output_content": None}})

    def fail(self, chunk: dict[str, Any], failure: str) -> None:
        self._send({"FailChunk": {"id": self._id(chunk), "failure": failure}})

    def close(self) -> None:
        self._ends.close()


class Replay:
    """Sends the captured requests with our ids in place of the captured ones."""

    def __init__(self, port: int) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
        self._consumer = Consumer(port)
        self._ours: dict[str, str] = {}

    def close(self) -> None:
        self._consumer.close()
        self._connection.close()

    def send(self, vector: dict[str, Any]) -> tuple[int, str | None, str]:
        headers = {}
        if vector["request_content_type"]:
            headers = {"Content-Type": vector["request_content_type"], "traceparent": TRACEPARENT, "tracestate": ""}
        body = vector["request_body"].encode() or None
        self._connection.request(vector["method"], self._with_our_ids(vector["path"]), body, headers)
        response = self._connection.getresponse()
        text = response.read().decode()
        if vector["method"] == "POST" and vector["path"] == "/producer/submissions" and response.status == 200:
            self._ours[vector["body"]] = text
        return response.status, response.headers["Content-Type"], text

    def _with_our_ids(self, path: str) -> str:
        for captured, ours in self._ours.items():
            path = path.replace(captured, ours)
        return path

    def bring_about(self, vector: dict[str, Any]) -> None:
        """What happened in the capture between two exchanges: consumers' work, and a cancel."""
        answer = json.loads(vector["body"]) if vector["content_type"] == "application/json" and vector["body"] else None
        if not isinstance(answer, dict):
            return
        match answer:
            case {"Completed": {"id": submission, "chunks_total": chunks}}:
                wanted = "Completed"
            case {"Failed": [{"id": submission}, {"failure": failure}]}:
                wanted = "Failed"
            case {"Cancelled": {"id": submission}}:
                wanted = "Cancelled"
            case _:
                return
        if wanted in self._status(submission):
            return
        if wanted == "Completed":
            for _ in range(chunks):
                self._consumer.complete(self._consumer.reserve())
        elif wanted == "Failed":
            for _ in range(10):
                self._consumer.fail(self._consumer.reserve(), failure)
        else:
            self._connection.request("POST", f"/producer/submissions/cancel/{self._ours[str(submission)]}")
            self._connection.getresponse().read()
        self._wait_for(submission, wanted)

    def _status(self, captured: int) -> dict[str, Any]:
        self._connection.request("GET", f"/producer/submissions/{self._ours[str(captured)]}")
        status: dict[str, Any] = json.loads(self._connection.getresponse().read())
        return status

    def _wait_for(self, captured: int, wanted: str) -> None:
        deadline = time.monotonic() + 10
        while wanted not in self._status(captured):
            assert time.monotonic() < deadline, f"never became {wanted}: {self._status(captured)}"


def shape(value: Any, labels: dict[int, str], ended: bool = False) -> Any:
    """`value` with what may differ replaced: ids by a label in order of appearance, times, and what only we keep."""
    match value:
        case dict():
            below = ended or bool({"Completed", "Failed"} & value.keys())
            return {
                key: "kept" if ended and key in KEPT_BY_US else shape(part, labels, below)
                for key, part in value.items()
            }
        case list():
            return [shape(part, labels, ended) for part in value]
        case int() if value >= SMALLEST_REAL_ID:
            return labels.setdefault(value, f"id {len(labels)}")
        case str() if TIME.match(value):
            return "a time"
        case str() if VERSION.match(value):
            return "a version"
        case str() if value.startswith('{"traceparent"'):
            return sorted(json.loads(value))
    return value


@pytest.fixture
def replay(server: Server) -> Iterator[Replay]:
    made = Replay(server.port)
    yield made
    made.close()


def test_every_captured_exchange_is_answered_alike(replay: Replay) -> None:
    theirs: dict[int, str] = {}
    ours: dict[int, str] = {}
    for line in VECTORS.read_text().splitlines():
        vector = json.loads(line)
        replay.bring_about(vector)
        status, content_type, body = replay.send(vector)
        asked = f"{vector['method']} {vector['path']} {vector['request_body'][:80]}"
        assert status == vector["status"], f"{asked}: {body}"
        assert content_type == vector["content_type"], asked
        if vector["body"] is None:
            assert len(body) > 10, f"{asked}: an error needs a text"
        elif vector["content_type"] == "application/json":
            assert shape(json.loads(body), ours) == shape(json.loads(vector["body"]), theirs), asked
        else:
            assert shape(body, ours) == shape(vector["body"], theirs), asked

"""A producer made of http.client and json, and a reader of metrics. Shares no code with the product."""

from __future__ import annotations

import http.client
import itertools
import json
from collections.abc import Sequence
from typing import Any, Self

from tests.support.server import wait_until

WITHIN_S = 20.0
_prefixes = itertools.count()


class RawProducer:
    """One keep-alive connection."""

    def __init__(self, port: int) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=WITHIN_S)
        #: Every submission that was made here.
        self.inserted: list[int] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()

    def ask(self, method: str, path: str, body: Any = None) -> tuple[int, bytes]:
        """Status and body, as they come."""
        headers = {} if body is None else {"Content-Type": "application/json"}
        self._connection.request(
            method, path, None if body is None else json.dumps(body, separators=(",", ":")), headers
        )
        response = self._connection.getresponse()
        return response.status, response.read()

    def _post(self, path: str, body: Any = None) -> Any:
        status, answer = self.ask("POST", f"/producer/submissions{path}", body)
        assert status == 200, (status, answer)
        return json.loads(answer) if answer else None

    def insert(self, count: int = 1, *, prefix: str | None = None, **fields: Any) -> int:
        """A submission of `count` chunks in an object store; further fields as on the wire."""
        contents = {"SeeObjectStorage": {"prefix": prefix or f"prefix-{next(_prefixes)}", "count": count}}
        return self._insert({"chunk_contents": contents, **fields})

    def insert_direct(self, contents: Sequence[bytes | None], **fields: Any) -> int:
        """A submission whose inputs go along."""
        lists = [None if content is None else list(content) for content in contents]
        return self._insert({"chunk_contents": {"Direct": {"contents": lists}}, **fields})

    def _insert(self, body: dict[str, Any]) -> int:
        submission = int(self._post("", body))
        self.inserted.append(submission)
        return submission

    def cancel(self, submission: int) -> None:
        self._post(f"/cancel/{submission}")

    def pause(self, submission: int) -> None:
        self._post(f"/pause/{submission}")

    def unpause(self, submission: int) -> None:
        self._post(f"/unpause/{submission}")

    def status(self, submission: int) -> tuple[str, Any]:
        """`("InProgress", {...})` and the like."""
        status, answer = self.ask("GET", f"/producer/submissions/{submission}")
        assert status == 200, (status, answer)
        [(state, about)] = json.loads(answer).items()
        return state, about

    def state(self, submission: int) -> str:
        return self.status(submission)[0]

    def chunks_done(self, submission: int) -> int:
        """Of one in progress or paused."""
        state, about = self.status(submission)
        assert state in ("InProgress", "Paused"), state
        return int(about["chunks_done"])

    def failure(self, submission: int) -> dict[str, Any]:
        """Why it failed: the failed chunk."""
        state, about = self.status(submission)
        assert state == "Failed", state
        found: dict[str, Any] = about[1]
        return found

    def output(self, submission: int, chunk: int) -> tuple[int, bytes]:
        return self.ask("GET", f"/producer/submissions/{submission}/chunks/{chunk}/output")

    def metric(self, name: str) -> float:
        """The value now; of a metric per process, the sum."""
        status, answer = self.ask("GET", "/metrics")
        assert status == 200
        values = [
            float(line.rpartition(" ")[2])
            for line in answer.decode().splitlines()
            if line.partition("{")[0].partition(" ")[0] == name
        ]
        assert values, f"no metric {name}"
        return sum(values)

    def wait_for_metric(self, name: str, value: float) -> None:
        wait_until(lambda: self.metric(name) == value, f"{name} is {value}")

    def wait_for_parked(self, count: int) -> None:
        """Until so many requests for chunks wait for work."""
        self.wait_for_metric("opsqueue_requests_parked", count)

    def wait_for_state(self, submission: int, state: str) -> None:
        wait_until(lambda: self.state(submission) == state, f"submission {submission} is {state}")

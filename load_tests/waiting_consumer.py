"""A consumer that asks for one chunk at a time and completes the one before: for latencies, not for throughput."""

from __future__ import annotations

import socket
import time

import cbor2

LONGEST_S = 30.0


class WaitingConsumer:
    """On a connection after its handshake, blocking. Answers pings, ignores everything else but its reply."""

    def __init__(self, connection: socket.socket, strategy: object = "Oldest") -> None:
        connection.settimeout(LONGEST_S)
        self._connection = connection
        self._strategy = strategy
        self._nonce = 0
        self._input = b""
        self._done: dict[str, int] | None = None

    def ask(self) -> None:
        """Complete the chunk that is held, if any, and ask for another, in one write."""
        messages = b""
        if self._done is not None:
            messages += self._message({"CompleteChunk": {"id": self._done, "output_content": None}})
        messages += self._message({"WantToReserveChunks": {"max": 1, "strategy": self._strategy}})
        self._connection.sendall(messages)

    def held(self) -> int:
        """Wait until the chunk is there; the submission it belongs to. TimeoutError after 30 s, pings or not."""
        until = time.monotonic() + LONGEST_S
        while True:
            if time.monotonic() > until:
                raise TimeoutError(f"no chunk for {self._strategy} within {LONGEST_S:g} s")
            opcode, payload = self._frame()
            if opcode == 9:
                self._connection.sendall(_framed(10, payload))
            elif opcode == 8:
                raise ConnectionError(f"the server closed the consumer's connection: {payload!r}")
            elif b"ChunksReserved" in payload:
                ((chunk, _),) = cbor2.loads(payload)["Sync"]["contents"]["ChunksReserved"]["Ok"]
                self._done = {"submission_id": chunk["submission_id"], "chunk_index": chunk["chunk_index"]}
                return int(chunk["submission_id"])

    def _message(self, contents: object) -> bytes:
        payload = cbor2.dumps({"nonce": self._nonce, "contents": contents})
        self._nonce += 1
        return _framed(2, payload)

    def _frame(self) -> tuple[int, bytes]:
        head = self._exactly(2)
        size = head[1] & 127
        if size >= 126:
            size = int.from_bytes(self._exactly(2 if size == 126 else 8), "big")
        return head[0] & 15, self._exactly(size)

    def _exactly(self, size: int) -> bytes:
        while len(self._input) < size:
            part = self._connection.recv(65536)
            if not part:
                raise ConnectionError("the server ended the consumer's connection")
            self._input += part
        taken, self._input = self._input[:size], self._input[size:]
        return taken


def _framed(opcode: int, payload: bytes) -> bytes:
    """A final frame of less than 64 KiB, masked with the key zero."""
    size = len(payload)
    length = bytes([0x80 | size]) if size < 126 else b"\xfe" + size.to_bytes(2, "big")
    return bytes([0x80 | opcode]) + length + bytes(4) + payload

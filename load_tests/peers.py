"""Connections to a server, bare: a WebSocket handshake, an HTTP request. For the generator, which does the rest."""

from __future__ import annotations

import base64
import json
import os
import socket


def connect(address: str) -> socket.socket:
    """A TCP connection without delay."""
    host, _, port = address.partition(":")
    connection = socket.create_connection((host, int(port)), timeout=10)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


def consumer(address: str, features: str | None = None) -> socket.socket:
    """A consumer's connection after its handshake; Init may be unread. `features` None sends no Opsqueue-Features."""
    connection = connect(address)
    extensions = "" if features is None else f"Opsqueue-Features: {features}\r\n"
    key = base64.b64encode(os.urandom(16)).decode()
    connection.sendall(
        f"GET /consumer HTTP/1.1\r\nHost: {address}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        f"Sec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n{extensions}\r\n".encode()
    )
    head = b""
    while not head.endswith(b"\r\n\r\n"):  # byte by byte: what follows belongs to the generator
        byte = connection.recv(1)
        if not byte:
            raise ConnectionError(f"the handshake ended after {head!r}")
        head += byte
    if not head.startswith(b"HTTP/1.1 101"):
        raise ConnectionError(f"the server refused the handshake: {head!r}")
    return connection


def request(address: str, method: str, path: str, body: bytes = b"") -> bytes:
    """One whole HTTP request with a JSON body."""
    return (
        f"{method} {path} HTTP/1.1\r\nHost: {address}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n".encode()
        + body
    )


def insert_request(address: str, prefix: str, chunks: int, strategic_metadata: dict[str, int] | None = None) -> bytes:
    """An insert of `chunks` chunks whose operations would lie in an object store under `prefix`."""
    body = {
        "chunk_contents": {"SeeObjectStorage": {"prefix": prefix, "count": chunks}},
        "metadata": None,
        "strategic_metadata": strategic_metadata or {},
        "chunk_size": 1,
    }
    return request(address, "POST", "/producer/submissions", json.dumps(body).encode())


def exchange(connection: socket.socket, message: bytes) -> bytes:
    """Send one request on a keep-alive connection and give the body of its answer; RuntimeError unless it is a 200."""
    connection.sendall(message)
    answer = b""
    while b"\r\n\r\n" not in answer:
        part = connection.recv(65536)
        if not part:
            raise ConnectionError("the server closed the connection before it answered")
        answer += part
    head, _, body = answer.partition(b"\r\n\r\n")
    length = next(int(line[15:]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:"))
    while len(body) < length:
        part = connection.recv(65536)
        if not part:
            raise ConnectionError("the server closed the connection in the middle of its answer")
        body += part
    if not head.startswith(b"HTTP/1.1 200"):
        raise RuntimeError(f"the server answered {head!r} {body[:200]!r}")
    return body

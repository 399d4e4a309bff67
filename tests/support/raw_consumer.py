"""A consumer made of a socket and cbor2: what it sends and hears is on the wire exactly as a test wrote it.

Shares no code with the product. Every wait ends by an event or after `WITHIN_S` with an error; nothing sleeps.
"""

from __future__ import annotations

import base64
import hashlib
import os
import select
import socket
import struct
from typing import Any, NamedTuple, Self

import cbor2

#: Longer than any answer takes, also on a machine that runs other tests at the same time.
WITHIN_S = 20.0

CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG = 0, 1, 2, 8, 9, 10
HEARTBEAT = bytes.fromhex("f09f9293")

ChunkId = tuple[int, int]


class Frame(NamedTuple):
    """One frame of the server, as it came."""

    opcode: int
    fin: bool
    payload: bytes


class Reserved(NamedTuple):
    """One chunk of a reply and its submission, as they came."""

    chunk: dict[str, Any]
    submission: dict[str, Any]

    @property
    def id(self) -> ChunkId:
        return self.chunk["submission_id"], self.chunk["chunk_index"]


class EndedError(Exception):
    """The connection ended: with the server's close code and reason, or with None and no reason."""

    def __init__(self, code: int | None, reason: str) -> None:
        super().__init__(f"the connection ended: {code} {reason}")
        self.code = code
        self.reason = reason


def frame(payload: bytes, opcode: int = BINARY, *, fin: bool = True, masked: bool = True) -> bytes:
    """A frame as a client sends it."""
    size = len(payload)
    mask_bit = 0x80 if masked else 0
    head = bytes([(0x80 if fin else 0) | opcode])
    if size < 126:
        head += bytes([mask_bit | size])
    elif size < 1 << 16:
        head += struct.pack(">BH", mask_bit | 126, size)
    else:
        head += struct.pack(">BQ", mask_bit | 127, size)
    # A mask of zeros is a mask: the payload can be read in a capture.
    return head + (b"\0\0\0\0" if masked else b"") + payload


def chunk_id(chunk: ChunkId) -> dict[str, int]:
    return {"submission_id": chunk[0], "chunk_index": chunk[1]}


class RawConsumer:
    """One connection. `features`: the words of the header Opsqueue-Features, None sends no header."""

    def __init__(
        self, port: int, features: str | None = None, *, nodelay: bool = True, receive_buffer: int | None = None
    ) -> None:
        self.socket = socket.socket()
        if receive_buffer is not None:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        if nodelay:
            self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket.settimeout(WITHIN_S)
        self.socket.connect(("127.0.0.1", port))
        self._received = bytearray()
        self._nonce = 0
        #: Answer the server's pings, as every WebSocket library does by itself.
        self.answers_pings = True
        #: What came, in order, and was not asked for: notices; payloads of pings; frames that carried messages.
        self.notices: list[dict[str, Any]] = []
        self.pings: list[bytes] = []
        self.answers: dict[int, dict[str, Any]] = {}
        #: Submissions that compact messages have described.
        self.described: list[dict[str, Any]] = []
        #: Frames of the message that came last.
        self.last_frames: list[Frame] = []
        self.handshake_head = self._shake_hands(features)
        first = self.receive()
        assert list(first) == ["Init"], first
        self.init: dict[str, Any] = first["Init"]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.drop()

    def _shake_hands(self, features: str | None) -> str:
        key = base64.b64encode(os.urandom(16)).decode()
        lines = [
            "GET /consumer HTTP/1.1",
            "Host: localhost",
            "Upgrade: websocket",
            "Connection: Upgrade",
            "Sec-WebSocket-Version: 13",
            f"Sec-WebSocket-Key: {key}",
            # What a library offers by itself; the server takes none of it.
            "Sec-WebSocket-Extensions: permessage-deflate; client_max_window_bits",
        ]
        if features is not None:
            lines.append(f"Opsqueue-Features: {features}")
        self.socket.sendall("\r\n".join([*lines, "", ""]).encode())
        while b"\r\n\r\n" not in self._received:
            self._read()
        head, _, rest = bytes(self._received).partition(b"\r\n\r\n")
        self._received = bytearray(rest)
        digest = hashlib.sha1(key.encode() + b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11").digest()
        assert head.startswith(b"HTTP/1.1 101 "), head
        assert f"sec-websocket-accept: {base64.b64encode(digest).decode()}".lower() in head.decode().lower()
        return head.decode()

    # --- hearing ---

    def _read(self) -> None:
        data = self.socket.recv(1 << 20)
        if not data:
            raise EndedError(None, "")
        self._received += data

    def _take(self, size: int) -> bytes:
        while len(self._received) < size:
            self._read()
        taken = bytes(self._received[:size])
        del self._received[:size]
        return taken

    def next_frame(self) -> Frame:
        """The next frame, whatever it is; nothing is answered."""
        first, size = self._take(2)
        assert first & 0x70 == 0, "reserved bits: no extension was agreed"
        assert size & 0x80 == 0, "a server's frame is not masked"
        if size == 126:
            (size,) = struct.unpack(">H", self._take(2))
        elif size == 127:
            (size,) = struct.unpack(">Q", self._take(8))
        return Frame(first & 0x0F, bool(first & 0x80), self._take(size))

    def receive(self) -> dict[str, Any]:
        """The next message; pings before it are noted and answered. Raises EndedError."""
        parts: list[Frame] = []
        while True:
            got = self.next_frame()
            if got.opcode == PING:
                self.pings.append(got.payload)
                if self.answers_pings:
                    self.socket.sendall(frame(got.payload, PONG))
            elif got.opcode == CLOSE:
                code = int.from_bytes(got.payload[:2], "big") if got.payload else None
                raise EndedError(code, got.payload[2:].decode())
            elif got.opcode in (BINARY, CONTINUATION):
                parts.append(got)
                if got.fin:
                    break
            else:
                raise AssertionError(f"an unexpected frame: {got}")
        assert [part.opcode for part in parts] == [BINARY, *[CONTINUATION] * (len(parts) - 1)]
        self.last_frames = parts
        message: dict[str, Any] = cbor2.loads(b"".join(part.payload for part in parts))
        assert len(message) == 1
        assert next(iter(message)) in ("Init", "Sync", "Async")
        return message

    def _note(self) -> None:
        message = self.receive()
        if "Async" in message:
            self.notices.append(message["Async"])
            return
        sync = message["Sync"]
        assert set(sync) == {"nonce", "contents"}
        assert sync["nonce"] not in self.answers, f"nonce {sync['nonce']} is answered twice"
        self.answers[sync["nonce"]] = sync["contents"]

    def answer(self, nonce: int) -> dict[str, Any]:
        """The contents of the answer to `nonce`, once it has come."""
        while nonce not in self.answers:
            self._note()
        return self.answers[nonce]

    def chunks(self, nonce: int) -> list[Reserved]:
        """What `nonce` reserved, once it is answered."""
        contents = self.answer(nonce)
        assert list(contents) == ["ChunksReserved"], contents
        return [Reserved(*pair) for pair in contents["ChunksReserved"]["Ok"]]

    def notice(self) -> dict[str, Any]:
        """The oldest notice that was not yet given, once there is one."""
        while not self.notices:
            self._note()
        return self.notices.pop(0)

    def ping(self) -> bytes:
        """The next ping's payload; notices and answers that come before it are kept."""
        if not self.pings:
            while True:
                got = self.next_frame()
                if got.opcode == PING:
                    if self.answers_pings:
                        self.socket.sendall(frame(got.payload, PONG))
                    return got.payload
                assert got.opcode == BINARY
                assert got.fin
                message = cbor2.loads(got.payload)
                assert "Async" in message, message
                self.notices.append(message["Async"])
        return self.pings.pop(0)

    def end(self) -> tuple[int | None, str]:
        """The server's close code and reason; returns when the server has closed the TCP connection too."""
        try:
            while True:
                self._note()
        except EndedError as ended:
            code, reason = ended.code, ended.reason
        except ConnectionResetError:
            return None, ""
        try:
            while code is not None and self.socket.recv(1 << 16):
                pass
        except ConnectionResetError:
            # Closed too, with what we sent last unread.
            return code, reason
        return code, reason

    def has_nothing(self) -> bool:
        """Whether nothing but pings has come up to now."""
        while self._received or select.select([self.socket], [], [], 0)[0]:
            got = self.next_frame()
            if got.opcode != PING:
                return False
            self.pings.append(got.payload)
        return True

    # --- saying ---

    def send(self, data: bytes) -> None:
        """Bytes as they are."""
        self.socket.sendall(data)

    def send_fragments(self, parts: list[bytes]) -> None:
        """One message in as many frames."""
        for at, part in enumerate(parts):
            self.send(frame(part, CONTINUATION if at else BINARY, fin=at == len(parts) - 1))

    def message(self, contents: Any, nonce: int | None = None) -> bytes:
        """The frame of a message; the nonce is the next of this connection's counter."""
        if nonce is None:
            nonce, self._nonce = self._nonce, self._nonce + 1
        return frame(cbor2.dumps({"nonce": nonce, "contents": contents}))

    def say(self, *contents: Any) -> None:
        """Messages, in one write."""
        self.send(b"".join(self.message(each) for each in contents))

    def ask(self, maximum: int = 1, strategy: Any = "Oldest") -> int:
        """Ask for chunks; the nonce of the answer to come."""
        nonce = self._nonce
        self.say({"WantToReserveChunks": {"max": maximum, "strategy": strategy}})
        return nonce

    def reserve(self, maximum: int = 1, strategy: Any = "Oldest") -> list[Reserved]:
        """Ask, and wait for the chunks."""
        return self.chunks(self.ask(maximum, strategy))

    def reserve_ids(self, maximum: int = 1, strategy: Any = "Oldest") -> list[ChunkId]:
        return [reserved.id for reserved in self.reserve(maximum, strategy)]

    def complete(self, *chunks: ChunkId, output: Any = None) -> None:
        self.say(*({"CompleteChunk": {"id": chunk_id(chunk), "output_content": output}} for chunk in chunks))

    def fail(self, chunk: ChunkId, failure: str) -> None:
        self.say({"FailChunk": {"id": chunk_id(chunk), "failure": failure}})

    def about(self, kind: str, chunk: ChunkId, **fields: Any) -> None:
        """A message of the extensions: `about("ReleaseChunk", chunk)`."""
        self.say({kind: {"id": chunk_id(chunk), **fields}})

    def settle(self) -> None:
        """Return once everything said before stands in the way to the writer, ahead of later requests over HTTP.

        A request for no chunks is answered by the front-end when its turn comes, and one front-end keeps one order.
        """
        assert self.answer(self.ask(0)) == {"ChunksReserved": {"Err": []}}

    # --- ending ---

    def close(self) -> None:
        """A clean end: a close frame, the server's echo, then the end of the connection."""
        self.send(frame(struct.pack(">H", 1000), CLOSE))
        assert self.end()[0] == 1000
        self.socket.close()

    def drop(self) -> None:
        """The connection ends without a word."""
        self.socket.close()

    def reset(self) -> None:
        """The connection is reset, as when a machine is gone."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.close()

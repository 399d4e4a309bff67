"""A file and an HTTP port that say whether all is well, for supervisors and load balancers."""

from __future__ import annotations

import os
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Protocol, Self

from opsqueue.server.settings_sources import SettingsError


class Watched(Protocol):
    """What is asked."""

    @property
    def is_healthy(self) -> bool:
        """Whether all is well."""

    def line(self) -> str:
        """What goes on, for people."""


def write_whole(path: Path, text: str) -> None:
    """Writes a small file so that a reader sees the old or the new one. Raises OSError."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text)
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


class HealthPort:
    """Answers GET on a port of 127.0.0.1 while it is entered: 200 when all is well, else 503. No port: nothing."""

    def __init__(self, port: int | None, watched: Watched) -> None:
        self._server: ThreadingHTTPServer | None = None
        if port is None:
            return

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                body = (watched.line() + "\n").encode()
                self.send_response(200 if watched.is_healthy else 503)
                self.send_header("Content-Type", "text/plain; charset=utf-8")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:
                """Nothing: a supervisor asks every few seconds."""

        try:
            self._server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        except (OSError, OverflowError) as error:
            raise SettingsError(f"--health-port {port} cannot be used: {error}") from error

    def __enter__(self) -> Self:
        if self._server is not None:
            threading.Thread(target=self._server.serve_forever, name="opsqueue-health", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()

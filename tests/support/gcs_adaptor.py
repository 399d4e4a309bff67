"""What fake-gcs-server lacks of Google's XML interface: plain uploads, which obstore makes.

It takes an upload only with the query of a signed URL, whose signature it does not check, and tells its ETag in the
body instead of the header. All other requests go to it, and its answers back, as they are.
"""

from __future__ import annotations

import http.client
import json
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

#: Of what is between two peers only.
_NOT_PASSED_ON = frozenset(("connection", "content-length", "date", "host", "server", "transfer-encoding"))


@contextmanager
def adapted(port: int) -> Iterator[str]:
    """The URL at which the emulator on `port` of this machine takes plain uploads, too."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def forward(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            is_upload = self.command == "PUT"
            path = f"{self.path}?X-Goog-Algorithm=GOOG4-RSA-SHA256" if is_upload else self.path
            emulator = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
            try:
                emulator.request(self.command, path, body, _passed_on(self.headers.items()))
                answer = emulator.getresponse()
                content = answer.read()
            finally:
                emulator.close()
            self.send_response(answer.status)
            for name, value in _passed_on(answer.getheaders()).items():
                self.send_header(name, value)
            if is_upload and answer.status == 200:
                self.send_header("ETag", f'"{json.loads(content)["etag"]}"')
            if self.command == "HEAD":
                self.send_header("Content-Length", answer.getheader("Content-Length", "0"))
            else:
                self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = forward

        def log_message(self, *_: object) -> None:
            """The emulator has its own log."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        running.daemon_threads = True
        thread = threading.Thread(target=running.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{running.server_address[1]}"
        finally:
            running.shutdown()
            thread.join()


def _passed_on(headers: Iterable[tuple[str, str]]) -> dict[str, str]:
    return {name: value for name, value in headers if name.lower() not in _NOT_PASSED_ON}

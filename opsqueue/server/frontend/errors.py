"""Every HTTP answer that is not a success, in one place. Raised by handlers, turned into an answer by the application.

A text says what is wrong, where, and what to do; it never holds a traceback. What may succeed later is a 503 with
Retry-After, because producers retry that and nothing else. On the metadata lookup a 400, and on cancel a 404 or 409, is
parsed as JSON by producers: nothing else may use those codes there.
"""

from __future__ import annotations

import msgspec

JSON = "application/json"
TEXT = "text/plain; charset=utf-8"


class HttpError(Exception):
    """An answer that ends a request: status, body and its content type (None: no body)."""

    def __init__(
        self,
        status: int,
        body: bytes = b"",
        content_type: str | None = None,
        *,
        headers: dict[str, str] | None = None,
        close: bool = False,
    ) -> None:
        super().__init__(status, body)
        self.status = status
        self.body = body
        self.content_type = content_type
        self.headers = headers or {}
        #: True: the connection ends after this answer (the request was not read to its end).
        self.close = close


def _text(status: int, text: str, *, headers: dict[str, str] | None = None, close: bool = False) -> HttpError:
    return HttpError(status, text.encode("utf-8", "replace"), TEXT, headers=headers, close=close)


def malformed(text: str) -> HttpError:
    """400: a path or a body that cannot be read at all."""
    return _text(400, text)


def too_many_matches(maximum: int) -> HttpError:
    """400 of the metadata lookup: the bare maximum."""
    return HttpError(400, b"%d" % maximum, JSON)


def unknown_path() -> HttpError:
    """404 with an empty body: there is no such endpoint, or no such thing."""
    return HttpError(404)


def unknown_submission(submission: int) -> HttpError:
    """404 of cancel, retry, pause and unpause: the bare id."""
    return HttpError(404, b"%d" % submission, JSON)


def wrong_method(allowed: str) -> HttpError:
    """405 with an empty body; `allowed` is the Allow header."""
    return HttpError(405, headers={"Allow": allowed})


def not_cancellable(status: bytes) -> HttpError:
    """409 of cancel: the submission's final status as JSON."""
    return HttpError(409, status, JSON)


def not_retryable(refusal: bytes) -> HttpError:
    """409 of a retry: the submission's id and state and the reason as JSON."""
    return HttpError(409, refusal, JSON)


def conflicting_insert(submission: int, identity: str) -> HttpError:
    """409 of an insert: the same prefix or key was used for other contents."""
    return _text(
        409,
        f"{identity} belongs to submission {submission}, which is in progress and differs from this one in its count "
        "or contents, chunk_size, metadata or strategic_metadata; insert under another one, or wait until it has ended",
    )


def too_large(text: str, *, close: bool = False) -> HttpError:
    """413: above a configured limit."""
    return _text(413, text, close=close)


def not_json(content_type: str | None) -> HttpError:
    """415: the body's content type is not JSON."""
    found = f"Content-Type is {content_type!r}" if content_type else "there is no Content-Type"
    return _text(415, f"{found}; send the body as application/json")


def encoded_body(encoding: str) -> HttpError:
    """415: the body is compressed."""
    return _text(415, f"Content-Encoding {encoding!r} is not supported; send the body as it is")


def wrong_expectation(expectation: str) -> HttpError:
    """417: an Expect header other than 100-continue."""
    return _text(417, f"Expect: {expectation!r} cannot be met; only 100-continue is known")


def wrong_shape(text: str) -> HttpError:
    """422: JSON, but not what this endpoint takes."""
    return _text(422, text)


def internal() -> HttpError:
    """500: a defect of ours; the log has the cause, the client gets a JSON string."""
    return HttpError(500, msgspec.json.encode("internal error; the server's log says more"), JSON)


def unavailable(reason: str, retry_after_s: int = 1, *, close: bool = False) -> HttpError:
    """503: the same request may succeed later."""
    return _text(503, reason, headers={"Retry-After": str(max(1, retry_after_s))}, close=close)


def bad_query(name: str, given: str, expected: str) -> HttpError:
    """422: a value in the query string that this endpoint cannot read."""
    return wrong_shape(f"?{name}={given[:100]} in the request's query is not {expected}")


def client_gone() -> HttpError:
    """499: ends a request whose client has gone; nobody gets it, the metrics count it."""
    return HttpError(499, close=True)


def too_many_waits(limit: int) -> HttpError:
    """503: as many requests wait as may."""
    return unavailable(
        f"{limit} requests wait here already (--max-parked-waits of each front-end); try again, or ask without ?wait="
    )


def storage_full(reason: str, retry_after_s: int) -> HttpError:
    """507: nothing was stored because the disk is full."""
    return _text(507, reason, headers={"Retry-After": str(max(1, retry_after_s))})

"""Builds aiohttp responses: the few shapes that our endpoints answer with. Decides nothing."""

from __future__ import annotations

from aiohttp import web

from opsqueue.server import requests
from opsqueue.server.frontend import errors
from opsqueue.server.frontend.errors import JSON, TEXT, HttpError

_JSON_HEADERS = {"Content-Type": JSON}
_TEXT_HEADERS = {"Content-Type": TEXT}
_BYTES_HEADERS = {"Content-Type": "application/octet-stream"}


def json_answer(body: bytes) -> web.Response:
    """200 with JSON."""
    return web.Response(body=body, headers=_JSON_HEADERS)


def text_answer(text: str) -> web.Response:
    """200 with text."""
    return web.Response(body=text.encode(), headers=_TEXT_HEADERS)


def bytes_answer(body: bytes) -> web.Response:
    """200 with bytes as they are."""
    return web.Response(body=body, headers=_BYTES_HEADERS)


def empty_answer() -> web.Response:
    """200 without a body."""
    return web.Response()


def error_answer(error: HttpError) -> web.Response:
    """The answer that `error` stands for."""
    headers = dict(error.headers)
    if error.content_type is not None:
        headers["Content-Type"] = error.content_type
    response = web.Response(status=error.status, body=error.body or None, headers=headers)
    if error.close:
        response.force_close()
    return response


def refused(reply: requests.Reply) -> Exception:
    """What to raise for a reply of the writer's that is not the one that was asked for."""
    if isinstance(reply, requests.Unavailable):
        if reply.storage_full:
            return errors.storage_full(reply.reason, reply.retry_after_s)
        return errors.unavailable(reply.reason, reply.retry_after_s)
    return TypeError(f"the writer answered with {type(reply).__name__}, which this request has no use for")

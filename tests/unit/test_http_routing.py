"""What the path table promises: every endpoint is found, parameters are decoded, and nothing else is."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from aiohttp import web

from opsqueue.server.frontend.errors import HttpError
from opsqueue.server.frontend.routing import MAX_INTEGER, Endpoint, Router

DOCUMENT = Path(__file__).parents[2] / "docs" / "http_api.md"


async def _nothing(request: web.BaseRequest, *parameters: int | str) -> web.StreamResponse:
    return web.Response()


ROUTER = Router(
    Endpoint(method, path, _nothing)
    for method, path in [
        ("POST", "/things"),
        ("GET", "/things/{id}"),
        ("GET", "/things/count"),
        ("POST", "/things/cancel/{id}"),
        ("GET", "/things/by_prefix/{prefix}"),
        ("GET", "/things/{id}/parts/{index}/output"),
    ]
)


def refusal(method: str, path: str) -> HttpError:
    with pytest.raises(HttpError) as raised:
        ROUTER.match(method, path)
    return raised.value


@pytest.mark.parametrize(
    ("method", "path", "found", "parameters"),
    [
        ("POST", "/things", "/things", ()),
        ("GET", "/things/count", "/things/count", ()),
        ("HEAD", "/things/count", "/things/count", ()),
        ("GET", "/things/0", "/things/{id}", (0,)),
        ("GET", "/things/007", "/things/{id}", (7,)),
        ("GET", "/things/%31%32", "/things/{id}", (12,)),
        ("GET", f"/things/{MAX_INTEGER}", "/things/{id}", (MAX_INTEGER,)),
        ("POST", "/things/cancel/5", "/things/cancel/{id}", (5,)),
        ("GET", "/things/by_prefix/a%2Fb%20c", "/things/by_prefix/{prefix}", ("a/b c",)),
        ("GET", "/things/by_prefix/..", "/things/by_prefix/{prefix}", ("..",)),
        ("GET", "/things/by_prefix/%C3%BC+1", "/things/by_prefix/{prefix}", ("ü+1",)),
        ("GET", "/things/3/parts/4/output", "/things/{id}/parts/{index}/output", (3, 4)),
    ],
)
def test_a_path_is_matched_and_its_parameters_are_decoded(
    method: str, path: str, found: str, parameters: tuple[int | str, ...]
) -> None:
    endpoint, values = ROUTER.match(method, path)
    assert endpoint.path == found
    assert values == parameters


@pytest.mark.parametrize(
    "path", ["/", "/nope", "/things/", "/things/cancel/", "/things/1/2", "/things/by_prefix/a/b", "*"]
)
def test_an_unknown_path_is_404_with_an_empty_body(path: str) -> None:
    error = refusal("GET", path)
    assert (error.status, error.body, error.content_type) == (404, b"", None)


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [("DELETE", "/things/1", "GET, HEAD"), ("GET", "/things", "POST"), ("OPTIONS", "/things/count", "GET, HEAD")],
)
def test_a_wrong_method_is_405_with_an_empty_body_and_says_which_are_allowed(
    method: str, path: str, allowed: str
) -> None:
    error = refusal(method, path)
    assert (error.status, error.body, error.content_type) == (405, b"", None)
    assert error.headers == {"Allow": allowed}


@pytest.mark.parametrize(
    "number",
    ["abc", "-1", "+1", "1.0", "1e3", "cancel", "%20", "9223372036854775808", "9" * 5000, "٣", "%FF", "1%002"],
)
def test_a_bad_number_in_a_path_is_400_with_a_text_that_says_where(number: str) -> None:
    error = refusal("GET", f"/things/{number}")
    assert (error.status, error.content_type) == (400, "text/plain; charset=utf-8")
    assert b"id" in error.body
    assert len(error.body) < 500


def test_every_endpoint_is_in_the_documentation_and_nothing_else_is() -> None:
    from opsqueue.server.frontend.done import DoneEndpoints
    from opsqueue.server.frontend.listing import ListEndpoints
    from opsqueue.server.frontend.plain import PlainEndpoints
    from opsqueue.server.frontend.producers import ProducerEndpoints
    from opsqueue.server.frontend.retries import RetryEndpoints

    unused = object()
    ours = [
        *ProducerEndpoints(*[unused] * 6).endpoints(),  # type: ignore[arg-type]
        *ListEndpoints(*[unused] * 2).endpoints(),  # type: ignore[arg-type]
        *RetryEndpoints(*[unused] * 3).endpoints(),  # type: ignore[arg-type]
        *DoneEndpoints(*[unused] * 3).endpoints(),  # type: ignore[arg-type]
        *PlainEndpoints(*[unused] * 3).endpoints(),  # type: ignore[arg-type]
    ]
    served = {(endpoint.method, endpoint.path) for endpoint in ours} | {("GET", "/consumer")}
    documented = set(re.findall(r"^### (GET|POST) (\S+)$", DOCUMENT.read_text(), re.M))
    assert documented == served

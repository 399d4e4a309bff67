"""Matches a request's method and path to an endpoint. Decodes path segments; knows no endpoint."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from urllib.parse import unquote_to_bytes

from aiohttp import web

from opsqueue.server.frontend import errors
from opsqueue.server.frontend.answers import Answer

Handler = Callable[..., Awaitable[Answer | web.StreamResponse]]

#: Parameters that are no integers.
_TEXTS = ("prefix", "key")
#: Ids, indexes and counts go up to here.
MAX_INTEGER = 2**63 - 1


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One endpoint. In `path`, `{name}` is a parameter: `{prefix}` and `{key}` are text, every other an integer."""

    method: str
    path: str
    handler: Handler


@dataclass(slots=True)
class _Node:
    literal: dict[str, _Node] = field(default_factory=dict)
    parameter: tuple[str, _Node] | None = None
    endpoints: dict[str, Endpoint] = field(default_factory=dict)


class Router:
    """A tree of path segments. Literal segments win over parameters; HEAD is answered as GET without the body."""

    def __init__(self, endpoints: Iterable[Endpoint]) -> None:
        self._root = _Node()
        self._exact: dict[tuple[str, str], Endpoint] = {}
        for endpoint in endpoints:
            self._add(endpoint)

    def _add(self, endpoint: Endpoint) -> None:
        node = self._root
        for segment in endpoint.path[1:].split("/"):
            if segment.startswith("{"):
                if node.parameter is None:
                    node.parameter = (segment[1:-1], _Node())
                node = node.parameter[1]
            else:
                node = node.literal.setdefault(segment, _Node())
        node.endpoints[endpoint.method] = endpoint
        if "{" not in endpoint.path:
            self._exact[endpoint.method, endpoint.path] = endpoint

    def match(self, method: str, raw_path: str) -> tuple[Endpoint, tuple[int | str, ...]]:
        """The endpoint and its path parameters. Raises HttpError: 404, 405, or 400 for a bad parameter."""
        exact = self._exact.get((method, raw_path))
        if exact is not None:
            return exact, ()
        found = self._find(self._root, raw_path[1:].split("/"), 0, []) if raw_path.startswith("/") else None
        if found is None:
            raise errors.unknown_path()
        node, parameters = found
        endpoint = node.endpoints.get("GET" if method == "HEAD" else method)
        if endpoint is None:
            raise errors.wrong_method(_allowed(node))
        return endpoint, tuple(_read_parameter(name, raw) for name, raw in parameters)

    def _find(
        self, node: _Node, segments: list[str], at: int, parameters: list[tuple[str, str]]
    ) -> tuple[_Node, list[tuple[str, str]]] | None:
        if at == len(segments):
            return (node, parameters) if node.endpoints else None
        segment = segments[at]
        child = node.literal.get(segment)
        if child is not None:
            found = self._find(child, segments, at + 1, parameters)
            if found is not None:
                return found
        if node.parameter is None or not segment:
            return None
        name, child = node.parameter
        return self._find(child, segments, at + 1, [*parameters, (name, segment)])


def _allowed(node: _Node) -> str:
    methods = set(node.endpoints)
    if "GET" in methods:
        methods.add("HEAD")
    return ", ".join(sorted(methods))


def _read_parameter(name: str, raw: str) -> int | str:
    try:
        text = unquote_to_bytes(raw).decode("utf-8")
    except UnicodeError:
        raise errors.malformed(f"the path's {name} is not UTF-8 text: {raw[:100]!r}") from None
    if name in _TEXTS:
        return text
    digits = text.lstrip("0") or text[-1:]
    if not (text.isascii() and text.isdigit()) or len(digits) > 19 or int(digits) > MAX_INTEGER:
        raise errors.malformed(f"the path's {name} must be an integer from 0 to {MAX_INTEGER}, not {text[:100]!r}")
    return int(digits)

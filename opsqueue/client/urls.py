"""A server's address, as users write it, as the URLs of its two interfaces. Opens no connection."""

from __future__ import annotations

import urllib.parse

import msgspec

from opsqueue.exceptions import IncorrectUsageError

DEFAULT_PORT = 3999
_SCHEMES = {"http": False, "ws": False, "https": True, "wss": True}


class ServerAddress(msgspec.Struct, frozen=True):
    """Where a server is: `path` is what stands before `/producer` and `/consumer`, empty or starting with a slash."""

    secure: bool
    host: str
    port: int
    path: str

    @property
    def authority(self) -> str:
        """`host:port`, an IPv6 address in brackets."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"

    @property
    def http(self) -> str:
        """The base of the producers' endpoints."""
        return f"{'https' if self.secure else 'http'}://{self.authority}{self.path}"

    @property
    def consumer(self) -> str:
        """The consumers' WebSocket."""
        return f"{'wss' if self.secure else 'ws'}://{self.authority}{self.path}/consumer"


def parse_address(url: str) -> ServerAddress:
    """The address in `host:port`, `http(s)://…` or `ws(s)://…`, with a path prefix if any.

    Raises IncorrectUsageError, whose text shows what is expected. The port is 3999 for a bare host, else the scheme's.
    """
    if not isinstance(url, str):
        raise TypeError(f"opsqueue_url must be a str, not {url!r}")
    text = url.strip()
    scheme, separator, rest = text.partition("://")
    if not separator:
        scheme, rest = "", text
    elif scheme.lower() not in _SCHEMES:
        raise IncorrectUsageError(_explained(url, f"the scheme {scheme!r} is not known"))
    try:
        parts = urllib.parse.urlsplit("//" + rest)
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise IncorrectUsageError(_explained(url, str(error))) from None
    if not host or any(character.isspace() for character in host):
        raise IncorrectUsageError(_explained(url, "it has no host"))
    if parts.query or parts.fragment or parts.username is not None:
        raise IncorrectUsageError(_explained(url, "it may have neither a user nor a query"))
    secure = _SCHEMES.get(scheme.lower(), False)
    if port is None:
        port = DEFAULT_PORT if not scheme else 443 if secure else 80
    return ServerAddress(secure, host, port, parts.path.rstrip("/"))


def _explained(url: str, problem: str) -> str:
    return f"opsqueue_url {url!r} is wrong: {problem}; write host:port, http://host:port or https://host/path"

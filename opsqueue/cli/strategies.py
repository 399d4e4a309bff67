"""A strategy as it is written on a command line: `Random`, `PreferDistinct(customer, Oldest)`."""

from __future__ import annotations

import re
from typing import Final

from opsqueue.client.values import Strategy

_TOKEN: Final = re.compile(r"\s*(?:([A-Za-z_][\w.-]*|-?\d+|\"[^\"]*\")|([(),]))")
_SIMPLE: Final = {"oldest": Strategy.Oldest, "newest": Strategy.Newest, "random": Strategy.Random}
#: What each takes: k a metadata key, i an integer, s a strategy.
_SHAPES: Final = {
    "preferdistinct": "ks", "highest": "k", "lowest": "k",
    "selectonly": "kis", "maxsimultaneous": "kis", "orelse": "ss",
}  # fmt: skip
USAGE: Final = (
    "Oldest, Newest, Random, PreferDistinct(KEY, STRATEGY), Highest(KEY), Lowest(KEY), "
    "SelectOnly(KEY, VALUE, STRATEGY), MaxSimultaneous(KEY, LIMIT, STRATEGY) or OrElse(STRATEGY, STRATEGY)"
)


def parse(text: str) -> Strategy:
    """The strategy in `text`; case does not matter. Raises ValueError, whose text says what is expected."""
    tokens, at = [], 0
    while at < len(text.rstrip()):
        match = _TOKEN.match(text, at)
        if match is None:
            raise _wrong(text, f"{text[at:].strip()[:20]!r} is not understood")
        tokens.append(match.group(1) or match.group(2))
        at = match.end()
    strategy, rest = _strategy(text, tokens)
    if rest:
        raise _wrong(text, f"nothing may follow the strategy, but {rest[0]!r} does")
    return strategy


def _wrong(text: str, problem: str) -> ValueError:
    return ValueError(f"strategy {text!r}: {problem}; write {USAGE}")


def _strategy(text: str, tokens: list[str]) -> tuple[Strategy, list[str]]:
    if not tokens:
        raise _wrong(text, "a strategy is missing")
    name = tokens[0].lower().replace("-", "").replace("_", "")
    rest = tokens[1:]
    if name in _SIMPLE:
        # with or without empty parentheses
        return _SIMPLE[name](), rest[2:] if rest[:2] == ["(", ")"] else rest
    if name not in _SHAPES:
        raise _wrong(text, f"{tokens[0]!r} is not known")
    arguments: list[str | int | Strategy] = []
    expected = "("
    for kind in _SHAPES[name]:
        if rest[:1] != [expected]:
            raise _wrong(text, f"{tokens[0]} needs {len(_SHAPES[name])} arguments in parentheses")
        argument, rest = _argument(text, kind, rest[1:])
        arguments.append(argument)
        expected = ","
    if rest[:1] != [")"]:
        raise _wrong(text, f"{tokens[0]} takes {len(_SHAPES[name])} arguments, then a closing parenthesis")
    return _made(text, name, arguments), rest[1:]


def _argument(text: str, kind: str, tokens: list[str]) -> tuple[str | int | Strategy, list[str]]:
    if kind == "s":
        return _strategy(text, tokens)
    if not tokens or tokens[0] in ("(", ")", ","):
        raise _wrong(text, "an argument is missing")
    if kind == "k":
        return tokens[0].strip('"'), tokens[1:]
    if not tokens[0].lstrip("-").isdigit():
        raise _wrong(text, f"{tokens[0]!r} must be a whole number")
    return int(tokens[0]), tokens[1:]


def _made(text: str, name: str, arguments: list[str | int | Strategy]) -> Strategy:
    try:
        match name, arguments:
            case "preferdistinct", [str(key), Strategy() as underlying]:
                return Strategy.PreferDistinct(meta_key=key, underlying=underlying)
            case "highest", [str(key)]:
                return Strategy.Highest(meta_key=key)
            case "lowest", [str(key)]:
                return Strategy.Lowest(meta_key=key)
            case "selectonly", [str(key), int(value), Strategy() as underlying]:
                return Strategy.SelectOnly(meta_key=key, value=value, underlying=underlying)
            case "maxsimultaneous", [str(key), int(limit), Strategy() as underlying]:
                return Strategy.MaxSimultaneous(meta_key=key, limit=limit, underlying=underlying)
            case "orelse", [Strategy() as first, Strategy() as second]:
                return Strategy.OrElse(first=first, second=second)
    except (ValueError, OverflowError, TypeError) as error:
        raise _wrong(text, str(error)) from error
    raise _wrong(text, "its arguments are not understood")

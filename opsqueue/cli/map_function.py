"""What consumers run for `opsqueue map`: the user's function, its failures caught one by one."""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable
from typing import Any

import orjson


def of(function: Callable[[Any], Any]) -> Callable[[Any], list[Any]]:
    """`function`, giving [True, the result], or [False, the exception's last line, its traceback].

    A result that no output could show is a failure too, without a traceback.
    """

    def outcome(item: Any) -> list[Any]:
        try:
            result = function(item)
        except (Exception, SystemExit) as error:
            # without the line above
            frames = error.__traceback__.tb_next if error.__traceback__ is not None else None
            shown = traceback.TracebackException(type(error), error, frames)
            return [False, f"{type(error).__name__}: {shown}", "".join(shown.format())]
        try:
            _check(result)
        except (TypeError, ValueError, RecursionError) as error:
            return [False, f"its result cannot be written as JSON: {error}", ""]
        return [True, result]

    return outcome


def _check(result: Any) -> None:
    """Raises TypeError, ValueError or RecursionError for what is no JSON."""
    try:
        orjson.dumps(result, option=orjson.OPT_SERIALIZE_NUMPY)
    except TypeError:
        json.dumps(result).encode()  # integers of any size, which orjson refuses

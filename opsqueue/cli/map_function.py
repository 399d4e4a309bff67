"""What consumers run for `opsqueue map`: the user's function, its failures caught one by one."""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable
from typing import Any

import orjson


def of(function: Callable[[Any], Any]) -> Callable[[Any], list[Any]]:
    """`function`, giving [True, the result], or [False, the exception's last line, its traceback].

    A result that no output could show is a failure too.
    """

    def outcome(item: Any) -> list[Any]:
        try:
            result = function(item)
            _check(result)
            return [True, result]
        except (Exception, SystemExit) as error:
            return [False, f"{type(error).__name__}: {error}", traceback.format_exc()]

    return outcome


def _check(result: Any) -> None:
    """Raises TypeError or ValueError for what is no JSON."""
    try:
        orjson.dumps(result, option=orjson.OPT_SERIALIZE_NUMPY)
    except TypeError:
        json.dumps(result).encode()  # integers of any size, which orjson refuses

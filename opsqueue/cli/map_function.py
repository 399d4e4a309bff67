"""What the processes of `opsqueue map` run: the user's function, its failures caught one by one."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable
from functools import cache
from typing import Any, Final

from opsqueue.cli.functions import load

#: Names the function to the processes of a pool.
VARIABLE: Final = "OPSQUEUE_MAP_FUNCTION"


@cache
def _function() -> Callable[[Any], list[Any]]:
    return of(load(os.environ[VARIABLE]))


def call(item: Any) -> list[Any]:
    """The outcome of the function that the environment names."""
    return _function()(item)


def of(function: Callable[[Any], Any]) -> Callable[[Any], list[Any]]:
    """`function`, giving [True, the result], or [False, the exception's last line, its traceback]."""

    def outcome(item: Any) -> list[Any]:
        try:
            return [True, function(item)]
        except Exception as error:
            return [False, f"{type(error).__name__}: {error}", traceback.format_exc()]

    return outcome

"""The function that a command line names, as `module:function`. Imports it and says clearly what is wrong with it."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any, Final

#: Of the lines that a pool and its processes log.
LOG_FORMAT: Final = "%(asctime)s %(levelname)s [%(process)d] %(name)s: %(message)s"


class FunctionError(Exception):
    """The function cannot be had; the text says why."""


def load(name: str) -> Callable[..., Any]:
    """The function `name`, "module:function" or "package.module:object.method". Raises FunctionError.

    The working directory is looked into first, as `python -m` does.
    """
    module_name, colon, path = name.partition(":")
    if not colon or not module_name or not path:
        raise FunctionError(f"{name!r} is no function: write module:function, such as mytasks:resize")
    directory = os.getcwd()
    if directory not in sys.path:
        sys.path.insert(0, directory)
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is not None and (module_name + ".").startswith(error.name + "."):
            raise FunctionError(
                f"{name!r}: there is no module {error.name!r} in {directory} or among the installed packages"
            ) from error
        raise FunctionError(f"{name!r}: importing {module_name} failed: {error}") from error
    except Exception as error:
        what = f"{type(error).__name__}: {error}"
        if not isinstance(error, SyntaxError):  # which says itself where it is
            where = traceback.extract_tb(error.__traceback__)[-1]
            what += f" ({where.filename}:{where.lineno})"
        raise FunctionError(f"{name!r}: importing {module_name} failed: {what}") from error
    for part in path.split("."):
        try:
            found = getattr(found, part)
        except AttributeError as error:
            raise FunctionError(f"{name!r}: {module_name} has no {path}") from error
    if not callable(found):
        raise FunctionError(f"{name!r} cannot be called: it is of type {type(found).__name__}")
    if inspect.iscoroutinefunction(found):
        raise FunctionError(
            f"{name!r} is a coroutine function: give a plain one, or write a program with AsyncConsumerClient"
        )
    return found  # type: ignore[no-any-return]  # anything callable

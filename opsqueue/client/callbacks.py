"""What a loop is given to call. Calls nothing."""

from __future__ import annotations

import inspect


def check_callable(callback: object, name: str) -> None:
    """Raises TypeError for what cannot be called; `name` is the parameter's."""
    if not callable(callback):
        raise TypeError(f"{name} must be callable, {callback!r} is not")


def check_plain(callback: object, name: str) -> None:
    """Raises TypeError for what cannot be called, and for a coroutine function, which has to be awaited."""
    check_callable(callback, name)
    if inspect.iscoroutinefunction(callback):
        raise TypeError(f"{name} {callback!r} is a coroutine function: AsyncConsumerClient awaits those")

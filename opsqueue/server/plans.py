"""From a strategy to what the engine's indexes can answer: alternatives, each a flat plan. Refuses every scan.

Filters (SelectOnly, MaxSimultaneous) may stand anywhere: they say which submissions take part, whatever orders these.
OrElse may hold and be held by anything but PreferDistinct. docs/engine.md says what a plan costs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from opsqueue.protocol.errors import StrategyError
from opsqueue.protocol.strategy import (
    Highest,
    Lowest,
    MaxSimultaneous,
    Newest,
    Oldest,
    OrElse,
    PreferDistinct,
    SelectOnly,
    Strategy,
)

#: Keys of one alternative, and alternatives of one strategy.
MAX_KEYS = 8
MAX_ALTERNATIVES = 16


@dataclass(frozen=True, slots=True)
class Plan:
    """One alternative. `leaf`: the letter of the innermost strategy; `leaf_key`: of Highest and Lowest."""

    selects: tuple[tuple[str, int], ...] = ()
    limits: tuple[tuple[str, int], ...] = ()
    prefers: tuple[str, ...] = ()
    leaf: str = "O"
    leaf_key: str | None = None


def plans(strategy: Strategy) -> tuple[Plan, ...]:
    """The alternatives, first choice first. Raises StrategyError for what no index can answer, saying why."""
    found = tuple(_flat(strategy, Plan()))
    if len(found) > MAX_ALTERNATIVES:
        raise StrategyError(f"strategy has {len(found)} alternatives by OrElse, it may have {MAX_ALTERNATIVES}")
    for plan in found:
        _check(plan)
    return found


def _flat(strategy: Strategy, plan: Plan) -> list[Plan]:
    match strategy:
        case OrElse(first, second):
            if plan.prefers:
                raise StrategyError(
                    f"PreferDistinct({plan.prefers[-1]}) over OrElse has no order that an index can keep; "
                    "put OrElse outside: OrElse(PreferDistinct(first), PreferDistinct(second))"
                )
            return _flat(first, plan) + _flat(second, plan)
        case PreferDistinct(key, underlying):
            return _flat(underlying, replace(plan, prefers=(*plan.prefers, key)))
        case SelectOnly(key, value, underlying):
            return _flat(underlying, replace(plan, selects=(*plan.selects, (key, value))))
        case MaxSimultaneous(key, limit, underlying):
            return _flat(underlying, replace(plan, limits=(*plan.limits, (key, limit))))
        case Highest(key):
            return [replace(plan, leaf="H", leaf_key=key)]
        case Lowest(key):
            return [replace(plan, leaf="L", leaf_key=key)]
        case Oldest():
            return [plan]
        case Newest():
            return [replace(plan, leaf="N")]
        case _:
            return [replace(plan, leaf="R")]


def _check(plan: Plan) -> None:
    keys = len(plan.selects) + len(plan.limits) + len(plan.prefers)
    if keys > MAX_KEYS:
        raise StrategyError(f"strategy has {keys} keys, it may have {MAX_KEYS}")
    if plan.selects or not plan.limits:
        return
    (key, _), *others = plan.limits
    if others:
        raise StrategyError(
            f"MaxSimultaneous({key}) with MaxSimultaneous({others[0][0]}) would have to look at every submission; "
            "one limit is possible, or several inside SelectOnly"
        )
    if plan.prefers and plan.prefers[0] != key:
        raise StrategyError(
            f"MaxSimultaneous({key}) with PreferDistinct({plan.prefers[0]}) would have to look at every submission; "
            f"prefer {key} first, or put both inside SelectOnly"
        )

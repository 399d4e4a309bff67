"""The strategies that the benchmarks measure, and the metadata that tells submissions apart for them.

A new strategy is one entry in CASES; everything else takes it from here.
"""

from __future__ import annotations

import cbor2

from opsqueue.protocol.strategy import (
    Highest,
    MaxSimultaneous,
    Newest,
    Oldest,
    OrElse,
    PreferDistinct,
    Random,
    SelectOnly,
    Strategy,
    to_wire,
)

#: Values of `customer` over a backlog: many, so that an index per value is worth measuring.
CUSTOMERS = 1_000
#: Values of `kind`: few, so that many submissions share one.
KINDS = 3

#: The customer of SelectOnly: no backlog has one until `backlog.fill_selected` inserts it, so that the strategies that
#: were measured before have taken none of its chunks.
SELECTED = -1

CASES: dict[str, Strategy] = {
    "Oldest": Oldest(),
    "Newest": Newest(),
    "Random": Random(),
    "PreferDistinct(customer, Oldest)": PreferDistinct("customer", Oldest()),
    "PreferDistinct(customer, Random)": PreferDistinct("customer", Random()),
    "PreferDistinct(customer, PreferDistinct(kind, Oldest))": PreferDistinct(
        "customer", PreferDistinct("kind", Oldest())
    ),
    "Highest(kind)": Highest("kind"),
    "SelectOnly(customer, -1, Oldest)": SelectOnly("customer", SELECTED, Oldest()),
    "MaxSimultaneous(customer, 100, Oldest)": MaxSimultaneous("customer", 100, Oldest()),
    "OrElse(SelectOnly(customer, -1, Oldest), Random)": OrElse(SelectOnly("customer", SELECTED, Oldest()), Random()),
}


def metadata(number: int) -> dict[str, int]:
    """The strategic metadata of a backlog's submission with this number."""
    return {"customer": number % CUSTOMERS, "kind": number % KINDS}


def selects(name: str) -> bool:
    """Whether a case takes chunks of the customer SELECTED alone, or first."""
    return "SelectOnly" in name


def encoded(strategy: Strategy) -> bytes:
    """As a consumer sends it."""
    return cbor2.dumps(to_wire(strategy))

"""What the benchmark's rows promise: ratios that say better or worse, who was the limit, tables that read back."""

from __future__ import annotations

import dataclasses

import pytest

from load_tests.figures import (
    Figure,
    Machine,
    as_json,
    as_markdown,
    cells,
    did_not_run,
    from_json,
    limit_of,
    percentile,
)
from load_tests.scale import FULL, QUICK
from load_tests.strategies import CASES, encoded

MACHINE = Machine(2, "a processor", "6.0", "3.11", "3.54", "0.1.0", "2026-01-01 00:00 UTC", "make bench")


def test_a_ratio_above_one_is_better_whichever_way_the_unit_goes() -> None:
    assert Figure("rate", 200, "/s", reference=100, asked=400).ratio == 2
    assert Figure("rate", 200, "/s", reference=100, asked=400).of_asked == 0.5
    assert Figure("time", 2, "ms", reference=8, asked=1, higher_is_better=False).ratio == 4
    assert Figure("time", 2, "ms", reference=8, asked=1, higher_is_better=False).of_asked == 0.5


@pytest.mark.parametrize("figure", [Figure("x", 1, "s"), Figure("x", 0, "s", 1, 1), did_not_run("x", "no disk")])
def test_what_was_not_measured_has_no_ratio(figure: Figure) -> None:
    assert figure.ratio is None
    assert cells(figure)[3] == "-"


def test_the_busiest_process_is_the_limit_unless_all_cores_are_taken_or_everybody_waits() -> None:
    assert limit_of({"writer": 0.97, "fe0": 0.3}).startswith("writer ")
    assert limit_of({"writer": 0.1, "fe0": 0.2, "others": 5.0}).startswith("all ")
    assert limit_of({"writer": 0.1, "fe0": 0.2}).startswith("waiting ")


def test_results_can_be_written_and_read_back() -> None:
    figures = [Figure("a | b", 1.5, "ms", 3, 1, False, "writer", "note"), did_not_run("c", "why")]
    assert from_json(as_json(MACHINE, figures)) == (MACHINE, figures)
    table = as_markdown(MACHINE, figures).splitlines()
    assert "a \\| b" in table[4]
    assert all(line.count(" | ") >= 7 for line in table[2:])


def test_percentiles_are_values_that_were_measured() -> None:
    ordered = [float(value) for value in range(1, 101)]
    assert (percentile(ordered, 0.5), percentile(ordered, 0.99), percentile([7.0], 0.99)) == (51, 100, 7)


def test_a_scaled_run_means_the_same_rows() -> None:
    small = FULL.scaled(0.01)
    assert (small.shapes, small.churn_age_seconds) == (FULL.shapes, FULL.churn_age_seconds)
    assert small.stall_seconds == FULL.stall_seconds / 100
    assert all(getattr(QUICK.scaled(1e-9), field.name) for field in dataclasses.fields(QUICK))


@pytest.mark.parametrize("name", CASES)
def test_every_strategy_of_the_benchmark_has_its_own_form(name: str) -> None:
    assert name.startswith(type(CASES[name]).__name__)
    assert encoded(CASES[name])

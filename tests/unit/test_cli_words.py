"""What the command line understands: functions and strategies as words."""

from __future__ import annotations

from pathlib import Path

import pytest

from opsqueue.cli.functions import FunctionError, load
from opsqueue.cli.strategies import parse
from opsqueue.consumer import Strategy


@pytest.mark.parametrize(
    ("text", "strategy"),
    [
        ("Oldest", Strategy.Oldest()),
        ("newest", Strategy.Newest()),
        (" Random() ", Strategy.Random()),
        (
            "PreferDistinct(customer, Oldest)",
            Strategy.PreferDistinct(meta_key="customer", underlying=Strategy.Oldest()),
        ),
        ('prefer-distinct("a b", random)', Strategy.PreferDistinct(meta_key="a b", underlying=Strategy.Random())),
        ("Highest(priority)", Strategy.Highest(meta_key="priority")),
        ("Lowest(priority)", Strategy.Lowest(meta_key="priority")),
        (
            "OrElse(SelectOnly(customer, -7, Newest), MaxSimultaneous(kind,3,Oldest))",
            Strategy.OrElse(
                first=Strategy.SelectOnly(meta_key="customer", value=-7, underlying=Strategy.Newest()),
                second=Strategy.MaxSimultaneous(meta_key="kind", limit=3, underlying=Strategy.Oldest()),
            ),
        ),
    ],
)
def test_a_strategy_is_read(text: str, strategy: Strategy) -> None:
    assert parse(text) == strategy


@pytest.mark.parametrize(
    "text",
    ["", "Fastest", "Oldest Newest", "PreferDistinct", "PreferDistinct(a)", "PreferDistinct(a, Oldest", "Highest()",
     "SelectOnly(a, x, Oldest)", "OrElse(Oldest)", "Highest(a, b)", "Oldest;", "PreferDistinct(a, Oldest, Newest)"],
)  # fmt: skip
def test_a_wrong_strategy_is_refused_with_what_is_expected(text: str) -> None:
    with pytest.raises(ValueError, match=r"strategy .*write Oldest, Newest"):
        parse(text)


def test_a_function_is_found_in_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tasks_of_test.py").write_text(
        "class Tasks:\n    @staticmethod\n    def double(x):\n        return 2 * x\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert load("tasks_of_test:Tasks.double")(21) == 42


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("json", "write module:function"),
        (":dumps", "write module:function"),
        ("no_such_module:f", "there is no module 'no_such_module'"),
        ("json.no_such:f", "there is no module 'json.no_such'"),
        ("json:no_such", "json has no no_such"),
        ("json:__name__", "cannot be called: it is of type str"),
        ("asyncio:sleep", "is a coroutine function"),
    ],
)
def test_a_function_that_cannot_be_had_is_explained(name: str, complaint: str) -> None:
    with pytest.raises(FunctionError, match=complaint):
        load(name)


def test_a_module_that_fails_is_explained_with_its_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_of_test.py").write_text("x = 1\ny = 1 / 0\n")
    (tmp_path / "unfinished_of_test.py").write_text("x = 1\ndef f(:\n")
    (tmp_path / "needs_of_test.py").write_text("import no_such_library_of_test\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(FunctionError, match=r"ZeroDivisionError.*broken_of_test\.py:2"):
        load("broken_of_test:f")
    with pytest.raises(FunctionError, match=r"SyntaxError: invalid syntax \(unfinished_of_test\.py, line 2\)$"):
        load("unfinished_of_test:f")
    with pytest.raises(
        FunctionError, match="importing needs_of_test failed: No module named 'no_such_library_of_test'"
    ):
        load("needs_of_test:f")

"""Every public name says what it is: shapes, units, and the errors that it raises. Read off the docstrings."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import textwrap
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FunctionType
from typing import Any, NamedTuple

import msgspec
import pytest

import opsqueue.exceptions
from docs_site.public_api import PUBLIC_MODULES, constant_comment, public_names
from opsqueue.consumer import AsyncConsumerClient, ConsumerClient
from opsqueue.producer import AsyncProducerClient, ProducerClient

#: What must be said of a parameter or field of that name, wherever it occurs.
UNITS = {
    "timeout": "seconds",
    "wait": "seconds",
    "delay": "seconds",
    "estimate": "seconds",
    "rate": "chunks a second",
    "max_decompressed": "bytes",
    "completed_at": "UTC",
    "failed_at": "UTC",
    "cancelled_at": "UTC",
    "prefetch": "chunks",
    "concurrency": "chunks",
    "chunk_size": "operations",
}

#: Exceptions that only programs written for the reference still name: nothing here raises them.
NEVER_RAISED = {"ChunkCountIsZeroError", "ChunkNotFoundError", "UnexpectedOpsqueueConsumerServerResponseError"}
#: Parents of others, to be caught and not raised themselves.
PARENTS = {"OpsqueueInternalError"}

#: What may go wrong at each call beyond the network, whichever client makes it: the contract's table.
ERRORS = {
    "insert_submission": {"ChunkSizeIsZeroError", "ChunksStorageError", "SerializationError"},
    "insert_submission_chunks": {"ChunksStorageError"},
    "run_submission": {"ChunkSizeIsZeroError", "SubmissionFailedError", "SubmissionCancelledError"},
    "run_submission_chunks": {"ChunksStorageError", "SubmissionFailedError", "ChunkRetrievalError"},
    "async_run_submission": {"ChunkSizeIsZeroError", "SubmissionFailedError", "SubmissionCancelledError"},
    "find_or_insert": {"SubmissionConflictError", "ServerLacksFeatureError", "ChunksStorageError"},
    "blocking_stream_completed_submission": {
        "TimeoutError", "SubmissionFailedError", "SubmissionCancelledError", "SubmissionNotFoundError",
        "ChunkRetrievalError", "DeserializationError", "DecompressionError",
    },
    "async_stream_completed_submission_chunks": {"SubmissionFailedError", "ChunkRetrievalError"},
    "stream_completed_submission": {"TimeoutError", "SubmissionFailedError", "ChunkRetrievalError"},
    "try_stream_completed_submission": {
        "SubmissionNotCompletedYetError", "SubmissionFailedError", "ChunkRetrievalError",
    },
    "stream_submission": {"SubmissionNotFoundError", "SubmissionFailedError", "InternalProducerClientError"},
    "wait": {"TimeoutError", "SubmissionNotFoundError"},
    "progress": {"SubmissionNotFoundError"},
    "cancel_submission": {"SubmissionNotFoundError", "SubmissionNotCancellableError"},
    "lookup_submission_ids_by_strategic_metadata": {"TooManyMatchingSubmissionsError"},
    "list_submissions": {"ServerLacksFeatureError", "ValueError"},
    "retry_submission": {"SubmissionNotFoundError", "SubmissionNotRetryableError", "ServerLacksFeatureError"},
    "pause_submission": {"SubmissionNotFoundError", "SubmissionEndedError", "ServerLacksFeatureError"},
    "unpause_submission": {"SubmissionNotFoundError", "SubmissionEndedError", "ServerLacksFeatureError"},
    "is_completed": {"SubmissionNotFoundError"},
    "run_each_op": {"TypeError", "InternalConsumerClientError"},
    "run_each_chunk": {"TypeError", "InternalConsumerClientError"},
    "run_each_chunk_raw": {"TypeError", "InternalConsumerClientError"},
    "reserve_chunks": {"IncorrectUsageError", "InternalConsumerClientError", "ChunkRetrievalError"},
    "complete_chunk": {"ChunkStorageError", "InternalConsumerClientError"},
    "fail_chunk": {"InternalConsumerClientError"},
}  # fmt: skip
CLIENTS = (ProducerClient, AsyncProducerClient, ConsumerClient, AsyncConsumerClient)


class Documented(NamedTuple):
    """A public name, where it stands, and its docstring."""

    name: str
    value: Any
    text: str


def members(name: str, cls: type) -> Iterator[Documented]:
    """The public methods, properties and nested classes that `cls` has of its own."""
    for member, raw in vars(cls).items():
        value = raw.__func__ if isinstance(raw, classmethod | staticmethod) else raw
        if member.startswith("_") or not isinstance(value, FunctionType | property | type):
            continue
        yield Documented(f"{name}.{member}", value, inspect.getdoc(getattr(cls, member)) or "")
        if isinstance(value, type):
            yield from members(f"{name}.{member}", value)


def everything() -> list[Documented]:
    found = []
    for module_name in PUBLIC_MODULES:
        module = importlib.import_module(module_name)
        for name in public_names(module):
            value, full = getattr(module, name), f"{module_name}.{name}"
            text = constant_comment(module, name)
            found.append(Documented(full, value, text if text is not None else _own_docstring(value)))
            if isinstance(value, type):
                found += members(full, value)
    return found


def _own_docstring(value: Any) -> str:
    """Not the one that a class inherits, nor the signature that a dataclass makes up."""
    text = value.__dict__.get("__doc__", "") if isinstance(value, type) else value.__doc__
    return "" if text is None or text.startswith(f"{value.__name__}(") else inspect.cleandoc(text)


EVERYTHING = everything()
#: By the last name, and by the last two. Of the clients of two modules, the one for programs comes first.
BY_LAST_NAMES = {".".join(each.name.split(".")[-length:]): each for each in reversed(EVERYTHING) for length in (1, 2)}
each_name = pytest.mark.parametrize("documented", EVERYTHING, ids=lambda documented: documented.name)


def whole_text(documented: Documented, seen: frozenset[str] = frozenset()) -> str:
    """The docstring with those that it refers to: "as `insert_submission`", "Raises as `ProducerClient.wait`"."""
    text = documented.text
    owner, _, _ = documented.name.rpartition(".")
    for reference in re.findall(r"(?<!such )\b[Aa]s `([\w.]+)`", text):
        found = next((each for each in EVERYTHING if each.name == f"{owner}.{reference}"), None)
        found = found or BY_LAST_NAMES.get(reference)
        assert found is not None, f"{documented.name} refers to {reference}, which is not public"
        if found.name not in seen:
            text += "\n" + whole_text(found, seen | {documented.name})
    return " ".join(text.split())


def errors_in(text: str) -> set[str]:
    return set(re.findall(r"\b[A-Z]\w*Error\b", text))


def fields_of(value: object) -> tuple[str, ...]:
    return value.__struct_fields__ if isinstance(value, msgspec.StructMeta) else ()


def test_values_have_fields_to_be_explained() -> None:
    assert sum(bool(fields_of(documented.value)) for documented in EVERYTHING) >= 15


@each_name
def test_every_public_name_has_a_docstring(documented: Documented) -> None:
    assert len(documented.text.split()) >= 2, documented.name


@each_name
def test_what_has_a_unit_says_which(documented: Documented) -> None:
    if isinstance(documented.value, FunctionType):
        names = list(inspect.signature(documented.value).parameters)
    else:
        names = list(fields_of(documented.value))
    if not names:
        return
    text = whole_text(documented)
    for name in set(names) & set(UNITS):
        assert UNITS[name] in text, f"{documented.name} does not say that {name} is in {UNITS[name]}"


@each_name
def test_every_field_of_a_value_is_explained(documented: Documented) -> None:
    names = fields_of(documented.value)
    text = whole_text(documented) if names else ""
    for name in names:
        assert f"`{name}`" in text, f"{documented.name} does not explain {name}"


@each_name
def test_what_a_function_raises_by_itself_it_names(documented: Documented) -> None:
    value = documented.value.fget if isinstance(documented.value, property) else documented.value
    if not isinstance(value, FunctionType):
        return
    tree = ast.parse(textwrap.dedent(inspect.getsource(value)))
    raised = {
        node.exc.func.id
        for node in ast.walk(tree)
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and isinstance(node.exc.func, ast.Name)
    }
    assert raised <= errors_in(whole_text(documented)), documented.name


@pytest.mark.parametrize(
    "method",
    [getattr(client, name) for client in CLIENTS for name in ERRORS if hasattr(client, name)],
    ids=lambda method: method.__qualname__,
)
def test_a_call_names_what_it_may_raise(method: Callable[..., Any]) -> None:
    documented = BY_LAST_NAMES[method.__qualname__]
    named = errors_in(whole_text(documented))
    client = BY_LAST_NAMES[method.__qualname__.split(".")[0]]
    assert ERRORS[method.__name__] <= named | errors_in(whole_text(client)), documented.name


def test_the_package_says_that_it_is_typed_wherever_it_is_installed() -> None:
    root = Path(__file__).parents[2]
    assert (root / "opsqueue" / "py.typed").is_file()
    settings = tomllib.loads((root / "pyproject.toml").read_text())["tool"]
    assert {"py.typed", "**/*.pyi"} <= set(settings["setuptools"]["package-data"]["opsqueue"])
    for checker in (settings["mypy"]["files"], settings["basedpyright"]["include"]):
        assert "examples" in checker


def test_every_exception_is_named_by_what_raises_it() -> None:
    named = set()
    for documented in EVERYTHING:
        if not documented.name.startswith("opsqueue.exceptions."):
            named |= errors_in(documented.text)
    assert set(opsqueue.exceptions.__all__) - named == NEVER_RAISED | PARENTS

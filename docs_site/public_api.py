"""What programs may import from opsqueue, by module. Reads sources; changes nothing."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path
from types import ModuleType
from typing import Final

#: The modules that programs import. A new one is added here; the tests and the reference take it from here.
PUBLIC_MODULES: Final = (
    "opsqueue.producer",
    "opsqueue.consumer",
    "opsqueue.common",
    "opsqueue.exceptions",
    "opsqueue.serialization",
    "opsqueue.tracing",
    "opsqueue.opsqueue_internal",
)


def public_names(module: ModuleType) -> list[str]:
    """`__all__`, then what the module imports under the same name (`import X as X`), then its `#:` constants."""
    source = _source(module)
    names: list[str] = list(module.__all__)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            names += [alias.name for alias in node.names if alias.asname == alias.name and alias.name not in names]
    return names + [name for name in _comments(source) if not name.startswith("_") and name not in names]


def constant_comment(module: ModuleType, name: str) -> str | None:
    """What the `#:` lines above a constant say, in the module or in the one it is imported from; None without any."""
    source = _source(module)
    comments = _comments(source)
    if name in comments:
        return comments[name]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module and name in {alias.name for alias in node.names}:
            origin = importlib.import_module(node.module)
            return constant_comment(origin, name) if node.module.startswith("opsqueue") else None
    return None


def _source(module: ModuleType) -> str:
    assert module.__file__ is not None
    return Path(module.__file__).read_text()


def _comments(source: str) -> dict[str, str]:
    """The constants of a module's top level that have `#:` lines directly above them."""
    lines = source.splitlines()
    found = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.AnnAssign):
            target: ast.expr = node.target
        elif isinstance(node, ast.Assign):
            target = node.targets[0]
        else:
            continue
        first = node.lineno - 1
        while first and lines[first - 1].startswith("#:"):
            first -= 1
        if first < node.lineno - 1 and isinstance(target, ast.Name):
            found[target.id] = " ".join(line[2:].strip() for line in lines[first : node.lineno - 1])
    return found

"""Every SQL text of the server, read once from the .sql files beside this module. Runs none of them.

A query file holds several queries, each under a line `-- name: the_name`. Migrations are files of their own, numbered.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from importlib import resources

_NAME = re.compile(r"^-- name: (\w+)\s*$", re.MULTILINE)
_MIGRATION = re.compile(r"^(\d{4})_(\w+)\.sql$")


@dataclass(frozen=True, slots=True)
class Migration:
    """One step of the schema: `version` is what user_version becomes."""

    version: int
    name: str
    script: str


@cache
def queries(file: str) -> dict[str, str]:
    """The queries of `file`.sql by name, without their comments."""
    text = resources.files(__package__).joinpath(f"{file}.sql").read_text(encoding="utf-8")
    parts = _NAME.split(text)
    found: dict[str, str] = {}
    for name, body in zip(parts[1::2], parts[2::2], strict=True):
        if name in found:
            raise ValueError(f"{file}.sql names {name} twice")
        found[name] = "\n".join(line for line in body.splitlines() if line and not line.startswith("--"))
    return found


@cache
def migrations() -> tuple[Migration, ...]:
    """All migrations in order; their numbers are 1, 2, 3 and so on without a gap."""
    found = [
        Migration(int(match[1]), match[2], entry.read_text(encoding="utf-8"))
        for entry in resources.files(__package__).joinpath("migrations").iterdir()
        if (match := _MIGRATION.match(entry.name))
    ]
    found.sort(key=lambda migration: migration.version)
    if [migration.version for migration in found] != list(range(1, len(found) + 1)):
        raise ValueError("the migrations are not numbered 1, 2, 3 and so on")
    return tuple(found)

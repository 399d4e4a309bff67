"""Writes docs/configuration.md from the declarations.

`python -m opsqueue.server.settings_doc > docs/configuration.md` brings the page up to date.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

from opsqueue.server.settings import Declared, declarations
from opsqueue.server.settings_sources import CONFIG_FLAG, CONFIG_VARIABLE, default_words

_HEAD = f"""# Configuration

Every setting of `opsqueue serve` can be a flag, an environment variable or a key of a TOML file. Flags win over
variables, variables over the file, the file over the defaults. An unknown flag or key, or a value that cannot be read,
is one line on standard error and exit code 2.

The file is named by `{CONFIG_FLAG} FILE` or `{CONFIG_VARIABLE}`. Its keys are the settings' names, at the top level:

```toml
port = 3999
database_filename = "/var/lib/opsqueue/opsqueue.db"
reservation_expiration = "10 minutes"
max_body_size = "16 MiB"
external_checkpoints = false
```

- **Durations** are numbers with units, as many as you like: `500ms`, `10 minutes`, `1h 30m`. Units: ns, us, ms, s, m,
  h, d, w, M (30.44 days), y (365.25 days), and their long names.
- **Sizes** are bytes, or a number with a unit: `16 MiB`, `64KiB` (powers of 1,024), `1.5 GB` (powers of 1,000).
- **Switches** are flags without a value (`--external-checkpoints`, `--no-external-checkpoints`), `true` or `false`
  elsewhere.

This page is generated from the declarations in `opsqueue/server/settings.py`.
"""

_TAIL = """
## Exit codes

| code | meaning |
| --- | --- |
| 0 | stopped as asked: SIGTERM, SIGINT or SIGHUP |
| 1 | the server could not start, or its writer could not; the last line on standard error says why |
| 2 | a flag, a variable or the file is wrong; the line on standard error says which |
| 3 | stopped at once, by a second signal while it was stopping |
| 4 | not the server but `opsqueue consume` and `opsqueue gc`: no connection to the server in time |
| 5 | not the server but `opsqueue map`: done, but some items failed ([commands.md](commands.md)) |
| 130 | interrupted from the keyboard before there was anything to stop |
"""


def document() -> str:
    """The whole page."""
    return "\n".join([_HEAD, *_sections(), _TAIL.strip(), ""])


def _sections() -> Iterator[str]:
    group = None
    for declared in declarations():
        if declared.setting.group != group:
            group = declared.setting.group
            yield f"## {group}\n"
        yield _entry(declared)


def _entry(declared: Declared) -> str:
    setting = declared.setting
    flags = declared.flag if setting.short is None else f"{setting.short}, {declared.flag}"
    lines = [
        f"### {declared.name}",
        "",
        f"{setting.help} {setting.doc}".strip(),
        "",
        f"`{f'{flags} {setting.kind.metavar}'.strip()}` · `{declared.variable}` · default: {_default(declared)}",
        "",
    ]
    return "\n".join(lines)


def _default(declared: Declared) -> str:
    words = default_words(declared)
    return words if declared.setting.default_doc else f"`{words}`"


if __name__ == "__main__":
    sys.stdout.write(document())

"""The texts that settings are written in: durations, sizes, integers, choices, switches. Knows no setting's name."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

#: The largest integer that the wire and the database can hold.
LARGEST_INTEGER: Final = 2**63 - 1

#: Longer ones are taken for mistakes; also keeps every deadline far from overflow.
LONGEST_DURATION: Final = 100 * 365.25 * 86_400.0

_SECONDS: Final[dict[str, float]] = {
    name: seconds
    for seconds, names in (
        (1e-9, "ns nsec"),
        (1e-6, "us µs usec"),
        (1e-3, "ms msec millisecond milliseconds"),
        (1.0, "s sec secs second seconds"),
        (60.0, "m min mins minute minutes"),
        (3_600.0, "h hr hrs hour hours"),
        (86_400.0, "d day days"),
        (7 * 86_400.0, "w wk wks week weeks"),
        (30.44 * 86_400.0, "M month months"),
        (365.25 * 86_400.0, "y yr yrs year years"),
    )
    for name in names.split()
}

_BYTES: Final[dict[str, int]] = {
    "": 1,
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
}

# Digits are bounded: no text, however long, is slow or too large to convert.
_DURATION_PART: Final = re.compile(r"\s*(\d{1,40}(?:\.\d{1,40})?)\s*([A-Za-zµ]+)")
_SIZE: Final = re.compile(r"(\d[\d,_]{0,39}(?:\.\d{1,40})?)\s*([A-Za-z]*)")
_INTEGER: Final = re.compile(r"-?\d[\d,_]{0,39}")


class BadValueError(ValueError):
    """A setting's text cannot be read; the message says what was expected."""


def parse_duration(text: str) -> float:
    """Seconds of a text such as `1h 30m`, `500ms`, `10 minutes`; `0` needs no unit."""
    text = text.strip()
    if text == "0":
        return 0.0
    total, position = 0.0, 0
    while position < len(text):
        part = _DURATION_PART.match(text, position)
        if part is None or part[2] not in _SECONDS:
            raise BadValueError('expected a duration such as "10 minutes", "1h 30m" or "500ms"')
        total += float(part[1]) * _SECONDS[part[2]]
        position = part.end()
    if not text:
        raise BadValueError('expected a duration such as "10 minutes", not nothing')
    if total > LONGEST_DURATION:
        raise BadValueError("expected a duration of at most 100 years")
    return total


def parse_size(text: str) -> int:
    """Bytes of a text such as `16 MiB`, `64KiB`, `1.5 GB`, `1048576`; KB, MB, GB are powers of 1,000."""
    match = _SIZE.fullmatch(text.strip())
    if match is None or match[2].lower() not in _BYTES:
        raise BadValueError('expected a size such as "16 MiB", "64KiB" or "1048576" (bytes)')
    number, unit = match[1].replace(",", "").replace("_", ""), _BYTES[match[2].lower()]
    size = int(float(number) * unit) if "." in number else int(number) * unit
    if size > LARGEST_INTEGER:
        raise BadValueError(f"expected a size of at most {LARGEST_INTEGER:,} bytes")
    return size


def parse_integer(text: str) -> int:
    """A whole number; `1,024` and `1_024` are 1024."""
    if _INTEGER.fullmatch(text.strip()) is None:
        raise BadValueError("expected a whole number")
    return int(text.strip().replace(",", "").replace("_", ""))


def parse_switch(text: str) -> bool:
    """True for `true`, `yes`, `on`, `1`; False for `false`, `no`, `off`, `0`."""
    known = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
    value = known.get(text.strip().lower())
    if value is None:
        raise BadValueError("expected true or false")
    return value


def parse_text(text: str) -> str:
    """Any text but an empty one."""
    if not text:
        raise BadValueError("expected a text, not nothing")
    if "\0" in text:
        raise BadValueError("expected a text without zero bytes")
    return text


@dataclass(frozen=True)
class Kind:
    """How a setting's text is read. `toml` lists the TOML types that may stand for it, beside its text."""

    metavar: str
    parse: Callable[[str], object]
    toml: tuple[type, ...] = ()


def duration(*, above_zero: bool = False) -> Kind:
    """A duration; the setting's value is a float of seconds."""

    def parse(text: str) -> float:
        seconds = parse_duration(text)
        if above_zero and seconds < 0.001:
            raise BadValueError("expected a duration of at least 1ms")
        return seconds

    return Kind("DURATION", parse, (str,))


def size(*, least: int = 0) -> Kind:
    """A size; the setting's value is an int of bytes."""

    def parse(text: str) -> int:
        count = parse_size(text)
        if count < least:
            raise BadValueError(f"expected a size of at least {least:,} bytes")
        return count

    return Kind("SIZE", parse, (str, int))


def integer(least: int = 0, most: int = LARGEST_INTEGER, *, metavar: str = "N") -> Kind:
    """A whole number from `least` to `most`."""

    def parse(text: str) -> int:
        number = parse_integer(text)
        if not least <= number <= most:
            bounds = f"of at least {least:,}" if most == LARGEST_INTEGER else f"from {least:,} to {most:,}"
            raise BadValueError(f"expected a whole number {bounds}")
        return number

    return Kind(metavar, parse, (int,))


def choice(*allowed: str) -> Kind:
    """One of a few words."""

    def parse(text: str) -> str:
        if text not in allowed:
            raise BadValueError(f"expected {', '.join(allowed[:-1])} or {allowed[-1]}")
        return text

    return Kind("|".join(allowed), parse, (str,))


def text(metavar: str) -> Kind:
    """Any text but an empty one."""
    return Kind(metavar, parse_text, (str,))


def switch() -> Kind:
    """On or off; as a flag it takes no value."""
    return Kind("", parse_switch, (bool,))


def format_size(count: int) -> str:
    """`16 MiB`: the largest binary unit that divides it."""
    for unit, factor in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count and count % factor == 0:
            return f"{count // factor:,} {unit}"
    return f"{count:,}"

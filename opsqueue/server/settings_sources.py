"""Reads the settings: flags, then OPSQUEUE_* variables, then the TOML file, then defaults. Declares none of them.

Everything wrong is a SettingsError whose one line names the source: the flag, the variable, or the file and key.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final, NoReturn

from opsqueue.server.settings import VARIABLE_PREFIX, Declared, Settings, declarations
from opsqueue.server.values import BadValueError

#: The one setting that can stand in flags and variables only.
CONFIG_FLAG: Final = "--config"
CONFIG_VARIABLE: Final = "OPSQUEUE_CONFIG"
CONFIG_HELP: Final = "Read settings from this TOML file."


class SettingsError(Exception):
    """A setting cannot be used; the text is one line that says which, where it was given, and what was expected."""


@dataclass(frozen=True)
class LoadedSettings:
    """The settings, and what to warn of once the log is set up."""

    settings: Settings
    warnings: tuple[str, ...]


class OneLineParser(argparse.ArgumentParser):
    """An argument parser that says what is wrong in one line and ends with exit code 2."""

    def error(self, message: str) -> NoReturn:
        raise SettingsError(f"{message[:1].lower()}{message[1:]}; see {self.prog} --help")


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Give `parser` a flag for every setting, and --config."""
    parser.add_argument(CONFIG_FLAG, metavar="FILE", default=argparse.SUPPRESS, help=CONFIG_HELP)
    groups: dict[str, argparse._ArgumentGroup] = {}
    for declared in declarations():
        setting = declared.setting
        group = groups.get(setting.group)
        if group is None:
            group = groups[setting.group] = parser.add_argument_group(setting.group)
        text = f"{setting.help} (default: {default_words(declared)})".replace("%", "%%")
        if declared.is_switch:
            group.add_argument(
                declared.flag, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=text
            )
        else:
            names = [declared.flag] if setting.short is None else [setting.short, declared.flag]
            group.add_argument(*names, metavar=setting.kind.metavar, default=argparse.SUPPRESS, help=text)


def default_words(declared: Declared) -> str:
    """The default as help texts and documentation give it, the same on every machine."""
    return declared.setting.default_doc or declared.default_text()


def load(flags: Mapping[str, object], environment: Mapping[str, str]) -> LoadedSettings:
    """The settings of a command line that `add_flags` made an argument parser read (texts by field name; a bool for a
    switch), over those of `environment`, over those of the file that either names."""
    given: dict[str, object] = {}
    file = flags.get("config", environment.get(CONFIG_VARIABLE))
    if file is not None:
        given.update(_from_file(str(file)))
    given.update(_from_environment(environment))
    given.update(_from_flags(flags))
    settings = Settings.of(given)
    return LoadedSettings(settings, tuple(_warnings(given, environment)))


def _from_flags(flags: Mapping[str, object]) -> Iterator[tuple[str, object]]:
    for declared in declarations():
        value = flags.get(declared.name)
        if isinstance(value, bool):
            yield declared.name, value
        elif value is not None:
            yield declared.name, _parse(declared, str(value), declared.flag)


def _from_environment(environment: Mapping[str, str]) -> Iterator[tuple[str, object]]:
    for declared in declarations():
        text = environment.get(declared.variable)
        if text is not None:
            yield declared.name, _parse(declared, text, f"environment variable {declared.variable}")


def _from_file(path: str) -> Iterator[tuple[str, object]]:
    known = {declared.name: declared for declared in declarations()}
    for key, value in _read_toml(path).items():
        declared = known.get(key)
        if declared is None:
            raise SettingsError(f"{path}: unknown key {key}{_did_you_mean(key, known)}")
        source = f"{path}: {key}"
        if type(value) not in declared.setting.kind.toml:
            wanted = " or ".join(_TOML_TYPES[kind] for kind in declared.setting.kind.toml)
            raise SettingsError(f"{source}: expected {wanted}, not {_TOML_TYPES.get(type(value), 'a date or time')}")
        text = str(value).lower() if isinstance(value, bool) else str(value)
        yield key, _parse(declared, text, source)


_TOML_TYPES: Final[dict[type, str]] = {
    str: "a string",
    int: "an integer",
    bool: "true or false",
    float: "a float",
    list: "an array",
    dict: "a table",
}


def _read_toml(path: str) -> dict[str, object]:
    import tomllib  # only servers with a file pay for its import

    try:
        with open(path, "rb") as file:
            return tomllib.load(file)
    except OSError as error:
        raise SettingsError(f"{CONFIG_FLAG}: cannot read {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path}: not valid TOML: {error}") from error


def _parse(declared: Declared, text: str, source: str) -> object:
    try:
        return declared.setting.kind.parse(text)
    except BadValueError as error:
        raise SettingsError(f"{source}: {error}, not {_shown(text)}") from error


def _shown(text: str) -> str:
    """A value as an error quotes it: one short line whatever it holds."""
    return repr(text if len(text) <= 60 else text[:57] + "...")


def _did_you_mean(name: str, known: Mapping[str, object], likeness: float = 0.6) -> str:
    import difflib  # only mistakes pay for its import

    close = difflib.get_close_matches(name.replace("-", "_"), known, n=1, cutoff=likeness)
    return f", did you mean {close[0]}?" if close else ""


def _warnings(given: Mapping[str, object], environment: Mapping[str, str]) -> Iterator[str]:
    if "max_read_pool_size" in given:
        yield "max_read_pool_size is accepted for compatibility and does nothing"
    known = {declared.variable: declared for declared in declarations()} | {CONFIG_VARIABLE: None}
    for name in environment:
        # Clients and build tools have OPSQUEUE_ variables of their own: only what looks like a slip is worth a word.
        if name.startswith(VARIABLE_PREFIX) and name not in known:
            guess = _did_you_mean(name, known, likeness=0.9)
            if guess:
                yield f"the environment variable {name} is not a setting of the server{guess}"

"""The flag --object-store-option, which the commands that open an object store share."""

from __future__ import annotations

import argparse


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declares it."""
    parser.add_argument(
        "--object-store-option",
        metavar="NAME=VALUE",
        action="append",
        default=[],
        type=_option,
        help="an option of the object store by its own name, such as region=eu-west-1; repeatable",
    )


def pairs(arguments: argparse.Namespace) -> list[tuple[str, str]]:
    """What was given, as `object_store_options` of the clients take it."""
    return [(name, value) for name, _, value in (option.partition("=") for option in arguments.object_store_option)]


def _option(text: str) -> str:
    if "=" not in text:
        raise argparse.ArgumentTypeError(f"expected NAME=VALUE, not {text!r}")
    return text

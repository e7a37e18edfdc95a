"""Command lines in the ancestors' manner: options and `key=value` overrides in any order."""

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


def parse_with_overrides(parser: ArgumentParser, argv: Sequence[str] | None) -> Namespace:
    """Parse; `namespace.overrides` holds whatever is not an option. A mistyped option ends with argparse's message."""
    arguments, rest = parser.parse_known_args(argv)
    if unknown := [word for word in rest if word.startswith("-")]:
        parser.error(f"no option {unknown[0]}; settings are given as key=value")
    arguments.overrides = rest
    return arguments

"""Command lines in the ancestors' manner: options and `key=value` overrides in any order."""

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path

from pathfm.jobs.find_run import RUNS

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


def follows(words: Sequence[str]) -> bool:
    """Whether a command line of an evaluation is about a run that goes on."""
    return any(word.partition("=")[0] == "--follow" for word in words)


def add_options_to_follow(parser: ArgumentParser) -> None:
    """Of `pathfm evaluate --follow` and of its launcher."""
    parser.add_argument("--follow", required=True, metavar="RUN", help="a run's directory, or its name in runs/")
    parser.add_argument("--runs-dir", type=Path, default=RUNS, help="where runs lie (default: runs)")
    parser.add_argument("--once", action="store_true", help="score what is exported now, and end")


def parse_with_overrides(parser: ArgumentParser, argv: Sequence[str] | None) -> Namespace:
    """Parse; `namespace.overrides` holds whatever is not an option. A mistyped option ends with argparse's message."""
    arguments, rest = parser.parse_known_args(argv)
    if unknown := [word for word in rest if word.startswith("-")]:
        parser.error(f"no option {unknown[0]}; settings are given as key=value")
    arguments.overrides = rest
    return arguments

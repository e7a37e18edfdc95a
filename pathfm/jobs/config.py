"""`pathfm config NAME [key=value ...]`: the resolved recipe, as a run would use it."""

import sys
from argparse import ArgumentParser
from collections.abc import Sequence

from pathfm.config import to_yaml
from pathfm.jobs.arguments import CONFIGS, parse_with_overrides
from pathfm.recipe import find_config, read_recipe, written_out


def main(argv: Sequence[str] | None = None) -> int:
    parser = ArgumentParser("pathfm config", description="Print the resolved recipe.")
    parser.add_argument("config", help="a recipe's name in configs/, or a path")
    arguments = parse_with_overrides(parser, argv)
    read = read_recipe(find_config(arguments.config, CONFIGS), arguments.overrides)
    for note in read.notes:
        print(f"note: {note}", file=sys.stderr)
    print(to_yaml(written_out(read.recipe)), end="")
    return 0

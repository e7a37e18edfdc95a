"""`pathfm evaluate`: what backbones are worth on labelled tiles, or with `--follow RUN` how a run's teachers fare."""

import sys
from collections.abc import Sequence

from pathfm.jobs.arguments import follows


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    if follows(words):
        from pathfm.jobs.follow import main as follow

        return follow(words)
    from pathfm.jobs.evaluation import main as evaluate

    return evaluate(words)

"""`pathfm concat`: the indices of cohorts -> one; the same as the ancestors' scripts/concat_entries.py."""

import shlex
import sys
from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path

from pathfm.data.concat import ConcatRequest, ConcatSummary, concat
from pathfm.data.entries import printable
from pathfm.errors import exit_status
from pathfm.log import start_logging
from pathfm.tables import text_table


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    arguments = _parser().parse_args(words)
    start_logging()
    request = ConcatRequest(**vars(arguments), command=shlex.join(["pathfm", "concat", *words]))
    return exit_status(lambda: _concat(request))


def _concat(request: ConcatRequest) -> int:
    print(_summary_text(request, concat(request)))
    return 0


def _summary_text(request: ConcatRequest, summary: ConcatSummary) -> str:
    num_rows = sum(cohort.num_entries for cohort in summary.cohorts)
    rows = [[printable(cohort.cohort), cohort.num_entries, cohort.tar] for cohort in summary.cohorts]
    lines = [
        f"{printable(str(request.root))}: {len(summary.cohorts):,} cohorts, {num_rows:,} samples",
        text_table(["cohort", "samples", "tar"], rows),
        *(f"  passed over {printable(file)}: {printable(reason)}" for file, reason in summary.passed_over.items()),
        *(f"  wrote {printable(str(path))}" for path in summary.written),
    ]
    return "\n".join(lines)


def _parser() -> ArgumentParser:
    parser = ArgumentParser("pathfm concat", description="Put the indices of cohorts together into one.")
    parser.add_argument("-r", "--root", type=Path, required=True, help="folder of NAME_entries.npy and NAME.tar")
    parser.add_argument(
        "-o", "--output_root", "--output-root", type=Path, required=True, help="folder for pretrain_entries.npy"
    )
    parser.add_argument("-s", "--suffix", default="", help="take the subset NAME_entries_SUFFIX.npy of every cohort")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())

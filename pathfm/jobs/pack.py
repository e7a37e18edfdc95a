"""`pathfm pack`: a folder of images, or of region features -> one tar and its index."""

import shlex
import sys
from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path

from pathfm.data.entries import printable
from pathfm.data.pack import PackRequest, PackSummary, pack
from pathfm.errors import exit_status
from pathfm.log import start_logging


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    arguments = _parser().parse_args(words)
    start_logging()
    request = PackRequest(**vars(arguments), command=shlex.join(["pathfm", "pack", *words]))
    return exit_status(lambda: _pack(request))


def _pack(request: PackRequest) -> int:
    print(_summary_text(request, pack(request)))
    return 0


def _summary_text(request: PackRequest, summary: PackSummary) -> str:
    lines = [f"{printable(str(request.folder))}: {summary.num_samples:,} files packed"]
    lines += [f"  skipped  {count:,} {kind}" for kind, count in summary.skipped.items()]
    lines.append(f"  {'is there' if summary.was_there else 'wrote   '} {printable(str(request.tar))}")
    if summary.index is None:
        lines.append(f"  is there {printable(str(request.output / request.name))}_*, its index")
    else:
        lines += [f"  wrote    {printable(str(path))}" for path in summary.index.written]
    return "\n".join(lines)


def _parser() -> ArgumentParser:
    parser = ArgumentParser("pathfm pack", description="Pack a folder of images or region features and index it.")
    parser.add_argument("folder", type=Path, help="images (or region features, .pt), also in subfolders")
    parser.add_argument("--name", required=True, help="writes NAME_dataset.tar, NAME_entries.npy, ...")
    parser.add_argument("--output", type=Path, default=Path(), help="folder for the files (default: here)")
    parser.add_argument("--suffix", default="", help="the index is called NAME_entries_SUFFIX.npy")
    parser.add_argument("--cohort", action="store_true", help="write NAME.tar, a cohort for 'pathfm concat'")
    parser.add_argument("--force", action="store_true", help="replace a tar of other content")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())

"""`pathfm index`: a tar -> its entries and file names; the same as the ancestors' scripts/infer_entries.py."""

import shlex
import sys
from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path

from pathfm.data.entries import printable
from pathfm.data.index import IndexRequest, IndexSummary, build_index
from pathfm.errors import exit_status, listed
from pathfm.log import start_logging


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    arguments = _parser().parse_args(words)
    start_logging()
    return exit_status(lambda: _index(arguments.allow_missing, _request(vars(arguments), words)))


def _index(allow_missing: bool, request: IndexRequest) -> int:
    summary = build_index(request)
    print(summary_text(request.tarball_path, summary))
    if not summary.missing:
        return 0
    print(_missing_text(summary.missing, allow_missing), file=sys.stderr)
    return 0 if allow_missing else 1


def summary_text(tar: Path, summary: IndexSummary) -> str:
    """What was found and written, for people."""
    lines = [f"{printable(str(tar))}: {summary.num_files:,} files, {summary.num_entries:,} of them indexed"]
    lines += [f"  skipped  {count:,} {kind}" for kind, count in summary.skipped.items()]
    if summary.class_names:
        lines.append(f"  classes  {len(summary.class_names)}")
    if summary.unused_labels:
        lines.append(f"  unused   {summary.unused_labels:,} labels of files that are not in the tar")
    lines += [f"  wrote    {printable(str(path))}" for path in summary.written]
    return "\n".join(lines)


def _missing_text(missing: Sequence[str], allowed: bool) -> str:
    then = "" if allowed else "; the index was written without them (--allow-missing says that this is meant)"
    return f"{len(missing):,} listed names are not in the tar: {listed(map(printable, missing))}{then}"


def _request(options: dict[str, object], words: Sequence[str]) -> IndexRequest:
    fields = {key: value for key, value in options.items() if key != "allow_missing" and value is not None}
    return IndexRequest(**fields, command=shlex.join(["pathfm", "index", *words]))  # type: ignore[arg-type]


def _parser() -> ArgumentParser:
    parser = ArgumentParser("pathfm index", description="Index a tar of images: where every file's bytes are.")
    parser.add_argument("--tarball_path", "--tarball-path", type=Path, required=True, help="an uncompressed tar")
    parser.add_argument("--output_root", "--output-root", type=Path, required=True, help="folder for the .npy files")
    parser.add_argument("--name", "--prefix", help="files are called NAME_entries.npy, NAME_file_indices.npy")
    parser.add_argument("--suffix", help="name of a subset: NAME_entries_SUFFIX.npy")
    lists = parser.add_mutually_exclusive_group()
    lists.add_argument("--keep", "--restrict", type=Path, help="text file: index only these names, one per line")
    lists.add_argument("--remove", type=Path, help="text file: index all but these names")
    parser.add_argument("--csv", type=Path, help="labels of the files")
    parser.add_argument("--file_name", "--file-name", help="the CSV's column of file names (default: filename)")
    parser.add_argument("--label_name", "--label-name", help="its column of integer labels (default: label)")
    parser.add_argument("--class_name", "--class-name", help="its column of class names (default: class, if there)")
    parser.add_argument("--allow-missing", action="store_true", help="names that are not in the tar are no failure")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())

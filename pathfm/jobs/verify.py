"""`pathfm verify DATASET ...`: whether indices fit their tars, samples can be decoded, and splits share nothing."""

from argparse import ArgumentParser
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from pathfm.data.datasets import KNN, Dataset, Regions
from pathfm.data.decode import decode
from pathfm.data.entries import IndexFiles
from pathfm.data.strings import DatasetString, parse_dataset_string
from pathfm.data.verification.findings import Check
from pathfm.data.verification.samples import Decoder
from pathfm.data.verification.slides import SlideNames
from pathfm.data.verification.verify import Verification, VerifyRequest, verify
from pathfm.errors import UserError
from pathfm.files import write_json
from pathfm.log import start_logging
from pathfm.tables import text_table

_MAX_SHOWN = 3  # cases of a check; the JSON holds more
_VERDICTS = {
    "ok": "all is well",
    "warning": "no damage; see the warnings",
    "damage": "DAMAGED",
    "leakage": "LEAKING: what is in two of these data sets must not be",
}


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    start_logging()
    strings = [parse_dataset_string(text) for text in arguments.datasets]  # a mistyped string is no damage
    slide_names = SlideNames(arguments.slide)
    texts = [*arguments.datasets, *map(str, _other_splits(strings))]
    found = verify(VerifyRequest(texts, _number(arguments.decode), slide_names, _decoder_of))
    print(report_text(found))
    write_json(arguments.output, {"verdict": found.verdict, "checks": _as_json(found.checks)})
    print(f"wrote {arguments.output}")
    return 1 if found.verdict in ("damage", "leakage") else 0


def _other_splits(strings: Sequence[DatasetString]) -> list[DatasetString]:
    """The split that a single split of KNN must share nothing with, where it is there."""
    if len(strings) > 1 or strings[0].name != KNN.__name__:
        return []
    options = strings[0].options
    folder = Path(options.get("extra", options["root"])).expanduser()
    others = [split for split in KNN.SPLITS if split != options["split"]]
    there = [split for split in others if IndexFiles(folder, split, options.get("subset", "")).entries.is_file()]
    return [replace(strings[0], options={**options, "split": split}) for split in there]


def _decoder_of(dataset: Dataset) -> Decoder:
    if not isinstance(dataset, Regions):
        return decode
    from pathfm.data.region_features import decode_features  # here, because it needs torch, which images do not

    return decode_features


def report_text(found: Verification) -> str:
    """A table for each data set, and for every two of them, with the first cases below what is not well."""
    parts = [f"{title}\n{_table(checks)}" for title, checks in found.checks.items()]
    return "\n\n".join([*parts, _VERDICTS[found.verdict]])


def _table(checks: Sequence[Check]) -> str:
    return text_table(["check", "verdict", "what was found"], [row for check in checks for row in _rows(check)])


def _rows(check: Check) -> Iterator[tuple[str, str, str]]:
    yield check.name, check.verdict if check.verdict == "ok" else check.verdict.upper(), check.said
    for case in check.cases[:_MAX_SHOWN]:
        yield "", "", f"  {case}"


def _as_json(checks: Mapping[str, Sequence[Check]]) -> dict[str, list[dict[str, object]]]:
    return {title: [asdict(check) for check in found] for title, found in checks.items()}


def _number(text: str) -> int | None:
    """How many samples to decode; None: all."""
    if text in ("all", "none"):
        return None if text == "all" else 0
    if not text.isdecimal():
        raise UserError(f"--decode takes a number of samples, all or none, not '{text}'")
    return int(text)


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        "pathfm verify",
        description="Check data sets: every row against its tar, samples, duplicates, labels. "
        "Several data sets are taken for splits that must share no slide and no image; "
        "a split of KNN is checked together with the other one.",
        epilog="Exit status: 1 for damage, or when splits share something; 0 otherwise, also with warnings.",
    )
    parser.add_argument("datasets", nargs="+", metavar="DATASET", help="e.g. KNN:root=/data:split=query")
    parser.add_argument(
        "--decode",
        default="10000",
        metavar="N|all|none",
        help="samples of each to read, decode and compare by content, spread over it (default: 10000)",
    )
    parser.add_argument(
        "--slide",
        metavar="REGEX",
        help="finds the slide in a tile's path in the tar: its first group, or all of it "
        "(default: the file's name without the two numbers or coordinates at its end, "
        "or its folder's where the file's tells no slide)",
    )
    parser.add_argument(
        "--output", type=Path, default=Path("verify.json"), help="where the findings go (default: verify.json)"
    )
    return parser


if __name__ == "__main__":
    raise SystemExit(main())

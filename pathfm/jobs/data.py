"""`pathfm data DATASET`: what is in a data set, as tables and as a contact sheet."""

from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path

from pathfm.data.contact_sheet import contact_sheet
from pathfm.data.datasets import Regions, open_dataset
from pathfm.data.summary import Summary, summarise
from pathfm.files import written_aside
from pathfm.log import start_logging
from pathfm.tables import amount, text_table


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    start_logging()
    dataset = open_dataset(arguments.dataset)
    print(f"{arguments.dataset}\n{summary_text(summarise(dataset))}")
    if isinstance(dataset, Regions):
        return 0  # features are nothing to look at
    sheet = arguments.sheet or Path(f"{dataset.name}_sheet.png")
    with written_aside(sheet) as aside:
        contact_sheet(dataset).save(aside, format="PNG")
    print(f"\ndrawn: {sheet}")
    return 0


def summary_text(summary: Summary) -> str:
    """The data set in a few lines, then its cohorts and, with labels, its classes."""
    smallest, median, largest = map(amount, summary.sample_bytes)
    about = "" if summary.num_weighed == summary.num_samples else "about "
    lines = [
        f"  samples  {summary.num_samples:,}",
        f"  encoded  {about}{amount(summary.total_bytes)}: from {smallest} to {largest} a sample, median {median}",
        f"  images   {_images(summary)}",
        f"  index    {summary.index_command}",
        "",
        _cohorts(summary),
    ]
    if len(summary.classes) > 1:
        lines += ["", _classes(summary)]
    return "\n".join(lines)


def _images(summary: Summary) -> str:
    looked_at = sum(summary.images.values())
    if len(summary.images) == 1:
        return f"{next(iter(summary.images))} ({looked_at:,} looked at)"
    kinds = "; ".join(f"{kind}: {number:,}" for kind, number in summary.images.items())
    return f"{kinds} (of {looked_at:,} looked at)"


def _cohorts(summary: Summary) -> str:
    rows = [
        (name, cohort.num_samples, _share(cohort.num_samples, summary), amount(cohort.median_bytes), cohort.tar)
        for name, cohort in summary.cohorts.items()
    ]
    return text_table(["cohort", "samples", "share", "median", "tar"], rows)


def _classes(summary: Summary) -> str:
    rows = [(name, number, _share(number, summary)) for name, number in summary.classes.items()]
    return text_table(["class", "samples", "share"], rows)


def _share(number: int, summary: Summary) -> str:
    return f"{number / summary.num_samples:6.1%}"


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        "pathfm data", description="Show what is in a data set: tables, and a contact sheet of images."
    )
    parser.add_argument("dataset", metavar="DATASET", help="e.g. Pathology:root=/data")
    parser.add_argument("--sheet", type=Path, metavar="PNG", help="the contact sheet (default: NAME_sheet.png, here)")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())

"""Put `pathfm extract` on a Slurm cluster, or on this machine; an array where several weights are given. No torch."""

import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pathfm.data.strings import is_dataset_string
from pathfm.errors import UserError
from pathfm.jobs.before_queue import folders_of, unwritable
from pathfm.jobs.slurm_options import add_options, demand_slurm, for_slurm_alone, place_of
from pathfm.jobs.slurm_order import SlurmOrder, Work, hand_over
from pathfm.jobs.submit import checked_name, to_submit_again
from pathfm.jobs.works_here import run_here

_FILES = ("regions", "tiles", "dataset", "table")  # what is read beside the weights


def main(argv: Sequence[str] | None = None) -> int:
    """`launchers/extract.py`. Returns the exit status; raises `UserError` for whatever can be known to be wrong."""
    parser = _parser()
    arguments, further = parser.parse_known_args(argv)
    command = to_submit_again(["python", *sys.argv] if argv is None else ["extract.py", *argv])
    works = _works(arguments, further)
    problems = list(_problems(arguments, works))
    if arguments.cluster == "local":
        given = for_slurm_alone(arguments, parser)
        return run_here(works, problems, given, does="extracts", dry_run=arguments.dry_run)
    if not arguments.dry_run:
        demand_slurm("extract on this machine with --cluster local")
    is_array = len(works) > 1
    place = place_of(arguments, is_array=is_array, array_by="several --weights")
    output = arguments.output.absolute()
    order = SlurmOrder(
        checked_name(output.name), output, tuple(works), place, command, "extraction" if is_array else ""
    )
    return hand_over(order, problems, dry_run=arguments.dry_run)


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        "extract.py",
        description="Extract features of regions, slides or data sets on a cluster: 'pathfm extract', started again "
        "until it is done. Several weights make an array, one job each, in folders of their own below --output.",
        epilog="All other options are those of 'pathfm extract', which lists them with --help.",
        allow_abbrev=False,
    )
    parser.add_argument("--weights", nargs="+", required=True, type=Path, metavar="FILE", help="of frozen backbones")
    parser.add_argument("--output", required=True, type=Path, metavar="FOLDER")
    parser.add_argument("--regions", metavar="SOURCE", help="a folder, a tar or a data set of region images")
    parser.add_argument("--tiles", metavar="SOURCE", help="likewise of tiles")
    parser.add_argument("--dataset", metavar="DATASET", help="a data set, like KNN:root=FOLDER:split=test")
    parser.add_argument("--table", metavar="CSV", help="what 'pathfm extract' reads of slides and places")
    parser.add_argument("--cluster", choices=("auto", "slurm", "local"), default="auto", help="auto: Slurm")
    parser.add_argument("--dry-run", action="store_true", help="print what would be submitted, and stop")
    add_options(parser)
    return parser


def _works(arguments: Namespace, further: Sequence[str]) -> list[Work]:
    """One for each file of weights. Raises `UserError` when two of them would share a folder."""
    output = arguments.output.absolute()
    given = {name: source for name in _FILES if (source := _source(arguments, name))}
    sources = [word for name, source in given.items() for word in (f"--{name}", source.word)]
    works: dict[Path, Work] = {}
    for weights in arguments.weights:
        folder = output / _label(weights) if len(arguments.weights) > 1 else output
        if folder in works:
            raise UserError(f"two of the weights would be extracted into {folder}; give them one call each")
        words = ["-u", "-m", "pathfm", "extract", *sources, "--weights", str(weights.absolute())]
        reads = (weights.absolute().parent, *(folder for source in given.values() for folder in source.folders))
        words += ["--output", str(folder), *further]
        works[folder] = Work(checked_name(folder.name), folder, tuple(words), reads)
    return list(works.values())


@dataclass(frozen=True)
class _Source:
    """What is read: the word for it on a command line, and where it lies."""

    word: str
    places: tuple[Path, ...]

    @property
    def folders(self) -> tuple[Path, ...]:
        return tuple(place if place.is_dir() else place.parent for place in self.places)


def _source(arguments: Namespace, name: str) -> _Source | None:
    """A path, or a data set string."""
    text: str | None = getattr(arguments, name)
    if text is None:
        return None
    if is_dataset_string(text) or name == "dataset":
        return _Source(text, tuple(folders_of(text)))
    return _Source(str(Path(text).absolute()), (Path(text).absolute(),))


def _label(weights: Path) -> str:
    """`runs/NAME/exports/teacher_00012000.pth` -> `NAME_teacher_00012000`."""
    run = weights.absolute().parents[1].name if weights.absolute().parent.name == "exports" else ""
    return "_".join(filter(None, (run, weights.stem)))


def _problems(arguments: Namespace, works: Sequence[Work]) -> Iterator[str]:
    named = [f"--{name}" for name in ("regions", "tiles", "dataset") if getattr(arguments, name)]
    if not named:
        yield "nothing to extract from is named; add --regions SOURCE, --tiles SOURCE with --slides, or --dataset"
    if len(named) > 1:
        yield f"{' and '.join(named)} are extractions of their own; give them one call each"
    yield from (f"there is no {path}" for path in arguments.weights if not path.exists())
    for name in _FILES:
        source = _source(arguments, name)
        if source is not None and not all(place.exists() for place in source.places):
            yield f"there is no {getattr(arguments, name)}"
    for work in works:
        if place := unwritable(work.run_dir):
            yield f"{place} cannot be written; choose another --output"

"""Put `pathfm evaluate` on a Slurm cluster, or on this machine; an array where several weights are given. No torch."""

import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Sequence
from pathlib import Path

from pathfm.data.strings import is_dataset_string
from pathfm.errors import UserError
from pathfm.jobs.arguments import follows
from pathfm.jobs.before_queue import folders_of, unwritable
from pathfm.jobs.find_run import RUNS
from pathfm.jobs.named_weights import RANDOM, NamedWeights, named_weights
from pathfm.jobs.slurm_options import add_options, demand_slurm, for_slurm_alone, place_of
from pathfm.jobs.slurm_order import SlurmOrder, Work, hand_over
from pathfm.jobs.submit import checked_name, to_submit_again
from pathfm.jobs.works_here import run_here

_OUTPUT, _CACHE = Path("evaluations"), Path("~/.cache/pathfm/features")


def main(argv: Sequence[str] | None = None) -> int:
    """`launchers/evaluate.py`. Returns the exit status; raises `UserError` for whatever can be known to be wrong."""
    if follows(sys.argv[1:] if argv is None else argv):
        from pathfm.jobs.submit_following import main as follow

        return follow(argv)
    parser = _parser()
    arguments, further = parser.parse_known_args(argv)
    command = to_submit_again(["python", *sys.argv] if argv is None else ["evaluate.py", *argv])
    works = _works(arguments, further)
    problems = list(_problems(arguments, works))
    if arguments.cluster == "local":
        given = for_slurm_alone(arguments, parser)
        return run_here(works, problems, given, does="evaluates", dry_run=arguments.dry_run)
    if not arguments.dry_run:
        demand_slurm("evaluate on this machine with --cluster local")
    is_array = len(works) > 1
    place = place_of(arguments, is_array=is_array, array_by="several --weights")
    output = arguments.output.absolute()
    folder = output if is_array else works[0].run_dir
    name = checked_name(output.name) if is_array else works[0].name
    if not (arguments.dry_run or problems):
        for written in (output, arguments.cache.expanduser()):
            written.mkdir(parents=True, exist_ok=True)  # a container is shown only what is there
    order = SlurmOrder(name, folder, tuple(works), place, command, "evaluation" if is_array else "")
    return hand_over(order, problems, dry_run=arguments.dry_run)


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        "evaluate.py",
        description="What frozen backbones are worth on labelled tiles, found on a cluster: 'pathfm evaluate', started "
        "again until it is done. Several weights make an array, one job each, and reports beside each other in "
        "--output; with --follow RUN: tune a run by the teachers that it exports, beside the job that trains it "
        "(--follow RUN --help).",
        epilog="All other options are those of 'pathfm evaluate', which lists them with --help.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--weights", nargs="+", required=True, metavar="WEIGHTS", help="files, runs, or random:RECIPE for random ones"
    )
    parser.add_argument("--query", required=True, metavar="KNN:...", help="labelled tiles to learn from")
    parser.add_argument("--test", required=True, metavar="KNN:...", help="labelled tiles to be judged on")
    parser.add_argument("--groups", metavar="FILE.csv:COLUMN", help="slide or patient of every file")
    parser.add_argument("--output", type=Path, default=_OUTPUT, metavar="FOLDER", help=f"default: {_OUTPUT}")
    parser.add_argument("--cache", type=Path, default=_CACHE, metavar="FOLDER", help=f"of features (default: {_CACHE})")
    parser.add_argument("--name", help="of the report (default: after the weights)")
    parser.add_argument("--runs-dir", type=Path, default=RUNS, help="where runs lie (default: runs)")
    parser.add_argument("--cluster", choices=("auto", "slurm", "local"), default="auto", help="auto: Slurm")
    parser.add_argument("--dry-run", action="store_true", help="print what would be submitted, and stop")
    add_options(parser)
    return parser


def _works(arguments: Namespace, further: Sequence[str]) -> list[Work]:
    """One for each backbone. Raises `UserError` for weights that are not there, or when two would share a report."""
    if arguments.name and len(arguments.weights) > 1:
        raise UserError("--name is for one backbone; several are called after their files")
    output, cache = arguments.output.absolute(), arguments.cache.expanduser().absolute()
    shared = ["--query", arguments.query, "--test", arguments.test, *_groups(arguments)]
    shared += ["--cache", str(cache), "--output", str(output)]
    data = [folder for text in (arguments.query, arguments.test) for folder in _folders(text)]
    of_groups = [Path(arguments.groups.rpartition(":")[0]).expanduser().absolute().parent] if arguments.groups else []
    works: dict[str, Work] = {}
    for text in arguments.weights:
        named = named_weights(text, arguments.runs_dir)
        name = arguments.name or named.label
        if name in works:
            raise UserError(f"two of the weights would be called {name}; give them one call each, with --name")
        words = ["-u", "-m", "pathfm", "evaluate", _word(named), *shared, "--name", name, *further]
        reads = (*data, *of_groups, *_seen_with(named), output, cache)
        works[name] = Work(checked_name(name), output / "jobs" / name, tuple(words), tuple(dict.fromkeys(reads)))
    return list(works.values())


def _word(named: NamedWeights) -> str:
    """What stands for the weights on the command line of a job: a run's teacher of this moment, not of a later one."""
    if named.path is not None:
        return str(named.path.absolute())
    is_file = named.recipe.endswith((".yaml", ".yml"))
    return RANDOM + (str(Path(named.recipe).absolute()) if is_file else named.recipe)


def _seen_with(named: NamedWeights) -> list[Path]:
    """Folders that a job must see to read the weights; for a run's its recipe too."""
    if named.path is None:
        return [Path(named.recipe).absolute().parent] if named.recipe.endswith((".yaml", ".yml")) else []
    path = named.path.absolute()
    return [path.parents[1] if path.parent.name == "exports" else path if path.is_dir() else path.parent]


def _groups(arguments: Namespace) -> list[str]:
    if not arguments.groups:
        return []
    source, colon, column = arguments.groups.rpartition(":")
    if not (colon and source and column):
        raise UserError(f"groups are given as FILE.csv:COLUMN, not '{arguments.groups}'; e.g. labels.csv:slide")
    return ["--groups", f"{Path(source).expanduser().absolute()}:{column}"]


def _folders(text: str) -> list[Path]:
    if not is_dataset_string(text) or not text.startswith("KNN:"):
        raise UserError(f"labelled tiles are named as KNN:root=FOLDER:split=query or test, not '{text}'")
    return folders_of(text)


def _problems(arguments: Namespace, works: Sequence[Work]) -> Iterator[str]:
    for text in (arguments.query, arguments.test):
        yield from (f"there is no {folder} of {text}" for folder in _folders(text) if not folder.exists())
    if arguments.groups and not (source := Path(arguments.groups.rpartition(":")[0]).expanduser()).is_file():
        yield f"there is no {source}"
    for work in works:
        if place := unwritable(work.run_dir):
            yield f"{place} cannot be written; choose another --output"
    if place := unwritable(arguments.cache.expanduser().absolute()):
        yield f"{place} cannot be written; choose another --cache"

"""`pathfm profile init [NAME]`, `pathfm profile show NAME`: write a profile for the cluster at hand; print one."""

import re
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence

import yaml

from pathfm.config import Layer, build, find_file, to_yaml
from pathfm.errors import UserError
from pathfm.files import write_text
from pathfm.jobs.slurm_options import PROFILES
from pathfm.launch.profile import Profile, read_profile
from pathfm.launch.site import ask_slurm, preemption_in_words, profile_text

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def main(argv: Sequence[str] | None = None) -> int:
    arguments: Namespace = _parser().parse_args(argv)
    return _init(arguments.name) if arguments.verb == "init" else _show(arguments.name)


def _init(wanted: str | None) -> int:
    """Ask Slurm, write the profile, say what preemption means here."""
    site = ask_slurm()
    name = wanted or site.name
    if not _NAME.fullmatch(name):
        raise UserError(f"'{name}' cannot be a profile's name: letters, digits and . _ - only")
    path = PROFILES / f"{name}.yaml"
    if path.exists():
        raise UserError(f"{path} is there already; look at it with 'pathfm profile show {name}', or give another name")
    text = profile_text(site, name)
    build(Profile, [Layer(f"the profile for {site.name}", yaml.safe_load(text))])
    write_text(path, text)
    print(f"wrote {path}; look it over, then start with --profile {name}")
    for line in preemption_in_words(site):
        print(f"  {line}")
    return 0


def _show(name: str) -> int:
    print(to_yaml(read_profile(find_file(name, PROFILES, "profile"))), end="")
    return 0


def _parser() -> ArgumentParser:
    parser = ArgumentParser("pathfm profile", description="Profiles say where a run is trained: one cluster each.")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    init = verbs.add_parser("init", help="ask Slurm about this cluster and write launchers/profiles/NAME.yaml")
    init.add_argument("name", metavar="NAME", nargs="?", help="(default: the name of the cluster)")
    show = verbs.add_parser("show", help="print a profile as the launcher reads it, or what is wrong with it")
    show.add_argument("name", metavar="NAME", help="in launchers/profiles/, or a path")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())

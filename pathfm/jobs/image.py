"""`pathfm image check [--profile P]`: whether an image is there, fits this machine, and has what this code wants."""

import sys
from argparse import ArgumentParser
from collections.abc import Sequence

from pathfm.config import find_file
from pathfm.errors import UserError
from pathfm.jobs.examination.finding import findings_table, worst
from pathfm.jobs.examination.image import container_findings
from pathfm.jobs.slurm_options import PROFILES
from pathfm.launch.profile import Container, Profile, read_profile


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 1 when something fails, else 0."""
    arguments = _parser().parse_args(argv)
    if bool(arguments.image) == bool(arguments.profile):
        raise UserError("name one image: --profile NAME, or a .sif file, a sandbox folder or a name with --runtime")
    profile = (
        read_profile(find_file(arguments.profile, PROFILES, "profile"))
        if arguments.profile
        else Profile(container=Container(runtime=arguments.runtime, image=arguments.image))
    )
    findings = list(container_findings(profile))
    print(findings_table(findings))
    if worst(findings) == "warn":
        print("warning: it can be used, but look at the lines above", file=sys.stderr)
    return 1 if worst(findings) == "fail" else 0


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        "pathfm image", description="Images in which jobs run; docs/image.md says how to build one."
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    check = verbs.add_parser("check", help="compare an image with this machine and with this code's pins")
    check.add_argument("image", metavar="IMAGE", nargs="?", help="a file, a folder, or a name")
    check.add_argument("--profile", metavar="NAME", help="the image of this profile, in launchers/profiles/")
    runtimes = ("apptainer", "docker", "podman", "pyxis")
    check.add_argument("--runtime", choices=runtimes, default="apptainer", help="of IMAGE (default: apptainer)")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())

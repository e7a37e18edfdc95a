"""`pathfm VERB ...`; a verb's code is imported when it is called, so that light verbs start at once."""

import sys
from collections.abc import Sequence
from importlib import import_module

from pathfm.errors import exit_status

VERBS = {
    "pack": "a folder of images -> one tar and its index",
    "index": "a tar -> entries.npy (the ancestors' infer_entries)",
    "concat": "the indices of cohorts -> one (the ancestors' concat_entries)",
    "verify": "check data sets: index against tar, samples, duplicates, splits",
    "data": "show what is in a data set: tables and a contact sheet",
    "config": "print the resolved recipe",
    "schedule": "print and draw all schedules of a recipe",
    "memory": "what a run takes of each GPU's memory, and settings that fit",
    "train": "train on this machine (the ancestors' -m pathfm.train)",
    "extract": "features of regions, tiles and slides by a frozen backbone",
    "evaluate": "what backbones are worth on labelled tiles; with --follow: tune a run beside the job that trains it",
    "compare": "evaluated backbones side by side, with paired intervals",
    "dense": "score a frozen backbone by segmentation or dense regression",
    "export": "weights as timm, transformers, torch.hub and onnxruntime load them",
    "attention": "pictures of what the [CLS] token looks at in a region",
    "checkpoints": "list and verify the checkpoints of a run",
    "doctor": "examine this machine, the run's folders and the cluster before a run does",
    "image": "compare a job's image with this machine and with this code's pins",
    "submit": "submit a run to Slurm, or run it here (launchers/pretrain.py)",
    "profile": "write a profile for the cluster at hand, or print one",
    "status": "where runs stand: in the queue, in steps, in checkpoints",
    "plot": "draw runs: losses, tuning, health, throughput",
    "logs": "print or follow what a run's ranks say",
    "cancel": "end the Slurm jobs of a run; its checkpoints stay",
    "wandb-sync": "send to W&B what it does not have of runs that trained offline or lost the connection",
    "wandb-dashboard": "make a W&B page of a run's curves, in the order in which one looks at them",
    "demo-tiles": "real H&E tiles to try everything on",
}
_MODULES = {"train": "pathfm.jobs.pretrain"}


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        print(_usage())
        return 0
    if words[0] == "--version":
        from pathfm import __version__

        print(f"pathfm {__version__}")
        return 0
    if words[0] not in VERBS:
        print(f"error: no verb '{words[0]}'\n{_usage()}", file=sys.stderr)
        return 2
    if words[0] in ("train", "extract", "evaluate", "dense"):
        from pathfm.lifecycle.signals import take_notes

        take_notes()  # before torch is imported, which takes seconds in which a signal may come
    module = _MODULES.get(words[0], f"pathfm.jobs.{words[0].replace('-', '_')}")
    return exit_status(lambda: import_module(module).main(words[1:]))


def _usage() -> str:
    rows = "\n".join(f"  {verb:<11} {what}" for verb, what in VERBS.items())
    return f"usage: pathfm VERB ...   (pathfm VERB --help says more)\n\n{rows}"


if __name__ == "__main__":
    raise SystemExit(main())

"""`pathfm evaluate WEIGHTS ... --query KNN:... --test KNN:...`: frozen backbones judged on labelled tiles."""

import hashlib
import shlex
import sys
import time
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int

from pathfm.data.datasets import KNN, open_dataset
from pathfm.data.groups import GroupTable, read_groups
from pathfm.dist.env import Ranks, ranks_from_environment
from pathfm.dist.groups import Team, device_of, joined, run_rank
from pathfm.errors import EXIT_INTERRUPTED, UserError, listed
from pathfm.evaluate.linear import LinearSettings
from pathfm.evaluate.picture import draw_evaluation
from pathfm.evaluate.report import METRICS, JudgedSamples, in_words, percent, report_of_task, write_evaluation
from pathfm.evaluate.tasks import TASKS, Found, Split, TaskSettings, judge
from pathfm.features.dataset_features import Wanted, demand_possible, extract_dataset, key_of, open_features
from pathfm.jobs.find_run import RUNS
from pathfm.jobs.named_weights import NamedWeights, named_weights
from pathfm.jobs.random_backbone import random_backbone
from pathfm.lifecycle.run import commit_of_this_code, version_of
from pathfm.lifecycle.signals import noted
from pathfm.log import get_logger, start_logging
from pathfm.models.pretrained import Pretrained, load_backbone
from pathfm.tables import text_table

_log = get_logger(__name__)

CACHE = Path("~/.cache/pathfm/features")
OUTPUT = Path("evaluations")
_STALL_AFTER_S, _LOST_AFTER_S = 1800.0, 120.0
_LAST_BLOCKS = 4  # DINOv2's linear evaluation
_VERSIONS = ("pathfm", "torch", "numpy", "scikit-learn")


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    arguments = _parser().parse_args(words)
    ranks = ranks_from_environment()
    start_logging(speak=ranks.is_first)
    command = shlex.join(["pathfm", "evaluate", *words])
    evaluate = partial(_evaluate, arguments, command, ranks)
    if ranks.world_size > 1:
        run_rank(evaluate)
    return evaluate()


@dataclass(frozen=True)
class Data:
    """Query and test, and what is known of their slides or patients."""

    query: KNN
    test: KNN
    texts: Mapping[str, str]  # as they were named
    table: GroupTable | None
    groups: Mapping[str, Int[np.ndarray, " N"]]  # by split; the same number is the same group. Empty: unknown
    shared: Sequence[str]  # groups that are in both

    def split(self, name: str) -> KNN:
        return self.query if name == "query" else self.test


def open_data(query: str, test: str, groups: str | None, *, allow_shared: bool) -> Data:
    """Raises `UserError` where the splits do not belong together, or share what they must not."""
    splits = {"query": _labelled(query, "--query"), "test": _labelled(test, "--test")}
    names = [split.class_names for split in splits.values()]
    if names[0] != names[1]:
        raise UserError(
            f"--query has the classes {listed(names[0])}, --test {listed(names[1])}; index both with one CSV"
        )
    for name, split in splits.items():
        if len(there := np.unique(split.labels)) < 2:
            raise UserError(f"--{name} has samples of {split.class_names[there[0]]} alone; two classes are needed")
    texts = {"query": query, "test": test}
    if groups is None:
        return Data(**splits, texts=texts, table=None, groups={}, shared=())
    table = read_groups(groups)
    of_splits = {name: table.groups_of(split) for name, split in splits.items()}
    if len({*of_splits["query"]}) < 2:
        raise UserError(
            f"all samples of --query are of one {table.column}, '{of_splits['query'][0]}'; two are needed to choose "
            "settings on one that was held out"
        )
    shared = sorted({*of_splits["query"]} & {*of_splits["test"]})
    if shared and not allow_shared:
        raise UserError(
            f"query and test share {len(shared):,} groups of '{table.column}' ({listed(shared, at_most=3)}), so test "
            "would be easier than it looks; index other splits, or add --allow-shared-groups"
        )
    number_of = {group: number for number, group in enumerate(sorted({*of_splits["query"], *of_splits["test"]}))}
    numbers = {name: np.array([number_of[group] for group in of_split]) for name, of_split in of_splits.items()}
    return Data(**splits, texts=texts, table=table, groups=numbers, shared=shared)


def open_backbone(named: NamedWeights) -> Pretrained:
    """A file's, or random weights that are the same each time."""
    if named.path is not None:
        return load_backbone(named.path)
    vit, student = random_backbone(named, torch_seed=0)
    content = hashlib.sha256()
    for name, tensor in sorted(vit.state_dict().items()):
        content.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return Pretrained(vit, student, Path(named.text), content.hexdigest(), {})


@dataclass(frozen=True)
class _Subject:
    """A backbone that is judged, and where its features lie."""

    name: str
    model: Pretrained
    wanted: Wanted
    folders: Mapping[str, Path]  # by split


def _evaluate(arguments: Namespace, command: str, ranks: Ranks) -> int:
    """The same exit status on every rank, but for what rank 0 does alone at the end."""
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise UserError("torch sees no GPU here; use --device auto or cpu")
    device = device_of(ranks, arguments.device)
    data = open_data(arguments.query, arguments.test, arguments.groups, allow_shared=arguments.allow_shared_groups)
    named = _named(arguments)
    with joined(ranks, device, _STALL_AFTER_S, _LOST_AFTER_S) as team:
        subjects = [_subject(one, name, data, arguments) for name, one in named.items()]
        for subject in subjects:
            if not _extract(subject, data, team, arguments):
                return _leave()
        if not ranks.is_first:
            return 0
        team.watch.stop()  # the others leave; what follows needs none of them
        for subject in subjects:
            if not _judge(subject, data, arguments, command, device):
                return _leave()
    return 0


def _leave() -> int:
    _log.info("told to leave (%s); the same command goes on from here", noted() or "another rank was")
    return EXIT_INTERRUPTED


def _named(arguments: Namespace) -> dict[str, NamedWeights]:
    """By the name that each report has. Raises `UserError` when two would have the same."""
    all_named = [named_weights(text, arguments.runs_dir) for text in arguments.weights]
    if arguments.name and len(all_named) > 1:
        raise UserError("--name is for one backbone; several are called after their files")
    names = [arguments.name or named.label for named in all_named]
    if twice := [name for name, number in Counter(names).items() if number > 1]:
        raise UserError(f"two of the weights would be called {twice[0]}; evaluate them one by one, with --name")
    return dict(zip(names, all_named, strict=True))


def _subject(named: NamedWeights, name: str, data: Data, arguments: Namespace) -> _Subject:
    """Raises `UserError` for what the backbone cannot read."""
    model = open_backbone(named)
    last_blocks = min(_LAST_BLOCKS, len(model.vit.blocks))
    wanted = Wanted(arguments.side or named.side, ("cls", "mean_patch"), last_blocks, precision=arguments.precision)
    demand_possible(data.query, model, wanted)
    cache = arguments.cache.expanduser()
    folders = {split: cache / key_of(data.split(split), model, wanted) for split in ("query", "test")}
    return _Subject(name, model, wanted, folders)


def _extract(subject: _Subject, data: Data, team: Team, arguments: Namespace) -> bool:
    """Features of both splits, unless the cache has them. False: told to leave before the end."""
    for number, (split, folder) in enumerate(subject.folders.items()):
        team.watch.at(number, f"extracting {subject.name}")
        if not extract_dataset(
            data.split(split),
            subject.model,
            subject.wanted,
            folder,
            team.ranks,
            team.device,
            batch_size=arguments.batch_size,
            num_workers=arguments.num_workers,
            go_on=lambda: noted() is None,
        ):
            return False
    return True


def _judge(subject: _Subject, data: Data, arguments: Namespace, command: str, device: torch.device) -> bool:
    """Write the report. False: told to leave before the end."""
    started = time.perf_counter()
    settings = _settings(arguments)
    last = subject.wanted.last_blocks if "linear" in settings.tasks else 1
    splits = {name: _split(data, name, folder, last) for name, folder in subject.folders.items()}
    found: dict[str, Found] = {}
    for task, of_task in judge(splits["query"], splits["test"], len(data.query.class_names), settings, device):
        _log.info("%s: %s", subject.name, in_words(task))
        found[task] = of_task
        if noted() is not None:
            return False
    test = splits["test"]
    rows = np.asarray(open_features(subject.folders["test"]).rows)
    samples = JudgedSamples(rows, test.labels, test.groups if data.groups else None)
    report = {
        "name": subject.name,
        "weights": _weights_report(subject),
        "tasks": {
            task: report_of_task(of_task, samples, arguments.bootstrap, settings.seed)
            for task, of_task in found.items()
        },
        "groups": _groups_report(data),
        **{name: _split_report(data, name, split) for name, split in splits.items()},
        "settings": {**asdict(settings), "bootstrap": arguments.bootstrap},
        "command": command,
        "seconds": time.perf_counter() - started,
        "commit": commit_of_this_code(),
        "versions": {package: version_of(package) for package in _VERSIONS},
    }
    draw_evaluation(report, arguments.output / f"{subject.name}.png")
    written = write_evaluation(arguments.output, report, samples, {task: one.tries for task, one in found.items()})
    _print(report, written)
    return True


def _split(data: Data, name: str, folder: Path, last_blocks: int) -> Split:
    """In memory as little as is looked at: [CLS] of so many blocks, the mean patch of the last."""
    features = open_features(folder)
    rows = np.asarray(features.rows)
    assert features.cls is not None
    assert features.mean_patch is not None
    groups = data.groups.get(name)
    return Split(
        np.asarray(features.cls[rows, -last_blocks:], np.float32),
        np.asarray(features.mean_patch[rows, -1:], np.float32),
        data.split(name).labels[rows],
        np.arange(len(rows)) if groups is None else groups[rows],
    )


def _split_report(data: Data, name: str, split: Split) -> dict[str, Any]:
    dataset = data.split(name)
    counts = np.bincount(split.labels, minlength=len(dataset.class_names)).tolist()
    return {
        "dataset": data.texts[name],
        "fingerprint": dataset.fingerprint(),
        "samples": len(split.labels),
        "left_out": len(dataset) - len(split.labels),
        "groups": len(np.unique(split.groups)) if data.groups else None,
        "classes": dict(zip(dataset.class_names, counts, strict=True)),
    }


def _weights_report(subject: _Subject) -> dict[str, Any]:
    model, wanted = subject.model, subject.wanted
    return {
        "path": str(model.path),
        "sha256": model.sha256,
        "arch": model.student.arch,
        "patch_size": model.student.patch_size,
        "width": int(model.vit.cls_token.shape[-1]),
        "side": wanted.side,
        "precision": wanted.precision,
        "features": {split: str(folder) for split, folder in subject.folders.items()},
    }


def _groups_report(data: Data) -> dict[str, Any] | None:
    if data.table is None:
        return None
    return {"file": str(data.table.source), "column": data.table.column, "shared": len(data.shared)}


def _settings(arguments: Namespace) -> TaskSettings:
    return TaskSettings(
        tasks=arguments.tasks,
        ks=arguments.k,
        n_per_class=arguments.n_per_class,
        tries=arguments.tries,
        linear=LinearSettings(steps=arguments.linear_steps),
        seed=arguments.seed,
    )


def _print(report: Mapping[str, Any], written: Path) -> None:
    rows = [
        [in_words(task), *(percent(found.get(metric)) for metric in METRICS)] for task, found in report["tasks"].items()
    ]
    print(f"{report['name']}: {report['test']['samples']:,} test samples")
    print(text_table(["task", *METRICS.values()], rows))
    print(f"written: {written} and .md, .png, .npz beside it")


def _labelled(text: str, option: str) -> KNN:
    dataset = open_dataset(text)
    if not isinstance(dataset, KNN):
        raise UserError(f"{option} needs labelled tiles, KNN:root=FOLDER:split=..., not {dataset.name}")
    if not len(dataset):
        raise UserError(f"{option} {text} has no samples")
    return dataset


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        "pathfm evaluate",
        description="What frozen backbones are worth on labelled tiles: kNN, a linear probe, logistic regression, with "
        "95 % intervals; settings are chosen without the test split. Features are extracted once, on any number of "
        "ranks, and kept. 'pathfm evaluate --follow RUN' tunes a run instead, beside the job that trains it.",
        epilog="Exit status: 75 when told to leave (TERM, USR2, Ctrl-C) before the end; the same command goes on.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "weights",
        nargs="+",
        metavar="WEIGHTS",
        help="a file, a run (its best teacher, or else its newest), or random:RECIPE for what training has to beat",
    )
    parser.add_argument("--query", required=True, metavar="KNN:...", help="labelled tiles to learn from")
    parser.add_argument("--test", required=True, metavar="KNN:...", help="labelled tiles to be judged on")
    parser.add_argument(
        "--tasks", type=_tasks, default=TASKS, metavar="TASK,...", help="some of knn,linear,logistic (default: all)"
    )
    parser.add_argument(
        "--groups",
        metavar="FILE.csv:COLUMN",
        help="slide or patient of every file (columns filename and COLUMN): they are held out and drawn as a whole",
    )
    parser.add_argument("--allow-shared-groups", action="store_true", help="although query and test share some")
    parser.add_argument(
        "--k", type=_numbers, default=TaskSettings.ks, metavar="K,...", help="neighbours (default: 10,20,100,200)"
    )
    parser.add_argument(
        "--n-per-class", type=_numbers, default=(), metavar="N,...", help="few shots too: so many samples of each class"
    )
    parser.add_argument("--tries", type=_positive, default=TaskSettings.tries, help="drawings of these (default: 10)")
    parser.add_argument(
        "--side", type=_positive, metavar="PX", help="of tiles as backbones see them (default: their recipe's, or 224)"
    )
    steps = LinearSettings.steps
    parser.add_argument("--linear-steps", type=_positive, default=steps, help=f"of the linear probe (default: {steps})")
    parser.add_argument("--bootstrap", type=_positive, default=1000, help="resamples behind intervals (default: 1000)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cache", type=Path, default=CACHE, metavar="FOLDER", help=f"of features (default: {CACHE})")
    parser.add_argument("--output", type=Path, default=OUTPUT, metavar="FOLDER", help=f"of reports (default: {OUTPUT})")
    parser.add_argument("--name", help="of the report (default: after the weights)")
    parser.add_argument("--runs-dir", type=Path, default=RUNS, help="where runs lie (default: runs)")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="bf16: autocast, for GPUs")
    parser.add_argument("--batch-size", type=_positive, default=128, help="tiles at once (default: 128)")
    parser.add_argument("--num-workers", type=int, default=0, help="processes that decode, of each rank (default: 0)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    return parser


def _tasks(text: str) -> tuple[str, ...]:
    words = tuple(dict.fromkeys(text.split(",")))
    if unknown := [word for word in words if word not in TASKS]:
        raise ArgumentTypeError(f"'{unknown[0]}' is none of {', '.join(TASKS)}")
    return words


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(sorted({_positive(word) for word in text.split(",")}))


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise ArgumentTypeError(f"{text} is not a whole number from 1 on")
    return int(text)

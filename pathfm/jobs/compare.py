"""`pathfm compare A.json B.json ...`: evaluated backbones side by side, with paired intervals of their differences."""

import shlex
import sys
from argparse import ArgumentParser
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int

from pathfm.errors import UserError, listed
from pathfm.evaluate.metrics import differences, mean_scores
from pathfm.evaluate.report import (
    FEW_SHOTS,
    METRICS,
    Evaluation,
    JudgedSamples,
    as_mapping,
    in_words,
    markdown_table,
    percent,
    read_evaluation,
)
from pathfm.files import write_json, write_text
from pathfm.tables import text_table


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    arguments = _parser().parse_args(words)
    paths = [*arguments.reports]
    if len(paths) < 2:
        raise UserError("one report compares with nothing; name two or more")
    together = side_by_side([read_evaluation(path) for path in paths])
    found = compare(together, arguments.bootstrap, arguments.seed)
    tables = {METRICS[metric]: _rows(found, metric, together.names) for metric in METRICS}
    header = ["task", together.names[0], *(part for name in together.names[1:] for part in (name, "difference"))]
    print(_about(together, arguments.bootstrap))
    for title, rows in tables.items():
        print(f"\n{title}\n{text_table(header, rows)}")
    if arguments.output:
        command = shlex.join(["pathfm", "compare", *words])
        report = {**_facts(together, arguments.bootstrap), "tasks": found, "command": command}
        write_json(arguments.output.with_suffix(".json"), report)
        parts = ["# " + " and ".join(together.names), _about(together, arguments.bootstrap)]
        parts += [f"## {title}\n\n{markdown_table(header, rows)}" for title, rows in tables.items()]
        write_text(arguments.output.with_suffix(".md"), "\n\n".join([*parts, f"```\n{command}\n```"]) + "\n")
        print(f"\nwritten: {arguments.output.with_suffix('.json')} and .md beside it")
    return 0


@dataclass(frozen=True)
class SideBySide:
    """Several evaluations on the samples that all of them judged; the first is what others are compared with."""

    names: tuple[str, ...]
    test: JudgedSamples
    tasks: Mapping[str, Sequence[Float[np.ndarray, "A T C"]]]  # of every backbone, in their order
    left_out: int  # samples that not all have judged
    only_some: tuple[str, ...]  # tasks that not all have
    paths: tuple[Path, ...]


def side_by_side(evaluations: Sequence[Evaluation]) -> SideBySide:
    """Raises `UserError` when they were not judged on the same test split, or have no task in common."""
    first = evaluations[0]
    for other in evaluations[1:]:
        _demand_same(first, other)
    names = [one.name for one in evaluations]
    if len({*names}) < len(names):
        names = [str(one.path.with_suffix("")) for one in evaluations]
    rows = first.test.rows
    for other in evaluations[1:]:
        rows = np.intersect1d(rows, other.test.rows)
    places = [np.searchsorted(one.test.rows, rows) for one in evaluations]
    everywhere = [task for task in first.tries if all(task in one.tries for one in evaluations)]
    if not everywhere:
        raise UserError(f"{listed(names)} have no task in common; evaluate them with the same --tasks and --k")
    return SideBySide(
        tuple(names),
        JudgedSamples(rows, first.test.labels[places[0]], _groups_of(evaluations, places)),
        {
            task: [one.tries[task][:, place] for one, place in zip(evaluations, places, strict=True)]
            for task in everywhere
        },
        max(len(one.test.rows) for one in evaluations) - len(rows),
        tuple(sorted({task for one in evaluations for task in one.tries} - {*everywhere})),
        tuple(one.path for one in evaluations),
    )


def compare(together: SideBySide, resamples: int, seed: int) -> dict[str, list[dict[str, Any]]]:
    """By task, for every backbone: its metrics and, but for the first, their difference to the first's."""
    labels, groups = together.test.as_tensors()
    found: dict[str, list[dict[str, Any]]] = {}
    for task, of_task in together.tasks.items():
        tries = [list(torch.from_numpy(one)) for one in of_task]
        found[task] = []
        for number, own in enumerate(tries):
            scores = mean_scores(own, labels, groups=groups, resamples=resamples, seed=seed)
            line: dict[str, Any] = {"name": together.names[number]}
            line |= {metric: as_mapping(score) for metric, score in scores.items()}
            if number:
                gaps = differences(own, tries[0], labels, groups=groups, resamples=resamples, seed=seed)
                line["difference"] = {metric: as_mapping(gap) for metric, gap in gaps.items()}
            found[task].append(line)
    return found


def _demand_same(first: Evaluation, other: Evaluation) -> None:
    one, two = first.report["test"], other.report["test"]
    if one["fingerprint"] != two["fingerprint"]:
        raise UserError(
            f"{first.path} was judged on {one['dataset']} and {other.path} on {two['dataset']}, which is another test "
            "split; differences are of the same samples alone"
        )
    if [*one["classes"]] != [*two["classes"]]:
        raise UserError(f"{first.path} and {other.path} have other classes; evaluate both with one class-ids.npy")
    if first.report["query"]["fingerprint"] != other.report["query"]["fingerprint"]:
        raise UserError(f"{first.path} and {other.path} learned from other query splits; evaluate both with one")


def _groups_of(evaluations: Sequence[Evaluation], places: Sequence[Int[np.ndarray, " T"]]) -> np.ndarray | None:
    """Those that some of them know. Raises `UserError` when two know different ones."""
    known = [
        (one, one.test.groups[place])
        for one, place in zip(evaluations, places, strict=True)
        if one.test.groups is not None
    ]
    for other, groups in known[1:]:
        if not _same_partition(known[0][1], groups):
            raise UserError(f"{known[0][0].path} and {other.path} have other groups; evaluate both with one --groups")
    return known[0][1] if known else None


def _same_partition(one: Int[np.ndarray, " T"], other: Int[np.ndarray, " T"]) -> bool:
    pairs = len(np.unique(np.stack([one, other]), axis=1).T)
    return pairs == len(np.unique(one)) == len(np.unique(other))


def _rows(found: Mapping[str, list[dict[str, Any]]], metric: str, names: Sequence[str]) -> list[list[str]]:
    rows = []
    for task, lines in found.items():
        cells = [in_words(task), percent(lines[0].get(metric))]
        for line in lines[1:]:
            cells += [percent(line.get(metric)), _gap(line["difference"].get(metric))]
        rows.append(cells)
    return rows


def _gap(gap: Mapping[str, float] | None) -> str:
    """With a star where the interval leaves out no difference."""
    star = " *" if gap is not None and (gap["low"] > 0 or gap["high"] < 0) else ""
    return percent(gap, signed=True) + star


def _about(together: SideBySide, resamples: int) -> str:
    test = together.test
    groups = "samples, as no groups are known" if test.groups is None else f"{len(np.unique(test.groups))} groups"
    said = (
        f"{len(test.labels):,} test samples. Differences are to {together.names[0]}, in points; 95 % intervals of "
        f"{resamples} resamples of {groups}, the same for all; * where the interval leaves out 0."
    )
    if any(len(of_task[0]) > 1 for of_task in together.tasks.values()):
        said += FEW_SHOTS
    if together.left_out:
        said += f" Left out: {together.left_out} samples that not all could read."
    if together.only_some:
        said += f" Left out: {listed(map(in_words, together.only_some))}, which not all have."
    return said


def _facts(together: SideBySide, resamples: int) -> dict[str, Any]:
    return {
        "names": list(together.names),
        "reports": [str(path) for path in together.paths],
        "compared_with": together.names[0],
        "test_samples": len(together.test.labels),
        "groups": None if together.test.groups is None else len(np.unique(together.test.groups)),
        "bootstrap": resamples,
    }


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        "pathfm compare",
        description="Backbones that 'pathfm evaluate' judged on one test split, side by side. The interval of a "
        "difference comes of the same resamples of both, so it is narrower than two intervals beside each other.",
        allow_abbrev=False,
    )
    parser.add_argument("reports", nargs="+", type=Path, metavar="REPORT.json", help="the first is compared with")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write FILE.json and FILE.md too")
    parser.add_argument("--bootstrap", type=int, default=1000, help="resamples behind intervals (default: 1000)")
    parser.add_argument("--seed", type=int, default=0)
    return parser

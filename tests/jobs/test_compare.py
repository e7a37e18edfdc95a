"""`pathfm compare`: the same samples, the same resamples, and a word where reports do not belong together."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pathfm.errors import UserError
from pathfm.evaluate.metrics import differences, scores
from pathfm.evaluate.report import JudgedSamples, write_evaluation
from pathfm.jobs.compare import main

LABELS = np.arange(60) % 3
GROUPS = np.arange(60) // 4


def probabilities(seed: int, strength: float, tries: int = 1) -> np.ndarray:
    """Of classifiers that know the more the stronger they are."""
    logits = np.random.default_rng(seed).normal(size=(tries, 60, 3)) + strength * np.eye(3)[LABELS]
    return (np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)).astype(np.float32)


def write(folder: Path, name: str, strength: float, *, rows: np.ndarray | None = None, **changes: Any) -> Path:
    rows = np.arange(60) if rows is None else rows
    tries = {"knn_20": probabilities(len(name), strength), "knn_1_5_per_class": probabilities(9, strength, tries=3)}
    tries |= {"linear": probabilities(5, strength)} if name == "a" else {}
    split = {"dataset": "KNN:root=x", "fingerprint": "f", "samples": 60, "left_out": 0, "groups": 15}
    split |= {"classes": dict.fromkeys("abc", 20)}
    zero = {"value": 0.0, "low": 0.0, "high": 0.0}
    report = {
        "name": name,
        "weights": {"path": "w", "sha256": "0", "arch": "v", "patch_size": 16, "width": 4, "side": 32},
        "tasks": {task: {"chosen": {}, "calibration_error": 0.0, "acc": zero} for task in tries},
        "groups": {"file": "f.csv", "column": "slide", "shared": 0},
        "settings": {"bootstrap": 100},
        "command": "c",
        "query": split,
        "test": split,
        **changes,
    }
    groups = None if report["groups"] is None else GROUPS[rows]
    test = JudgedSamples(rows, LABELS[rows], groups)
    return write_evaluation(folder, report, test, {task: one[:, rows] for task, one in tries.items()})


def test_a_stronger_backbone_differs_by_what_paired_resamples_say(tmp_path, capsys):
    weak, strong = write(tmp_path, "weak", 1.0), write(tmp_path, "stronger", 3.0)
    assert main([str(weak), str(strong), "--bootstrap", "200", "--output", str(tmp_path / "both")]) == 0
    found = json.loads((tmp_path / "both.json").read_text())
    own = [torch.from_numpy(probabilities(len(name), k)[0]) for name, k in (("weak", 1.0), ("stronger", 3.0))]
    common = {"groups": torch.from_numpy(GROUPS), "resamples": 200}
    labels = torch.from_numpy(LABELS)
    gaps = differences([own[1]], [own[0]], labels, **common)
    first, second = found["tasks"]["knn_20"]
    assert second["difference"] == {metric: pytest.approx(asdict(gap)) for metric, gap in gaps.items()}
    assert first["acc"] == pytest.approx(asdict(scores(own[0], labels, **common)["acc"]))
    assert "difference" not in first
    said = capsys.readouterr().out
    shown = [f"{100 * end:+.1f}" for end in (gaps["acc"].value, gaps["acc"].low, gaps["acc"].high)]
    assert f"{shown[0]} % [{shown[1]}, {shown[2]}] *" in said
    assert "200 resamples of 15 groups" in said
    assert f"{shown[0]} % [{shown[1]}, {shown[2]}] *" in (tmp_path / "both.md").read_text()


def test_samples_that_one_could_not_read_and_tasks_that_one_has_not_are_left_out(tmp_path, capsys):
    one, other = write(tmp_path, "a", 1.0), write(tmp_path, "bb", 1.0, rows=np.arange(60)[3:])
    assert main([str(one), str(other), "--bootstrap", "50", "--output", str(tmp_path / "both")]) == 0
    said = capsys.readouterr().out
    assert "57 test samples" in said
    assert "Left out: 3 samples that not all could read. Left out: linear probe, which not all have." in said
    found = json.loads((tmp_path / "both.json").read_text())
    expected = scores(torch.from_numpy(probabilities(1, 1.0)[0, 3:]), torch.from_numpy(LABELS[3:]), resamples=0)
    assert found["tasks"]["knn_20"][0]["acc"]["value"] == pytest.approx(expected["acc"].value)


def test_groups_that_one_of_them_knows_serve_both(tmp_path, capsys):
    one, other = write(tmp_path, "a", 1.0, groups=None), write(tmp_path, "bb", 1.0)
    assert main([str(one), str(other), "--bootstrap", "50"]) == 0
    assert "50 resamples of 15 groups" in capsys.readouterr().out


def test_reports_of_one_name_are_told_apart_by_their_places(tmp_path, capsys):
    paths = [write(tmp_path / folder, "same", 1.0) for folder in ("one", "two")]
    assert main([*map(str, paths), "--bootstrap", "50"]) == 0
    said = capsys.readouterr().out
    assert f"{tmp_path}/one/same" in said
    assert "+0.0 % [+0.0, +0.0]" in said
    assert "[+0.0, +0.0] *" not in said


@pytest.mark.parametrize("split", ["test", "query"])
def test_other_samples_are_refused(tmp_path, split):
    other = {"dataset": "KNN:root=y", "fingerprint": "g", "samples": 60, "left_out": 0, "groups": 15}
    paths = [
        write(tmp_path, "a", 1.0),
        write(tmp_path, "b", 1.0, **{split: {**other, "classes": dict.fromkeys("abc", 20)}}),
    ]
    with pytest.raises(UserError, match="another test split" if split == "test" else "other query splits"):
        main(list(map(str, paths)))


def test_what_is_no_report_is_named(tmp_path):
    report = write(tmp_path, "a", 1.0)
    (tmp_path / "b.json").write_text("{}")
    with pytest.raises(UserError, match=r"b.json is no report of 'pathfm evaluate'"):
        main([str(report), str(tmp_path / "b.json")])
    with pytest.raises(UserError, match="one report compares with nothing"):
        main([str(report)])
    report.with_suffix(".npz").unlink()
    with pytest.raises(UserError, match=r"cannot read .*a.npz"):
        main([str(report), str(report)])

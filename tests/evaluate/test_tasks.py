"""Every task judges the same test samples, by features of the blocks that it says, from the query split alone."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from pathfm.evaluate.folds import folds_by_group
from pathfm.evaluate.knn import few_shot_rows, knn_probabilities
from pathfm.evaluate.linear import LinearSettings
from pathfm.evaluate.logistic import LogisticSettings, choose_c, fit_and_predict
from pathfm.evaluate.picture import draw_evaluation, shown_tasks
from pathfm.evaluate.report import JudgedSamples, as_markdown, in_words, report_of_task
from pathfm.evaluate.tasks import Found, Split, TaskSettings, judge

CPU = torch.device("cpu")
SETTINGS = TaskSettings(ks=(1, 5, 500), n_per_class=(2,), tries=3, linear=LinearSettings(steps=50, batch_size=16))


def split(number: int, seed: int) -> Split:
    """Four blocks of which the last tells the classes apart."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, number)
    features = rng.normal(size=(2, number, 4, 5)).astype(np.float32)
    features[:, :, -1, :3] += 2 * np.eye(3)[labels]
    return Split(features[0], features[1], labels, np.arange(number) // 3)


@pytest.fixture(scope="module")
def found():
    return dict(judge(split(60, 1), split(30, 2), 3, SETTINGS, CPU))


def test_every_task_says_something_of_every_test_sample(found):
    names = ["knn_1", "knn_5", "linear", "logistic", "knn_1_2_per_class", "knn_5_2_per_class", "logistic_2_per_class"]
    assert list(found) == names
    for name, of_task in found.items():
        assert of_task.tries.shape == (3 if name.endswith("per_class") else 1, 30, 3)
        np.testing.assert_allclose(of_task.tries.sum(-1), 1, atol=1e-5)
        assert (of_task.tries.argmax(-1) == split(30, 2).labels).mean() > 0.5


def test_few_shots_are_the_same_samples_whatever_the_backbone(found):
    query, test = split(60, 1), split(30, 2)
    rows = few_shot_rows(torch.from_numpy(query.labels), 2, 3, seed=0)[1]
    features = torch.from_numpy(query.cls[:, -1])[rows], torch.from_numpy(query.labels)[rows]
    expected = knn_probabilities(*features, torch.from_numpy(test.cls[:, -1].copy()), 3, [5])[5]
    np.testing.assert_allclose(found["knn_5_2_per_class"].tries[1], expected, atol=1e-6)


def test_logistic_regression_is_of_the_last_blocks_class_tokens_with_c_by_groups(found):
    query, test = split(60, 1), split(30, 2)
    folds = folds_by_group(query.labels, query.groups, 5, 0)
    chosen = choose_c(query.cls[:, -1], query.labels, folds, LogisticSettings())
    assert found["logistic"].chosen["c"] == chosen.c
    expected = fit_and_predict(query.cls[:, -1], query.labels, test.cls[:, -1], 3, chosen.c)
    np.testing.assert_allclose(found["logistic"].tries[0], expected, atol=1e-6)


def test_the_probe_may_choose_among_four_kinds_of_features():
    query, test = split(60, 1), split(30, 2)
    told = replace(query, mean_patch=query.mean_patch.copy()), replace(test, mean_patch=test.mean_patch.copy())
    for one in told:
        one.cls[:] = 0
        one.mean_patch[:, -1, :3] = 5 * np.eye(3)[one.labels]
    of_task = dict(judge(*told, 3, replace(SETTINGS, tasks=("linear",), n_per_class=()), CPU))["linear"]
    assert of_task.chosen["features"] == "cls_1+mean_patch"  # of equally good ones the first
    assert (of_task.tries[0].argmax(-1) == test.labels).all()


def test_a_k_that_is_too_large_leaves_the_nearest_alone():
    of_tasks = dict(judge(split(60, 1), split(30, 2), 3, replace(SETTINGS, tasks=("knn",), ks=(20,)), CPU))
    assert list(of_tasks) == ["knn_20", "knn_1_2_per_class"]


def test_names_in_words():
    words = {"knn_20": "kNN, k = 20", "knn_20_5_per_class": "kNN, k = 20, 5 per class", "linear": "linear probe"}
    words["logistic_10_per_class"] = "logistic regression, 10 per class"
    assert {name: in_words(name) for name in words} == words


@pytest.mark.parametrize(
    ("tasks", "shown"),
    [
        (["knn_10", "knn_20", "linear", "logistic", "knn_10_1_per_class"], ["knn_20", "linear", "logistic"]),
        (["knn_1", "knn_5"], ["knn_1"]),
        (["knn_1_1_per_class"], []),
    ],
)
def test_the_picture_shows_one_k_and_no_few_shots(tasks, shown):
    assert shown_tasks(tasks) == shown


def test_a_class_without_test_samples_and_many_classes_are_drawn_and_written(tmp_path):
    rng = np.random.default_rng(0)
    probabilities = rng.dirichlet(np.ones(15), 40).astype(np.float32)
    labels = rng.integers(0, 14, 40)
    of_task = report_of_task(Found(probabilities[None], {}), JudgedSamples(np.arange(40), labels, None), 50, 0)
    side = {"dataset": "d", "fingerprint": "f", "samples": 40, "left_out": 0, "groups": None}
    side["classes"] = {f"class {number}": int((labels == number).sum()) for number in range(15)}
    report = {"name": "n", "tasks": {"knn_20": of_task}, "query": side, "test": side, "command": "c", "groups": None}
    report["weights"] = {"path": "p", "sha256": "s", "arch": "a", "patch_size": 1, "side": 1, "width": 1}
    report["settings"] = {"bootstrap": 50}
    assert draw_evaluation(report, tmp_path / "n.png")
    assert (tmp_path / "n.png").stat().st_size > 1000
    assert "class 14 0" in as_markdown(report)

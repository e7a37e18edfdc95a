import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score, jaccard_score, recall_score

from pathfm.errors import UserError
from pathfm.evaluate.dense.losses import IGNORED
from pathfm.evaluate.dense.metrics import confusion, deviations, regression_scores, segmentation_scores
from pathfm.random_streams import stream

NAMES = ("stroma", "tumour", "necrosis", "fat")


def _pictures(number: int, classes: int, seed: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """True and predicted masks; some classes are rare, some pixels are ignored."""
    rng = np.random.default_rng(seed)
    truths, answers = [], []
    for _ in range(number):
        truth = np.minimum(rng.integers(0, classes, (7, 9)), rng.integers(0, classes, (7, 9)))
        answer = np.where(rng.random((7, 9)) < 0.6, truth, rng.integers(0, classes, (7, 9)))
        truths.append(torch.from_numpy(np.where(rng.random((7, 9)) < 0.1, IGNORED, truth)))
        answers.append(torch.from_numpy(answer))
    return truths, answers


def _confusions(truths: list[torch.Tensor], answers: list[torch.Tensor], classes: int) -> np.ndarray:
    return np.stack([confusion(*pair, classes) for pair in zip(truths, answers, strict=True)])


def _pixels(truths: list[torch.Tensor], answers: list[torch.Tensor]) -> tuple[np.ndarray, np.ndarray]:
    true, said = (torch.cat([mask.flatten() for mask in masks]).numpy() for masks in (truths, answers))
    return true[true != IGNORED], said[true != IGNORED]


@given(st.integers(1, 4), st.integers(2, 4), st.integers(0, 10_000))
@settings(max_examples=30, deadline=None)
def test_values_equal_scikit_learns_over_all_pixels(number: int, classes: int, seed: int):
    truths, answers = _pictures(number, classes, seed)
    confusions = _confusions(truths, answers, classes)
    true, said = _pixels(truths, answers)
    labels = list(range(classes))
    assert (confusions.sum(0) == confusion_matrix(true, said, labels=labels)).all()
    found = {name: s.value for name, s in segmentation_scores(confusions, NAMES[:classes], resamples=0).items()}
    there = [label for label in labels if ((true == label) | (said == label)).any()]
    ious = jaccard_score(true, said, labels=there, average=None)
    dices = f1_score(true, said, labels=there, average=None)
    expected = {"miou": ious.mean(), "mdice": dices.mean(), "pixel_acc": accuracy_score(true, said)}
    expected |= {f"iou/{NAMES[label]}": iou for label, iou in zip(there, ious, strict=True)}
    expected |= {f"dice/{NAMES[label]}": dice for label, dice in zip(there, dices, strict=True)}
    occurring = [label for label in labels if (true == label).any()]
    recalls = recall_score(true, said, labels=occurring, average=None)
    expected |= {f"acc/{NAMES[label]}": acc for label, acc in zip(occurring, recalls, strict=True)}
    assert found == pytest.approx(expected, abs=1e-12)


def test_a_class_that_is_nowhere_counts_in_no_mean_and_one_that_is_only_said_counts_as_0():
    truth, answer = torch.tensor([[0, 0, 1, 1]]), torch.tensor([[0, 0, 1, 2]])
    found = segmentation_scores(_confusions([truth], [answer], 4), NAMES, resamples=0)
    assert found["iou/necrosis"].value == 0
    assert "iou/fat" not in found
    assert "acc/necrosis" not in found
    assert found["miou"].value == pytest.approx((1 + 0.5 + 0) / 3)


@pytest.mark.parametrize("groups", [None, ["a", "b", "a", "c", "c", "b", "d", "a"]])
def test_intervals_equal_a_plain_loop_over_the_same_drawings_of_pictures_or_groups(groups: list[str] | None):
    truths, answers = _pictures(8, 3, seed=4)
    found = segmentation_scores(_confusions(truths, answers, 3), NAMES[:3], groups, resamples=60, seed=5)
    names = groups or list(range(8))
    units = [[place for place, name in enumerate(names) if name == unit] for unit in sorted(set(names))]
    drawn = []
    for number in range(60):
        rows = stream(5, number, "bootstrap").integers(0, len(units), len(units))
        places = [place for row in rows for place in units[row]]
        true, said = _pixels([truths[place] for place in places], [answers[place] for place in places])
        drawn.append(jaccard_score(true, said, average="macro"))
    score = found["miou"]
    assert (score.low, score.high) == pytest.approx(tuple(np.percentile(drawn, [2.5, 97.5])), abs=1e-12)
    assert score.low < score.value < score.high


def test_regression_scores_equal_plain_loops():
    rng = np.random.default_rng(2)
    truths = [torch.from_numpy(rng.uniform(0.5, 4, (5, 6))) for _ in range(3)]
    answers = [truth * torch.from_numpy(rng.uniform(0.5, 2, (5, 6))) for truth in truths]
    truths[0][0] = 0.0
    truths[1][2, 3] = math.nan
    amounts = np.stack([deviations(*pair) for pair in zip(truths, answers, strict=True)])
    found = {name: score.value for name, score in regression_scores(amounts, resamples=10).items()}
    pairs = [
        (t, p)
        for truth, answer in zip(truths, answers, strict=True)
        for t, p in zip(truth.flatten().tolist(), answer.flatten().tolist(), strict=True)
        if math.isfinite(t) and t > 0
    ]
    assert len(pairs) == 3 * 30 - 6 - 1
    expected = {
        "abs_rel": np.mean([abs(p - t) / t for t, p in pairs]),
        "rmse": math.sqrt(np.mean([(p - t) ** 2 for t, p in pairs])),
        **{f"delta_{n}": np.mean([max(p / t, t / p) < 1.25**n for t, p in pairs]) for n in (1, 2, 3)},
    }
    assert found == pytest.approx(expected, abs=1e-12)


def test_without_a_test_picture_there_is_no_score():
    with pytest.raises(UserError, match="no test picture to score"):
        segmentation_scores(np.zeros((0, 2, 2)), NAMES[:2])

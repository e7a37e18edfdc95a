import math

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, balanced_accuracy_score, roc_auc_score

from pathfm.errors import UserError
from pathfm.evaluate import metrics
from pathfm.evaluate.bootstrap import Score
from pathfm.evaluate.metrics import differences, mean_scores, scores
from pathfm.random_streams import stream


def _sample(num_samples: int, classes: int, levels: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities of which many tie when `levels` is small, and labels that they tell something about."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, num_samples)
    votes = (
        rng.integers(0, levels + 1, (num_samples, classes))
        + rng.integers(0, 2, num_samples)[:, None] * np.eye(classes, dtype=int)[labels]
    )
    votes[:, 0] += votes.sum(1) == 0
    return votes / votes.sum(1, keepdims=True), labels


def _by_scikit_learn(probabilities: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """By one-vs-rest calls, as `roc_auc_score(multi_class="ovr")` refuses labels that lack a class."""
    classes = probabilities.shape[1]
    predicted, present = probabilities.argmax(1), np.unique(labels)
    found = {
        "acc": accuracy_score(labels, predicted),
        "balanced_acc": float(np.mean([np.mean(predicted[labels == label] == label) for label in present])),
    }
    if len(present) > 1:
        judged = present if classes > 2 else [1]
        found["auc"] = float(np.mean([roc_auc_score(labels == c, probabilities[:, c]) for c in judged]))
    return found


def _scores(probabilities: np.ndarray, labels: np.ndarray, **options: int) -> dict[str, Score]:
    return scores(torch.from_numpy(probabilities), torch.from_numpy(labels), **options)


@given(st.integers(1, 60), st.integers(2, 6), st.sampled_from([1, 2, 5, 1000]), st.integers(0, 10_000))
@example(40, 5, 1, 0)
@settings(max_examples=80, deadline=None)
def test_values_equal_scikit_learns_also_with_ties_and_absent_classes(
    num_samples: int, classes: int, levels: int, seed: int
):
    probabilities, labels = _sample(num_samples, classes, levels, seed)
    found = {name: score.value for name, score in _scores(probabilities, labels, resamples=0).items()}
    assert found == pytest.approx(_by_scikit_learn(probabilities, labels), abs=1e-12)


@pytest.mark.parametrize("classes", [3, 7])
@pytest.mark.parametrize("levels", [1, 10, 10**6])
def test_with_every_class_present_values_are_scikit_learns_own_macro_averages(classes: int, levels: int):
    probabilities, labels = _sample(500, classes, levels, seed=3)
    found = {name: score.value for name, score in _scores(probabilities, labels, resamples=0).items()}
    assert found == pytest.approx(
        {
            "acc": accuracy_score(labels, probabilities.argmax(1)),
            "balanced_acc": balanced_accuracy_score(labels, probabilities.argmax(1)),
            "auc": roc_auc_score(labels, probabilities, multi_class="ovr", average="macro"),
        },
        abs=1e-12,
    )


def test_with_two_classes_the_area_is_the_ordinary_one_even_where_the_first_class_ties():
    tiny = np.array([1e-20, 2e-20, 3e-20, 4e-20])
    labels = np.array([0, 1, 0, 1])
    found = _scores(np.stack([1 - tiny, tiny], axis=1), labels, resamples=0)
    assert found["auc"].value == roc_auc_score(labels, tiny) == 0.75


@pytest.mark.parametrize(("num_samples", "classes", "levels"), [(30, 2, 2), (12, 4, 1), (80, 3, 1000)])
def test_intervals_equal_a_plain_loop_over_the_same_resamples(num_samples: int, classes: int, levels: int):
    probabilities, labels = _sample(num_samples, classes, levels, seed=5)
    found = _scores(probabilities, labels, resamples=200, seed=9)
    drawn = []
    for number in range(200):
        rows = stream(9, number, "bootstrap").integers(0, num_samples, num_samples)
        drawn.append(_by_scikit_learn(probabilities[rows], labels[rows]))
    for name, score in found.items():
        low, high = np.percentile([one[name] for one in drawn if name in one], [2.5, 97.5])
        assert (score.low, score.high) == pytest.approx((low, high), abs=1e-12)
        assert score.low < score.value < score.high


def _rows_of_drawn_groups(groups: np.ndarray, number: int) -> np.ndarray:
    names = np.unique(groups)
    drawn = stream(9, number, "bootstrap").integers(0, len(names), len(names))
    return np.concatenate([np.flatnonzero(groups == names[place]) for place in drawn])


@pytest.mark.parametrize(("num_groups", "classes", "levels"), [(7, 2, 2), (12, 4, 1), (25, 3, 1000)])
def test_intervals_over_groups_equal_a_plain_loop_that_draws_whole_groups(num_groups: int, classes: int, levels: int):
    probabilities, labels = _sample(80, classes, levels, seed=5)
    groups = 3 * np.random.default_rng(1).integers(0, num_groups, 80) + 2  # numbers need not be dense
    found = scores(*map(torch.from_numpy, (probabilities, labels)), groups=torch.from_numpy(groups), seed=9)
    drawn = []
    for number in range(1000):
        rows = _rows_of_drawn_groups(groups, number)
        drawn.append(_by_scikit_learn(probabilities[rows], labels[rows]))
    for name, score in found.items():
        low, high = np.percentile([one[name] for one in drawn if name in one], [2.5, 97.5])
        assert (score.low, score.high) == pytest.approx((low, high), abs=1e-12)


def test_samples_that_are_their_own_group_have_the_interval_of_samples():
    probabilities, labels = map(torch.from_numpy, _sample(60, 3, 1000, seed=2))
    assert scores(probabilities, labels, groups=torch.arange(60)) == scores(probabilities, labels)


def test_alike_tiles_of_few_slides_make_a_wide_interval():
    """Twenty slides of fifty tiles that are all right or all wrong tell no more than twenty tiles."""
    slides = np.arange(20).repeat(50)
    labels = slides % 2
    told = np.where(slides % 4 < 3, labels, 1 - labels)
    probabilities = torch.from_numpy(np.eye(2)[told])
    of_tiles = scores(probabilities, torch.from_numpy(labels))["acc"]
    of_slides = scores(probabilities, torch.from_numpy(labels), groups=torch.from_numpy(slides))["acc"]
    assert of_slides.value == of_tiles.value == 0.75
    assert (of_slides.high - of_slides.low) > 5 * (of_tiles.high - of_tiles.low)


def test_a_mean_over_tries_is_of_each_resample_not_of_intervals():
    tries = [_sample(40, 3, 1000, seed)[0] for seed in range(3)]
    labels = _sample(40, 3, 1000, 0)[1]
    found = mean_scores(list(map(torch.from_numpy, tries)), torch.from_numpy(labels), resamples=100, seed=9)
    drawn = []
    for number in range(100):
        rows = stream(9, number, "bootstrap").integers(0, 40, 40)
        of_tries = [_by_scikit_learn(one[rows], labels[rows]) for one in tries]
        drawn.append({name: np.mean([one[name] for one in of_tries]) for name in of_tries[0]})
    for name, score in found.items():
        assert score.value == pytest.approx(np.mean([_by_scikit_learn(one, labels)[name] for one in tries]))
        expected = np.percentile([one[name] for one in drawn], [2.5, 97.5])
        assert (score.low, score.high) == pytest.approx(tuple(expected), abs=1e-12)


def test_differences_equal_a_plain_loop_over_the_same_resamples_of_both():
    labels = _sample(80, 3, 1000, 0)[1]
    one, other = _sample(80, 3, 1000, 0)[0], _sample(80, 3, 5, 4)[0]
    groups = np.random.default_rng(1).integers(0, 15, 80)
    found = differences(
        [torch.from_numpy(one)],
        [torch.from_numpy(other)],
        torch.from_numpy(labels),
        groups=torch.from_numpy(groups),
        resamples=150,
        seed=9,
    )
    drawn = []
    for number in range(150):
        rows = _rows_of_drawn_groups(groups, number)
        first, second = (_by_scikit_learn(side[rows], labels[rows]) for side in (one, other))
        drawn.append({name: first[name] - second[name] for name in first})
    whole = [_by_scikit_learn(side, labels) for side in (one, other)]
    for name, score in found.items():
        expected = np.percentile([one[name] for one in drawn], [2.5, 97.5])
        assert score.value == pytest.approx(whole[0][name] - whole[1][name], abs=1e-12)
        assert (score.low, score.high) == pytest.approx(tuple(expected), abs=1e-12)


def test_a_backbone_differs_from_itself_by_nothing():
    probabilities, labels = map(torch.from_numpy, _sample(60, 3, 1000, seed=2))
    found = differences([probabilities], [probabilities], labels, resamples=100)
    assert set(found.values()) == {Score(0.0, 0.0, 0.0)}


def test_an_interval_does_not_depend_on_how_many_resamples_come_at_once(monkeypatch):
    probabilities, labels = _sample(50, 3, 3, seed=1)
    expected = _scores(probabilities, labels, resamples=100)
    monkeypatch.setattr(metrics, "_WEIGHTS_AT_ONCE", 50 * 7)
    for name, score in _scores(probabilities, labels, resamples=100).items():
        assert (score.value, score.low, score.high) == pytest.approx(
            (expected[name].value, expected[name].low, expected[name].high), abs=1e-12
        )


def test_an_interval_holds_the_truth_about_as_often_as_it_says():
    """Of 200 test sets, each with its own 95 % interval of an accuracy that is truly 0.7."""
    rng = np.random.default_rng(0)
    hits = 0
    for seed in range(200):
        labels = rng.integers(0, 2, 200)
        told = np.where(rng.random(200) < 0.7, labels, 1 - labels)
        score = _scores(np.eye(2)[told], labels, resamples=200, seed=seed)["acc"]
        hits += score.low <= 0.7 <= score.high
    assert 0.9 <= hits / 200 <= 0.99


def test_the_same_seed_gives_the_same_interval_and_no_global_random_number_is_drawn():
    probabilities, labels = _sample(60, 3, 1000, seed=2)
    before = np.random.get_state()[1].copy(), torch.get_rng_state()
    assert _scores(probabilities, labels, seed=4) == _scores(probabilities, labels, seed=4)
    assert _scores(probabilities, labels, seed=4) != _scores(probabilities, labels, seed=5)
    assert (np.random.get_state()[1] == before[0]).all()
    assert torch.get_rng_state().equal(before[1])


def test_labels_of_one_class_have_no_area():
    found = _scores(np.array([[0.9, 0.1], [0.2, 0.8]]), np.array([0, 0]), resamples=100)
    assert set(found) == {"acc", "balanced_acc"}
    assert found["acc"].value == found["balanced_acc"].value == 0.5


def test_resamples_of_one_class_are_left_out_of_the_area():
    found = _scores(np.array([[0.9, 0.1], [0.2, 0.8]]), np.array([0, 1]), resamples=100)
    assert found["auc"] == Score(1.0, 1.0, 1.0)


def test_without_resamples_the_interval_is_the_value():
    found = _scores(*_sample(20, 3, 5, seed=0), resamples=0)
    assert all(score.low == score.value == score.high for score in found.values())


def test_single_precision_probabilities_are_scored_as_they_are():
    probabilities, labels = _sample(100, 4, 7, seed=0)
    single = torch.from_numpy(probabilities).float()
    found = scores(single, torch.from_numpy(labels), resamples=0)
    assert math.isclose(found["auc"].value, _by_scikit_learn(single.numpy(), labels)["auc"], abs_tol=1e-12)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpus_tensors_have_the_cpus_scores():
    probabilities, labels = map(torch.from_numpy, _sample(100, 4, 7, seed=0))
    assert scores(probabilities.cuda(), labels.cuda()) == scores(probabilities, labels)


def test_a_test_split_without_samples_is_refused():
    with pytest.raises(UserError, match="there is no test sample to score"):
        scores(torch.zeros(0, 3), torch.zeros(0, dtype=torch.long))

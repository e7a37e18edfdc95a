import math

import numpy as np
import pytest
from sklearn.metrics import confusion_matrix

from pathfm.evaluate.calibration import confusion, reliability


def _sample(seed: int = 0, number: int = 400, classes: int = 4) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    logits = 2 * rng.normal(size=(number, classes))
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    return probabilities, rng.integers(0, classes, number)


def test_confusion_is_scikit_learns_also_where_a_class_is_absent():
    probabilities, labels = _sample()
    labels[labels == 2] = 1
    expected = confusion_matrix(labels, probabilities.argmax(1), labels=range(4))
    assert (confusion(probabilities, labels) == expected).all()


def test_expected_calibration_error_is_a_plain_loops():
    probabilities, labels = _sample(3)
    found = reliability(probabilities, labels, bins=10)
    error = 0.0
    for number in range(10):
        rows = [i for i, p in enumerate(probabilities) if number / 10 < p.max() <= (number + 1) / 10]
        if rows:
            accuracy = np.mean([probabilities[i].argmax() == labels[i] for i in rows])
            confidence = np.mean([probabilities[i].max() for i in rows])
            assert (found.counts[number], found.accuracy[number]) == (len(rows), pytest.approx(accuracy))
            error += len(rows) / len(labels) * abs(accuracy - confidence)
        else:
            assert found.counts[number] == 0
            assert math.isnan(found.accuracy[number])
    assert found.expected_error == pytest.approx(error)


def test_probabilities_that_mean_what_they_say_have_next_to_no_error():
    probabilities, _ = _sample(1, number=40_000)
    rng = np.random.default_rng(2)
    labels = (probabilities.cumsum(1) < rng.random(len(probabilities))[:, None]).sum(1)
    assert reliability(probabilities, labels).expected_error < 0.01


def test_votes_that_are_certain_lie_in_the_last_bin():
    found = reliability(np.eye(3)[[0, 1, 2, 0]], np.array([0, 1, 2, 1]))
    assert found.counts.tolist() == [0] * 14 + [4]
    assert found.expected_error == 0.25

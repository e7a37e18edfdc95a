import sys

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, PredefinedSplit
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from pathfm.errors import UserError
from pathfm.evaluate.folds import folds_by_group
from pathfm.evaluate.logistic import LogisticSettings, choose_c, fit_and_predict


def _blobs(number: int, seed: int, classes: int = 3) -> tuple[np.ndarray, np.ndarray]:
    scales = np.array([1.0, 10.0, 0.1, 1.0, 3.0])
    centres = np.random.default_rng(0).normal(size=(classes, 5)) * scales
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, number)
    return centres[labels] + 1.5 * scales * rng.normal(size=(number, 5)), labels


def test_c_is_what_a_grid_search_over_the_same_folds_chooses():
    features, labels = _blobs(120, seed=1)
    folds = folds_by_group(labels, np.arange(120) // 4, 5, seed=0)
    cs = [1e-3, 1e-2, 0.1, 1.0, 10.0]
    pipeline = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
    search = GridSearchCV(
        pipeline, {"logisticregression__C": cs}, cv=PredefinedSplit(folds), scoring="neg_log_loss"
    ).fit(features, labels)
    found = choose_c(features, labels, folds, LogisticSettings(cs=tuple(cs)))
    assert found.c == search.best_params_["logisticregression__C"]
    assert found.cross_entropy == pytest.approx(-search.best_score_, abs=1e-6)


def test_probabilities_are_scikit_learns_on_standardised_features():
    features, labels = _blobs(80, seed=1)
    test, _ = _blobs(30, seed=2)
    pipeline = make_pipeline(StandardScaler(), LogisticRegression(C=0.3, max_iter=2000)).fit(features, labels)
    np.testing.assert_allclose(fit_and_predict(features, labels, test, 3, 0.3), pipeline.predict_proba(test))


def test_a_class_that_was_not_learned_has_probability_0():
    features, labels = _blobs(80, seed=1)
    probabilities = fit_and_predict(features[labels != 1], labels[labels != 1], features[:7], 4, 1.0)
    assert probabilities.shape == (7, 4)
    assert (probabilities[:, [1, 3]] == 0).all()
    np.testing.assert_allclose(probabilities.sum(1), 1)


def test_a_few_samples_are_standardised_by_all_of_the_split():
    features, labels = _blobs(80, seed=1)
    few = np.concatenate([np.flatnonzero(labels == label)[:2] for label in range(3)])
    scaler = StandardScaler().fit(features)
    model = LogisticRegression(C=1.0, max_iter=2000).fit(scaler.transform(features[few]), labels[few])
    found = fit_and_predict(features[few], labels[few], features, 3, 1.0, standardise_by=features)
    np.testing.assert_allclose(found, model.predict_proba(scaler.transform(features)))


def test_folds_that_leave_one_class_cannot_choose():
    with pytest.raises(UserError, match="no fold of the query split leaves two classes"):
        choose_c(np.ones((4, 2)), np.array([0, 0, 1, 1]), np.array([0, 0, 1, 1]), LogisticSettings())


def test_without_scikit_learn_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(UserError, match=r"pip install 'scikit-learn>=1.5'"):
        fit_and_predict(np.ones((2, 2)), np.array([0, 1]), np.ones((1, 2)), 2, 1.0)

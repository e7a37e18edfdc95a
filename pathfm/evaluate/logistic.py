"""Logistic regression on standardised frozen features, by scikit-learn; its C is chosen by folds.

N query samples   T test samples   D width   C classes
"""

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from pathfm.errors import UserError

_CS = tuple(10.0**power for power in range(-5, 3))  # scikit-learn's C: small ones hold the weights back


@dataclass(frozen=True)
class LogisticSettings:
    cs: tuple[float, ...] = _CS
    few_shot_c: float = 1.0  # scikit-learn's default: a few samples leave none over to choose it by
    max_iterations: int = 2000


@dataclass(frozen=True)
class ChosenC:
    """The C of the least cross-entropy on held-out folds."""

    c: float
    cross_entropy: float


def choose_c(
    features: Float[np.ndarray, "N D"],
    labels: Int[np.ndarray, " N"],
    folds: Int[np.ndarray, " N"],
    settings: LogisticSettings,
) -> ChosenC:
    """The mean over folds of the mean over samples, each fold predicted from the others; of equal ones the smaller C.

    Cross-entropy, not accuracy: C changes how sure the model is long before it changes what it says.
    """
    num_classes = int(labels.max()) + 1
    losses: dict[float, list[float]] = {c: [] for c in sorted(settings.cs)}
    for fold in np.unique(folds):
        kept, held = folds != fold, folds == fold
        if len(np.unique(labels[kept])) < 2:
            continue
        for c, of_c in losses.items():
            limit = settings.max_iterations
            found = fit_and_predict(features[kept], labels[kept], features[held], num_classes, c, max_iterations=limit)
            of_c.append(_cross_entropy(found, labels[held]))
    if not next(iter(losses.values())):
        raise UserError("no fold of the query split leaves two classes to learn from; give more groups of each class")
    means = {c: float(np.mean(of_c)) for c, of_c in losses.items()}
    best = min(means, key=means.__getitem__)
    return ChosenC(best, means[best])


def fit_and_predict(
    features: Float[np.ndarray, "N D"],
    labels: Int[np.ndarray, " N"],
    test: Float[np.ndarray, "T D"],
    num_classes: int,
    c: float,
    *,
    standardise_by: Float[np.ndarray, "n D"] | None = None,
    max_iterations: int = LogisticSettings.max_iterations,
) -> Float[np.ndarray, "T C"]:
    """Probabilities; 0 for classes that are not among the labels, of which there must be two.

    `standardise_by`: whose mean and deviation each feature is standardised with (default: the samples learned from).
    """
    linear_model, preprocessing, convergence_warning = _scikit_learn()
    scaler = preprocessing.StandardScaler().fit(
        np.asarray(features if standardise_by is None else standardise_by, float)
    )
    model = linear_model.LogisticRegression(C=c, max_iter=max_iterations)
    with warnings.catch_warnings():  # a weak C on classes that a plane parts has no end to converge to
        warnings.simplefilter("ignore", convergence_warning)
        model.fit(scaler.transform(np.asarray(features, float)), labels)
    probabilities = np.zeros((len(test), num_classes))
    probabilities[:, model.classes_] = model.predict_proba(scaler.transform(np.asarray(test, float)))
    return probabilities


def _cross_entropy(probabilities: Float[np.ndarray, "n C"], labels: Int[np.ndarray, " n"]) -> float:
    of_own = probabilities[np.arange(len(labels)), labels]
    return float(-np.log(np.maximum(of_own, np.finfo(float).eps)).mean())


def _scikit_learn() -> tuple[Any, Any, type[Warning]]:
    try:
        from sklearn import linear_model, preprocessing
        from sklearn.exceptions import ConvergenceWarning
    except ImportError as error:
        raise UserError(
            "logistic regression needs scikit-learn; pip install 'scikit-learn>=1.5', or leave it out with "
            "--tasks knn,linear"
        ) from error
    return linear_model, preprocessing, ConvergenceWarning

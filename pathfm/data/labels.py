"""How many samples each class of a data set has."""

from collections import Counter

import numpy as np

from pathfm.data.datasets import KNN, Dataset

_ROWS_AT_ONCE = 1_000_000


def class_counts(dataset: Dataset) -> dict[str, int]:
    """Class name -> number of samples, in the order of the labels; of a KNN data set also the classes without any.

    A data set that was indexed without labels has one class, `class_0`. Reads the index in pieces.
    """
    counts: Counter[int] = Counter()
    for begin in range(0, len(dataset), _ROWS_AT_ONCE):
        labels, numbers = np.unique(dataset.entries["class_index"][begin : begin + _ROWS_AT_ONCE], return_counts=True)
        counts.update(dict(zip(labels.tolist(), numbers.tolist(), strict=True)))
    if isinstance(dataset, KNN):
        return {name: counts[label] for label, name in zip(dataset.class_labels, distinct_names(dataset), strict=True)}
    return {f"class_{label}": counts[label] for label in sorted(counts)}


def distinct_names(dataset: KNN) -> list[str]:
    """The name of each class, with its label where two classes go by one name."""
    names = zip(dataset.class_names, dataset.class_labels, strict=True)
    return [f"{name} (label {label})" if dataset.class_names.count(name) > 1 else name for name, label in names]

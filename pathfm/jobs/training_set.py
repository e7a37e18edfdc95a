"""The data set that a recipe trains on, and the order of its samples. Without torch: login nodes look too."""

from pathfm.data.datasets import Dataset, open_dataset
from pathfm.data.mixture import MixedOrder, shares_of
from pathfm.errors import UserError
from pathfm.training.config import TrainConfig

_TRAINED_ON = {"dinov2": ("Pathology", "PathologyFoundation", "KNN")}  # by method


def open_training_set(text: str, method: str) -> Dataset:
    """Raises `UserError` when the data set cannot be opened, or the method learns nothing from such data."""
    dataset = open_dataset(text)
    if dataset.name not in _TRAINED_ON[method]:
        raise UserError(
            f"method {method} is trained on images ({', '.join(_TRAINED_ON[method])}), not on {dataset.name}; "
            "name another data set in train.dataset_path"
        )
    return dataset


def order_of(train: TrainConfig, dataset: Dataset) -> MixedOrder:
    """Which sample lies at which position of the run. Raises `UserError` for cohorts that the data set has not."""
    return MixedOrder(shares_of(dataset.cohorts, train.cohorts, train.cohort_cap), train.seed)

"""The data set that a recipe trains on, and the order of its samples. Without torch: login nodes look too."""

from pathfm.data.datasets import Dataset, Regions, open_dataset
from pathfm.data.mixture import MixedOrder, shares_of
from pathfm.errors import UserError
from pathfm.models.config import StudentConfig
from pathfm.training.config import TrainConfig


def open_training_set(text: str, student: StudentConfig) -> Dataset:
    """Raises `UserError` when the data set cannot be opened, or holds what the student does not read."""
    dataset = open_dataset(text)
    has_features, reads_features = isinstance(dataset, Regions), student.feature_width is not None
    if has_features and not reads_features:
        raise UserError(
            f"{dataset.name} holds features of patches, but the student reads images; set student.feature_width to "
            "their width (configs/region.yaml), or name a data set of images in train.dataset_path"
        )
    if reads_features and not has_features:
        raise UserError(
            f"{dataset.name} holds images, but the student reads features of patches (student.feature_width="
            f"{student.feature_width}); extract them with 'pathfm extract --regions' and train on Regions:root=FOLDER"
        )
    return dataset


def order_of(train: TrainConfig, dataset: Dataset) -> MixedOrder:
    """Which sample lies at which position of the run. Raises `UserError` for cohorts that the data set has not."""
    return MixedOrder(shares_of(dataset.cohorts, train.cohorts, train.cohort_cap), train.seed)

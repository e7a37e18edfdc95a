from pathlib import Path
from typing import Any

import pytest

from pathfm.errors import UserError
from pathfm.jobs.tuning_sets import open_tuning_sets, warn_of_oddities
from pathfm.training.config import EarlyStoppingConfig, KnnConfig, TuneConfig
from tests.labelled import CLASSES, make_labelled


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """36 query and 21 test samples."""
    return make_labelled(tmp_path_factory.mktemp("labelled"))


def tune(root: Path, **settings: Any) -> TuneConfig:
    sets = {f"{split}_dataset_path": f"KNN:root={root}:split={split}" for split in ("query", "test")}
    return TuneConfig(**{**sets, **settings})


def test_both_splits_are_opened_with_their_classes(root: Path):
    query, test = open_tuning_sets(tune(root))
    assert (len(query), len(test)) == (36, 21)
    assert tuple(query.class_names) == CLASSES


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"query_dataset_path": "Pathology:root={root}"}, "there is no|needs labelled tiles"),
        (
            {"knn": KnnConfig(nb_knn=(100, 200))},
            r"every k of tune.knn.nb_knn=\[100, 200\] exceeds the 36 query samples",
        ),
        ({"early_stopping": EarlyStoppingConfig(tracking="auc_100")}, "tracking=auc_100 is not found by this tuning"),
        ({"early_stopping": EarlyStoppingConfig(tracking="acc_20_5_per_class")}, "acc_20_5_per_class is not found"),
    ],
)
def test_what_cannot_be_tuned_on_is_said_before_the_first_step(root: Path, settings: dict[str, Any], says: str):
    settings = {key: value.format(root=root) if isinstance(value, str) else value for key, value in settings.items()}
    with pytest.raises(UserError, match=says):
        open_tuning_sets(tune(root, **settings))


def test_few_labelled_samples_of_a_class_limit_k(root: Path):
    knn = KnnConfig(nb_knn=(10, 20), n_per_class_list=(-1, 5))
    open_tuning_sets(tune(root, knn=knn, early_stopping=EarlyStoppingConfig(tracking="acc_10_5_per_class")))
    with pytest.raises(UserError, match="acc_20_5_per_class is not found"):  # 15 samples in all
        open_tuning_sets(tune(root, knn=knn, early_stopping=EarlyStoppingConfig(tracking="acc_20_5_per_class")))


def test_splits_of_other_classes_are_refused(root: Path, tmp_path: Path):
    other = make_labelled(tmp_path, query=(12, 12, 0), test=(7, 7, 0))
    (other / "class-ids.npy").unlink(missing_ok=True)
    settings = tune(root, test_dataset_path=f"KNN:root={other}:split=test")
    with pytest.raises(UserError, match="index both with one CSV"):
        open_tuning_sets(settings)


def test_a_test_split_of_one_class_tells_nothing(tmp_path: Path):
    with pytest.raises(UserError, match="has samples of stroma alone; two classes are needed"):
        open_tuning_sets(tune(make_labelled(tmp_path, query=(20, 20, 0), test=(5, 0, 0))))


def test_what_is_odd_is_told_and_does_not_stop(tmp_path: Path, caplog):
    settings = tune(make_labelled(tmp_path, query=(20, 20, 0), test=(5, 0, 5)))
    warn_of_oddities(settings, *open_tuning_sets(settings))
    assert "leaves out k = 100, 200: there are 40 query samples" in caplog.text
    assert "split query has no sample of necrosis, split test has; they are never predicted" in caplog.text
    assert "split test has no sample of tumour, split query has; its numbers are those of the other" in caplog.text

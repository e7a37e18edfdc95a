"""The data sets that a string names, each a thin view of one reader."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from os.path import expanduser
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64

from pathfm.data.entries import IndexFiles, open_entries, read_class_ids
from pathfm.data.folder_reader import REGION_SUFFIX, FolderReader
from pathfm.data.reader import Reader, open_cohorts, open_tar
from pathfm.data.strings import parse_dataset_string
from pathfm.errors import UserError, listed


class Dataset:
    """Samples by row, 0 <= sample < len, encoded as they lie in their tars.

    It can be pickled and forked; a process opens the files when it first reads.
    """

    def __init__(self, reader: Reader | FolderReader) -> None:
        self._reader = reader
        self.cohorts: Mapping[str, range] = {cohort.name: cohort.rows for cohort in reader.cohorts}

    @property
    def name(self) -> str:
        """What the data set is called in a data set string."""
        return type(self).__name__

    def __len__(self) -> int:
        return len(self._reader)

    @property
    def entries(self) -> np.ndarray:
        """Structured [N] (class_index, file_index, start_offset, end_offset, ...), a read-only memory map."""
        return self._reader.entries

    def read_bytes(self, sample: int) -> bytes:
        """The encoded image."""
        return self._reader.read_bytes(sample)

    def will_need(self, samples: Iterable[int]) -> None:
        """Announce what will be read next."""
        self._reader.will_need(samples)

    def name_of(self, sample: int) -> str:
        """The image's file name, as the tar says it."""
        return self._reader.name_of(sample)

    def tar_of(self, sample: int) -> Path:
        """The tar that a sample lies in."""
        return self._reader.cohort_of(sample).tar

    def cohort_of(self, sample: int) -> str:
        """The name of a sample's cohort."""
        return self._reader.cohort_of(sample).name

    def neighbours(self, sample: int, at_most: int) -> list[int]:
        """What is tried in place of a sample that cannot be decoded: the rows that follow in its cohort, cyclic."""
        rows = self._reader.cohort_of(sample).rows
        place = sample - rows.start
        return [rows[(place + step) % len(rows)] for step in range(1, min(at_most, len(rows) - 1) + 1)]

    def label(self, sample: int) -> int:
        """The class index as the entries hold it (0 everywhere when indexed without labels)."""
        return int(self.entries["class_index"][sample])

    def fingerprint(self) -> str:
        """The same for the same index, wherever it lies."""
        return self._reader.fingerprint()

    @property
    def index_command(self) -> str:
        """What to type to make the index again."""
        return self._reader.remake


class Pathology(Dataset):
    """Unlabelled images: `root/pretrain_dataset.tar` through `extra/pretrain_entries[_{subset}].npy`."""

    def __init__(self, root: Path, extra: Path | None = None, subset: str = "") -> None:
        files = IndexFiles(extra or root, "pretrain", subset)
        super().__init__(open_tar(root / "pretrain_dataset.tar", files, cohort="pretrain"))


class PathologyFoundation(Dataset):
    """Unlabelled images of many cohorts: `root/{cohort}.tar` through `extra/pretrain_entries[_{subset}].npy` [N, 5]."""

    def __init__(self, root: Path, extra: Path | None = None, subset: str = "") -> None:
        super().__init__(open_cohorts(root, IndexFiles(extra or root, "pretrain", subset)))


class KNN(Dataset):
    """Labelled images: `root/downstream_dataset.tar` through `extra/{split}_entries[_{subset}].npy`.

    labels: Int64 [N], 0..C-1 in ascending order of the original labels; class_labels: the original label of each
    class; class_names. The classes are those of `extra/class-ids.npy`, or else the labels that occur in any split, so
    that they are the same for query and test.
    """

    SPLITS = ("query", "test")

    def __init__(self, root: Path, split: str, extra: Path | None = None, subset: str = "") -> None:
        if split not in self.SPLITS:
            raise UserError(f"KNN takes split={' or split='.join(self.SPLITS)}, not split={split}")
        files = IndexFiles(extra or root, split, subset)
        super().__init__(open_tar(root / "downstream_dataset.tar", files, cohort="downstream"))
        self.split = split
        names = _class_names(files)
        self.class_labels = sorted(names)
        self.class_names = [names[label] for label in self.class_labels]
        self.labels = self._remapped()

    def label(self, sample: int) -> int:
        """The class, 0..C-1."""
        return int(self.labels[sample])

    def _remapped(self) -> Int64[np.ndarray, " N"]:
        labels, known = self.entries["class_index"], np.array(self.class_labels, np.uint64)
        classes = np.searchsorted(known, labels).clip(max=len(known) - 1)
        if len(strange := np.flatnonzero(known[classes] != labels)):
            raise UserError(
                f"class-ids.npy has no class for the labels {listed(map(str, np.unique(labels[strange])))} "
                f"of {len(strange):,} samples of split {self.split} (the first is row {strange[0]}); "
                "index both splits again with one CSV"
            )
        return classes.astype(np.int64)


class Regions(Dataset):
    """Features of regions, a tensor [npatch, width] each, as the bytes that torch.save wrote.

    `root/*.pt`, or packed: `root/regions_dataset.tar` through `extra/regions_entries[_{subset}].npy`.
    """

    def __init__(self, root: Path, extra: Path | None = None, subset: str = "") -> None:
        tar, files = root / "regions_dataset.tar", IndexFiles(extra or root, "regions", subset)
        is_packed = tar.exists() or files.entries.exists() or subset
        super().__init__(open_tar(tar, files, "regions") if is_packed else FolderReader(root, REGION_SUFFIX, "regions"))


def open_dataset(text: str) -> Dataset:
    """Open the data set that a string like `Pathology:root=/data:subset=train` names. Raises `UserError`."""
    parsed = parse_dataset_string(text)
    options: dict[str, Any] = dict(parsed.options)
    for key in ("root", "extra"):
        if key in options:
            options[key] = Path(expanduser(options[key]))  # os.path's leaves the ~ of nobody as it is
    return _DATASETS[parsed.name](**options)


_DATASETS: dict[str, Callable[..., Dataset]] = {
    view.__name__: view for view in (Pathology, PathologyFoundation, KNN, Regions)
}


def _class_names(files: IndexFiles) -> dict[int, str]:
    """Original label -> name, from class-ids.npy or else from whatever labels occur in a split or this subset."""
    if files.class_ids.is_file():
        return read_class_ids(files.class_ids)
    splits = (replace(files, name=split, suffix=suffix) for split in KNN.SPLITS for suffix in ("", files.suffix))
    paths = {split.entries for split in splits if split.entries.is_file()}
    labels = np.concatenate([np.unique(open_entries(path)["class_index"]) for path in paths])
    return {label: f"class_{label}" for label in np.unique(labels).tolist()}

"""The unlabelled pretraining data set: one tar, all of its images or a subset."""

from collections.abc import Iterable
from pathlib import Path

from pathfm.data.entries import IndexFiles
from pathfm.data.reader import TarReader
from pathfm.data.strings import parse_dataset_string


class Pathology:
    """`root/pretrain_dataset.tar` through `extra/pretrain_entries[_{subset}].npy`.

    Raises `UserError` when a file is missing or the index does not belong to the tar.
    """

    def __init__(self, root: Path, extra: Path | None = None, subset: str = "") -> None:
        self._reader = TarReader(root / "pretrain_dataset.tar", IndexFiles(extra or root, "pretrain", subset))

    def __len__(self) -> int:
        return len(self._reader)

    def read_bytes(self, sample: int) -> bytes:
        """The encoded image of a sample, 0 <= sample < len."""
        return self._reader.read_bytes(sample)

    def will_need(self, samples: Iterable[int]) -> None:
        """Announce what will be read next."""
        self._reader.will_need(samples)

    def tar_of(self, sample: int) -> Path:
        """Which tar a sample lies in, for messages."""
        return self._reader.tar

    def name_of(self, sample: int) -> str:
        """The image's file name, as the tar says it."""
        return self._reader.name_of(sample)

    def fingerprint(self) -> str:
        """The same for the same index, wherever it lies."""
        return self._reader.fingerprint()

    def label(self, sample: int) -> int:
        """The class index as the entries hold it (0 everywhere when indexed without labels)."""
        return self._reader.class_index(sample)


def open_dataset(text: str) -> Pathology:
    """Open the data set that a string like `Pathology:root=/data:subset=train` names. Raises `UserError`."""
    options = parse_dataset_string(text).options
    root = Path(options["root"]).expanduser()
    extra = Path(options["extra"]).expanduser() if "extra" in options else None
    return Pathology(root, extra, options.get("subset", ""))

"""Samples of a folder by row, one file each, as a reader that needs no tar; the files in the order of their names."""

import hashlib
import json
import os
import shlex
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from pathfm.data.cohorts import Cohort
from pathfm.data.entries import new_entries, printable
from pathfm.errors import UserError

REGION_SUFFIX = ".pt"  # of region features


class FolderReader:
    """The files of a folder that end in `suffix`. Raises `UserError` when there is no folder, or no file in it."""

    def __init__(self, folder: Path, suffix: str, cohort: str) -> None:
        if not folder.is_dir():
            raise UserError(f"there is no folder {folder}; set root= to the folder of the {suffix} files")
        files = sorted(
            (entry.name, entry.stat().st_size)
            for entry in os.scandir(folder)
            if entry.name.endswith(suffix) and not entry.name.startswith(".") and entry.is_file()
        )
        if not files:
            raise UserError(f"{folder} holds no {suffix} files; set root= to the folder that does")
        self.remake = printable(shlex.join(["pathfm", "pack", str(folder), "--name", cohort, "--output", str(folder)]))
        self._names = [name for name, _ in files]
        self.cohorts = (Cohort(cohort, folder, range(len(files))),)
        rows, sizes_bytes = np.arange(len(files), dtype=np.uint64), np.array([size for _, size in files], np.uint64)
        self.entries = new_entries(np.zeros_like(rows), rows, np.zeros_like(rows), sizes_bytes)

    def __len__(self) -> int:
        return len(self._names)

    def fingerprint(self) -> str:
        """sha256 of the files' names and sizes."""
        sizes_bytes = self.entries["end_offset"].tolist()
        return hashlib.sha256(json.dumps([self._names, sizes_bytes]).encode()).hexdigest()

    def read_bytes(self, row: int) -> bytes:
        """The content of a file."""
        path = self.cohorts[0].tar / self._names[row]
        try:
            return path.read_bytes()
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror or error}") from error

    def will_need(self, rows: Iterable[int]) -> None:
        """Nothing: a file is read whole and at once."""

    def name_of(self, row: int) -> str:
        return self._names[row]

    def cohort_of(self, row: int) -> Cohort:
        return self.cohorts[0]

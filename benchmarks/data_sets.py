"""What do order, opening and concatenation cost at 10^8 and 10^9 samples?

    python benchmarks/data_sets.py --work build/bench_data_sets

The index of 10^8 rows is sparse: almost all rows of the first cohort are a hole in the file, so that it takes no room.
"""

import shutil
import tarfile
from argparse import ArgumentParser
from collections.abc import Callable
from functools import partial
from io import BytesIO
from pathlib import Path

import numpy as np
from measuring import spread, taking_turns
from numpy.lib import format as npy_format

from pathfm.data.concat import ConcatRequest, concat
from pathfm.data.datasets import PathologyFoundation
from pathfm.data.entries import (
    ENTRY,
    IndexFiles,
    SideCar,
    new_entries,
    write_cohort_indices,
    write_entries,
    write_side_car,
)
from pathfm.data.mixture import MixedOrder, shares_of
from pathfm.data.order import SampleOrder

_SAMPLES = 10**9
_COHORTS = 333
_TILE_BYTES = 600
_FIRST_BYTE = 512  # of the only member of a tar
_TURNS = 7


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="a folder for the files; removed before and after")
    work = parser.parse_args().work
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    print(order_table(), opening_table(work / "open"), concat_line(work / "concat"), sep="\n\n")
    shutil.rmtree(work)


def order_table() -> str:
    size = _SAMPLES // _COHORTS
    cohorts = {f"cohort_{n}": range(n * size, (n + 1) * size) for n in range(_COHORTS)}
    orders = {
        "no cohorts": SampleOrder(_SAMPLES, 0),
        f"{_COHORTS} cohorts, weights 1": MixedOrder(shares_of(cohorts), 0),
        f"{_COHORTS} cohorts, weights 0.3": MixedOrder(shares_of(cohorts, dict.fromkeys(cohorts, 0.3)), 0),
    }
    rows = []
    for block in (64, 1024, 65_536):
        positions = np.arange(block, dtype=np.int64) + 5 * 10**8
        repeats = 65_536 // block
        calls = {name: partial(repeated, repeats, partial(order.samples, positions)) for name, order in orders.items()}
        for name, seconds in taking_turns(calls, _TURNS).items():
            rows.append(f"| {name} | {block:,} | {spread([1e9 * s / (repeats * block) for s in seconds], '.3g')} |")
    return "\n".join(["| order of 10^9 samples | positions at once | ns a sample |", "| --- | --- | --- |", *rows])


def repeated(number: int, call: Callable[[], object]) -> None:
    for _ in range(number):
        call()


def opening_table(folder: Path) -> str:
    rows = []
    for num_rows in (10**6 + 1, 10**8):
        for num_cohorts in (1, 500):
            root = sparse_concatenation(folder / f"{num_rows}_{num_cohorts}", num_rows, num_cohorts)
            seconds = taking_turns({"open": partial(PathologyFoundation, root)}, _TURNS)["open"]
            rows.append(f"| {num_rows:,} | {num_cohorts} | {spread([1e3 * s for s in seconds], '.3g')} |")
    return "\n".join(["| rows | cohorts | opening, ms |", "| --- | --- | --- |", *rows])


def concat_line(folder: Path, num_cohorts: int = 10, num_rows: int = 2 * 10**6) -> str:
    """Tars that lie elsewhere, so that the indices alone are read."""
    offsets = np.arange(num_rows, dtype=np.uint64) * np.uint64(1024)
    for number in range(num_cohorts):
        files = IndexFiles(folder, f"cohort_{number}")
        zeros = np.zeros(num_rows, np.uint64)
        write_entries(files.entries, new_entries(zeros, offsets, offsets, offsets + np.uint64(_TILE_BYTES)))
        write_side_car(files.side_car, SideCar(f"{files.name}.tar", num_rows * 1024, 0, num_rows, num_rows, ""))
    seconds = taking_turns({"concat": partial(concat, ConcatRequest(folder, folder))}, 3)["concat"]
    rates = [num_cohorts * num_rows / s / 1e6 for s in seconds]
    return f"concat of {num_cohorts} x {num_rows:,} rows: {spread(rates, '.3g')} million rows/s"


def sparse_concatenation(root: Path, num_rows: int, num_cohorts: int) -> Path:
    """One cohort with almost all rows and others with one; every tar is the same one, of one tile."""
    root.mkdir(parents=True)
    names = [f"cohort_{n:03}" for n in range(num_cohorts)]
    with tarfile.open(root / "one.tar", "w") as tar:
        member = tarfile.TarInfo("tile.jpg")
        member.size = _TILE_BYTES
        tar.addfile(member, BytesIO(bytes(_TILE_BYTES)))
    for name in names:
        (root / f"{name}.tar").symlink_to("one.tar")
    files = IndexFiles(root, "pretrain")
    write_cohort_indices(files.cohort_indices, names)
    with files.entries.open("wb") as file:
        npy_format.write_array_header_1_0(file, {"descr": "<u8", "fortran_order": False, "shape": (num_rows, 5)})
        file.truncate(file.tell() + num_rows * 5 * ENTRY["class_index"].itemsize)
    rows = np.load(files.entries, mmap_mode="r+")
    rows[-num_cohorts:, 4] = range(num_cohorts)
    rows[-num_cohorts:, 2:4] = _FIRST_BYTE, _FIRST_BYTE + _TILE_BYTES
    rows[np.linspace(0, num_rows - num_cohorts, 16).astype(int), 2:4] = _FIRST_BYTE, _FIRST_BYTE + _TILE_BYTES
    return root


if __name__ == "__main__":
    main()

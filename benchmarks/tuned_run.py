"""A run on real H&E that tunes while it trains and is interrupted twice: is it one run, one curve, in W&B and here?

    python benchmarks/tuned_run.py --data ../shared/data/osteosarcoma3 --work build/tuned_run [key=value ...]

Tiles with little tissue are dropped; every class's pictures (`source_image`) are dealt out to query and test. The
network trains on the query half without labels and is tuned on both. The run is killed (SIGKILL) at a third of its
steps, told to leave (USR2) at two thirds, and started again each time with the same command, W&B offline.
Prints a table in Markdown; the picture is RUN/previews/plot.png.
"""

import json
import os
import signal
import subprocess
import sys
import time
from argparse import ArgumentParser
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from knn_osteosarcoma import CONFIG, Tile, read_tiles, split
from measuring import machine

from pathfm.data.index import IndexRequest, build_index
from pathfm.data.pack import PackRequest, pack
from pathfm.errors import UserError, exit_status
from pathfm.jobs.run_progress import newest_checkpoint_of
from pathfm.lifecycle.run import Run
from pathfm.recipe import find_config, read_recipe
from pathfm.tables import text_table
from pathfm.track.json_lines import JsonLines
from pathfm.track.wandb_mirror.offline_files import records_of

_INTERRUPTED_BY = (signal.SIGKILL, signal.SIGUSR2)


def main(argv: Sequence[str] | None = None) -> int:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with images/ and labels.csv")
    parser.add_argument("--work", type=Path, default=Path("build/tuned_run"), help="where the run lies; must be new")
    parser.add_argument("--config", default="vittiny16_cpu")
    arguments, overrides = parser.parse_known_args(argv)
    if arguments.work.exists():
        raise UserError(f"{arguments.work} is there already; remove it, or name another by --work")
    data = _data(arguments.data, arguments.work)
    config = find_config(arguments.config, CONFIG)
    settings = [*data, "tune.tune_every_samples=800", "tune.num_workers=1", "checkpoint.every_steps=25", *overrides]
    run = Run(arguments.work / "osteosarcoma")
    command = [sys.executable, "-m", "pathfm.train", "--config-file", str(config), "--output-dir", str(run.directory)]
    steps = read_recipe(config, settings).recipe.optim.total_steps
    started = time.perf_counter()
    for number, how in enumerate(_INTERRUPTED_BY, start=1):
        _interrupted([*command, *settings], run, number * steps // (len(_INTERRUPTED_BY) + 1), how)
    subprocess.run([*command, *settings], env=_environment(), check=True)
    subprocess.run([sys.executable, "-m", "pathfm", "plot", str(run.directory)], check=True)
    print(_report(run, time.perf_counter() - started))
    return 0


def _data(folder: Path, work: Path) -> list[str]:
    """Packed and indexed; key=value of what is trained and tuned on."""
    query, test = split(read_tiles(folder), seed=0)
    _linked(query, work / "tiles")
    pack(PackRequest(work / "tiles", "pretrain", work / "data"))
    _linked([*query, *test], work / "labelled")
    pack(PackRequest(work / "labelled", "downstream", work / "data"))
    for name, tiles in {"query": query, "test": test}.items():
        kept = work / f"{name}.txt"
        kept.write_text("".join(f"{tile.path.name}\n" for tile in tiles))
        tar = work / "data" / "downstream_dataset.tar"
        build_index(IndexRequest(tar, work / "data", name, keep=kept, csv=folder / "labels.csv"))
    tuned = [f"tune.{name}_dataset_path=KNN:root={work / 'data'}:split={name}" for name in ("query", "test")]
    return [f"train.dataset_path=Pathology:root={work / 'data'}", *tuned]


def _linked(tiles: Sequence[Tile], folder: Path) -> None:
    folder.mkdir(parents=True)
    for tile in tiles:
        (folder / tile.path.name).symlink_to(tile.path.resolve())


def _interrupted(command: Sequence[str], run: Run, at_step: int, how: signal.Signals) -> None:
    process = subprocess.Popen(command, env=_environment())
    while newest_checkpoint_of(run)[0] < at_step:
        if process.poll() is not None:
            raise UserError(f"training ended with {process.returncode} before it could be interrupted")
        time.sleep(0.2)
    process.send_signal(how)
    process.wait()


def _environment() -> dict[str, str]:
    return {**os.environ, "WANDB_MODE": "offline"}


def _report(run: Run, seconds: float) -> str:
    metrics, tunings = JsonLines(run.metrics).read(), JsonLines(run.tuning).read()
    ids, rows = wandb_rows(run)
    in_metrics = [line["step"] for line in metrics]
    of_losses = Counter(row["step"] for row in rows if "total_loss" in row)
    of_tunings = Counter(row["step"] for row in rows if "tune/teacher.acc_20" in row)
    facts = {
        "starts of the trainer": len(json.loads((run.directory / "provenance.json").read_text())),
        "W&B runs, over all offline files": len(ids),
        "lines of metrics.jsonl, and of other steps than every 10th": (
            f"{len(in_metrics)}, {len({*in_metrics} ^ {*range(10, in_metrics[-1] + 1, 10)})}"
        ),
        "their losses that W&B has once, more than once, not": _once(in_metrics, of_losses),
        "tunings that W&B has once, more than once, not": _once([line["step"] for line in tunings], of_tunings),
        "minutes": f"{seconds / 60:.1f}",
    }
    table = [
        [str(line["step"]), *(f"{line[network]['acc_20']:.3f}" for network in ("teacher", "student")),
         *(f"{line[network]['auc_20']:.3f}" for network in ("teacher", "student")), f"{line['seconds']:.1f}"]
        for line in tunings
    ]  # fmt: skip
    header = ["step", "acc_20 teacher", "student", "auc_20 teacher", "student", "seconds"]
    lines = [f"{name}: {value}" for name, value in {"machine": machine(), **facts}.items()]
    return "\n".join([*lines, "", text_table(header, table)])


def wandb_rows(run: Run) -> tuple[set[str], list[dict[str, Any]]]:
    """The ids and the rows of all offline files of a run."""
    records = [record for file in run.directory.glob("wandb/offline-run-*/run-*.wandb") for record in records_of(file)]
    ids = {record.run.run_id for record in records if record.HasField("run")}
    histories = [record.history.item for record in records if record.HasField("history")]
    return ids, [
        {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in row} for row in histories
    ]


def _once(wanted: Sequence[int], found: Counter[int]) -> str:
    once = sum(found[step] == 1 for step in wanted)
    more = sum(found[step] > 1 for step in wanted)
    return f"{once}, {more}, {len(wanted) - once - more}"


if __name__ == "__main__":
    raise SystemExit(exit_status(main))

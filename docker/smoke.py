"""Whether an image is fit to train in, found out inside it: one line for each check, exit status 1 if any fails.

docker run --rm IMAGE python /opt/pathfm/code/docker/smoke.py
apptainer exec [--nv] IMAGE.sif python /opt/pathfm/code/docker/smoke.py

Needs no root, no home and no network, and writes below a temporary folder only (TMPDIR). GPUs are tried where they are.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from argparse import ArgumentParser
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from importlib.metadata import PackageNotFoundError, version
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

from locks import disagreements, lock_hash, pins_of

if TYPE_CHECKING:  # pathfm and torch are imported by the checks: what is wrong with them is a check that fails
    import numpy as np

    from pathfm.jobs.examination.finding import Finding

HERE = Path(__file__).resolve().parent
FACTS = HERE.parents[1] / "image.json"
_TILES, _TILE_PX, _WORKERS, _STEPS = 32, 96, 2, 3
_SECONDS_TO_TRAIN = 600
_SECONDS_TO_MEET = 120
_TAIL = 4000  # letters of what a program said that failed


class Failed(Exception):
    """A check failed; the message says what was found."""


Check = Callable[[], str]  # says what was found, or raises


def main(argv: Sequence[str] | None = None) -> int:
    parser = ArgumentParser("smoke.py", description="Find out inside an image whether one can train in it.")
    parser.add_argument("--facts", type=Path, default=FACTS, metavar="FILE", help="default: %(default)s")
    parser.add_argument("--only", nargs="+", metavar="CHECK", help="default: all")
    parser.add_argument("--rank", nargs=2, metavar=("RANK", "FOLDER"), help="used by the check of NCCL")
    arguments = parser.parse_args(argv)
    if arguments.rank:
        return _as_rank_of_nccl(int(arguments.rank[0]), Path(arguments.rank[1]))
    with tempfile.TemporaryDirectory(prefix="pathfm-smoke-") as folder:
        _stay_below(Path(folder))
        checks = checks_of(arguments.facts, Path(folder))
        if unknown := set(arguments.only or ()) - checks.keys():
            print(f"error: no check '{sorted(unknown)[0]}'; there are: {', '.join(checks)}", file=sys.stderr)
            return 2
        return run({name: check for name, check in checks.items() if name in (arguments.only or checks)})


def run(checks: Mapping[str, Check]) -> int:
    """Every check, also after one that failed. Returns the exit status."""
    verdicts = []
    for name, check in checks.items():
        begun = time.monotonic()
        try:
            verdict, found = "ok", check()
        except Exception as error:  # whatever an image that is not in order raises
            verdict, found = "fail", " ".join(str(error).split()) or type(error).__name__
            found = found if isinstance(error, Failed) else f"{type(error).__name__}: {found}"
        verdicts.append(verdict)
        print(f"{verdict:<4} {time.monotonic() - begun:5.1f} s  {name:<13} {found}", flush=True)
    return 1 if "fail" in verdicts else 0


def checks_of(facts: Path, folder: Path) -> dict[str, Check]:
    """In the order in which they run: what forks comes before what uses a GPU."""
    return {
        "packages": lambda: packages(facts),
        "compiler": compiler,
        "decode": decode,
        "all-reduce": all_reduce,
        "attention": attention,
        "NCCL": lambda: nccl(folder),
        "training": lambda: training(folder),
    }


def packages(facts: Path) -> str:
    """Everything is installed as locked, and the image says of itself what is true."""
    image = json.loads(facts.read_text(encoding="utf-8"))
    locked = pins_of(image["flavour"], HERE)
    if wrong := [
        f"{name} {found} in place of {locked[name]}" for name, found in _installed(locked) if found != locked[name]
    ]:
        raise Failed("; ".join(wrong))
    if wrong := disagreements(image, "", lock_hash(image["flavour"], HERE)):
        raise Failed(f"{facts}: {wrong[0]}")
    known = {name: locked[name] for name in ("torch", "xformers") if name in locked}
    named = ", ".join(f"{name} {number}" for name, number in known.items())
    python = ".".join(map(str, sys.version_info[:3]))
    return f"python {python}, {named}; all {len(locked)} as locked ({image['lock'][:12]}, {image['flavour']})"


def _installed(names: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    for name in names:
        try:
            yield name, version(name)
        except PackageNotFoundError:
            yield name, "nothing"


def compiler() -> str:
    """Only said: torch.compile needs one, nothing else does."""
    from shutil import which

    found = which("gcc")
    return f"{found}, for torch.compile" if found else "none, so parallel.compile=true will not work"


def decode() -> str:
    """A JPEG and a PNG of the same tile come back as they were, the JPEG nearly so."""
    import numpy as np
    from PIL import Image

    from pathfm.data.decode import decode as decoded

    tile = _tiles(1)[0]
    for suffix, tolerance in {"PNG": 0.0, "JPEG": 4.0}.items():
        file = BytesIO()
        Image.fromarray(tile).save(file, suffix, **({"quality": 95} if suffix == "JPEG" else {}))
        difference = float(np.abs(decoded(file.getvalue()).astype(float) - tile).mean())
        if difference > tolerance:
            raise Failed(f"a {suffix} is decoded with a mean difference of {difference:.1f} grey values")
    return "JPEG and PNG"


def _tiles(number: int) -> "list[np.ndarray]":
    from pathfm.jobs.synthetic_tissue import draw_tile

    return [draw_tile(0, position, _TILE_PX) for position in range(number)]


def all_reduce() -> str:
    """Two processes on this machine, by gloo."""
    from pathfm.jobs.examination.with_torch import all_reduce_of_two_processes

    return _said(all_reduce_of_two_processes())


def attention() -> str:
    """Every backend that the image has, on a GPU if there is one, in the precisions that are trained in."""
    import torch

    from pathfm.jobs.examination import devices

    if not torch.cuda.is_available():
        device = torch.device("cpu")
        found = [_said(devices.attention("sdpa", device, dtype)) for dtype in (torch.float32, torch.bfloat16)]
        return "; ".join(found) + ("; no GPU here to try xFormers on" if _has_xformers() else "")
    wanted = "xformers" if _has_xformers() else "sdpa"
    return _said(devices.attention(wanted, torch.device("cuda", 0), torch.bfloat16))


def _has_xformers() -> bool:
    try:
        return bool(version("xformers"))
    except PackageNotFoundError:
        return False


def nccl(folder: Path) -> str:
    """Two processes with a GPU each."""
    import torch

    if (gpus := torch.cuda.device_count()) < 2:
        return f"not tried: {gpus} GPUs here, it takes two"
    words = [sys.executable, str(Path(__file__).resolve()), "--rank"]
    ranks = [
        subprocess.Popen([*words, str(rank), str(folder)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for rank in range(2)
    ]
    outputs = [rank.communicate(timeout=2 * _SECONDS_TO_MEET)[0].strip() for rank in ranks]
    for rank, output in zip(ranks, outputs, strict=True):
        if rank.returncode:
            raise Failed(output.splitlines()[-1] if output else f"a rank ended with {rank.returncode}")
    return outputs[0].splitlines()[-1]


def _as_rank_of_nccl(rank: int, folder: Path) -> int:
    import torch
    import torch.distributed as dist

    from pathfm.jobs.examination import devices

    device, limit = torch.device("cuda", rank), timedelta(seconds=_SECONDS_TO_MEET)
    meeting = f"file://{folder}/meet"
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", init_method=meeting, rank=rank, world_size=2, timeout=limit, device_id=device)
    finding = devices.all_reduce(device)
    dist.destroy_process_group()
    print(finding.found)
    return 0 if finding.verdict == "ok" else 1


def training(folder: Path) -> str:
    """Drawn tiles are packed, and a tiny ViT makes three steps; loader workers hand batches over in shared memory."""
    import torch
    from PIL import Image

    tiles, run_dir = folder / "tiles", folder / "run"
    tiles.mkdir()
    for number, tile in enumerate(_tiles(_TILES)):
        Image.fromarray(tile).save(tiles / f"{number}.jpg", quality=90)
    _pathfm(folder, "pathfm", "pack", str(tiles), "--name", "pretrain", "--output", str(folder / "data"))
    settings = {
        "train.dataset_path": f"Pathology:root={folder / 'data'}",
        "train.batch_size_per_gpu": 8,
        "train.num_workers": _WORKERS,
        "train.log_every_steps": 1,
        "optim.total_steps": _STEPS,
    }
    words = [f"{key}={value}" for key, value in settings.items()]
    _pathfm(folder, "pathfm.train", "--config-file", "demo", "--output-dir", str(run_dir), *words)
    losses = _losses(run_dir / "metrics.jsonl")
    if len(losses) != _STEPS or not all(0 < loss < float("inf") for loss in losses):
        raise Failed(f"{_STEPS} steps were asked for, losses are {losses}")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "the CPU"
    return f"{_STEPS} steps on {device}, {_WORKERS} loader workers, losses {' '.join(f'{loss:.2f}' for loss in losses)}"


def _pathfm(folder: Path, module: str, *words: str) -> None:
    command = [sys.executable, "-m", module, *words]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=_SECONDS_TO_TRAIN)
    if done.returncode:
        print(done.stdout[-_TAIL:], done.stderr[-_TAIL:], sep="\n", file=sys.stderr)
        said = (done.stderr.strip() or done.stdout.strip() or "nothing said").splitlines()[-1]
        raise Failed(f"{module} ended with {done.returncode}: {said}")


def _losses(metrics: Path) -> list[float]:
    rows = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    return [row["total_loss"] for row in rows if "total_loss" in row]


def _said(finding: "Finding") -> str:
    if finding.verdict != "ok":
        raise Failed(finding.found)
    return finding.found


def _stay_below(folder: Path) -> None:
    """Caches and settings of all libraries, here and in processes that are started."""
    (folder / "home").mkdir()
    os.environ.update(HOME=str(folder / "home"), TMPDIR=str(folder), MPLCONFIGDIR=str(folder / "matplotlib"))
    os.environ.update(PYTHONDONTWRITEBYTECODE="1", WANDB_MODE="disabled", TORCH_CPP_LOG_LEVEL="ERROR")
    tempfile.tempdir = str(folder)


if __name__ == "__main__":
    sys.exit(main())

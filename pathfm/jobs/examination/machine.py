"""What is installed on this machine, its NVIDIA driver and its shared memory. Without torch."""

import os
import platform
import re
import shutil
import subprocess
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version

from pathfm.augment.config import NUM_GLOBAL_CROPS
from pathfm.jobs.examination.finding import Finding
from pathfm.recipe import Recipe
from pathfm.tables import amount

_PACKAGES = ("torch", "numpy", "submitit", "wandb", "xformers")
_LEAST_TORCH = (2, 10)
_XFORMERS_FOR_TORCH = {"0.0.35": (2, 10)}  # the pairs that were tried
_SHARED_MEMORY = "/dev/shm"


def installed_versions() -> dict[str, str]:
    """Of the packages that matter, those that are there."""
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def versions(installed: Mapping[str, str], *, trains_in_an_image: bool = False) -> Finding:
    """Python and the packages, against what pathfm needs."""
    names = [f"python {platform.python_version()}", *(f"{name} {number}" for name, number in installed.items())]
    missing = [name for name in _PACKAGES if name not in installed]
    found = ", ".join(names) + (f"; no {', no '.join(missing)}" if missing else "")
    torch, xformers = installed.get("torch"), installed.get("xformers")
    if torch is None:
        if trains_in_an_image:
            return Finding("versions", "ok", f"{found}; the image brings torch")
        return Finding("versions", "fail", found, "install torch, or take a profile with a container")
    if _major_minor(torch) < _LEAST_TORCH:
        return Finding("versions", "fail", found, "pathfm needs torch 2.10 or newer")
    if xformers and _XFORMERS_FOR_TORCH.get(xformers) != _major_minor(torch):
        pairs = ", ".join(f"{one} with torch {major}.{minor}" for one, (major, minor) in _XFORMERS_FOR_TORCH.items())
        return Finding("versions", "warn", found, f"this pair was never tried; known to fit: xformers {pairs}")
    return Finding("versions", "ok", found)


def _major_minor(number: str) -> tuple[int, int]:
    match = re.match(r"(\d+)\.(\d+)", number)
    return (int(match[1]), int(match[2])) if match else (0, 0)


def driver(*, gpus_are_needed: bool) -> Finding:
    """The NVIDIA driver and the GPUs that it knows, by nvidia-smi."""
    if not shutil.which("nvidia-smi"):
        if gpus_are_needed:
            return Finding("driver", "fail", "there is no nvidia-smi here", "install the driver; for apptainer: --nv")
        return Finding("driver", "ok", "no nvidia-smi here")
    query = ["nvidia-smi", "--query-gpu=driver_version,name,memory.total", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True, timeout=60)
    lines = [line for line in done.stdout.splitlines() if line.count(",") == 2]
    if done.returncode or not lines:
        said = " ".join((done.stdout + done.stderr).split()) or f"nvidia-smi ended with {done.returncode}"
        return Finding("driver", "fail" if gpus_are_needed else "warn", said, "reload the driver, or take another node")
    number, gpus = lines[0].split(",")[0], [line.partition(",")[2].strip() for line in lines]
    kinds = [f"{gpus.count(gpu)} x {gpu}" for gpu in dict.fromkeys(gpus)]
    return Finding("driver", "ok", f"driver {number}: {'; '.join(kinds)}")


def loader_bytes(recipe: Recipe, ranks_on_node: int) -> int:
    """What one batch for each worker of a node takes in shared memory: crops of bytes, or windows of fp32 features."""
    crops, train = recipe.crops, recipe.train
    pixels = NUM_GLOBAL_CROPS * crops.global_crops_size**2 + crops.local_crops_number * crops.local_crops_size**2
    samples = min(train.micro_batch_size or train.batch_size_per_gpu, train.batch_size_per_gpu)
    bytes_of_one = 3 if recipe.student.feature_width is None else 4 * recipe.student.feature_width
    return ranks_on_node * train.num_workers * samples * bytes_of_one * pixels


def shared_memory(
    one_batch_each: int, prefetched: int, free_bytes: Callable[[], int] | None = None, *, is_here: bool = True
) -> Finding:
    """Free room in /dev/shm against the batches that loader workers hand over there.

    `one_batch_each`: bytes of one batch for each worker; `prefetched`: how many batches a worker has ready.
    `is_here`: the run will be on this machine; elsewhere too little is only worth a warning.
    """
    free, wanted = (free_bytes or _free_shared_memory)(), one_batch_each * prefetched
    if not wanted:
        return Finding("shared memory", "ok", f"{amount(free)} free in {_SHARED_MEMORY}; no loader worker needs it")
    found = f"{amount(free)} free in {_SHARED_MEMORY}, loader workers fill {amount(wanted)}"
    if free >= wanted:
        return Finding("shared memory", "ok", found)
    advice = "lower train.num_workers or data.prefetch_batches; for docker: --ipc=host or --shm-size"
    is_hopeless = is_here and free < one_batch_each
    return Finding("shared memory", "fail" if is_hopeless else "warn", found, advice)


def _free_shared_memory() -> int:
    status = os.statvfs(_SHARED_MEMORY)
    return status.f_bavail * status.f_frsize

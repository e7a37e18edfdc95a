"""GPUs, attention and all-reduce: each counts as working when it did something small. Needs torch."""

import array
import fcntl
import os
import socket
import struct
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.distributed as dist
from torch.nn import functional

from pathfm.jobs.attention_choice import Work, as_text, fastest, time_all
from pathfm.jobs.examination.finding import Finding
from pathfm.models.attention import Backend, attend, candidates, what_stops
from pathfm.models.config import AttentionChoice
from pathfm.tables import amount

SILENT_GPU = "the GPU or its driver hangs; nvidia-smi and dmesg say more, take another node"
SILENT_NETWORK = "the ranks do not hear each other; look at GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME and firewalls"
_SIDE = 256  # of the matrices
_FREE_SHARE = 0.9  # of a GPU's memory, at the start of a run that has it to itself
_REDUCED_BYTES = {"cpu": 2**24, "cuda": 2**26}
_ROUNDS = 3
_SIOCGIFADDR = 0x8915


def gpu(device: torch.device) -> Finding:
    """A small matrix product with a known outcome, and how much memory nobody else holds."""
    with of(device):
        ones = torch.ones(_SIDE, _SIDE, device=device)
        total = float((ones @ ones).sum())
        free, whole = torch.cuda.mem_get_info(device)
    name = f"{device} {torch.cuda.get_device_name(device)}"
    if total != _SIDE**3:
        found = f"{name} computes wrong numbers: {total:g} in place of {_SIDE**3}"
        return Finding("GPU", "fail", found, "take another node, and report this one")
    found = f"{name}, {amount(free)} of {amount(whole)} free"
    if free < _FREE_SHARE * whole:
        return Finding("GPU", "warn", found, "something else is on this GPU: see nvidia-smi")
    return Finding("GPU", "ok", found)


def attention(
    requested: AttentionChoice, device: torch.device, dtype: torch.dtype, work: Work | None = None
) -> Finding:
    """A tiny forward and backward of every backend that may be used on this device; with `work` also its speed."""
    where = f"on {device} in {str(dtype).removeprefix('torch.')}"
    with of(device):
        if not _sdpa_is_right(device, dtype):
            return Finding("attention", "fail", f"SDPA's numbers are wrong {where}", "take another node or torch")
        tried = candidates(device, dtype) if requested == "auto" else dict.fromkeys((requested, "sdpa"))
        stopped = {backend: why for backend in tried if (why := what_stops(backend, device, dtype))}
        working = [backend for backend in tried if backend not in stopped]
        speeds = time_all(working, work) if work and len(working) > 1 else {}
    found = f"{_in_words(working)} {where}"
    found += f", the fastest is {fastest(speeds)} ({as_text(speeds)})" if speeds else ""
    found += "".join(f"; {backend} does not: {why}" for backend, why in stopped.items())
    if requested in stopped:
        return Finding("attention", "fail", found, _instead_of(requested))
    if working == ["sdpa"] and stopped:
        advice = "training goes on with SDPA; for xFormers install the one that was built for this torch"
        return Finding("attention", "warn", found, advice)
    return Finding("attention", "ok", found)


def _in_words(backends: Sequence[Backend]) -> str:
    if len(backends) == 1:
        return f"{backends[0]} works"
    return f"{', '.join(backends[:-1])} and {backends[-1]} work"


def _instead_of(requested: AttentionChoice) -> str:
    build = ", or install the xformers that was built for this torch" if requested == "xformers" else ""
    return f"set student.attention=auto{build}"


def _sdpa_is_right(device: torch.device, dtype: torch.dtype) -> bool:
    """Against attention written out in fp32. No random numbers are drawn."""
    layout = ((1, 5), (1, 3))
    query, key, value = torch.linspace(-1, 1, 3 * 8 * 2 * 64, device=device).sin().view(3, 8, 2, 64).to(dtype).unbind(0)
    with torch.inference_mode():
        ours = attend(query, key, value, layout).float()
        expected = torch.cat(
            [_written_out(*(t[rows].float() for t in (query, key, value))) for rows in (slice(5), slice(5, 8))]
        )
    return bool(torch.allclose(ours, expected, atol=2e-2, rtol=2e-2))


def _written_out(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    weights = functional.softmax(torch.einsum("qhe,khe->hqk", query, key) / query.shape[-1] ** 0.5, dim=-1)
    return torch.einsum("hqk,khe->qhe", weights, value)


def all_reduce(device: torch.device) -> Finding:
    """All ranks add up some megabytes, a few times. All ranks call this together."""
    ranks = dist.get_world_size()
    with of(device):
        numbers = torch.ones(_REDUCED_BYTES[device.type] // 4, device=device)
        dist.all_reduce(numbers)  # the first time, ranks connect
        if not bool((numbers == ranks).all()):
            return Finding("all-reduce", "fail", f"{ranks} ranks add up wrong numbers", "take other nodes")
        seconds = _seconds_to_reduce(numbers.zero_())
    speed = 2 * (ranks - 1) / ranks * numbers.nbytes * _ROUNDS / seconds  # what a rank sends, as nccl-tests count
    backend = "NCCL" if device.type == "cuda" else "gloo"
    return Finding("all-reduce", "ok", f"{amount(round(speed))}/s by {backend} over {interface(backend)}")


def _seconds_to_reduce(numbers: torch.Tensor) -> float:
    _wait_for(numbers.device)
    begun = time.perf_counter()
    for _ in range(_ROUNDS):
        dist.all_reduce(numbers)
    _wait_for(numbers.device)
    return time.perf_counter() - begun


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def of(device: torch.device) -> AbstractContextManager[object]:
    """Makes a GPU the current one: every thread has its own, and begins with the first."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def interface(backend: str) -> str:
    """The network interface of a backend: as the environment says, else the one that has this host's address."""
    if named := os.environ.get(f"{backend.upper()}_SOCKET_IFNAME"):
        return named
    if backend == "NCCL":
        return "an interface of its choice"
    try:
        address = socket.gethostbyname(socket.gethostname())
    except OSError:
        return "the loopback interface (this host's name does not resolve)"
    return next((name for _, name in socket.if_nameindex() if _address_of(name) == address), address)


def _address_of(name: str) -> str:
    """IPv4; empty for an interface that has none."""
    request = array.array("b", struct.pack("256s", name.encode()[:15]))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, request)
        except OSError:
            return ""
    return socket.inet_ntoa(request.tobytes()[20:24])

"""Attention over packed tokens behind one call, with the same numbers from every backend.

T tokens of all crops together   H heads   E width of one head
Tokens of a crop are contiguous; the layout says how many crops of how many tokens follow each other.
"""

import math
from collections.abc import Iterator
from functools import lru_cache
from typing import Any, Literal, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from pathfm.errors import UserError
from pathfm.models.config import AttentionChoice

Layout = tuple[tuple[int, int], ...]  # (number of crops, tokens per crop) of every group, in the order of the tokens
Backend = Literal["sdpa", "sdpa_fp32", "xformers", "varlen"]

_TINY: Layout = ((1, 5), (1, 3))
_BUSY: Layout = ((16, 257), (32, 50))  # enough that blocks of a GPU meet when they add up one gradient
_HEADS, _HEAD_WIDTH = 2, 64  # of what is tried out


def attend(
    query: Float[Tensor, "T H E"],
    key: Float[Tensor, "T H E"],
    value: Float[Tensor, "T H E"],
    layout: Layout,
    backend: Backend = "sdpa",
) -> Float[Tensor, "T H E"]:
    """softmax(query key^T / sqrt(E)) value within every crop; tokens of different crops never see each other.

    `sdpa` and `sdpa_fp32` go group by group; `xformers` and `varlen` take all tokens in one call. `sdpa_fp32` computes
    in fp32 whatever comes, since the backward pass of bf16 is slow on a CPU.
    """
    assert sum(crops * tokens for crops, tokens in layout) == len(query), (layout, query.shape)
    if backend == "xformers":
        return _attend_block_diagonal(query, key, value, layout)
    if backend == "varlen":
        return _attend_variable_length(query, key, value, layout)
    if backend == "sdpa_fp32":
        return _attend_in_fp32(query, key, value, layout)
    return _attend_group_by_group(query, key, value, layout)


def candidates(device: torch.device, dtype: torch.dtype) -> tuple[Backend, ...]:
    """What may be fast for queries of a dtype on a device, the one to take among equals first; SDPA is always there."""
    if device.type == "cuda":
        return ("xformers", "varlen", "sdpa")
    return ("sdpa",) if dtype == torch.float32 else ("sdpa_fp32", "sdpa")


def choose_backend(requested: AttentionChoice, device: torch.device, dtype: torch.dtype) -> Backend:
    """The backend for queries of a dtype on a device, without measuring: `auto` takes xFormers where it works, or SDPA.

    `varlen` has no kernel for fp32; what is computed in fp32 beside the training goes by SDPA. Raises `UserError` when
    a backend is asked for and does not work.
    """
    if requested == "auto":
        return "xformers" if device.type == "cuda" and what_stops("xformers", device, dtype) is None else "sdpa"
    if requested == "varlen" and dtype == torch.float32:
        return "sdpa"
    check_backend(requested, device, dtype)
    return requested


def check_backend(backend: Backend, device: torch.device, dtype: torch.dtype) -> None:
    """Raises `UserError` when it does not work."""
    if problem := what_stops(backend, device, dtype):
        raise UserError(
            f"student.attention={backend} does not work here ({device}, {dtype}: {problem}); "
            "use student.attention=sdpa, or auto to take the fastest that works"
        )


def what_stops(backend: Backend, device: torch.device, dtype: torch.dtype) -> str | None:
    """None when a backend works, else the reason in one line; kept for the life of the process.

    It works when a tiny forward and backward on this device gave SDPA's numbers. Where torch is told to use
    deterministic algorithms, it must also give the same gradients twice, to the bit.
    """
    if backend == "sdpa":
        return None
    return _what_was_found(backend, torch.device(device), dtype, torch.are_deterministic_algorithms_enabled())


def token_slices(layout: Layout) -> Iterator[tuple[slice, int, int]]:
    """For every group: where its tokens lie, how many crops, how many tokens per crop."""
    start = 0
    for crops, tokens in layout:
        yield slice(start, start + crops * tokens), crops, tokens
        start += crops * tokens


def _attend_group_by_group(query: Tensor, key: Tensor, value: Tensor, layout: Layout) -> Tensor:
    if len(layout) == 1:
        return _attend_dense(query, key, value, *layout[0])
    # Split, not indexed: then gradients are put side by side, and not added up in tensors of zeros.
    lengths = [crops * tokens for crops, tokens in layout]
    groups = zip(*(packed.split(lengths) for packed in (query, key, value)), layout, strict=True)
    return torch.cat([_attend_dense(*of_group, *group) for *of_group, group in groups])


def _attend_dense(query: Tensor, key: Tensor, value: Tensor, crops: int, tokens: int) -> Tensor:
    def per_crop(packed: Tensor) -> Tensor:
        return packed.unflatten(0, (crops, tokens)).transpose(1, 2)

    attended = functional.scaled_dot_product_attention(per_crop(query), per_crop(key), per_crop(value))
    return attended.transpose(1, 2).flatten(0, 1)


def _attend_in_fp32(query: Tensor, key: Tensor, value: Tensor, layout: Layout) -> Tensor:
    with torch.autocast(query.device.type, enabled=False):
        attended = _attend_group_by_group(query.float(), key.float(), value.float(), layout)
    return attended.to(query.dtype)


def _attend_variable_length(query: Tensor, key: Tensor, value: Tensor, layout: Layout) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn  # half precision on CUDA only, and slow to import

    bounds = _bounds_of_crops(layout, query.device)
    longest = max(tokens for _, tokens in layout)
    return cast(Tensor, varlen_attn(query, key, value, bounds, bounds, longest, longest))


def _bounds_of_crops(layout: Layout, device: torch.device) -> Int[Tensor, " N"]:
    """Where every crop's tokens begin, and where the last one's end."""
    if torch.compiler.is_compiling():  # a graph makes its own, for it cannot look into a cache
        return _make_bounds(layout, device)
    return _kept_bounds(layout, device)


@lru_cache(maxsize=32)
def _kept_bounds(layout: Layout, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # kept for later calls, which may train
        return _make_bounds(layout, device)


def _make_bounds(layout: Layout, device: torch.device) -> Tensor:
    """On the device itself, so that nothing is copied to it."""
    of_groups = [
        torch.arange(rows.start, rows.stop, tokens, dtype=torch.int32, device=device)
        for rows, _, tokens in token_slices(layout)
    ]
    end = sum(crops * tokens for crops, tokens in layout)
    return torch.cat([*of_groups, torch.full((1,), end, dtype=torch.int32, device=device)])


def _attend_block_diagonal(query: Tensor, key: Tensor, value: Tensor, layout: Layout) -> Tensor:
    from xformers import ops  # optional and CUDA only

    blocks = _block_diagonal_mask(layout, query.device)
    packed = ops.memory_efficient_attention(query[None], key[None], value[None], attn_bias=blocks)
    return packed.squeeze(0)


@lru_cache(maxsize=32)
def _block_diagonal_mask(layout: Layout, device: torch.device) -> Any:
    from xformers.ops import fmha

    lengths = [tokens for crops, tokens in layout for _ in range(crops)]
    with torch.inference_mode(False):  # kept for later calls, which may train
        return fmha.attn_bias.BlockDiagonalMask.from_seqlens(lengths, device=device)


@lru_cache
def _what_was_found(backend: Backend, device: torch.device, dtype: torch.dtype, must_repeat: bool) -> str | None:
    try:
        with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
            ours = _forward_and_backward(backend, _TINY, device, dtype)
            expected = _forward_and_backward("sdpa", _TINY, device, dtype)
            repeats = not must_repeat or _gives_the_same_twice(backend, device, dtype)
    except Exception as error:  # whatever an optional library raises on a machine it does not support
        sentences = str(error).strip().splitlines() or ["no message"]
        return f"{type(error).__name__}: {sentences[0].partition('. ')[0]}"
    if not torch.allclose(ours, expected, atol=2e-2, rtol=2e-2):
        return "its numbers differ from SDPA's"
    return None if repeats else "its gradients differ from call to call, and train.deterministic is set"


def _gives_the_same_twice(backend: Backend, device: torch.device, dtype: torch.dtype) -> bool:
    first, second = (_forward_and_backward(backend, _BUSY, device, dtype) for _ in range(2))
    return first.equal(second)


def _forward_and_backward(backend: Backend, layout: Layout, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The output and the gradient of attention over crops of different sizes; no random numbers are drawn."""
    shape = (3, sum(crops * tokens for crops, tokens in layout), _HEADS, _HEAD_WIDTH)
    numbers = torch.arange(math.prod(shape), device=device).sin().view(shape)
    inputs = numbers.to(dtype).requires_grad_()
    query, key, value = inputs.unbind(0)
    attended = attend(query, key, value, layout, backend)
    attended.float().square().sum().backward()
    assert inputs.grad is not None
    return torch.cat([attended.detach().flatten(), inputs.grad.flatten()]).float()

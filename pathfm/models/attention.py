"""Attention over packed tokens behind one call, with the same numbers from every backend.

T tokens of all crops together   H heads   E width of one head
Tokens of a crop are contiguous; the layout says how many crops of how many tokens follow each other.
"""

from collections.abc import Iterator
from functools import lru_cache
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from pathfm.errors import UserError
from pathfm.models.config import AttentionChoice

Layout = tuple[tuple[int, int], ...]  # (number of crops, tokens per crop) of every group, in the order of the tokens
Backend = Literal["sdpa", "xformers"]


def attend(
    query: Float[Tensor, "T H E"],
    key: Float[Tensor, "T H E"],
    value: Float[Tensor, "T H E"],
    layout: Layout,
    backend: Backend = "sdpa",
) -> Float[Tensor, "T H E"]:
    """softmax(query key^T / sqrt(E)) value within every crop; tokens of different crops never see each other."""
    assert sum(crops * tokens for crops, tokens in layout) == len(query), (layout, query.shape)
    if backend == "xformers":
        return _attend_block_diagonal(query, key, value, layout)
    return _attend_group_by_group(query, key, value, layout)


def choose_backend(requested: AttentionChoice, device: torch.device, dtype: torch.dtype) -> Backend:
    """The backend to use on a device for queries of a dtype.

    xFormers counts as available only after a tiny forward and backward on this device gave SDPA's numbers; the
    answer is kept for the life of the process. Raises `UserError` when xFormers is asked for and does not work.
    """
    if requested == "sdpa" or (requested == "auto" and device.type != "cuda"):
        return "sdpa"
    problem = _what_stops_xformers(torch.device(device), dtype)
    if problem is None:
        return "xformers"
    if requested == "auto":
        return "sdpa"
    raise UserError(
        f"student.attention=xformers does not work here ({device}, {dtype}: {problem}); "
        "use student.attention=sdpa, or auto to take xFormers only where it works"
    )


def token_slices(layout: Layout) -> Iterator[tuple[slice, int, int]]:
    """For every group: where its tokens lie, how many crops, how many tokens per crop."""
    start = 0
    for crops, tokens in layout:
        yield slice(start, start + crops * tokens), crops, tokens
        start += crops * tokens


def _attend_group_by_group(query: Tensor, key: Tensor, value: Tensor, layout: Layout) -> Tensor:
    attended = [
        _attend_dense(query[rows], key[rows], value[rows], crops, tokens)
        for rows, crops, tokens in token_slices(layout)
    ]
    return torch.cat(attended) if len(attended) > 1 else attended[0]


def _attend_dense(query: Tensor, key: Tensor, value: Tensor, crops: int, tokens: int) -> Tensor:
    def per_crop(packed: Tensor) -> Tensor:
        return packed.unflatten(0, (crops, tokens)).transpose(1, 2)

    attended = functional.scaled_dot_product_attention(per_crop(query), per_crop(key), per_crop(value))
    return attended.transpose(1, 2).flatten(0, 1)


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
def _what_stops_xformers(device: torch.device, dtype: torch.dtype) -> str | None:
    """None when a tiny forward and backward works and agrees with SDPA, else the reason in one line."""
    try:
        with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
            ours = _tiny_forward_and_backward("xformers", device, dtype)
            expected = _tiny_forward_and_backward("sdpa", device, dtype)
    except Exception as error:  # whatever an optional library raises on a machine it does not support
        lines = str(error).strip().splitlines()
        return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"
    if not torch.allclose(ours, expected, atol=2e-2, rtol=2e-2):
        return "its numbers differ from SDPA's"
    return None


def _tiny_forward_and_backward(backend: Backend, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The output and the gradient of attention over two crops of different sizes; no random numbers are drawn."""
    layout = ((1, 5), (1, 3))
    numbers = torch.linspace(-1, 1, 3 * 8 * 2 * 64, device=device).sin().view(3, 8, 2, 64)
    inputs = numbers.to(dtype).requires_grad_()
    query, key, value = inputs.unbind(0)
    attended = attend(query, key, value, layout, backend)
    attended.float().square().sum().backward()
    assert inputs.grad is not None
    return torch.cat([attended.detach().flatten(), inputs.grad.flatten()]).float()

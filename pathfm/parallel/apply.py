"""A network made ready for several ranks, in one place and one order: recompute, compile, shard.

Everything is FSDP2's `fully_shard` over a mesh of copies x shards: `ddp` is one shard, `fsdp` one copy. So weights,
gradients and moments are the same kind of tensor everywhere, and gradients are added up in an order that does not
depend on when they came: DistributedDataParallel regroups them after its first step, and a run that was resumed would
differ from one that was left alone in the last bit.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from pathfm.parallel.config import ParallelConfig

_KEPT = (  # operations whose results selective recomputation keeps, because they take most of the time
    "aten.mm",
    "aten.addmm",
    "aten._scaled_mm",
    "aten._scaled_dot_product_flash_attention",
    "aten._scaled_dot_product_flash_attention_for_cpu",
    "aten._scaled_dot_product_efficient_attention",
    "aten._scaled_dot_product_cudnn_attention",
    "aten._efficient_attention_forward",
    "aten._flash_attention_forward",
    "torch_attn._varlen_attn",
    "xformers_flash.flash_fwd",
)


def mesh_of(world_size: int, shards: int, device: torch.device) -> DeviceMesh | None:
    """Ranks as copies x shards (or shards alone); None for a process that is alone. All ranks call this together."""
    if world_size == 1:
        return None
    if shards == world_size:
        return init_device_mesh(device.type, (world_size,), mesh_dim_names=("shards",))
    return init_device_mesh(device.type, (world_size // shards, shards), mesh_dim_names=("copies", "shards"))


def parallelise(
    network: nn.Module,
    blocks: Sequence[nn.Module],
    config: ParallelConfig,
    mesh: DeviceMesh | None,
    dtype: torch.dtype,
    *,
    trained: bool,
) -> None:
    """Change `network` in place; the names of its parameters stay. All ranks call this together.

    `blocks`: its repeated parts, each gathered, recomputed and compiled by itself; then come its direct children. What
    is recomputed and compiled is a block's method `compute`, which draws no random numbers.
    `dtype`: what the blocks compute in, and so what their gathered weights are. `trained=False`: the teacher, which
    only goes forward. Its weights are let go after every forward: gathered ones would miss the next moving average.
    """
    for number, block in enumerate(blocks):
        if trained and config.recompute != "none" and number % config.recompute_every == 0:
            _recompute(block, selective=config.recompute == "selective")
    if config.compile:
        _compile(blocks)
    if mesh is not None:
        _shard(network, blocks, mesh, dtype, reshard=config.reshard_after_forward or not trained)


@contextmanager
def left_as_found(network: nn.Module) -> Iterator[None]:
    """The network in evaluation mode, not compiled; behind it every module is as it was, gathered weights are let go.

    It may be shown anything here, and a graph for that, made now or never, would change which graphs a step finds.
    Weights that a forward pass without gradients gathered would otherwise stay until the next backward pass, and be
    what a checkpoint meets.
    """
    modes = {module: module.training for module in network.modules()}
    compiled = _compiled_in(network)
    network.eval()
    for compute in compiled:
        compute.is_in_use = False
    try:
        yield
    finally:
        for compute in compiled:
            compute.is_in_use = True
        for module, mode in modes.items():
            module.training = mode
            if isinstance(module, FSDPModule):
                module.reshard()


@contextmanager
def whole(network: nn.Module) -> Iterator[None]:
    """All weights of a network on every rank, for calls that go past its forward. All ranks call this together."""
    sharded = [module for module in network.modules() if isinstance(module, FSDPModule)]
    for module in sharded:
        module.unshard()
    try:
        yield
    finally:
        for module in sharded:
            module.reshard()


def finish_gradients(network: nn.Module, *, is_last_part: bool) -> None:
    """Before the backward pass of one part of a batch: the copies add their gradients up once, with the last part.

    Shards add theirs up with every part: a whole gradient on every rank is what sharding is to avoid.
    """
    if isinstance(network, FSDPModule):
        network.set_requires_all_reduce(is_last_part)


def _recompute(block: nn.Module, *, selective: bool) -> None:
    settings: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    if selective:
        settings["context_fn"] = partial(create_selective_checkpoint_contexts, _operations(_KEPT))
    _replace_compute(block, lambda compute: partial(checkpoint, compute, **settings))


def _operations(names: Sequence[str]) -> list[Any]:
    """Those of them that this torch, and what was imported with it, has."""
    places = [(getattr(torch.ops, library), name) for library, _, name in (name.partition(".") for name in names)]
    return [getattr(library, name).default for library, name in places if hasattr(library, name)]


class _Compiled:
    """A function, compiled where it is in use: for every shape and layout that it meets once, and for good.

    Shapes are taken as they are, never as variables: a graph for many shapes would have other rounding, and whether
    there is one would depend on what a process has seen before. Sizes that training meets are few and always the same.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self._compiled = torch.compile(function, dynamic=False)
        self.is_in_use = True

    def __call__(self, *arguments: Any) -> Any:
        return (self._compiled if self.is_in_use else self._function)(*arguments)


def _compiled_in(network: nn.Module) -> list[_Compiled]:
    computes = (getattr(module, "compute", None) for module in network.modules())
    return [compute for compute in computes if isinstance(compute, _Compiled)]


def _compile(blocks: Sequence[nn.Module]) -> None:
    # Blocks share their code, so torch counts the graphs of all of them together: one, or where drop path grows from
    # block to block one each, with and without gradients. Beyond its limit it would go on uncompiled, in silence.
    limits = torch._dynamo.config
    limits.recompile_limit = max(limits.recompile_limit, 2 * len(blocks) + 1)
    for block in blocks:
        _replace_compute(block, _Compiled)


def _replace_compute(block: Any, change: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Below the hooks that gather the weights, and without a wrapper that would rename the parameters."""
    block.compute = change(block.compute)


def _shard(
    network: nn.Module, blocks: Sequence[nn.Module], mesh: DeviceMesh, dtype: torch.dtype, reshard: bool
) -> None:
    # It warns of in-place changes of what a module returns, of which there are none here.
    warnings.filterwarnings("ignore", message=r"FSDP2-wrapped module .* returned a view tensor")
    # One shard: nothing is gathered, so a copy in another precision would only cost.
    is_gathered = mesh.shape[-1] > 1 and dtype != torch.float32
    low = dtype if is_gathered else None
    in_blocks = MixedPrecisionPolicy(param_dtype=low, reduce_dtype=torch.float32, cast_forward_inputs=False)
    # Tokens, positions, patches and the last norm stay in fp32: the sum that runs through the blocks is made of them.
    elsewhere = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in blocks:
        fully_shard(block, mesh=mesh, reshard_after_forward=reshard, mp_policy=in_blocks)
    for child in network.children():
        fully_shard(child, mesh=mesh, reshard_after_forward=reshard, mp_policy=elsewhere)
    fully_shard(network, mesh=mesh, reshard_after_forward=reshard, mp_policy=elsewhere)

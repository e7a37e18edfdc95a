"""Settings of how a network is spread over GPUs: recipe group `parallel`. All of it is speed and memory only."""

from typing import Annotated, Literal

from pydantic import Field

from pathfm.config import Section
from pathfm.errors import UserError


class ParallelConfig(Section):
    """Which ranks hold which part of the weights, and what is computed twice to save memory."""

    # ddp: every rank holds everything. fsdp: every rank holds its share of weights, gradients and moments.
    # hybrid: the ranks of a node (or `shards`) share one copy, and the nodes hold copies.
    strategy: Literal["ddp", "fsdp", "hybrid"] = "ddp"
    shards: Annotated[int, Field(ge=1)] | None = None  # hybrid: ranks that share one copy; None: those of a node
    reshard_after_forward: bool = True  # false: a gathered block stays until its gradient is there; faster, larger
    # What the forward pass computes again in the backward pass instead of keeping it.
    recompute: Literal["none", "blocks", "selective"] = "none"  # selective: all but matrix products and attention
    recompute_every: Annotated[int, Field(ge=1)] = 1  # of the blocks: 1 all of them, 2 every second one
    compile: bool = False  # every block, by torch.compile


def shard_size(config: ParallelConfig, world_size: int, ranks_per_node: int) -> int:
    """How many ranks share one copy of the weights. Raises `UserError` when copies do not come out even."""
    if config.strategy != "hybrid":
        return world_size if config.strategy == "fsdp" else 1
    shards = min(config.shards or ranks_per_node, world_size)
    if world_size % shards:
        raise UserError(
            f"parallel.strategy=hybrid with {shards} ranks to a copy of the weights does not fit {world_size} ranks; "
            "set parallel.shards to a divisor of them, or take parallel.strategy=fsdp"
        )
    return shards

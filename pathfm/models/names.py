"""Names of parameters in other people's checkpoints, as this package spells them."""

import re
from collections.abc import Mapping
from typing import TypeVar

Value = TypeVar("Value")

_CHUNKED = re.compile(r"(^|\.)blocks\.\d+\.(\d+)\.")


def unchunked(state_dict: Mapping[str, Value]) -> dict[str, Value]:
    """`blocks.CHUNK.N.*` (checkpoints of models with `block_chunks`) as `blocks.N.*`; other names stay as they are."""
    return {_CHUNKED.sub(r"\1blocks.\2.", name): value for name, value in state_dict.items()}


def backbone_weights(state_dict: Mapping[str, Value]) -> dict[str, Value]:
    """A backbone's weights by this package's names, out of a state dict of DINO, HIPT, DINOv2 or pathfm.

    `module.` (a model that was saved in its distributed wrapper) and `backbone.` are taken off, heads are left out,
    chunked blocks are counted through. Names that are the backbone's own already stay.
    """
    plain = {name.removeprefix("module."): value for name, value in state_dict.items()}
    if any(name.startswith("backbone.") for name in plain):
        plain = {name.removeprefix("backbone."): value for name, value in plain.items() if name.startswith("backbone.")}
    return unchunked(plain)

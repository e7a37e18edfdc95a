"""Names of parameters in other people's checkpoints, as this package spells them."""

import re
from collections.abc import Mapping
from typing import TypeVar

Value = TypeVar("Value")

_CHUNKED = re.compile(r"(^|\.)blocks\.\d+\.(\d+)\.")


def unchunked(state_dict: Mapping[str, Value]) -> dict[str, Value]:
    """`blocks.CHUNK.N.*` (checkpoints of models with `block_chunks`) as `blocks.N.*`; other names stay as they are."""
    return {_CHUNKED.sub(r"\1blocks.\2.", name): value for name, value in state_dict.items()}

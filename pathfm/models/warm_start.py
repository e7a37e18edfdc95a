"""Weights of a backbone that was trained before, taken up by name into one that is to be trained on.

Positions are resampled to the grid of the new one, and registers may be there on one side only. Whatever else does not
fit is an error, unless it is allowed by name: a tensor that stays random in silence costs weeks.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from pathfm.errors import UserError, listed
from pathfm.models.position import resized_positions
from pathfm.models.vit import ViT

_SHOWN = 4  # names of a kind
_REGISTERS, _MASK = "register_tokens", "mask_token"


@dataclass(frozen=True)
class WarmStart:
    """What became of every tensor, by our names."""

    loaded: tuple[str, ...]
    resized: Mapping[str, tuple[int, int]]  # from how many positions to how many
    missing: tuple[str, ...]  # that the file has not: they stay as they were drawn
    unexpected: tuple[str, ...]  # that the network has not: they are left out
    other_shape: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]  # in the file, here: as missing ones

    def in_words(self) -> str:
        parts = [f"{len(self.loaded)} tensors are loaded"]
        parts += [f"{name} is resampled from {old} to {new} positions" for name, (old, new) in self.resized.items()]
        if self.missing:
            parts.append(f"not in the file, so random: {listed(self.missing, _SHOWN)}")
        if self.unexpected:
            parts.append(f"in the file alone, so left out: {listed(self.unexpected, _SHOWN)}")
        if self.other_shape:
            parts.append(f"of another shape, so random: {listed(_shapes(self.other_shape), _SHOWN)}")
        return "; ".join(parts)

    def as_json(self) -> dict[str, Any]:
        return {name: list(value) if isinstance(value, tuple) else dict(value) for name, value in vars(self).items()}


@torch.no_grad()
def warm_start(vit: ViT, weights: Mapping[str, Tensor], allow: Sequence[str], source: str) -> WarmStart:
    """Fill `vit` in place. `allow`: patterns (`blocks.*.ls?.gamma`) of names that may be missing, unexpected or of
    another shape. `source`: what the weights are called in messages.

    Raises `UserError` that names every kind of misfit that is not allowed; then nothing was changed.
    """
    own = dict(vit.named_parameters())
    fitting, report = _compared(own, _with_positions_of(vit, weights), weights)
    _refuse(report, [*allow, _REGISTERS, *([_MASK] if _MASK not in weights or _MASK not in own else [])], source)
    for name, tensor in fitting.items():
        own[name].copy_(tensor)
    return report


def _with_positions_of(vit: ViT, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights, positions resampled to the network's own grid."""
    there, here = weights["pos_embed"].shape, vit.pos_embed.shape
    if there == here or there[-1] != here[-1]:
        return dict(weights)
    return {**weights, "pos_embed": _resampled(weights["pos_embed"], here[1] - 1, vit)}


def _resampled(positions: Float[Tensor, "1 N D"], number: int, vit: ViT) -> Float[Tensor, "1 M D"]:
    """With offset 0: these become learned positions of their own, not a crop's."""
    side = round(number**0.5)
    patches = resized_positions(positions[0, 1:].float(), (side, side), antialias=vit.interpolate_antialias, offset=0.0)
    return torch.cat([positions[:, :1].float(), patches[None]], dim=1)


def _compared(
    own: Mapping[str, Tensor], weights: Mapping[str, Tensor], before: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], WarmStart]:
    common = [name for name in own if name in weights]
    fitting = {name: weights[name] for name in common if weights[name].shape == own[name].shape}
    resized = {
        name: (before[name].shape[1], fitting[name].shape[1])
        for name in fitting
        if before[name].shape != fitting[name].shape
    }
    return fitting, WarmStart(
        loaded=tuple(fitting),
        resized=resized,
        missing=tuple(name for name in own if name not in weights),
        unexpected=tuple(name for name in weights if name not in own),
        other_shape={
            name: (tuple(weights[name].shape), tuple(own[name].shape)) for name in common if name not in fitting
        },
    )


def _refuse(report: WarmStart, allowed: Sequence[str], source: str) -> None:
    def strange(names: Sequence[str]) -> list[str]:
        return [name for name in names if not any(fnmatch(name, pattern) for pattern in allowed)]

    wrong = {
        "missing": strange(report.missing),
        "unexpected": strange(report.unexpected),
        "of another shape": list(_shapes({name: report.other_shape[name] for name in strange([*report.other_shape])})),
    }
    if any(wrong.values()):
        said = "; ".join(f"{what}: {listed(names, _SHOWN)}" for what, names in wrong.items() if names)
        raise UserError(
            f"{source} does not fit this student ({said}){_advice(wrong)}; set student.* to what the file is of, or "
            "name in student.pretrained_allow what may differ"
        )


def _advice(wrong: Mapping[str, Sequence[str]]) -> str:
    """Of the misfits that people meet most."""
    if any(".ls1.gamma" in name for name in wrong["missing"]):
        return ": it was trained without LayerScale (student.layerscale=0)"
    if any(name.startswith("patch_embed.proj.weight") for name in wrong["of another shape"]):
        return ": it has patches of another size (student.patch_size), or another width (student.arch)"
    if any("mlp.w12" in name for name in [*wrong["missing"], *wrong["unexpected"]]):
        return ": one of them has SwiGLU (student.ffn_layer), the other has not"
    return ""


def _shapes(found: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]) -> list[str]:
    return [f"{name} {list(there)} for {list(here)}" for name, (there, here) in found.items()]

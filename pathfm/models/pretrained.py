"""A frozen backbone from a file of weights, every key of which is accounted for."""

import re
from argparse import Namespace
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from pathfm.config import Layer, build, read_layer
from pathfm.errors import UserError, listed
from pathfm.files import sha256
from pathfm.models.build import SIZES, build_backbone
from pathfm.models.config import StudentConfig
from pathfm.models.foreign import Found, backbone_tensors
from pathfm.models.vit import ViT

_NESTED = ("teacher", "model", "state_dict")  # under which keys checkpoints hold the network that is to be used
_SHOWN = 4  # wrong names of a kind
_BLOCK = re.compile(r"blocks\.(\d+)\.")


@dataclass(frozen=True)
class Pretrained:
    """A backbone in evaluation mode, without gradients, and where it came from."""

    vit: ViT
    student: StudentConfig
    path: Path
    sha256: str
    left_out: Mapping[str, int]  # tensors of the file that are none of the backbone's, by the first word of their name

    @property
    def reads_features(self) -> bool:
        """Whether it reads grids of patch features, not images."""
        return self.student.feature_width is not None


def load_backbone(path: Path, student: StudentConfig | None = None) -> Pretrained:
    """Read `.safetensors` or a torch file of pathfm, DINO, HIPT, DINOv2, timm or Hugging Face (also its folder).

    `student`: what the backbone is; by default what `recipe.yaml` of its run says, or else what the shapes tell.
    Positions keep the grid for which they were learned; the model resamples them. Raises `UserError` when the file is
    missing or no file of weights, or names the tensors that are missing, unexpected or of another shape.
    """
    path = weights_file(path)
    weights, others = read_backbone(path)
    student = student or _student_beside(path) or student_of(weights, path)
    vit = load_weights(weights, student, str(path))
    left_out = Counter(map(_owner_of, others))
    return Pretrained(vit, student, path, sha256(path), left_out)


def weights_file(path: Path) -> Path:
    """The file itself, or the one in a folder as Hugging Face lays it out."""
    return path / "model.safetensors" if path.is_dir() else path


def read_backbone(path: Path) -> Found:
    """A backbone's tensors by our names, and what else the file holds. Raises `UserError` where there is none."""
    everything = read_weights(path)
    found = backbone_tensors(everything)
    if "cls_token" not in found.weights or "pos_embed" not in found.weights:
        raise UserError(f"{path} holds no vision transformer: its tensors are {listed(everything, _SHOWN)}")
    return found


def load_weights(weights: Mapping[str, Tensor], student: StudentConfig, source: str) -> ViT:
    """A frozen backbone of these weights, by its own names. `source`: where they came from, for messages.

    Raises `UserError` that names the tensors that are missing, unexpected or of another shape.
    """
    image_size = _position_grid(weights, source) * student.patch_size
    vit = build_backbone(student, image_size, drop_path=False, has_mask_token="mask_token" in weights)
    _demand_all(source, weights, vit)
    vit.load_state_dict(dict(weights))
    return vit.eval().requires_grad_(False)


def read_weights(path: Path) -> dict[str, Tensor]:
    """The state dict of a file, on the CPU: of its teacher, where it has one. Code in the file is never run."""
    content = read_file(path)
    for key in _NESTED:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not content:
        raise UserError(f"{path} holds {type(content).__name__}, not named tensors")
    if others := [str(name) for name, value in content.items() if not isinstance(value, Tensor)]:
        raise UserError(f"{path}: no tensors under {listed(others, _SHOWN)}, nor a state dict under {listed(_NESTED)}")
    return dict(content)


def read_file(path: Path) -> Any:
    """What a `.safetensors` or a torch file holds, on the CPU. Code in the file is never run. Raises `UserError`."""
    if not path.is_file():
        raise UserError(f"there is no file {path}; give a file of weights, e.g. exports/teacher_*.pth of a run")
    return _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch_file(path)


def student_of(weights: Mapping[str, Tensor], path: Path) -> StudentConfig:
    """What the shapes tell of a backbone. How its positions are resampled they do not: that is DINO's and DINOv2's way.

    Raises `UserError` for a size that has no name here.
    """
    width, depth = weights["cls_token"].shape[-1], _depth_of(weights)
    arch = next((name for name, size in SIZES.items() if (size.width, size.depth) == (width, depth)), None)
    if arch is None:
        sizes = ", ".join(f"{name} {size.width} x {size.depth}" for name, size in SIZES.items())
        raise UserError(f"{path} is {width} wide and {depth} blocks deep, which is none of: {sizes}")
    has_registers = "register_tokens" in weights
    return StudentConfig(
        arch=arch,
        feature_width=weights["phi.0.weight"].shape[1] if "phi.0.weight" in weights else None,
        patch_size=weights["patch_embed.proj.weight"].shape[-1] if "patch_embed.proj.weight" in weights else 1,
        layerscale=StudentConfig().layerscale if "blocks.0.ls1.gamma" in weights else 0.0,
        ffn_layer="swiglu" if "blocks.0.mlp.w12.weight" in weights else "mlp",
        qkv_bias="blocks.0.attn.qkv.bias" in weights,
        proj_bias="blocks.0.attn.proj.bias" in weights,
        ffn_bias=any(f"blocks.0.mlp.{last}.bias" in weights for last in ("fc2", "w3")),
        num_register_tokens=weights["register_tokens"].shape[1] if has_registers else 0,
        interpolate_antialias=has_registers,  # DINOv2's published models
        interpolate_offset=0.0 if has_registers else 0.1,  # DINOv2's; DINO and HIPT resample with 0.1 too
    )


def _read_safetensors(path: Path) -> Any:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is not a whole file of safetensors: {' '.join(str(error).split())}") from error


def _read_torch_file(path: Path) -> Any:
    try:
        with torch.serialization.safe_globals([Namespace]):  # DINO and HIPT keep their arguments beside the weights
            return torch.load(path, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except UnpicklingError as error:
        raise UserError(f"{path} is damaged, or holds code or objects, which are not loaded") from error
    except Exception as error:  # a damaged archive can raise anything
        raise UserError(f"{path} is not a whole file of torch.save") from error


def _student_beside(path: Path) -> StudentConfig | None:
    """Of the run whose export this is."""
    run = path.parent.parent if path.parent.name == "exports" else path.parent
    recipe = run / "recipe.yaml"
    if not recipe.is_file():
        return None
    return build(StudentConfig, [Layer(str(recipe), dict(read_layer(recipe).tree.get("student") or {}))])


def _depth_of(weights: Mapping[str, Tensor]) -> int:
    return 1 + max((int(found[1]) for name in weights if (found := _BLOCK.match(name))), default=-1)


def _position_grid(weights: Mapping[str, Tensor], source: str) -> int:
    if "pos_embed" not in weights:
        raise UserError(f"{source} holds no vision transformer: its tensors are {listed(weights, _SHOWN)}")
    num_positions = weights["pos_embed"].shape[1] - 1
    side = round(num_positions**0.5)
    if side * side != num_positions:
        raise UserError(f"{source} has positions for {num_positions} patches, which are no square grid")
    return side


def _demand_all(source: str, weights: Mapping[str, Tensor], vit: ViT) -> None:
    own = vit.state_dict()
    wrong = {
        "missing": [name for name in own if name not in weights],
        "unexpected": [name for name in weights if name not in own],
        "of another shape": [
            f"{name} {list(weights[name].shape)} for {list(own[name].shape)}"
            for name in own
            if name in weights and weights[name].shape != own[name].shape
        ],
    }
    if any(wrong.values()):
        said = "; ".join(f"{what}: {listed(names, _SHOWN)}" for what, names in wrong.items() if names)
        raise UserError(f"{source} does not fit the model ({said}); name the recipe it was trained with by --config")


def _owner_of(name: str) -> str:
    return name.removeprefix("module.").partition(".")[0]

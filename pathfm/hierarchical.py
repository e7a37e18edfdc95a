"""The composed model of HIPT (arXiv 2206.02647): a 4096 px region -> one vector, by a patch ViT and a region ViT.

B regions   H, W region size in px   L patches of a region, row-major over its grid of h x w   C width of the patch
features   D width of the region's vector
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, UInt8
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from pathfm.batch import normalise_crops
from pathfm.config import Layer, build
from pathfm.errors import UserError
from pathfm.files import written_aside
from pathfm.models.config import StudentConfig
from pathfm.models.pretrained import Pretrained, load_backbone, load_weights, read_file
from pathfm.models.vit import ViT, as_grid

PATCH_SIZE = 256  # px of a region's patch (HIPT)
CHUNK = 64  # patches at once
_ABOUT = "pathfm_hierarchical"  # under which name a file says how its models are built
_LEVELS = ("patch", "region")


class HierarchicalModel(nn.Module):
    """A patch backbone over the patches of a region, and a region backbone over the grid of their features.

    The patch level runs without gradients; whoever wants to train the region level further lets it have them.
    """

    def __init__(
        self,
        patch: ViT,
        region: ViT,
        students: Mapping[str, StudentConfig],
        *,
        patch_size: int = PATCH_SIZE,
        chunk: int = CHUNK,
    ) -> None:
        """`students`: how the levels `patch` and `region` are built; `patch_size`: px of a region's patch.

        `chunk`: how many patches go through the patch backbone at once, which bounds the memory.
        Raises `UserError` when the levels do not fit each other.
        """
        super().__init__()
        _demand_fit(patch, students, patch_size)
        self.patch, self.region = patch, region
        self.students, self.patch_size, self.chunk = dict(students), patch_size, chunk

    @property
    def width(self) -> int:
        """Of a region's vector."""
        return self.region.width

    def forward(self, regions: Tensor) -> Tensor:
        """One region [3, H, W] -> [D], or a batch [B, 3, H, W] -> [B, D].

        uint8 as decoded, or float, normalised by ImageNet's mean and standard deviation; on the CPU, or where the model
        is. Raises `UserError` for a region that is not a whole number of patches.
        """
        if regions.ndim == 3:
            vector: Tensor = self(regions[None])[0]
            return vector
        grids = torch.stack([self.patch_grid(region) for region in regions])
        return self.region([grids])[0].cls

    @torch.no_grad()
    def patch_grid(self, region: UInt8[Tensor, "3 H W"] | Float[Tensor, "3 H W"]) -> Float[Tensor, "C h w"]:
        """The patches' [CLS] features on their grid: what the region level reads."""
        rows, columns = grid_of(region, self.patch_size)
        device = self.patch.cls_token.device
        chunks = in_chunks(region, self.patch_size, self.chunk)
        parts = [self.patch([normalise_crops(patches.to(device))])[0].cls for patches in chunks]
        return as_grid(torch.cat(parts)[None], rows, columns)[0]

    def save(self, path: Path) -> None:
        """Write both levels, prefixed `patch.` and `region.`, as safetensors or (.pth, .pt) by torch.save.

        `load_composed` reads it back without anything beside it. Raises `OSError` when the disk does not take it.
        """
        weights = {name: value.detach().cpu().contiguous().clone() for name, value in self.state_dict().items()}
        about = self._about()
        try:
            with written_aside(path) as aside:
                if path.suffix == ".safetensors":
                    save_file(weights, aside, metadata={"format": "pt", _ABOUT: json.dumps(about)})
                else:
                    torch.save({"model": weights, _ABOUT: about}, aside)
        except (RuntimeError, SafetensorError) as error:  # both wrap the operating system's error
            raise OSError(" ".join(str(error).split())) from error

    def _about(self) -> dict[str, Any]:
        students = {level: student.model_dump(mode="json") for level, student in self.students.items()}
        return {"patch_size": self.patch_size, **students}


def compose(
    patch: Path,
    region: Path,
    *,
    patch_student: StudentConfig | None = None,
    region_student: StudentConfig | None = None,
    patch_size: int = PATCH_SIZE,
    chunk: int = CHUNK,
) -> HierarchicalModel:
    """Both levels from their files: exports of pathfm's runs, or HIPT's vit256_small_dino.pth and vit4k_xs_dino.pth.

    What the levels are is told by the recipes of their runs, by `patch_student` and `region_student`, or by the shapes.
    Raises `UserError` when a file does not fit its level, or the levels do not fit each other.
    """
    levels = {"patch": load_backbone(patch, patch_student), "region": load_backbone(region, region_student)}
    return of_levels(levels, patch_size=patch_size, chunk=chunk)


def of_levels(
    levels: Mapping[str, Pretrained], *, patch_size: int = PATCH_SIZE, chunk: int = CHUNK
) -> HierarchicalModel:
    """Of what was loaded as `patch` and as `region`, in evaluation mode."""
    students = {level: levels[level].student for level in _LEVELS}
    patch, region = (levels[level].vit for level in _LEVELS)
    return HierarchicalModel(patch, region, students, patch_size=patch_size, chunk=chunk).eval()


def load_composed(path: Path, *, chunk: int = CHUNK) -> HierarchicalModel:
    """What `HierarchicalModel.save` wrote. Raises `UserError` when it is something else."""
    weights, about = _read_composed(path)
    students = {level: build(StudentConfig, [Layer(f"{path}, {level} level", about[level])]) for level in _LEVELS}
    patch, region = (
        load_weights(_of_level(weights, level), students[level], f"{path}, {level} level") for level in _LEVELS
    )
    return HierarchicalModel(patch, region, students, patch_size=int(about["patch_size"]), chunk=chunk).eval()


def in_chunks(
    region: UInt8[Tensor, "3 H W"] | Float[Tensor, "3 H W"], patch_size: int, chunk: int
) -> Iterator[UInt8[Tensor, "N 3 P P"] | Float[Tensor, "N 3 P P"]]:
    """The patches of a region, row by row, a few at a time; only those few are copied."""
    rows, columns = grid_of(region, patch_size)
    grid = region.unflatten(1, (rows, patch_size)).unflatten(3, (columns, patch_size)).permute(1, 3, 0, 2, 4)
    for cells in torch.arange(rows * columns, device=region.device).split(chunk):
        yield grid[cells // columns, cells % columns]


def grid_of(region: Tensor, patch_size: int) -> tuple[int, int]:
    """Rows and columns of a region's patches. Raises `UserError` when it is not a whole number of them."""
    height, width = region.shape[-2:]
    if height < patch_size or width < patch_size or height % patch_size or width % patch_size:
        raise UserError(f"a region of {height}x{width} px is not a whole number of {patch_size} px patches")
    return height // patch_size, width // patch_size


def _demand_fit(patch: ViT, students: Mapping[str, StudentConfig], patch_size: int) -> None:
    if students["patch"].feature_width is not None:
        raise UserError("the patch level reads patch features, not images; give the weights of a patch backbone")
    if (read := students["region"].feature_width) is None:
        raise UserError("the region level reads images, not patch features; give the weights of a region backbone")
    if read != patch.width:
        raise UserError(f"the region level reads features of width {read}, the patch level makes {patch.width}")
    if patch_size % patch.patch_size:
        raise UserError(f"patches of {patch_size} px are no whole number of the patch level's {patch.patch_size} px")


def _of_level(weights: Mapping[str, Tensor], level: str) -> dict[str, Tensor]:
    prefix = f"{level}."
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}


def _read_composed(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    if path.suffix == ".safetensors" and path.is_file():
        try:
            with safe_open(path, "pt") as file:
                about = json.loads((file.metadata() or {}).get(_ABOUT, "null"))
                weights: Any = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dict
        except (SafetensorError, OSError, ValueError) as error:
            raise UserError(f"{path} is not a whole file of safetensors: {' '.join(str(error).split())}") from error
    else:
        content = read_file(path)
        about = content.get(_ABOUT) if isinstance(content, dict) else None
        weights = content.get("model") if isinstance(content, dict) else None
    if not isinstance(about, dict) or not isinstance(weights, dict):
        raise UserError(f"{path} is no composed model; make one of two files by pathfm.hierarchical.compose")
    return weights, about

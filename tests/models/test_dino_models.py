"""DINO's ViT and the region transformer over patch features, against recorded features; other people's names."""

from pathlib import Path

import numpy as np
import pytest
import torch

from pathfm.errors import UserError
from pathfm.models.build import build_backbone
from pathfm.models.config import StudentConfig
from pathfm.models.names import backbone_weights
from pathfm.models.vit import ViT, as_grid

TOLERANCE = {"atol": 2e-5, "rtol": 1e-4}
PATCH = {"image_size": 224, "patch_size": 16, "width": 48}
REGION = {"image_size": 14, "patch_size": 1, "width": 24, "feature_width": 32}


def recorded(path: Path, **shape: int) -> tuple[ViT, np.lib.npyio.NpzFile]:
    arrays = np.load(path)
    vit = ViT(
        num_heads=3,
        drop_path_rates=[0.0] * 3,
        layerscale=0.0,
        interpolate_offset=0.0,
        has_mask_token=False,
        **shape,
    )
    vit.load_state_dict({key[3:]: torch.from_numpy(arrays[key]) for key in arrays.files if key.startswith("sd/")})
    return vit, arrays


@pytest.mark.parametrize("size", ["native", "global224", "local96"])
def test_dinos_class_tokens_equal_the_recorded_ones(golden_dir: Path, size: str) -> None:
    vit, arrays = recorded(golden_dir / "dino_vit.npz", **PATCH)
    (features,) = vit([torch.from_numpy(arrays[f"{size}/x"])])
    torch.testing.assert_close(features.cls, torch.from_numpy(arrays[f"{size}/cls"]), **TOLERANCE)


@pytest.mark.parametrize("size", ["region16", "global14", "local6"])
def test_the_region_transformers_class_tokens_equal_the_recorded_ones(golden_dir: Path, size: str) -> None:
    vit, arrays = recorded(golden_dir / "dino_hierarchical_vit.npz", **REGION)
    (features,) = vit([torch.from_numpy(arrays[f"{size}/x"])])
    torch.testing.assert_close(features.cls, torch.from_numpy(arrays[f"{size}/cls"]), **TOLERANCE)


def test_a_regions_rows_are_its_grid_row_by_row(golden_dir: Path) -> None:
    arrays = np.load(golden_dir / "dino_hierarchical_vit.npz")
    rows = torch.from_numpy(arrays["region_sequence"])
    assert torch.equal(as_grid(rows[None], 16, 16)[0], torch.from_numpy(arrays["region_grid"]))


def test_features_of_another_width_are_told_from_those_that_the_model_reads() -> None:
    vit = ViT(num_heads=3, drop_path_rates=[0.0], **REGION)
    with pytest.raises(UserError, match="features are 48 wide, the model reads 32"):
        vit([torch.zeros(1, 48, 14, 14)])


def test_hipts_region_model_has_its_published_size() -> None:
    region = StudentConfig(arch="vit4k_xs", feature_width=384, patch_size=1, layerscale=0.0)
    names = {
        name: tuple(value.shape) for name, value in build_backbone(region, 14, drop_path=False).state_dict().items()
    }
    assert names["phi.0.weight"] == (192, 384)
    assert names["pos_embed"] == (1, 197, 192)
    assert "blocks.5.mlp.fc2.bias" in names
    assert "blocks.6.mlp.fc2.bias" not in names


def test_where_features_are_read_a_patch_is_one_of_them() -> None:
    with pytest.raises(ValueError, match="patch_size is 1 where patch features are read"):
        StudentConfig(feature_width=384, patch_size=16)


@pytest.mark.parametrize("prefix", ["", "backbone.", "module.backbone."])
def test_backbones_of_dino_and_hipt_load_by_their_names(prefix: str) -> None:
    torch.manual_seed(0)
    source, target = (ViT(num_heads=3, drop_path_rates=[0.0], has_mask_token=False, **PATCH) for _ in range(2))
    theirs = {f"{prefix}{name}": value for name, value in source.state_dict().items()}
    if prefix:
        theirs[f"{prefix.removesuffix('backbone.')}head.mlp.0.weight"] = torch.zeros(1)
    target.load_state_dict(backbone_weights(theirs))
    assert all(torch.equal(ours, source.state_dict()[name]) for name, ours in target.state_dict().items())

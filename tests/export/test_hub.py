"""torch.hub.load from this repository, without a network."""

from pathlib import Path

import pytest
import torch

import hubconf
from pathfm.errors import UserError
from pathfm.export.hub import HubModel
from pathfm.models.build import build_backbone
from pathfm.models.config import StudentConfig
from tests.export.tiny import tiny
from tests.features.small import region_backbone, saved_teacher

REPO = str(Path(__file__).parents[2])
STUDENT = StudentConfig(arch="vit_tiny", patch_size=14, num_register_tokens=4)


def load(name: str, **options: object) -> torch.nn.Module:
    return torch.hub.load(REPO, name, source="local", **options)


def small_weights(folder: Path) -> Path:
    torch.manual_seed(0)
    path = folder / "weights.pth"
    torch.save(build_backbone(STUDENT, 56, drop_path=False).state_dict(), path)
    return path


def test_the_entry_points_are_ours_and_the_official_names():
    names = {name for name, value in vars(hubconf).items() if callable(value) and not name.startswith("_")}
    assert names == {"pathfm", *(f"dinov2_vit{size}14{end}" for size in "sblg" for end in ("", "_reg"))}


def test_a_file_becomes_a_model_with_the_official_methods(tmp_path):
    model = load("pathfm", weights=str(small_weights(tmp_path)))
    images = torch.randn(2, 3, 56, 84)
    features = model.vit([images])[0]
    told = model.forward_features(images)
    assert model(images).equal(features.cls)
    assert told["x_norm_clstoken"].equal(features.cls)
    assert told["x_norm_regtokens"].equal(features.registers)
    assert told["x_norm_patchtokens"].equal(features.patches)
    assert (model.embed_dim, model.patch_size, model.num_register_tokens, model.n_blocks) == (192, 14, 4, 12)
    assert not model.training


def test_intermediate_layers_are_given_as_the_official_models_give_them(tmp_path):
    model = load("pathfm", weights=str(small_weights(tmp_path)))
    images = torch.randn(2, 3, 28, 42)
    last = model.vit([images])[0]
    (patches,) = model.get_intermediate_layers(images)
    torch.testing.assert_close(patches, last.patches)
    pairs = model.get_intermediate_layers(images, n=[3, 11], reshape=True, return_class_token=True)
    assert [picture.shape for picture, _ in pairs] == [(2, 192, 2, 3)] * 2
    torch.testing.assert_close(pairs[1][0].flatten(2).transpose(1, 2), last.patches)
    torch.testing.assert_close(pairs[1][1], last.cls)


def test_an_official_name_takes_only_its_own_architecture(tmp_path):
    with pytest.raises(UserError, match=r"another model: width 192, 12 blocks.*not width 384, .*4 registers"):
        load("dinov2_vits14_reg", weights=str(small_weights(tmp_path)))


def test_nothing_is_downloaded():
    with pytest.raises(UserError, match="give weights=FILE"):
        load("dinov2_vits14")
    with torch.device("meta"):
        fresh = load("dinov2_vits14_reg", pretrained=False)
    assert fresh.vit.pos_embed.shape == (1, 1 + 37 * 37, 384)
    assert fresh.num_register_tokens == 4


def test_region_models_are_refused(tmp_path):
    path = saved_teacher(tmp_path / "region.pth", region_backbone())
    with pytest.raises(UserError, match="reads patch features, not images"):
        load("pathfm", weights=str(path))


def test_masked_patches_are_hidden_as_by_the_backbone_itself():
    vit, images = tiny().vit, torch.randn(2, 3, 56, 56)
    masks = torch.rand(2, 16) < 0.5
    found = HubModel(vit).forward_features(images, masks)
    assert found["x_norm_patchtokens"].equal(vit([images], [masks])[0].patches)

"""A region in, one vector out: the same as the two levels by hand, in bounded memory, from anybody's files."""

import argparse
from pathlib import Path

import pytest
import torch

from pathfm.batch import normalise_crops
from pathfm.errors import UserError
from pathfm.hierarchical import HierarchicalModel, compose, in_chunks, load_composed
from pathfm.models.build import build_backbone
from pathfm.models.config import StudentConfig
from tests.features.small import PATCH, REGION, SIDE, STUDENT, WIDTH, patch_backbone, picture, region_backbone

REGION_STUDENT = StudentConfig(arch="vit4k_xs", feature_width=WIDTH, patch_size=1, layerscale=0.0)
STUDENTS = {"patch": STUDENT, "region": REGION_STUDENT}


@pytest.fixture(scope="module")
def model() -> HierarchicalModel:
    return HierarchicalModel(patch_backbone(), region_backbone(), STUDENTS, patch_size=PATCH).eval()


@pytest.fixture(scope="module")
def region() -> torch.Tensor:
    return torch.from_numpy(picture(3)).permute(2, 0, 1)


def test_one_call_is_what_the_two_levels_give_by_hand(model, region):
    pixels = normalise_crops(region[None])
    cells = [(row * PATCH, column * PATCH) for row in range(SIDE) for column in range(SIDE)]
    patches = torch.cat([pixels[:, :, top : top + PATCH, left : left + PATCH] for top, left in cells])
    features = patch_backbone()([patches])[0].cls
    grid = torch.stack([features[row * SIDE : (row + 1) * SIDE] for row in range(SIDE)]).permute(2, 0, 1)
    expected = region_backbone()([grid[None]])[0].cls[0]
    vector = model(region)
    assert vector.shape == (model.width,) == (192,)
    torch.testing.assert_close(vector, expected, atol=1e-5, rtol=1e-4)


def test_bytes_and_normalised_pixels_and_batches_give_the_same(model, region):
    vector = model(region)
    both = model(torch.stack([normalise_crops(region[None])[0], normalise_crops(region.flip(2)[None])[0]]))
    torch.testing.assert_close(both[0], vector)
    assert not torch.allclose(both[1], vector)


def test_no_more_patches_than_a_chunk_are_copied_at_once_and_the_vector_is_the_same(model, region):
    assert [len(patches) for patches in in_chunks(region, PATCH, 7)] == [7, 7, 2]
    chunked = HierarchicalModel(model.patch, model.region, STUDENTS, patch_size=PATCH, chunk=7)
    torch.testing.assert_close(chunked(region), model(region), atol=1e-5, rtol=1e-4)


def test_regions_need_not_be_square(model):
    assert model(torch.zeros(3, 2 * PATCH, 3 * PATCH)).shape == (192,)


def test_the_region_level_can_be_trained_and_the_patch_level_is_not(region):
    model = HierarchicalModel(patch_backbone(), region_backbone(), STUDENTS, patch_size=PATCH).requires_grad_()
    model(region).sum().backward()
    assert model.region.cls_token.grad is not None
    assert all(parameter.grad is None for parameter in model.patch.parameters())


@pytest.mark.parametrize("name", ["model.safetensors", "model.pth"])
def test_what_is_saved_in_one_file_comes_back_equal(model, region, name, tmp_path):
    model.save(tmp_path / name)
    found = load_composed(tmp_path / name)
    assert (found.patch_size, found.students) == (PATCH, STUDENTS)
    assert {key.partition(".")[0] for key in found.state_dict()} == {"patch", "region"}
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in found.state_dict().items())
    assert torch.equal(found(region), model(region))


def hipts(path: Path, vit: torch.nn.Module) -> Path:
    """A checkpoint with the names, and the arguments beside them, of HIPT's."""
    weights = {f"module.backbone.{name}": value for name, value in vit.state_dict().items()}
    heads = {"module.head.mlp.0.weight": torch.zeros(3)}
    args = argparse.Namespace(arch="vit_small", patch_size=16)
    torch.save({"teacher": {**weights, **heads}, "student": {}, "epoch": 100, "args": args}, path)
    return path


def test_hipts_files_load_and_their_sizes_are_told_by_their_shapes(tmp_path):
    torch.manual_seed(0)
    small = StudentConfig(arch="vit_small", patch_size=16, layerscale=0.0)
    xs = StudentConfig(arch="vit4k_xs", feature_width=384, patch_size=1, layerscale=0.0)
    patch = build_backbone(small, 224, drop_path=False, has_mask_token=False)
    region = build_backbone(xs, 14, drop_path=False, has_mask_token=False)
    model = compose(hipts(tmp_path / "vit256_small_dino.pth", patch), hipts(tmp_path / "vit4k_xs_dino.pth", region))
    assert (model.students["patch"].arch, model.students["region"].arch) == ("vit_small", "vit4k_xs")
    assert (model.patch_size, model.width) == (256, 192)
    assert all(torch.equal(value, patch.state_dict()[name]) for name, value in model.patch.state_dict().items())
    assert all(torch.equal(value, region.state_dict()[name]) for name, value in model.region.state_dict().items())
    assert not model.training


def test_a_region_that_is_no_whole_number_of_patches_is_refused(model):
    with pytest.raises(UserError, match=f"a region of {REGION + 1}x{REGION} px is not a whole number of {PATCH} px"):
        model(torch.zeros(3, REGION + 1, REGION))


def test_levels_that_do_not_fit_each_other_are_refused():
    patch, region = patch_backbone(), region_backbone()
    wide = REGION_STUDENT.model_copy(update={"feature_width": 384})
    for students, patch_size, reason in [
        ({"patch": STUDENT, "region": STUDENT}, PATCH, "region level reads images"),
        ({"patch": REGION_STUDENT, "region": REGION_STUDENT}, PATCH, "patch level reads patch features"),
        ({"patch": STUDENT, "region": wide}, PATCH, "reads features of width 384, the patch level makes 192"),
        (STUDENTS, 24, "patches of 24 px are no whole number of the patch level's 16 px"),
    ]:
        with pytest.raises(UserError, match=reason):
            HierarchicalModel(patch, region, students, patch_size=patch_size)


def test_a_file_of_one_level_is_no_composed_model(tmp_path):
    torch.save({"teacher": patch_backbone().state_dict()}, tmp_path / "teacher.pth")
    with pytest.raises(UserError, match=r"teacher.pth is no composed model"):
        load_composed(tmp_path / "teacher.pth")

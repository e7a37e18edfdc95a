"""The other library loads what was written for it and gives our features, at the learned size and at another."""

import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image

from pathfm.batch import normalise_crops
from pathfm.errors import UserError
from pathfm.export.carried import Written, shape_of
from pathfm.export.huggingface import write_huggingface
from pathfm.export.onnx import write_onnx
from pathfm.export.timm import model_of, write_timm
from pathfm.export.timm import their_names as timm_names
from pathfm.export.verify import TOLERANCE, verify
from pathfm.models.build import build_backbone
from pathfm.models.config import StudentConfig
from pathfm.models.layers import NORM_EPS
from tests.export.tiny import tiny

WRITERS: dict[str, Callable[..., Written]] = {"huggingface": write_huggingface, "timm": write_timm, "onnx": write_onnx}
LIBRARIES = {"huggingface": "transformers", "timm": "timm", "onnx": "onnxruntime"}
VARIANTS = [
    {"patch_size": patch_size, "num_register_tokens": registers, "ffn_layer": ffn_layer, "layerscale": layerscale}
    for patch_size, registers, ffn_layer, layerscale in itertools.product(
        (14, 16), (0, 4), ("mlp", "swiglu"), (0.0, 0.1)
    )
]
WITHOUT = {"qkv_bias": False, "proj_bias": False, "ffn_bias": False, "has_mask_token": False}


def demand_library(target: str) -> None:
    pytest.importorskip(LIBRARIES[target])
    if target == "onnx":
        pytest.importorskip("onnxscript")


def words(variant: dict[str, object]) -> str:
    return ", ".join(f"{name} {value}" for name, value in variant.items())


@pytest.mark.parametrize("variant", VARIANTS, ids=words)
@pytest.mark.parametrize("target", ["huggingface", "timm"])
def test_every_variant_gives_our_features_at_the_learned_size_and_at_another(target, variant, tmp_path):
    demand_library(target)
    model = tiny(**variant)
    learned = 4 * model.vit.patch_size
    for size in (learned, 6 * model.vit.patch_size):
        folder = tmp_path / str(size)
        folder.mkdir()
        written = WRITERS[target](folder, model, size)
        assert written.image_size == size
        verdict = verify(target, folder, model.vit, [size])
        assert verdict.largest_difference is not None
        assert verdict.largest_difference < TOLERANCE


@pytest.mark.parametrize(("variant", "size"), [(VARIANTS[1], None), ({**VARIANTS[-1], **WITHOUT}, 96)], ids=str)
def test_onnxruntime_gives_our_features_of_any_number_of_images(variant, size, tmp_path):
    demand_library("onnx")
    model = tiny(**variant)
    written = write_onnx(tmp_path, model, size)
    assert written.image_size == (size or 56)
    assert verify("onnx", tmp_path, model.vit, [written.image_size]).largest_difference < TOLERANCE


@pytest.mark.parametrize("ffn_layer", ["mlp", "swiglu"])
@pytest.mark.parametrize("target", ["huggingface", "timm"])
def test_what_was_left_out_of_a_model_changes_nothing_there(target, ffn_layer, tmp_path):
    demand_library(target)
    model = tiny(**WITHOUT, ffn_layer=ffn_layer, num_register_tokens=1, layerscale=0.0)
    WRITERS[target](tmp_path, model, None)
    assert verify(target, tmp_path, model.vit, [56]).largest_difference < TOLERANCE


@pytest.mark.parametrize(
    ("target", "registers", "antialias", "offset", "any_size"),
    [
        ("huggingface", 0, False, 0.0, True),
        ("huggingface", 0, False, 0.1, False),
        ("huggingface", 4, True, 0.0, True),
        ("huggingface", 4, False, 0.1, False),
        ("timm", 0, True, 0.0, True),
        ("timm", 4, False, 0.0, False),
    ],
)
def test_images_of_any_size_are_promised_where_the_library_resamples_positions_as_we_do(
    target, registers, antialias, offset, any_size, tmp_path
):
    demand_library(target)
    model = tiny(num_register_tokens=registers, interpolate_antialias=antialias, interpolate_offset=offset)
    written = WRITERS[target](tmp_path, model, 84)
    assert written.any_size == any_size
    sizes = [28, 56, 84, 112] if any_size else [84]
    assert verify(target, tmp_path, model.vit, sizes).largest_difference < TOLERANCE
    assert any("84 px" in note for note in written.notes) != any_size


def test_an_export_that_gives_other_features_is_found(tmp_path):
    demand_library("huggingface")
    model = tiny(ffn_layer="swiglu")
    write_huggingface(tmp_path, model, None)
    gate_and_content = model.vit.blocks[0].mlp.w12.weight
    gate_and_content.copy_(gate_and_content.roll(len(gate_and_content) // 2, 0))
    with pytest.raises(UserError, match=r"gives other \[CLS\] for images of 56 px: they differ by"):
        verify("huggingface", tmp_path, model.vit, [56])


@pytest.mark.parametrize("target", WRITERS)
def test_an_image_size_that_is_no_whole_number_of_patches_is_one_line(target, tmp_path):
    demand_library(target)
    with pytest.raises(UserError, match=r"--image-size 60 is not a whole number of 14 px patches; take 56 or 70"):
        WRITERS[target](tmp_path, tiny(), 60)


def test_a_folder_for_timm_is_also_what_its_hub_takes(tmp_path):
    timm = pytest.importorskip("timm")
    model = tiny(num_register_tokens=4)
    write_timm(tmp_path, model, 84)
    theirs = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    images = torch.randn(2, 3, 84, 84)
    torch.testing.assert_close(theirs(images), model.vit([images])[0].cls, atol=TOLERANCE, rtol=0)
    with pytest.raises(AssertionError):
        theirs(torch.randn(2, 3, 56, 56))  # positions of other sizes would be resampled in another way


@pytest.mark.parametrize("registers", [0, 4])
def test_transformers_finds_model_and_preprocessing_by_themselves(registers, tmp_path):
    transformers = pytest.importorskip("transformers")
    write_huggingface(tmp_path, tiny(num_register_tokens=registers), 56)
    model = transformers.AutoModel.from_pretrained(tmp_path)
    assert type(model).__name__ == ("Dinov2WithRegistersModel" if registers else "Dinov2Model")
    tile = np.random.default_rng(0).integers(0, 256, (56, 56, 3), np.uint8)
    found = transformers.AutoImageProcessor.from_pretrained(tmp_path)(Image.fromarray(tile), return_tensors="pt")
    expected = normalise_crops(torch.from_numpy(tile).permute(2, 0, 1)[None])
    torch.testing.assert_close(found["pixel_values"], expected, atol=1e-5, rtol=0)


def test_official_models_go_by_their_name_in_timm():
    timm = pytest.importorskip("timm")
    for arch, ffn_layer, registers, name in [
        ("vit_small", "mlp", 0, "vit_small_patch14_dinov2"),
        ("vit_base", "mlp", 4, "vit_base_patch14_reg4_dinov2"),
        ("vit_large", "mlp", 0, "vit_large_patch14_dinov2"),
        ("vit_giant2", "swiglu", 4, "vit_giant_patch14_reg4_dinov2"),
    ]:
        student = StudentConfig(arch=arch, ffn_layer=ffn_layer, patch_size=14, num_register_tokens=registers)
        with torch.device("meta"):
            vit = build_backbone(student, 224, drop_path=False)
            theirs = timm.create_model(name, img_size=224, num_classes=0)
        assert model_of(shape_of(vit)) == (name, {})
        ours = timm_names(vit.state_dict(), shape_of(vit))
        assert {key: value.shape for key, value in ours.items()} == {
            key: value.shape for key, value in theirs.state_dict().items()
        }
        assert name in timm.list_models("*dinov2")
    assert timm.create_model("vit_small_patch14_dinov2", img_size=28).norm.eps == NORM_EPS

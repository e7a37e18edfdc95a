import pytest
import torch
from torch import Tensor

from pathfm.errors import UserError
from pathfm.models.vit import ViT
from pathfm.models.warm_start import warm_start
from tests.models.test_foreign import tiny


def fresh(**settings: object) -> ViT:
    vit = tiny(**settings)
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter.zero_()
    return vit


def weights(**settings: object) -> dict[str, Tensor]:
    return tiny(**settings).state_dict()


def test_every_tensor_is_taken_up_by_its_name():
    vit, given = fresh(), weights()
    report = warm_start(vit, dict(reversed(given.items())), (), "a.pth")
    assert all(tensor.equal(given[name]) for name, tensor in vit.state_dict().items())
    assert set(report.loaded) == given.keys()
    assert not any((report.missing, report.unexpected, report.resized, report.other_shape))
    assert report.in_words() == f"{len(given)} tensors are loaded"


def test_positions_of_another_grid_are_resampled_and_see_what_they_saw():
    given = weights(image_size=112)  # 8 x 8
    vit = fresh()  # 4 x 4
    report = warm_start(vit, given, (), "a.pth")
    assert report.resized == {"pos_embed": (65, 17)}
    assert "pos_embed is resampled from 65 to 17 positions" in report.in_words()
    assert vit.pos_embed[:, 0].equal(given["pos_embed"][:, 0])
    source = tiny(image_size=112, interpolate_offset=0.0)
    images = torch.randn(2, 3, 56, 56)
    torch.testing.assert_close(vit([images])[0].cls, source([images])[0].cls)


@pytest.mark.parametrize(("there", "here"), [(0, 4), (4, 0), (4, 4)])
def test_registers_may_be_on_one_side_alone(there: int, here: int):
    report = warm_start(fresh(num_register_tokens=here), weights(num_register_tokens=there), (), "a.pth")
    assert ("register_tokens" in report.missing) == (here > there)
    assert ("register_tokens" in report.unexpected) == (there > here)


def test_dinos_weights_have_no_mask_token():
    report = warm_start(fresh(), weights(has_mask_token=False), (), "dino.pth")
    assert report.missing == ("mask_token",)


@pytest.mark.parametrize(
    ("there", "message"),
    [
        ({"layerscale": 0.0}, r"missing: blocks.0.ls1.gamma.*without LayerScale \(student.layerscale=0\)"),
        ({"width": 48}, "of another shape: cls_token .1, 1, 48. for .1, 1, 36."),
        (
            {"patch_size": 7, "image_size": 28},
            r"patch_embed.proj.weight .*patches of another size \(student.patch_size\)",
        ),
        ({"ffn_layer": "swiglu"}, r"blocks.0.mlp.w12.*one of them has SwiGLU \(student.ffn_layer\)"),
        ({"drop_path_rates": [0.0] * 3}, "unexpected: blocks.2.norm1.weight"),
        ({"drop_path_rates": [0.0]}, "missing: blocks.1.norm1.weight"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line_and_nothing_is_changed(there: dict[str, object], message: str):
    vit = fresh()
    with pytest.raises(UserError, match=message) as caught:
        warm_start(vit, weights(**there), (), "a.pth")
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("a.pth does not fit this student")
    assert all(not tensor.any() for tensor in vit.state_dict().values())


def test_what_is_allowed_by_name_stays_random_and_is_told():
    report = warm_start(fresh(), weights(layerscale=0.0), ("blocks.*.ls?.gamma",), "a.pth")
    assert len(report.missing) == 4
    assert "not in the file, so random: blocks.0.ls1.gamma" in report.in_words()
    report = warm_start(fresh(), weights(drop_path_rates=[0.0] * 3), ("blocks.2.*",), "a.pth")
    assert all(name.startswith("blocks.2.") for name in report.unexpected)

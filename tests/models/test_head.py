"""The projection head against DINOv2's recorded output."""

from pathlib import Path

import numpy as np
import pytest
import torch

from pathfm.models.head import DINOHead, WeightNormLinear


@pytest.fixture
def head() -> DINOHead:
    torch.manual_seed(0)
    return DINOHead(24, num_prototypes=96, bottleneck_width=16, hidden_width=32)


def test_the_head_equals_the_recorded_one(head: DINOHead, golden_dir: Path) -> None:
    arrays = np.load(golden_dir / "dinov2_losses.npz")
    weights = {
        k.removeprefix("head_sd/"): torch.from_numpy(arrays[k]) for k in arrays.files if k.startswith("head_sd/")
    }
    head.load_state_dict(weights, strict=True)
    logits = head(torch.from_numpy(arrays["head/x"])).logits()
    torch.testing.assert_close(logits, torch.from_numpy(arrays["head/y"]), atol=2e-5, rtol=1e-4)


def test_initial_logits_are_cosines(head: DINOHead) -> None:
    assert head(torch.randn(50, 24)).logits().abs().max() <= 1 + 1e-6
    assert (head.last_layer.weight_g == 1).all()


def test_a_selection_of_tokens_gets_the_logits_it_has_among_all(head: DINOHead) -> None:
    tokens, selected = torch.randn(10, 24), torch.tensor([7, 0, 3])
    torch.testing.assert_close(head(tokens[selected]).logits(), head(tokens).logits()[selected])


def test_no_tokens_still_give_every_parameter_a_gradient(head: DINOHead) -> None:
    head(torch.zeros(0, 24)).logits().sum().backward()
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in head.parameters())


@pytest.mark.parametrize("learn_norm", [True, False])
def test_prototypes_have_the_gradients_of_their_formula(learn_norm: bool) -> None:
    layer = WeightNormLinear(4, 6, learn_norm=learn_norm)
    with torch.no_grad():
        layer.weight_v.normal_()
        layer.weight_g.uniform_(0.5, 2)
    trained = [parameter for parameter in layer.parameters() if parameter.requires_grad]
    upstream = torch.randn(6, 4)
    found = torch.autograd.grad(layer(), trained, upstream)
    written_out = layer.weight_g * layer.weight_v / layer.weight_v.norm(dim=1, keepdim=True)
    torch.testing.assert_close(layer(), written_out)
    torch.testing.assert_close(found, torch.autograd.grad(written_out, trained, upstream))


def test_the_prototypes_length_can_be_fixed() -> None:
    head = DINOHead(8, num_prototypes=5, bottleneck_width=4, hidden_width=8, norm_last_layer=True)
    head(torch.randn(3, 8)).logits().sum().backward()
    assert head.last_layer.weight_g.grad is None
    assert head.last_layer.weight_v.grad is not None


@pytest.mark.parametrize(
    ("layers", "names"),
    [(1, {"mlp.weight", "mlp.bias"}), (2, {"mlp.0.weight", "mlp.0.bias", "mlp.2.weight", "mlp.2.bias"})],
)
def test_names_follow_the_number_of_layers(layers: int, names: set[str]) -> None:
    head = DINOHead(8, num_prototypes=5, bottleneck_width=4, hidden_width=8, num_layers=layers)
    assert {name for name, _ in head.named_parameters() if name.startswith("mlp")} == names


def test_half_precision_autocast_gives_logits_near_fp32(head: DINOHead) -> None:
    tokens = torch.randn(20, 24)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = head(tokens).logits()
    torch.testing.assert_close(rounded.float(), head(tokens).logits(), atol=2e-2, rtol=2e-2)

"""Whole DINO steps against the recorded ones; the head's options; what the number of ranks must not change."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pathfm.batch import Batch
from pathfm.models.head import DINOHead
from pathfm.models.vit import ViT
from pathfm.ssl.config import Centering, DinoConfig
from pathfm.ssl.dino import DINO
from pathfm.ssl.method import Losses
from tests.ssl.lockstep import Total, on_ranks
from tests.ssl.small import Recorded, random_batch, shares_of

TOLERANCE = {"atol": 2e-5, "rtol": 1e-4}
GRADIENT_TOLERANCE = {"atol": 1e-5, "rtol": 1e-3}


def small_dino(centering: Centering = "centering", patch_size: int = 14, image_size: int = 84, **dino: object) -> DINO:
    def backbone() -> ViT:
        return ViT(
            image_size=image_size,
            patch_size=patch_size,
            width=36,
            num_heads=3,
            drop_path_rates=[0.0] * 2,
            layerscale=0.0,
            interpolate_offset=0.0,
            has_mask_token=False,
        )

    torch.manual_seed(0)
    sizes = {"head_n_prototypes": 72, "head_bottleneck_dim": 16, "head_hidden_dim": 40, "koleo_loss_weight": 0.0}
    return DINO(backbone(), backbone(), DinoConfig(**{**sizes, **dino}), centering=centering)


def of_recorded(arrays: Recorded) -> tuple[DINO, Batch]:
    method = small_dino(patch_size=16, image_size=192)
    for name in ("student", "teacher"):
        weights = {key.replace("head.", "dino_head.", 1): value for key, value in arrays.below(f"{name}/").items()}
        getattr(method, name).load_state_dict(weights)
    batch = Batch(
        global_crops=torch.cat([arrays[f"global{view}"] for view in range(2)]),
        local_crops=torch.cat([arrays[f"local{view}"] for view in range(3)]),
        masks=torch.zeros(6, 36, dtype=torch.bool),
        mask_indices=torch.empty(0, dtype=torch.long),
        mask_weights=torch.empty(0),
        positions=torch.arange(3),
        samples=torch.arange(3),
    )
    return method, batch


def test_three_epochs_have_the_recorded_losses_gradients_and_centres(golden_dir: Path) -> None:
    arrays = Recorded(golden_dir / "dino_step.npz")
    method, batch = of_recorded(arrays)
    for step in ("step0", "step1", "step2"):
        losses = method.losses(batch, arrays[f"{step}/teacher_temp"].item())
        torch.testing.assert_close(losses.total.detach(), arrays[f"{step}/loss"], **TOLERANCE)
        method.zero_grad()
        losses.total.backward()
        recorded = arrays.below(f"{step}/grad/")
        for name, gradient in recorded.items():
            ours = method.student.get_parameter(name.replace("head.", "dino_head.", 1)).grad
            torch.testing.assert_close(ours, gradient, **GRADIENT_TOLERANCE, msg=partial("{}: {}".format, name))
        method.update_teacher(1.0)
        torch.testing.assert_close(method.cls_targets.center, arrays[f"{step}/center_after"], **TOLERANCE)
    assert len(recorded) == len([p for p in method.student.parameters() if p.requires_grad])


def test_nothing_is_masked_whatever_the_batch_says() -> None:
    method, batch = small_dino(), random_batch(masked_share=0.3)
    nothing_masked = replace(batch, masks=torch.zeros_like(batch.masks))
    assert torch.equal(method.losses(batch, 0.04).total, method.losses(nothing_masked, 0.04).total)
    assert not any("mask_token" in name for name in method.state_dict())


def test_prototypes_of_fixed_length_are_not_trained() -> None:
    fixed, learnt = small_dino(norm_last_layer=True), small_dino(norm_last_layer=False)
    assert not fixed.student.dino_head.last_layer.weight_g.requires_grad
    assert learnt.student.dino_head.last_layer.weight_g.requires_grad


def gradients_of(method: DINO) -> dict[str, Tensor]:
    return {name: p.grad for name, p in method.student.named_parameters() if p.grad is not None}


def two_steps(method: DINO, batch: Batch) -> Losses:
    method.losses(batch, 0.05)
    method.update_teacher(0.9)
    losses = method.losses(batch, 0.05)
    losses.total.backward()
    return losses


@pytest.mark.parametrize("centering", ["centering", "sinkhorn_knopp"])
@pytest.mark.parametrize("use_bn_in_head", [False, True], ids=["plain head", "batch norm in the head"])
def test_the_mean_over_two_ranks_is_the_global_batchs_gradient(centering: Centering, use_bn_in_head: bool) -> None:
    batch = random_batch(num_samples=8)
    whole = small_dino(centering, use_bn_in_head=use_bn_in_head)
    expected = two_steps(whole, batch)

    def run(rank: int, total: Total) -> Losses:
        method = methods[rank]
        method.cls_targets.total = total
        for module in method.modules():
            if hasattr(module, "total") and module is not method.cls_targets:
                module.total = partial(_Sum.apply, total)
        return two_steps(method, shares[rank])

    methods = [small_dino(centering, use_bn_in_head=use_bn_in_head) for _ in range(2)]
    shares = shares_of(batch, 2)
    losses = on_ranks([partial(run, rank) for rank in range(2)])
    mean = torch.stack([of_rank.total.detach() for of_rank in losses]).mean()
    torch.testing.assert_close(mean, expected.total.detach(), atol=1e-5, rtol=1e-5)
    for name, gradient in gradients_of(whole).items():
        ours = torch.stack([gradients_of(method)[name] for method in methods]).mean(0)
        torch.testing.assert_close(ours, gradient, atol=1e-5, rtol=1e-4, msg=partial("{}: {}".format, name))


class _Sum(torch.autograd.Function):
    """Two ranks are two threads here, so the sum is lockstep's."""

    @staticmethod
    def forward(context, total, values):
        context.total = total
        return total(values.detach())

    @staticmethod
    def backward(context, gradient):
        return None, context.total(gradient)


def test_batch_norm_in_the_head_is_torchs() -> None:
    torch.manual_seed(0)
    ours = DINOHead(12, num_prototypes=9, bottleneck_width=6, hidden_width=10, batch_norm_total=lambda values: values)
    theirs = [torch.nn.BatchNorm1d(10), torch.nn.BatchNorm1d(10)]
    rows = torch.randn(7, 12)
    expected = rows
    for number, layer in enumerate(ours.mlp):
        expected = theirs[0 if number == 1 else 1](expected) if number in (1, 4) else layer(expected)
    torch.testing.assert_close(ours.mlp(rows), expected)
    assert torch.equal(ours.eval().mlp(rows), ours.train().mlp(rows))  # the teacher's too is of what it is just shown

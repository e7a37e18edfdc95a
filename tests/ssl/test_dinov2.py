"""Whole DINOv2 steps against the recorded ones, and what the number of ranks, masks and precision must not change."""

from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pathfm.batch import Batch
from pathfm.ssl.dinov2 import DINOv2
from pathfm.ssl.method import Losses
from tests.ssl.lockstep import Total, on_ranks
from tests.ssl.small import FILES, Recorded, random_batch, shares_of, small_dinov2, with_masks

TOLERANCE = {"atol": 2e-5, "rtol": 1e-4}
GRADIENT_TOLERANCE = {"atol": 1e-5, "rtol": 1e-3}


class RecordedSteps(Recorded):
    """One golden file: arrays, the batch, and the method with the recorded weights."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        centering = "sinkhorn_knopp" if "sinkhorn" in path.name else "centering"
        self.method = small_dinov2(separate_head="separate" in path.name, centering=centering)
        for name in ("student", "teacher"):
            getattr(self.method, name).load_state_dict(self.below(f"{name}/"), strict=True)

    @property
    def batch(self) -> Batch:
        return Batch(
            global_crops=self["batch/collated_global_crops"],
            local_crops=self["batch/collated_local_crops"],
            masks=self["batch/collated_masks"],
            mask_indices=self["batch/mask_indices_list"],
            mask_weights=self["batch/masks_weight"],
            positions=torch.arange(4),
            samples=torch.arange(4),
        )


@pytest.fixture(params=FILES)
def recorded(request: pytest.FixtureRequest, golden_dir: Path) -> RecordedSteps:
    return RecordedSteps(golden_dir / request.param)


def test_two_steps_have_the_recorded_losses_gradients_and_centres(recorded: RecordedSteps) -> None:
    method = recorded.method
    for step in ("step0", "step1"):
        losses = method.losses(recorded.batch, recorded[f"{step}/teacher_temp"].item())
        assert_close_by_name(losses.terms, recorded.below(f"{step}/loss/"), **TOLERANCE)

        method.zero_grad()
        losses.total.backward()
        assert_close_by_name(gradients_of(method), recorded.below(f"{step}/grad/"), **GRADIENT_TOLERANCE)

        method.update_teacher(1.0)
        centres = {name: value for name, value in method.state_dict().items() if name.endswith("center")}
        if f"{step}/dino_center" in recorded.arrays:
            torch.testing.assert_close(centres["cls_targets.center"], recorded[f"{step}/dino_center"], **TOLERANCE)
            torch.testing.assert_close(centres["patch_targets.center"], recorded[f"{step}/ibot_center"][0], **TOLERANCE)
        else:
            assert not centres


def test_the_recorded_masks_are_understood_as_ours(recorded: RecordedSteps) -> None:
    ours = with_masks(recorded.batch, recorded.batch.masks)
    assert torch.equal(ours.mask_indices, recorded.batch.mask_indices)
    torch.testing.assert_close(ours.mask_weights, recorded.batch.mask_weights)


@pytest.mark.parametrize("koleo_group_size", [2, 8], ids=["groups within a rank", "groups across ranks"])
@pytest.mark.parametrize("centering", ["centering", "sinkhorn_knopp"])
def test_the_mean_over_two_ranks_is_the_global_batchs_gradient(centering: str, koleo_group_size: int) -> None:
    batch = random_batch(num_samples=8)
    whole = small_dinov2(centering=centering, koleo_group_size=koleo_group_size)
    expected = two_steps(whole, batch)

    def run(rank: int, total: Total) -> Losses:
        method, share = methods[rank], shares[rank]
        method.gather = lambda own: gathered(own, rank, total)
        for targets in (method.cls_targets, method.patch_targets):
            targets.total = total
        return two_steps(method, share)

    # Built before the threads start, which share torch's generator.
    methods = [small_dinov2(centering=centering, koleo_group_size=koleo_group_size) for _ in range(2)]
    shares = shares_of(batch, 2)
    losses = on_ranks([partial(run, rank) for rank in range(2)])

    mean_terms = {name: (losses[0].terms[name] + losses[1].terms[name]) / 2 for name in expected.terms}
    assert_close_by_name(mean_terms, expected.terms, **TOLERANCE)
    ours = [gradients_of(method) for method in methods]
    mean_gradients = {name: (ours[0][name] + ours[1][name]) / 2 for name in ours[0]}
    assert_close_by_name(mean_gradients, gradients_of(whole), **GRADIENT_TOLERANCE)
    for method in methods:
        assert_close_by_name(buffers_of(method), buffers_of(whole), **TOLERANCE)


@pytest.mark.parametrize("separate_head", [False, True])
@pytest.mark.parametrize("centering", ["centering", "sinkhorn_knopp"])
def test_a_batch_without_masked_patches_is_finite_and_every_parameter_gets_a_gradient(
    centering: str, separate_head: bool
) -> None:
    method = small_dinov2(centering=centering, separate_head=separate_head)
    losses = two_steps(method, random_batch(masked_share=0.0))
    assert losses.terms["ibot_loss"] == 0
    assert torch.isfinite(losses.total)
    gradients = gradients_of(method)
    assert gradients.keys() == dict(method.student.named_parameters()).keys()
    assert all(torch.isfinite(gradient).all() for gradient in gradients.values())
    assert not any(gradient.any() for name, gradient in gradients.items() if name.startswith("ibot_head"))


@pytest.mark.parametrize("centering", ["centering", "sinkhorn_knopp"])
def test_bf16_autocast_gives_losses_near_fp32(centering: str) -> None:
    batch = random_batch()
    exact = small_dinov2(centering=centering).losses(batch, 0.07)
    method = small_dinov2(centering=centering)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = method.losses(batch, 0.07)
    rounded.total.backward()
    assert rounded.total.dtype == torch.float32
    assert_close_by_name(rounded.terms, exact.terms, atol=2e-2, rtol=2e-2)
    assert all(torch.isfinite(gradient).all() for gradient in gradients_of(method).values())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("centering", ["centering", "sinkhorn_knopp"])
def test_losses_on_cuda_in_bf16_are_near_those_on_cpu_in_fp32(centering: str) -> None:
    batch = random_batch()
    exact = small_dinov2(centering=centering).losses(batch, 0.07)
    method, device = small_dinov2(centering=centering).cuda(), torch.device("cuda")
    with torch.autocast("cuda", torch.bfloat16):
        rounded = method.losses(batch.to(device), 0.07)
    rounded.total.backward()
    on_cpu = {name: term.cpu() for name, term in rounded.terms.items()}
    assert_close_by_name(on_cpu, exact.terms, atol=2e-2, rtol=2e-2)
    assert all(torch.isfinite(gradient).all() for gradient in gradients_of(method).values())


def test_the_teacher_has_the_prefixes_of_exported_checkpoints() -> None:
    def prefixes(method: DINOv2) -> set[str]:
        return {name.partition(".")[0] for name in method.teacher.state_dict()}

    assert prefixes(small_dinov2()) == {"backbone", "dino_head"}
    assert prefixes(small_dinov2(separate_head=True)) == {"backbone", "dino_head", "ibot_head"}


def test_the_teacher_follows_the_student_and_is_never_in_training_mode() -> None:
    method = small_dinov2(drop_path_rate=0.5).train()
    assert method.student.training
    assert not any(module.training for module in method.teacher.modules())
    assert not any(parameter.requires_grad for parameter in method.teacher.parameters())
    before = method.teacher.backbone.norm.weight.clone()
    with torch.no_grad():
        method.student.backbone.norm.weight += 1
    method.update_teacher(0.75)
    torch.testing.assert_close(method.teacher.backbone.norm.weight, before + 0.25)


def test_training_works_without_local_crops() -> None:
    losses = two_steps(small_dinov2(), random_batch(num_local=0))
    assert losses.terms["dino_local_crops_loss"] == 0
    assert torch.isfinite(losses.total)


def gathered(own: torch.Tensor, rank: int, total: Total) -> torch.Tensor:
    """The rows of both ranks; the other's without a gradient."""
    rows = torch.zeros(2, *own.shape)
    rows[rank] = own.detach()
    parts = list(total(rows))
    parts[rank] = own
    return torch.cat(parts)


def two_steps(method: DINOv2, batch: Batch) -> Losses:
    """Two passes, so that the second uses the centres of the first; the gradients are the second's."""
    for _ in range(2):
        method.zero_grad()
        losses = method.losses(batch, 0.07)
        losses.total.backward()
        method.update_teacher(1.0)
    return losses


def gradients_of(method: DINOv2) -> dict[str, Tensor]:
    return {name: p.grad for name, p in method.student.named_parameters() if p.grad is not None}


def buffers_of(method: DINOv2) -> dict[str, Tensor]:
    return dict(method.named_buffers())


def assert_close_by_name(ours: dict[str, Tensor], expected: dict[str, Tensor], **tolerance: float) -> None:
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(ours[name], value, **tolerance, msg=lambda text, name=name: f"{name}: {text}")

"""One optimiser step: losses of a batch, gradients, clipping, update of the student, then of the teacher."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.amp import GradScaler
from torch.optim import AdamW, Optimizer

from pathfm.batch import Batch
from pathfm.dist.collect import average_over_ranks_, sum_over_ranks
from pathfm.random_streams import derived_seed
from pathfm.schedule import StepValues
from pathfm.ssl.method import Method
from pathfm.ssl.param_groups import apply_schedule, parameter_groups
from pathfm.training.config import OptimConfig, TrainConfig
from pathfm.training.state import TrainingState


def compute_dtype(train: TrainConfig) -> torch.dtype:
    """Of matrix products and attention in the forward and backward pass."""
    return torch.bfloat16 if train.precision == "bf16" else torch.float32


def build_optimizer(method: Method, config: OptimConfig, device: torch.device) -> Optimizer:
    """AdamW over the student's parameter groups. Its moments exist from the start, so that step 0 can be saved."""
    groups = parameter_groups(
        method.student, layerwise_decay=config.layerwise_decay, patch_embed_lr_mult=config.patch_embed_lr_mult
    )
    # Fused on CUDA: a step with a non-finite gradient is then passed over on the device, without asking the host.
    fused = True if device.type == "cuda" else None
    optimizer = AdamW(groups, betas=(config.adamw_beta1, config.adamw_beta2), fused=fused)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    zeros = {index: _no_moments(parameter) for index, parameter in enumerate(parameters)}
    optimizer.load_state_dict({"state": zeros, "param_groups": optimizer.state_dict()["param_groups"]})
    return optimizer


def _no_moments(parameter: Tensor) -> dict[str, Tensor]:
    """What AdamW itself begins with at its first step."""
    return {
        "step": torch.zeros(()),
        "exp_avg": torch.zeros_like(parameter),
        "exp_avg_sq": torch.zeros_like(parameter),
    }


def build_scaler(device: torch.device) -> GradScaler:
    """Here to pass over steps with non-finite gradients, not to scale: fp32 and bf16 have the range they need."""
    return GradScaler(device.type, init_scale=1.0)


def train_step(
    state: TrainingState, batch: Batch, values: StepValues, train: TrainConfig, optim: OptimConfig, rank: int
) -> None:
    """One step on this rank's share of the global batch. Metrics go to `state.meter` and stay on the device.

    A step whose loss or gradient norm is not finite on some rank changes neither the student nor its optimiser state.
    """
    device = batch.global_crops.device
    # Drop path draws from torch's generators; seeding them by step and rank makes a resumed step draw the same.
    torch.manual_seed(derived_seed(train.seed, state.step, f"drop path of rank {rank}"))
    apply_schedule(state.optimizer, values)
    with torch.autocast(device.type, torch.bfloat16, enabled=compute_dtype(train) == torch.bfloat16):
        losses = state.method.losses(batch.normalised(), values.teacher_temp)
    state.scaler.scale(losses.total).backward()
    average_over_ranks_(list(_gradients(state)))
    norms = _clip(state, optim.clip_grad)
    finite = _finite_on_all_ranks(losses.total.detach(), *norms.values())
    _step_if(finite, state)
    state.method.update_teacher(values.momentum)
    state.step += 1
    state.meter.add({"total_loss": losses.total.detach(), **losses.terms, **norms, "finite": finite})


def _finite_on_all_ranks(*numbers: Tensor) -> Tensor:
    """A bool on the device; the host is not asked."""
    mine = torch.stack([torch.isfinite(number) for number in numbers]).all()
    return sum_over_ranks((~mine).float()) == 0


def _step_if(finite: Tensor, state: TrainingState) -> None:
    """The scaler passes over a step in which it meets one gradient that is not finite, without asking the host."""
    next(_gradients(state)).add_(torch.where(finite, 0.0, torch.nan))
    state.scaler.step(state.optimizer)
    state.scaler.update(1.0)  # it would halve its scale after such a step
    state.optimizer.zero_grad(set_to_none=True)


def _gradients(state: TrainingState) -> Iterator[Tensor]:
    for parameter in state.method.student.parameters():
        if parameter.grad is not None:
            yield parameter.grad


def _clip(state: TrainingState, limit: float) -> dict[str, Tensor]:
    """Clip every part (backbone, each head) to the limit by itself, as DINOv2 does. Returns the norms before."""
    norms = {}
    for name, part in state.method.student.named_children():
        norms[f"grad_norm/{name}"] = torch.nn.utils.clip_grad_norm_(part.parameters(), limit or float("inf"))
    return norms

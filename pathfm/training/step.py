"""One optimiser step: losses of a batch, gradients, clipping, update of the student, then of the teacher."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer

from pathfm.batch import Batch
from pathfm.dist.collect import gather_rows, sum_over_ranks
from pathfm.dist.env import Ranks
from pathfm.parallel.apply import finish_gradients
from pathfm.parallel.tensors import whole_from_all
from pathfm.random_streams import derived_seed
from pathfm.schedule import StepValues
from pathfm.ssl.health import Look, Probe
from pathfm.ssl.method import Losses, Method
from pathfm.ssl.param_groups import apply_schedule, parameter_groups
from pathfm.training.config import OptimConfig, TrainConfig
from pathfm.training.loss_scale import LossScale
from pathfm.training.state import TrainingState

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.bfloat16}


def compute_dtype(train: TrainConfig) -> torch.dtype:
    """Of matrix products and attention in the forward and backward pass; with fp8, of all but blocks' linear layers."""
    return _DTYPES[train.precision]


def build_optimizer(method: Method, config: OptimConfig) -> Optimizer:
    """AdamW over the student's parameter groups. Its moments exist from the start, so that step 0 can be saved."""
    groups = parameter_groups(
        method.student, layerwise_decay=config.layerwise_decay, patch_embed_lr_mult=config.patch_embed_lr_mult
    )
    # Fused: a step that is to be passed over is passed over on the device, without asking the host.
    optimizer = AdamW(groups, betas=(config.adamw_beta1, config.adamw_beta2), fused=True)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    zeros = {index: _no_moments(parameter) for index, parameter in enumerate(parameters)}
    optimizer.load_state_dict({"state": zeros, "param_groups": optimizer.state_dict()["param_groups"]})
    return optimizer


def _no_moments(parameter: Tensor) -> dict[str, Tensor]:
    """What AdamW itself begins with at its first step."""
    return {
        "step": torch.zeros((), device=parameter.device),
        "exp_avg": torch.zeros_like(parameter),
        "exp_avg_sq": torch.zeros_like(parameter),
    }


def build_loss_scale(train: TrainConfig, device: torch.device) -> LossScale:
    return LossScale(device, dynamic=train.precision == "fp16")


def train_step(
    state: TrainingState,
    parts: Sequence[Batch],
    values: StepValues,
    train: TrainConfig,
    optim: OptimConfig,
    ranks: Ranks,
) -> None:
    """One step on this rank's share of the global batch, which comes in equal parts. All ranks call this together.

    Metrics go to `state.meter` and stay on the device; before a report they tell of the representation's health too.
    A step whose loss or gradient norm is not finite on some rank changes neither the student nor its optimiser state.
    """
    apply_schedule(state.optimizer, values)
    probe = _probe(state, train, ranks)
    metrics = _backpropagated(state, parts, values.teacher_temp, train, ranks.rank, probe.look if probe else None)
    health = probe.read() if probe else {}
    _unscale(state)
    norms = _clip(state.method, optim)
    loss_finite, finite = _finite_on_all_ranks(metrics["total_loss"], *norms.values())
    accident = ~loss_finite | (~finite & ~state.loss_scale.can_shrink())
    _step_if(finite, state)
    state.method.update_teacher(values.momentum)
    state.step += 1
    state.meter.add({**metrics, **norms, **health, "finite": finite, "accident": accident})


def _probe(state: TrainingState, train: TrainConfig, ranks: Ranks) -> Probe | None:
    """At the last step before a report."""
    if (state.step + 1) % train.log_every_steps:
        return None
    return Probe(sum_over_ranks, gather_rows, ranks.world_size)


def _backpropagated(
    state: TrainingState, parts: Sequence[Batch], teacher_temp: float, train: TrainConfig, rank: int, look: Look | None
) -> dict[str, Tensor]:
    """Gradients of the batch; returns the means of its losses over this rank's parts."""

    def redraw(part: int) -> None:
        # Drop path draws from torch's generators; seeding them by step, rank and part makes a resumed step draw the
        # same, and a part that is seen twice look the same.
        torch.manual_seed(derived_seed(train.seed, state.step, f"drop path of rank {rank} part {part}"))

    device = parts[0].positions.device
    sums: dict[str, Tensor] = {}
    losses_of_parts = state.method.losses_of_parts(parts, teacher_temp, redraw, look)
    for number, losses in enumerate(_under_autocast(losses_of_parts, device, compute_dtype(train))):
        finish_gradients(state.method.student, is_last_part=number == len(parts) - 1)
        (losses.total * state.loss_scale.value / len(parts)).backward()
        for name, term in {"total_loss": losses.total.detach(), **losses.terms}.items():
            sums[name] = sums.get(name, 0) + term / len(parts)
    return sums


def _under_autocast(losses: Iterator[Losses], device: torch.device, dtype: torch.dtype) -> Iterator[Losses]:
    """The forward passes only: backward ones take over what theirs computed in."""
    while True:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            part = next(losses, None)
        if part is None:
            return
        yield part


def _unscale(state: TrainingState) -> None:
    if state.loss_scale.dynamic:
        for parameter in state.method.student.parameters():
            if parameter.grad is not None:
                parameter.grad.div_(state.loss_scale.value)


def _clip(method: Method, optim: OptimConfig) -> dict[str, Tensor]:
    """Clip every part (backbone, each head) to the limit by itself, or every parameter. Returns the parts' norms.

    The norms are those before. All ranks call this together: where weights are sharded, each norm is a collective.
    """
    limit, norms = optim.clip_grad or float("inf"), {}
    for name, part in method.student.parts().items():
        trained = [parameter for parameter in part.parameters() if parameter.grad is not None]
        clipped_together = [trained] if optim.clip_grad_of == "part" else [[parameter] for parameter in trained]
        found = [whole_from_all(torch.nn.utils.clip_grad_norm_(group, limit)) for group in clipped_together]
        norms[f"grad_norm/{name}"] = found[0] if len(found) == 1 else torch.linalg.vector_norm(torch.stack(found))
    return norms


def _finite_on_all_ranks(loss: Tensor, *norms: Tensor) -> tuple[Tensor, Tensor]:
    """Whether the loss is, and whether loss and norms are: bools on the device; the host is not asked."""
    loss_bad = ~torch.isfinite(loss)
    any_bad = loss_bad | ~torch.stack([torch.isfinite(norm) for norm in norms]).all()
    bad_ranks = sum_over_ranks(torch.stack([loss_bad, any_bad]).float())
    return bad_ranks[0] == 0, bad_ranks[1] == 0


def _step_if(finite: Tensor, state: TrainingState) -> None:
    """AdamW passes over a step for which it is told that infinities were found, and does not count it."""
    state.optimizer.found_inf = (~finite).float()  # type: ignore[attr-defined]
    state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=True)
    state.loss_scale.update(finite)

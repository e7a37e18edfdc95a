"""From a recipe to steps: batch sizes, epoch length, total steps and every schedule. No torch: login nodes plan too."""

import math
from dataclasses import dataclass

from pathfm.errors import UserError
from pathfm.schedule import CosineSchedule, StepSchedules
from pathfm.ssl.config import DinoConfig, TeacherConfig
from pathfm.training.config import OptimConfig, TrainConfig


@dataclass(frozen=True)
class TrainingPlan:
    """All that follows from the recipe, the number of samples and the number of ranks."""

    global_batch_size: int
    epoch_length: int  # steps
    total_steps: int
    parts: int  # that a rank's share of the batch passes the network in
    koleo_group_size: int  # samples
    peak_lr: float
    schedules: StepSchedules

    def place(self, step: int) -> dict[str, float]:
        """Where a step lies, as every line of metrics begins."""
        samples = step * self.global_batch_size
        return {"step": step, "samples_seen": samples, "epoch": step / self.epoch_length}


def global_batch_size(train: TrainConfig, world_size: int) -> int:
    return train.global_batch_size or train.batch_size_per_gpu * world_size


def plan_training(
    train: TrainConfig,
    optim: OptimConfig,
    teacher: TeacherConfig,
    dino: DinoConfig,
    world_size: int,
    epoch_size: int | None,
) -> TrainingPlan:
    """`epoch_size`: samples in an epoch, where the data set is at hand.

    Raises `UserError` when the batch is larger than an epoch or cannot be shared by the ranks, and when neither the
    data set nor the recipe gives the epoch length.
    """
    batch = global_batch_size(train, world_size)
    if batch % world_size:
        fitting = [str(ranks) for ranks in range(1, batch + 1) if batch % ranks == 0]
        several = f"{', '.join(fitting[:-1])} or {fitting[-1]}" if len(fitting) > 1 else fitting[0]
        raise UserError(
            f"a global batch of {batch} cannot be shared equally by {world_size} ranks; a run keeps the batch that it "
            f"was begun with, so take {several} ranks"
        )
    if epoch_size is not None and batch > epoch_size:
        raise UserError(
            f"the global batch of {batch} is larger than an epoch of {epoch_size} samples; "
            f"set {_batch_key(train)} to {_largest_batch(train, epoch_size, world_size)} or less"
        )
    epoch_length = train.epoch_length or (epoch_size // batch if epoch_size else None)
    if epoch_length is None:
        raise UserError("the length of an epoch is unknown: name a data set (train.dataset_path) or train.epoch_length")
    total_steps = optim.total_steps or max(1, round(optim.epochs * epoch_length))
    peak_lr = optim.base_lr * _batch_factor(optim.scaling_rule, batch)
    schedules = _schedules(optim, teacher, peak_lr, total_steps)
    parts, koleo_group = _parts(train, batch // world_size), _koleo_group(train, dino, batch)
    if dino.use_bn_in_head and parts > 1:
        raise UserError(
            f"dino.use_bn_in_head needs a rank's {batch // world_size} samples at once, not in {parts} parts; raise "
            f"train.micro_batch_size to {batch // world_size}, or take more ranks"
        )
    return TrainingPlan(batch, epoch_length, total_steps, parts, koleo_group, peak_lr, schedules)


def _parts(train: TrainConfig, rank_batch: int) -> int:
    """The fewest equal parts that each fit."""
    at_once = train.micro_batch_size or train.batch_size_per_gpu
    return next(n for n in range(1, rank_batch + 1) if rank_batch % n == 0 and rank_batch // n <= at_once)


def _koleo_group(train: TrainConfig, dino: DinoConfig, batch: int) -> int:
    # DINOv2 spreads the features within a rank's batch; we do so within groups of the size that the recipe calls a
    # rank's batch, so that another number of ranks changes nothing.
    group = dino.koleo_group_size or min(train.batch_size_per_gpu, batch)
    if dino.koleo_loss_weight and batch % group:
        raise UserError(
            f"a global batch of {batch} is not a whole number of KoLeo's groups of {group} samples; "
            "set dino.koleo_group_size to a divisor of the batch"
        )
    return group


def _batch_key(train: TrainConfig) -> str:
    return "train.global_batch_size" if train.global_batch_size else "train.batch_size_per_gpu"


def _largest_batch(train: TrainConfig, epoch_size: int, world_size: int) -> int:
    per_rank = max(1, epoch_size // world_size)
    return per_rank * world_size if train.global_batch_size else per_rank


def _batch_factor(rule: str, batch: int) -> float:
    return math.sqrt(batch / 1024) if rule == "sqrt_wrt_1024" else batch / 256


def _schedules(optim: OptimConfig, teacher: TeacherConfig, peak_lr: float, total_steps: int) -> StepSchedules:
    def steps(fraction: float) -> int:
        return int(fraction * total_steps)

    temp_steps = steps(teacher.warmup_teacher_temp_pct)
    return StepSchedules(
        lr=CosineSchedule(peak_lr, optim.min_lr, total_steps, steps(optim.warmup_pct)),
        weight_decay=CosineSchedule(optim.weight_decay, optim.weight_decay_end, total_steps),
        momentum=CosineSchedule(teacher.momentum_teacher, teacher.final_momentum_teacher, total_steps),
        # A warm-up that fills its whole schedule, then the final value, as DINOv2 builds it.
        teacher_temp=CosineSchedule(
            teacher.teacher_temp, teacher.teacher_temp, temp_steps, temp_steps, teacher.warmup_teacher_temp
        ),
        last_layer_frozen_steps=steps(optim.freeze_last_layer_pct),
        backbone_frozen_steps=steps(optim.freeze_backbone_pct),
    )

"""Schedules: a value for every optimiser step, as arithmetic, so that any step can be asked for at once."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class CosineSchedule:
    """Zero while frozen, a linear warm-up, then half a cosine from `base` to `final` (DINOv2's schedule, float64).

    `warmup_steps` counts from step 0 and includes neither frozen steps nor the cosine; after `total_steps` the
    value stays `final`. The warm-up's last value is `base` itself, as numpy.linspace includes its end.
    """

    base: float
    final: float
    total_steps: int
    warmup_steps: int = 0
    start_warmup: float = 0.0
    frozen_steps: int = 0

    def __call__(self, step: int) -> float:
        if step >= self.total_steps:
            return self.final
        if step < self.frozen_steps:
            return 0.0
        step -= self.frozen_steps
        if step < self.warmup_steps:
            ramp = step / (self.warmup_steps - 1) if self.warmup_steps > 1 else 0.0
            return self.start_warmup + ramp * (self.base - self.start_warmup)
        step -= self.warmup_steps
        cosine_steps = self.total_steps - self.warmup_steps - self.frozen_steps
        return self.final + 0.5 * (self.base - self.final) * (1 + math.cos(math.pi * step / cosine_steps))


@dataclass(frozen=True)
class StepSchedules:
    """Everything that changes from step to step; `at(step)` is what the training step is handed."""

    lr: CosineSchedule
    weight_decay: CosineSchedule
    momentum: CosineSchedule
    teacher_temp: CosineSchedule
    last_layer_frozen_steps: int = 0
    backbone_frozen_steps: int = 0

    def at(self, step: int) -> "StepValues":
        lr = self.lr(step)
        return StepValues(
            lr=lr,
            last_layer_lr=0.0 if step < self.last_layer_frozen_steps else lr,
            weight_decay=self.weight_decay(step),
            momentum=self.momentum(step),
            teacher_temp=self.teacher_temp(step),
            backbone_is_frozen=step < self.backbone_frozen_steps,
        )


@dataclass(frozen=True)
class StepValues:
    """What the schedules say at one step."""

    lr: float
    last_layer_lr: float  # of the prototypes, which stay frozen at first
    weight_decay: float
    momentum: float  # of the teacher's moving average
    teacher_temp: float
    backbone_is_frozen: bool = False  # while new heads learn what to ask of a backbone that was trained before

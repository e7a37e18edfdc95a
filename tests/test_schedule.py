"""Schedules against DINOv2's recorded ones."""

import ast
from pathlib import Path

import numpy as np
import pytest

from pathfm.schedule import CosineSchedule, StepSchedules


@pytest.mark.parametrize("name", ["lr", "wd", "momentum", "teacher_temp", "frozen"])
def test_every_step_has_its_recorded_value(name: str, golden_dir: Path) -> None:
    arrays = np.load(golden_dir / "dinov2_schedules.npz")
    recorded, config = arrays[name], ast.literal_eval(str(arrays[f"{name}/config"]))
    schedule = CosineSchedule(
        base=config["base_value"],
        final=config["final_value"],
        total_steps=config["total_iters"],
        warmup_steps=config.get("warmup_iters", 0),
        start_warmup=config.get("start_warmup_value", 0.0),
        frozen_steps=config.get("freeze_iters", 0),
    )
    np.testing.assert_allclose([schedule(step) for step in range(len(recorded))], recorded, atol=1e-12, rtol=1e-12)


def test_the_last_layer_is_frozen_at_first_and_then_learns_as_the_rest() -> None:
    constant = CosineSchedule(base=1.0, final=1.0, total_steps=10)
    schedules = StepSchedules(constant, constant, constant, constant, last_layer_frozen_steps=2)
    assert [schedules.at(step).last_layer_lr for step in range(4)] == [0.0, 0.0, 1.0, 1.0]
    assert [schedules.at(step).lr for step in range(4)] == [1.0] * 4

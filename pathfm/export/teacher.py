"""The teacher's weights as others load them: the ancestors' .pth and safetensors."""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from pathfm.files import written_aside


def export_teacher(
    teacher: Mapping[str, Tensor], directory: Path, step: int, name: str | None = None
) -> tuple[Path, Path]:
    """Write `teacher_STEP.pth` ({"teacher": state dict}) and `teacher_STEP.safetensors`; returns both paths.

    `name`: in place of the step, for a file that is to be replaced by the next of that name.

    Raises `OSError` when the disk does not take them.
    Keys are prefixed `backbone.`, `dino_head.` and, where the head is separate, `ibot_head.`.
    """
    weights = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in teacher.items()}
    name = name or f"{step:08d}"
    pth, tensors = directory / f"teacher_{name}.pth", directory / f"teacher_{name}.safetensors"
    try:
        with written_aside(pth) as aside:
            torch.save({"teacher": weights}, aside)
        with written_aside(tensors) as aside:
            save_file(weights, aside, metadata={"format": "pt", "step": str(step)})
            aside.chmod(pth.stat().st_mode)  # save_file lets nobody else read
    except (RuntimeError, SafetensorError) as error:  # both wrap the operating system's error
        raise OSError(" ".join(str(error).split())) from error
    return pth, tensors

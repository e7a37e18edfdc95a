"""A method from its settings."""

from typing import Any

from pathfm.models.build import build_backbone
from pathfm.models.config import StudentConfig
from pathfm.ssl.config import DinoConfig, IbotConfig, MethodName
from pathfm.ssl.dino import DINO
from pathfm.ssl.dinov2 import DINOv2


def build_method(
    name: MethodName, student: StudentConfig, image_size: int, dino: DinoConfig, ibot: IbotConfig, **settings: Any
) -> DINOv2:
    """`image_size`: of the global crops, as for `build_backbone`. `settings`: those of `DINOv2` by name."""
    masks = name == "dinov2"
    trained = build_backbone(student, image_size, drop_path=True, has_mask_token=masks)
    teacher = build_backbone(student, image_size, drop_path=False, has_mask_token=masks)
    if name == "dino":
        return DINO(trained, teacher, dino, **settings)
    return DINOv2(trained, teacher, dino, ibot, **settings)

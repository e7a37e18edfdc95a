"""DINO (arXiv 2104.14294): a student matches its moving-average teacher on class tokens, across crops of a sample.

It is DINOv2 without the loss on patches: nothing is masked, so its networks need no mask token. Its own are the options
of the head (`DinoConfig.norm_last_layer`, `use_bn_in_head`) and the defaults of its recipes (`recipe.py`).
"""

from typing import Any

from pathfm.models.vit import ViT
from pathfm.ssl.config import DinoConfig, IbotConfig
from pathfm.ssl.dinov2 import DINOv2


class DINO(DINOv2):
    """The loss is the mean over all pairs of a teacher's view and another of the student's.

    `settings`: those of `DINOv2` by name.
    """

    def __init__(self, student_backbone: ViT, teacher_backbone: ViT, dino: DinoConfig, **settings: Any) -> None:
        super().__init__(student_backbone, teacher_backbone, dino, IbotConfig(loss_weight=0.0), **settings)

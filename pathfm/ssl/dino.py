"""DINO (arXiv 2104.14294): a student matches its moving-average teacher on class tokens, across crops of a sample.

It is DINOv2 without the loss on patches: nothing is masked, so its networks need no mask token. Its own are the options
of the head (`DinoConfig.norm_last_layer`, `use_bn_in_head`) and the defaults of its recipes (`recipe.py`).
"""

from pathfm.models.vit import ViT
from pathfm.ssl.config import Centering, DinoConfig, IbotConfig
from pathfm.ssl.dinov2 import DINOv2
from pathfm.ssl.targets import Gather, Total, alone


class DINO(DINOv2):
    """See `DINOv2`, of whose arguments it has those that speak of class tokens. The loss is the mean over all pairs of
    a teacher's view and another of the student's."""

    def __init__(
        self,
        student_backbone: ViT,
        teacher_backbone: ViT,
        dino: DinoConfig,
        *,
        centering: Centering = "centering",
        koleo_group_size: int | None = None,
        total: Total = alone,
        total_with_gradient: Total = alone,
        gather: Gather = alone,
    ) -> None:
        super().__init__(
            student_backbone,
            teacher_backbone,
            dino,
            IbotConfig(loss_weight=0.0),
            centering=centering,
            koleo_group_size=koleo_group_size,
            total=total,
            total_with_gradient=total_with_gradient,
            gather=gather,
        )

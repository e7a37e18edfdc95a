"""Settings of self-distillation (recipe groups `dino`, `ibot`, `teacher`)."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from pathfm.config import Section

MethodName = Literal["dinov2", "dino"]
Centering = Literal["centering", "sinkhorn_knopp"]

Weight = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(gt=0)]
Temperature = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]


class DinoConfig(Section):
    """The loss on class tokens and its head."""

    loss_weight: Weight = 1.0  # DINOv2's default recipe
    head_n_prototypes: Count = 65536  # DINOv2's default recipe; 131072 for ViT-L and ViT-g
    head_bottleneck_dim: Count = 256  # DINOv2's default recipe; 384 for ViT-L and ViT-g
    head_nlayers: Count = 3  # DINOv2's default recipe
    head_hidden_dim: Count = 2048  # DINOv2's default recipe
    norm_last_layer: bool = (
        False  # DINOv2 learns the prototypes' lengths; DINO fixes them for stability with small ViTs
    )
    use_bn_in_head: bool = False  # DINO, appendix C: batch norm between the head's layers, over all ranks
    koleo_loss_weight: Weight = 0.1  # DINOv2 section 4, "KoLeo regularizer"
    # Samples among which KoLeo looks for nearest neighbours. None: the recipe's batch_size_per_gpu, as in DINOv2, where
    # it is one GPU's share; fixed here, so that another number of ranks changes nothing.
    koleo_group_size: Annotated[int, Field(ge=2)] | None = None


class IbotConfig(Section):
    """The loss on masked patches and its head."""

    loss_weight: Weight = 1.0  # DINOv2's default recipe
    mask_sample_probability: Share = (
        0.5  # DINOv2's default recipe (iBOT, arXiv 2111.07832, masks half of the crops too)
    )
    mask_ratio_min_max: tuple[Share, Share] = (0.1, 0.5)  # DINOv2's default recipe
    separate_head: bool = False  # DINOv2's default recipe; true for ViT-L and ViT-g (section 4, "untying head weights")
    head_n_prototypes: Count = 65536  # as the class tokens' head; read when the head is separate
    head_bottleneck_dim: Count = 256
    head_nlayers: Count = 3
    head_hidden_dim: Count = 2048

    @model_validator(mode="after")
    def _ratios_are_ordered(self) -> "IbotConfig":
        low, high = self.mask_ratio_min_max
        if low > high:
            raise ValueError(f"mask_ratio_min_max must be [smaller, larger], not [{low}, {high}]")
        return self


class TeacherConfig(Section):
    """The moving average and the temperature of its targets."""

    momentum_teacher: Share = 0.992  # DINOv2's default recipe; 0.994 for ViT-L and ViT-g
    final_momentum_teacher: Share = 1.0  # DINOv2's default recipe
    warmup_teacher_temp: Temperature = 0.04  # DINOv2's default recipe
    teacher_temp: Temperature = 0.07  # DINOv2's default recipe
    warmup_teacher_temp_pct: Share = 0.3  # DINOv2: 30 of 100 epochs

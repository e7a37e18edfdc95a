"""DINOv2 (arXiv 2304.07193): a student matches its moving-average teacher on class tokens and on masked patches.

B samples   G global crops per sample   V local crops per sample   L patches of a global crop   M masked patches
D width   K prototypes. Crops are view-major: crop v of sample b is row v * B + b.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pathfm.batch import Batch
from pathfm.models.head import DINOHead
from pathfm.models.vit import Features, ViT
from pathfm.ssl.config import Centering, DinoConfig, IbotConfig
from pathfm.ssl.losses import dino_cross_entropy, ibot_cross_entropy, koleo
from pathfm.ssl.method import Losses, Method
from pathfm.ssl.targets import Centring, Gather, SinkhornKnopp, Total, alone, build_targets
from pathfm.ssl.teacher import follow, start_as_copy


@dataclass(frozen=True)
class Targets:
    """What the teacher asks of the student."""

    cls: Float[Tensor, "G B K"]
    patches: Float[Tensor, "M Kp"] | None  # None without an iBOT loss


@dataclass(frozen=True)
class Answers:
    """What the student says."""

    cls: Float[Tensor, "G B D"]  # of the global crops
    global_logits: Float[Tensor, "G B K"]
    local_logits: Float[Tensor, "V B K"]
    patch_logits: Float[Tensor, "M Kp"]


class DINOv2(Method):
    """Student, teacher and the losses between them.

    `student` and `teacher` hold `backbone`, `dino_head` and, when iBOT's head is separate, `ibot_head`; these are the
    prefixes of the ancestors' checkpoints. `total` sums over ranks (see `targets`), `gather` joins the rows of all
    ranks, of which only this rank's carry a gradient. The backbones must have the same parameters; the teacher starts
    as a copy of the student, and stays in evaluation mode.
    `koleo_group_size` (samples) must divide the global batch; None takes the rank's batch as one group.
    """

    def __init__(
        self,
        student_backbone: ViT,
        teacher_backbone: ViT,
        dino: DinoConfig,
        ibot: IbotConfig,
        *,
        centering: Centering = "centering",
        koleo_group_size: int | None = None,
        total: Total = alone,
        gather: Gather = alone,
    ) -> None:
        super().__init__()
        self.dino = dino
        self.ibot = ibot
        self.koleo_group_size = koleo_group_size
        self.gather = gather
        has_patch_loss = ibot.loss_weight > 0
        self.patch_head = "ibot_head" if has_patch_loss and ibot.separate_head else "dino_head"
        self.student = self._with_heads(student_backbone)
        self.teacher = self._with_heads(teacher_backbone)
        start_as_copy(self.teacher, self.student)
        self.cls_targets = build_targets(centering, dino.head_n_prototypes, total)
        patch_prototypes = (ibot if self.patch_head == "ibot_head" else dino).head_n_prototypes
        self.patch_targets = build_targets(centering, patch_prototypes, total) if has_patch_loss else None

    def losses(self, batch: Batch, teacher_temp: float) -> Losses:
        """The weighted total, and each term scaled as DINOv2 logs it, for a rank's share of a batch (float crops).

        All ranks call this together.
        """
        self._check(batch)
        targets = self._targets(batch, teacher_temp)
        answers = self._answers(batch)

        global_pairs = batch.num_global_crops * (batch.num_global_crops - 1)
        local_pairs = batch.num_global_crops * batch.num_local_crops
        all_pairs = global_pairs + local_pairs
        local_loss = dino_cross_entropy(answers.local_logits, targets.cls, same_views=False) * local_pairs / all_pairs
        global_loss = dino_cross_entropy(answers.global_logits, targets.cls, same_views=True) * global_pairs / all_pairs
        koleo_loss = self._koleo(answers.cls)
        total = self.dino.loss_weight * (local_loss + global_loss) + koleo_loss
        terms = {
            "dino_local_crops_loss": local_loss,
            "dino_global_crops_loss": global_loss,
            "koleo_loss": koleo_loss / 2,  # halved as DINOv2 logs it, so that its curves can be compared
        }
        if targets.patches is not None:
            ibot_loss = ibot_cross_entropy(
                answers.patch_logits, targets.patches, batch.mask_weights, num_crops=len(batch.global_crops)
            )
            total = total + self.ibot.loss_weight * ibot_loss
            terms["ibot_loss"] = ibot_loss / 2  # halved as DINOv2 logs it
        return Losses(total, {name: term.detach() for name, term in terms.items()})

    @torch.no_grad()
    def update_teacher(self, momentum: float) -> None:
        """Close an optimiser step: the teacher follows the student and the centres move, once.

        All ranks call this together.
        """
        follow(self.teacher, self.student, momentum)
        for targets in self._target_makers():
            targets.finish_step()

    def train(self, mode: bool = True) -> "DINOv2":
        super().train(mode)
        self.teacher.eval()
        return self

    def _with_heads(self, backbone: ViT) -> nn.ModuleDict:
        parts: dict[str, nn.Module] = {"backbone": backbone, "dino_head": _head(backbone.width, self.dino)}
        if self.patch_head == "ibot_head":
            parts["ibot_head"] = _head(backbone.width, self.ibot)
        return nn.ModuleDict(parts)

    def _check(self, batch: Batch) -> None:
        assert batch.global_crops.is_floating_point(), "the batch must be normalised first"
        assert batch.num_global_crops >= 2, "the views of a sample are compared with each other"

    @torch.no_grad()
    def _targets(self, batch: Batch, temp: float) -> Targets:
        """The teacher sees the global crops only, and nothing is masked."""
        (features,) = self.teacher["backbone"]([batch.global_crops])
        masked = _masked_patches(features, batch) if self.patch_targets is not None else features.cls[:0]
        cls_logits, patch_logits = self._logits(self.teacher, features.cls, masked)
        cls_probs = self.cls_targets.targets(cls_logits, temp)
        return Targets(
            cls=cls_probs.unflatten(0, (batch.num_global_crops, -1)),
            patches=self.patch_targets.targets(patch_logits, temp) if self.patch_targets is not None else None,
        )

    def _answers(self, batch: Batch) -> Answers:
        """The student sees all crops, packed in one pass, and the global ones with patches masked."""
        groups: list[tuple[Tensor, Tensor | None]] = [(batch.global_crops, batch.masks)]
        if batch.num_local_crops:
            groups.append((batch.local_crops, None))
        features, *local = self.student["backbone"](*zip(*groups, strict=True))
        cls = torch.cat([features.cls, *(group.cls for group in local)])
        masked = _masked_patches(features, batch) if self.patch_targets is not None else cls[:0]
        cls_logits, patch_logits = self._logits(self.student, cls, masked)
        num_global = len(batch.global_crops)
        return Answers(
            cls=features.cls.unflatten(0, (-1, batch.num_samples)),
            global_logits=cls_logits[:num_global].unflatten(0, (-1, batch.num_samples)),
            local_logits=cls_logits[num_global:].unflatten(0, (batch.num_local_crops, batch.num_samples)),
            patch_logits=patch_logits,
        )

    def _logits(self, pair_member: nn.ModuleDict, cls: Tensor, patches: Tensor) -> tuple[Tensor, Tensor]:
        """Prototype logits of class tokens and of masked patches; a shared head runs once over both."""
        if self.patch_head == "ibot_head":
            return pair_member["dino_head"](cls), pair_member["ibot_head"](patches)
        logits = pair_member["dino_head"](torch.cat([cls, patches]))
        return logits[: len(cls)], logits[len(cls) :]

    def _koleo(self, cls: Float[Tensor, "G B D"]) -> Float[Tensor, ""]:
        """KoLeo within each view: two views of one sample ought to be close."""
        if not self.dino.koleo_loss_weight:
            return cls.new_zeros((), dtype=torch.float32)
        group, num_samples = self.koleo_group_size, cls.shape[1]
        if group is None or num_samples % group == 0:
            views, ranks = list(cls), 1
        else:  # groups span ranks: each computes the loss of all of them, and its gradient for its own rows alone
            views = [self.gather(view) for view in cls]
            ranks = len(views[0]) // num_samples
        loss = self.dino.koleo_loss_weight * torch.stack([koleo(view, group) for view in views]).sum()
        return _with_gradient_times(ranks, loss)  # whose mean over ranks is then taken

    def _target_makers(self) -> list[Centring | SinkhornKnopp]:
        return [targets for targets in (self.cls_targets, self.patch_targets) if targets is not None]


def _with_gradient_times(factor: int, value: Tensor) -> Tensor:
    return value if factor == 1 else value.detach() + factor * (value - value.detach())


def _head(width: int, config: DinoConfig | IbotConfig) -> DINOHead:
    return DINOHead(
        width,
        num_prototypes=config.head_n_prototypes,
        bottleneck_width=config.head_bottleneck_dim,
        hidden_width=config.head_hidden_dim,
        num_layers=config.head_nlayers,
    )


def _masked_patches(features: Features, batch: Batch) -> Float[Tensor, "M D"]:
    return features.patches.flatten(0, 1).index_select(0, batch.mask_indices)

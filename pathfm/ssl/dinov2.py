"""DINOv2 (arXiv 2304.07193): a student matches its moving-average teacher on class tokens and on masked patches.

B samples   G global crops per sample   V local crops per sample   L patches of a global crop   M masked patches
D width   K prototypes. Crops are view-major: crop v of sample b is row v * B + b.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from pathfm.batch import Batch
from pathfm.models.head import DINOHead
from pathfm.models.vit import ViT
from pathfm.ssl.config import Centering, DinoConfig, IbotConfig
from pathfm.ssl.health import Look, Seen
from pathfm.ssl.losses import dino_cross_entropy, ibot_cross_entropy, koleo
from pathfm.ssl.method import Losses, Method, Redraw, drawn_once
from pathfm.ssl.network import Network, Output
from pathfm.ssl.targets import Centring, Gather, SinkhornKnopp, Total, alone, build_targets
from pathfm.ssl.teacher import follow, start_as_copy


@dataclass(frozen=True)
class Targets:
    """What the teacher asks of the student."""

    cls: Float[Tensor, "G B K"]
    patches: Float[Tensor, "M Kp"] | None  # None without an iBOT loss
    teacher_cls: Float[Tensor, "GB D"]  # what the teacher saw, before its heads


@dataclass(frozen=True)
class Answers:
    """What the student says."""

    cls: Float[Tensor, "G B D"]  # of the global crops
    global_logits: Float[Tensor, "G B K"]
    local_logits: Float[Tensor, "V B K"]
    patch_logits: Float[Tensor, "M Kp"] | None


class DINOv2(Method):
    """Student, teacher and the losses between them.

    `student` and `teacher` hold `backbone`, `dino_head` and, when iBOT's head is separate, `ibot_head`; these are the
    prefixes of the ancestors' checkpoints. `total` sums over ranks (see `targets`), `total_with_gradient` likewise and
    can be differentiated; `gather` joins the rows of all ranks, of which only this rank's carry a gradient.
    The backbones must have the same parameters; the teacher starts as a copy of the student, and stays in evaluation
    mode.
    `koleo_group_size` (samples) must divide the global batch; None takes what is passed at once as one group.
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
        total_with_gradient: Total = alone,
        gather: Gather = alone,
    ) -> None:
        super().__init__()
        self.dino = dino
        self.ibot = ibot
        self.koleo_group_size = koleo_group_size
        self.gather = gather
        has_patch_loss = ibot.loss_weight > 0
        has_patch_head = has_patch_loss and ibot.separate_head
        patch_head = ibot if has_patch_head else None
        self.student = _network(student_backbone, dino, patch_head, total_with_gradient)
        self.teacher = _network(teacher_backbone, dino, patch_head, total_with_gradient)
        start_as_copy(self.teacher, self.student)
        self.cls_targets = build_targets(centering, dino.head_n_prototypes, total)
        patch_prototypes = (ibot if has_patch_head else dino).head_n_prototypes
        self.patch_targets = build_targets(centering, patch_prototypes, total) if has_patch_loss else None

    def losses_of_parts(
        self, parts: Sequence[Batch], teacher_temp: float, redraw: Redraw = drawn_once, look: Look | None = None
    ) -> Iterator[Losses]:
        """See `Method`. Where a loss needs more than a part, everything is seen twice.

        Sinkhorn-Knopp: the teacher sees all parts before the student sees the first; what it asks for is held for all
        of them. KoLeo, when its groups are not whole parts: the student's backbone sees all parts once more, without
        gradients, about a fifth of a step's time.
        """
        class_tokens = self._class_tokens(parts, redraw) if self._groups_span_parts(parts) else []
        for number, (part, targets) in enumerate(self._with_targets(parts, teacher_temp)):
            redraw(number)
            answers = self._answers(part)
            if look is not None:
                look(Seen(targets.cls, targets.teacher_cls, answers.global_logits))
            together = [*class_tokens[:number], answers.cls, *class_tokens[number + 1 :]]
            yield self._losses(part, targets, answers, self._koleo(answers.cls, together))

    def _losses(self, batch: Batch, targets: Targets, answers: Answers, koleo_loss: Tensor) -> Losses:
        global_pairs = batch.num_global_crops * (batch.num_global_crops - 1)
        local_pairs = batch.num_global_crops * batch.num_local_crops
        all_pairs = global_pairs + local_pairs
        local_loss = dino_cross_entropy(answers.local_logits, targets.cls, same_views=False) * local_pairs / all_pairs
        global_loss = dino_cross_entropy(answers.global_logits, targets.cls, same_views=True) * global_pairs / all_pairs
        total = self.dino.loss_weight * (local_loss + global_loss) + koleo_loss
        terms = {
            "dino_local_crops_loss": local_loss,
            "dino_global_crops_loss": global_loss,
            "koleo_loss": koleo_loss / 2,  # halved as DINOv2 logs it, so that its curves can be compared
        }
        if targets.patches is not None and answers.patch_logits is not None:
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

    def _with_targets(self, parts: Sequence[Batch], temp: float) -> Iterator[tuple[Batch, Targets]]:
        """Every part, its crops as float, and what the teacher asks of it."""
        makers_see_all = any(maker.needs_whole_batch for maker in self._target_makers())
        if len(parts) > 1 and makers_see_all:
            asked = self._targets([self._seen_by_teacher(part.normalised()) for part in parts], temp)
            yield from zip((part.normalised() for part in parts), asked, strict=True)
        else:
            for part in parts:
                crops = part.normalised()
                (targets,) = self._targets([self._seen_by_teacher(crops)], temp)
                yield crops, targets

    @torch.no_grad()
    def _seen_by_teacher(self, batch: Batch) -> tuple[Batch, Output]:
        """The teacher sees the global crops only, and nothing is masked."""
        assert batch.num_global_crops >= 2, "the views of a sample are compared with each other"
        return batch, self.teacher([batch.global_crops], patches=self._asked_patches(batch))

    @torch.no_grad()
    def _targets(self, seen: Sequence[tuple[Batch, Output]], temp: float) -> list[Targets]:
        """Of parts that are taken as one batch."""
        cls = _in_parts(partial(self.cls_targets.targets, temp=temp), [output.cls_logits for _, output in seen])
        patches: Sequence[Tensor | None] = [None] * len(seen)
        if self.patch_targets is not None:
            patches = _in_parts(
                partial(self.patch_targets.targets, temp=temp), [output.patch_logits for _, output in seen]
            )
        return [
            Targets(rows.unflatten(0, (batch.num_global_crops, -1)), of_patches, output.cls)
            for (batch, output), rows, of_patches in zip(seen, cls, patches, strict=True)
        ]

    def _answers(self, batch: Batch) -> Answers:
        """The student sees all crops, packed in one pass, and the global ones with patches masked."""
        output = self.student(*self._crops_and_masks(batch), patches=self._asked_patches(batch))
        num_global = len(batch.global_crops)
        return Answers(
            cls=output.cls[:num_global].unflatten(0, (-1, batch.num_samples)),
            global_logits=output.cls_logits[:num_global].unflatten(0, (-1, batch.num_samples)),
            local_logits=output.cls_logits[num_global:].unflatten(0, (batch.num_local_crops, batch.num_samples)),
            patch_logits=output.patch_logits,
        )

    def _crops_and_masks(self, batch: Batch) -> tuple[list[Tensor], list[Tensor | None]]:
        masks = batch.masks if self.student.backbone.mask_token is not None else None
        if not batch.num_local_crops:
            return [batch.global_crops], [masks]
        return [batch.global_crops, batch.local_crops], [masks, None]

    def _asked_patches(self, batch: Batch) -> Tensor | None:
        return batch.mask_indices if self.patch_targets is not None else None

    def _groups_span_parts(self, parts: Sequence[Batch]) -> bool:
        return len(parts) > 1 and not self._groups_are_within(parts[0].num_samples)

    def _groups_are_within(self, num_samples: int) -> bool:
        group = self.koleo_group_size
        return not self.dino.koleo_loss_weight or group is None or num_samples % group == 0

    @torch.no_grad()
    def _class_tokens(self, parts: Sequence[Batch], redraw: Redraw) -> list[Float[Tensor, "G B D"]]:
        """Of the global crops of every part, as the student will see them again: with the same drop path."""
        tokens = []
        for number, part in enumerate(parts):
            redraw(number)
            output = self.student(*self._crops_and_masks(part.normalised()), heads=False)
            tokens.append(output.cls[: len(part.global_crops)].unflatten(0, (-1, part.num_samples)))
        return tokens

    def _koleo(self, cls: Float[Tensor, "G B D"], together: Sequence[Float[Tensor, "G B D"]]) -> Float[Tensor, ""]:
        """KoLeo within each view: two views of one sample ought to be close.

        `cls` is one part; `together`, it among the other parts of the rank, which carry no gradient.
        """
        if not self.dino.koleo_loss_weight:
            return cls.new_zeros((), dtype=torch.float32)
        views, sharers = list(cls), 1
        if not self._groups_are_within(cls.shape[1]):
            # Groups span parts or ranks: each computes the loss of all of them, its gradient for its own rows alone.
            views = [self.gather(torch.cat([part[view] for part in together])) for view in range(len(cls))]
            sharers = len(views[0]) // cls.shape[1]
        loss = self.dino.koleo_loss_weight * torch.stack([koleo(view, self.koleo_group_size) for view in views]).sum()
        return _with_gradient_times(sharers, loss)  # whose mean over parts and ranks is then taken

    def _target_makers(self) -> list[Centring | SinkhornKnopp]:
        return [targets for targets in (self.cls_targets, self.patch_targets) if targets is not None]


def _with_gradient_times(factor: int, value: Tensor) -> Tensor:
    return value if factor == 1 else value.detach() + factor * (value - value.detach())


def _head(width: int, config: DinoConfig | IbotConfig, **options: Any) -> DINOHead:
    return DINOHead(
        width,
        num_prototypes=config.head_n_prototypes,
        bottleneck_width=config.head_bottleneck_dim,
        hidden_width=config.head_hidden_dim,
        num_layers=config.head_nlayers,
        **options,
    )


def _network(backbone: ViT, dino: DinoConfig, ibot: IbotConfig | None, total: Total) -> Network:
    """`ibot`: the settings of the patches' own head, if they have one."""
    batch_norm_total = total if dino.use_bn_in_head else None
    dino_head = _head(backbone.width, dino, norm_last_layer=dino.norm_last_layer, batch_norm_total=batch_norm_total)
    return Network(backbone, dino_head, _head(backbone.width, ibot) if ibot else None)


def _in_parts(targets: Callable[[Tensor], Tensor], logits: Sequence[Tensor | None]) -> Sequence[Tensor]:
    """Targets made of all rows together, in the parts that the rows came in."""
    rows = [part for part in logits if part is not None]
    return targets(torch.cat(rows) if len(rows) > 1 else rows[0]).split([len(part) for part in rows])

"""DINOv2 (arXiv 2304.07193): a student matches its moving-average teacher on class tokens and on masked patches.

B samples   G global crops per sample   V local crops per sample   L patches of a global crop   M masked patches
D width   K prototypes. Crops are view-major: crop v of sample b is row v * B + b.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from pathfm.batch import Batch
from pathfm.models.head import DINOHead, Projection
from pathfm.models.vit import ViT
from pathfm.ssl.config import Centering, DinoConfig, IbotConfig
from pathfm.ssl.cross_entropy import ErrorsOf, errors_of_chunk
from pathfm.ssl.health import Look, Seen
from pathfm.ssl.losses import dino_loss, ibot_loss, koleo
from pathfm.ssl.method import Losses, Method, Redraw, drawn_once
from pathfm.ssl.network import Network
from pathfm.ssl.targets import Asked, Centring, Gather, SinkhornKnopp, Total, alone, biased_softmax, build_targets
from pathfm.ssl.teacher import follow, start_as_copy


@dataclass(frozen=True)
class Targets:
    """What the teacher asks of the student."""

    cls: Asked  # of G * B rows
    patches: Asked | None  # of M rows; None without an iBOT loss
    teacher_cls: Float[Tensor, "GB D"]  # what the teacher saw, before its heads


@dataclass(frozen=True)
class TeacherSaw:
    """What the teacher says of a part; its prototypes are not kept with it."""

    cls: Float[Tensor, "GB D"]
    cls_logits: Float[Tensor, "GB K"]
    patch_logits: Float[Tensor, "M Kp"] | None


@dataclass(frozen=True)
class Answers:
    """What the student says."""

    cls: Float[Tensor, "G B D"]  # of the global crops
    projected_cls: Projection  # of G * B + V * B rows
    projected_patches: Projection | None  # of M rows


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
        self.errors_of: ErrorsOf = errors_of_chunk
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
                look(_seen(part, targets, answers))
            together = [*class_tokens[:number], answers.cls, *class_tokens[number + 1 :]]
            yield self._losses(part, targets, answers, self._koleo(answers.cls, together))

    def _losses(self, batch: Batch, targets: Targets, answers: Answers, koleo_loss: Tensor) -> Losses:
        of_cls = dino_loss(answers.projected_cls, targets.cls, batch.num_samples, self.errors_of)
        total = self.dino.loss_weight * of_cls.total + koleo_loss
        terms = {
            "dino_local_crops_loss": of_cls.of_local_views,
            "dino_global_crops_loss": of_cls.of_global_views,
            "koleo_loss": koleo_loss / 2,  # halved as DINOv2 logs it, so that its curves can be compared
        }
        if targets.patches is not None and answers.projected_patches is not None:
            of_patches = ibot_loss(
                answers.projected_patches, targets.patches, batch.mask_weights, len(batch.global_crops), self.errors_of
            )
            total = total + self.ibot.loss_weight * of_patches
            terms["ibot_loss"] = of_patches / 2  # halved as DINOv2 logs it
        return Losses(total, {name: term.detach() for name, term in terms.items()})

    @torch.no_grad()
    def update_teacher(self, momentum: float) -> None:
        """Close an optimiser step: the teacher follows the student and the centres move, once.

        All ranks call this together.
        """
        follow(self.teacher, self.student, momentum)
        for targets in self._target_makers():
            targets.finish_step()

    def compile_losses(self) -> None:
        """What is done to single logits, by torch.compile, whatever the number of rows; matrix products stay as is."""
        self.errors_of = torch.compile(errors_of_chunk, dynamic=True)
        for targets in self._target_makers():
            targets.softmax_of = torch.compile(biased_softmax, dynamic=True)

    def train(self, mode: bool = True) -> "DINOv2":
        super().train(mode)
        self.teacher.eval()
        return self

    def _with_targets(self, parts: Sequence[Batch], temp: float) -> Iterator[tuple[Batch, Targets]]:
        """Every part, its crops as float, and what the teacher asks of it."""
        makers_see_all = any(maker.needs_whole_batch for maker in self._target_makers())
        if len(parts) > 1 and makers_see_all:
            asked = self._targets([self._teacher_sees(part.normalised()) for part in parts], temp)
            yield from zip((part.normalised() for part in parts), asked, strict=True)
        else:
            for part in parts:
                crops = part.normalised()
                (targets,) = self._targets([self._teacher_sees(crops)], temp)
                yield crops, targets

    @torch.no_grad()
    def _teacher_sees(self, batch: Batch) -> TeacherSaw:
        """The teacher sees the global crops only, and nothing is masked."""
        assert batch.num_global_crops >= 2, "the views of a sample are compared with each other"
        output = self.teacher([batch.global_crops], patches=self._asked_patches(batch))
        patches = output.projected_patches
        return TeacherSaw(output.cls, output.projected_cls.logits(), None if patches is None else patches.logits())

    @torch.no_grad()
    def _targets(self, seen: Sequence[TeacherSaw], temp: float) -> list[Targets]:
        """Of parts that are taken as one batch."""
        of_patches: Sequence[Asked | None] = [None] * len(seen)
        if self.patch_targets is not None:
            logits = [part.patch_logits for part in seen if part.patch_logits is not None]
            of_patches = self.patch_targets.targets(logits, temp)
        of_cls = self.cls_targets.targets([part.cls_logits for part in seen], temp)
        return [Targets(cls, patches, part.cls) for cls, patches, part in zip(of_cls, of_patches, seen, strict=True)]

    def _answers(self, batch: Batch) -> Answers:
        """The student sees all crops, packed in one pass, and the global ones with patches masked."""
        output = self.student(*self._crops_and_masks(batch), patches=self._asked_patches(batch))
        num_global = len(batch.global_crops)
        return Answers(
            cls=output.cls[:num_global].unflatten(0, (-1, batch.num_samples)),
            projected_cls=output.projected_cls,
            projected_patches=output.projected_patches,
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
        # A weight that was cast here would not be cast again where a block is seen with gradients, but would be where
        # it is recomputed, and selective recomputation compares the two, operation by operation.
        torch.clear_autocast_cache()
        return tokens

    def _koleo(self, cls: Float[Tensor, "G B D"], together: Sequence[Float[Tensor, "G _ D"]]) -> Float[Tensor, ""]:
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


@torch.no_grad()
def _seen(batch: Batch, targets: Targets, answers: Answers) -> Seen:
    """Of the global crops, whole: for the few steps that are looked at."""
    student, _ = answers.projected_cls.split(len(batch.global_crops))
    of_views = (batch.num_global_crops, batch.num_samples)
    return Seen(targets.cls.all().unflatten(0, of_views), targets.teacher_cls, student.logits().unflatten(0, of_views))

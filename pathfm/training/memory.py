"""How much of a GPU's memory a step takes, found by rehearsing it: the real code, on tensors that have no contents.

Tensors of torch's `FakeTensorMode` have shapes, types and storages of a size, but no bytes. With them the networks are
built, spread over ranks that are pretended, and taken through `train_step`, while a ledger counts what is alive. There
is no formula of sizes here that could fall behind the code. It takes seconds, and hardly any memory, on any machine.

What is forecast is what `torch.cuda.max_memory_allocated` says after such a step.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode  # documented by torch, although its module is named so
from torch.distributed.device_mesh import DeviceMesh

from pathfm.augment.apply_on_device import crop_on_device
from pathfm.augment.config import NUM_GLOBAL_CROPS, Augmentation, CropsConfig
from pathfm.augment.draw import draw_crops
from pathfm.augment.masks import MaskPlan, draw_masks
from pathfm.batch import Batch, Uncropped, normalise_crops
from pathfm.data.order import BatchPlan
from pathfm.dist.collect import gather_rows, sum_over_ranks
from pathfm.dist.env import Ranks
from pathfm.models.position import resized_positions
from pathfm.models.vit import ViT
from pathfm.parallel.apply import mesh_of, parallelise, whole
from pathfm.parallel.config import ParallelConfig, shard_size
from pathfm.schedule import StepValues
from pathfm.ssl.cross_entropy import chunks_as_on
from pathfm.ssl.health import Probe
from pathfm.ssl.method import Losses, Method
from pathfm.training.config import OptimConfig, TrainConfig
from pathfm.training.ledger import Ledger
from pathfm.training.state import TrainingState
from pathfm.training.step import build_loss_scale, build_optimizer, compute_dtype, train_step

# What memory is for, in the order in which it is shown.
STUDENT, TEACHER = "student's weights", "teacher's weights and centres"
MOMENTS, GRADIENTS = "AdamW's moments", "gradients"
SHARDING = "gathered weights, gradients to be sent"
CROPS = "crops and masks, of the next step too"
BACKBONE, HEADS = "student's backbone, kept for backward", "student's heads, kept for backward"
TEACHING, LOSSES = "teacher's pass", "targets and losses"
BACKWARD, UPDATE = "backward pass", "update"
KINDS = (STUDENT, TEACHER, MOMENTS, GRADIENTS, SHARDING, CROPS, BACKBONE, HEADS, TEACHING, LOSSES, BACKWARD, UPDATE)

Recompute = Literal["none", "selective", "blocks"]

_CPU = torch.device("cpu")
_STEPS_DRAWN = 32  # the one whose fullest part has the most masked patches is rehearsed
_LOOKED_AHEAD = 32  # samples at once; a forward pass without gradients takes little
_PARTS_REHEARSED = 2  # the first finds no gradients, the second does, and all others are like the second


@dataclass(frozen=True)
class Peak:
    """The moment of a step at which most is alive, and what for."""

    bytes_of: Mapping[str, int]  # by kind, in the order of `KINDS`; those that are there

    @property
    def total_bytes(self) -> int:
        return sum(self.bytes_of.values())

    @property
    def state_bytes(self) -> int:
        """Of it what does not depend on the batch, and can be shared out."""
        return sum(self.bytes_of.get(kind, 0) for kind in (STUDENT, TEACHER, MOMENTS, GRADIENTS))


class Rehearsal:
    """Networks and optimiser of a run as rank 0 would hold them, without contents; a context, within which steps go.

    One at a time in a process, and no real process group beside it.
    """

    def __init__(
        self,
        build: Callable[[], Method],
        parallel: ParallelConfig,
        train: TrainConfig,
        optim: OptimConfig,
        world_size: int = 1,
        ranks_per_node: int = 1,
        device_type: str = "cuda",
    ) -> None:
        """`build`: the method on torch's default device, with sums and gathers of `dist.collect`. `device_type`: of
        the devices that the step is for.

        Raises `UserError` when ranks cannot share copies of the weights as `parallel` says.
        """
        self._build = build
        # What is compiled takes less, by an amount that only the compiler knows.
        self._parallel = parallel.model_copy(update={"compile": False})
        self._train = train.model_copy(update={"log_every_steps": 2**31})
        self._optim = optim
        self._ranks = Ranks(0, world_size, 0, ranks_per_node)
        self._shards = shard_size(parallel, world_size, ranks_per_node)
        # What is not fake is small and was made before: the mesh's numbers, and constants.
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)
        self._ledger = Ledger(of_shards=SHARDING)
        self._device_type = device_type

    def __enter__(self) -> "Rehearsal":
        assert not dist.is_initialized()
        if self._ranks.world_size > 1:  # what is sent to the others goes nowhere
            dist.init_process_group("fake", rank=0, world_size=self._ranks.world_size)
        try:
            with torch.device("meta"):
                self._method = self._build()
            mesh = mesh_of(self._ranks.world_size, self._shards, _CPU)
            with self._on_stage():
                self._state = self._fresh_state(mesh)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()

    def step(self, parts: Sequence[Batch], values: StepValues, recompute: Recompute | None = None) -> Peak:
        """One step on this rank's share of a batch, whose parts have shapes only, the fullest ones first.

        `recompute`: in place of what `parallel` says.
        """
        ledger = self._ledger
        _make_constants(self._method.student.backbone, parts[0])
        with self._on_stage(), self._recomputing(recompute or self._parallel.recompute):
            with ledger.counting_as(CROPS):
                of_this_step, _of_the_next = [[_without_contents(part) for part in parts] for _ in range(2)]
            ledger.forget_peak()
            with self._seen_in_short(of_this_step):
                seen = of_this_step[:_PARTS_REHEARSED]
                train_step(self._state, seen, values, self._train, self._optim, self._ranks)
            return Peak({kind: amount for kind in KINDS if (amount := ledger.bytes_at_peak.get(kind, 0))})

    @contextmanager
    def _on_stage(self) -> Iterator[None]:
        with chunks_as_on(self._device_type), self._fake, self._ledger.seeing_resizes(), self._ledger:
            yield

    def _fresh_state(self, mesh: DeviceMesh | None) -> TrainingState:
        """As a run's, but that nothing is recomputed yet."""
        method, ledger, dtype = self._method, self._ledger, compute_dtype(self._train)
        keep_all = self._parallel.model_copy(update={"recompute": "none"})
        for network, kind in ((method.student, STUDENT), (method.teacher, TEACHER)):
            with ledger.counting_as(kind):
                _give_room(network)
                parallelise(network, network.layers(), keep_all, mesh, dtype, trained=kind == STUDENT)
            with ledger.counting_as(SHARDING), whole(network):
                pass  # room for gathered weights is made, and given back
        with ledger.counting_as(TEACHER):
            _give_room(method)
        with ledger.counting_as(MOMENTS):
            state = TrainingState(method, build_optimizer(method, self._optim), build_loss_scale(self._train, _CPU))
        self._name_what_is_kept()
        return state

    def _name_what_is_kept(self) -> None:
        """Of which kind is what comes while a network, or the student's backbone, is at work."""
        student, teacher = self._method.student, self._method.teacher
        for module, kind in ((student, HEADS), (student.backbone, BACKBONE), (teacher, TEACHING)):
            before: list[str] = []

            def begin(_: nn.Module, inputs: Any, kind: str = kind, before: list[str] = before) -> None:
                for crops in inputs[0]:
                    self._ledger.recount(crops, CROPS, only_if=LOSSES)  # as float, no longer as bytes
                before.append(self._ledger.kind)
                self._ledger.kind = kind

            def end(*_: object, before: list[str] = before) -> None:
                self._ledger.kind = before.pop()

            module.register_forward_pre_hook(begin)
            module.register_forward_hook(end)

    @contextmanager
    def _recomputing(self, recompute: Recompute) -> Iterator[None]:
        student = self._method.student
        as_built = [dict(vars(block)) for block in student.layers()]
        only_that = self._parallel.model_copy(update={"recompute": recompute})
        parallelise(student, student.layers(), only_that, None, compute_dtype(self._train), trained=True)
        try:
            yield
        finally:
            for block, attributes in zip(student.layers(), as_built, strict=True):
                vars(block).clear()
                vars(block).update(attributes)

    @contextmanager
    def _seen_in_short(self, parts: Sequence[Batch]) -> Iterator[None]:
        """The method sees all parts where it looks ahead, and hands out the losses of those that the step asks for."""
        method, ledger = self._method, self._ledger
        look_at_all = method.losses_of_parts
        probe = Probe(sum_over_ranks, gather_rows, self._ranks.world_size)

        def losses_of_parts(asked: Sequence[Batch], temp: float, redraw: Any, _: Any) -> Iterator[Losses]:
            losses = look_at_all(parts, temp, redraw, probe.look)
            for _ in asked:
                ledger.kind = LOSSES
                found = next(losses)
                ledger.kind = BACKWARD
                yield found
                del found
                ledger.recount_all(BACKWARD, into=GRADIENTS)  # nothing else outlives a backward pass
            ledger.kind = UPDATE

        method.losses_of_parts = losses_of_parts  # type: ignore[method-assign, assignment]
        try:
            yield
        finally:
            del method.losses_of_parts


def fullest_parts(
    crops: CropsConfig, masks: MaskPlan, share: BatchPlan, seed: int, feature_width: int | None = None
) -> list[Batch]:
    """A rank's share of a batch in parts, shapes without contents, the two with the most masked patches first.

    Of the run's first batches the one with the fullest part: memory has to do for the worst of them. The others, at
    which the method looks ahead if at all, come several at once, for speed.
    `feature_width`: where grids of patch features are read in place of images.
    """
    counts = sorted(max((_masked_patches(masks, share, seed, step) for step in range(_STEPS_DRAWN)), key=max))
    num_samples = share.rank_batch_size // share.parts
    together = max(1, _LOOKED_AHEAD // num_samples)
    rehearsed, others = counts[-_PARTS_REHEARSED:], counts[:-_PARTS_REHEARSED]
    groups = [[count] for count in rehearsed] + [
        others[first : first + together] for first in range(0, len(others), together)
    ]
    return [_shapes(crops, masks, num_samples * len(group), sum(group), feature_width) for group in groups]


def cropping_bytes(crops: CropsConfig, augmentation: Augmentation, num_samples: int, tile_px: int = 256) -> int:
    """The most that is alive while a GPU makes the crops of so many tiles, `tile_px` wide and high.

    A stream of its own does so beside the steps, and keeps what it needed: the steps cannot use it in between.
    """
    _crop(_tiles(crops, augmentation, 1, tile_px), crops)  # makes what the code keeps
    tiles = _tiles(crops, augmentation, num_samples, tile_px)
    ledger = Ledger(of_shards=SHARDING)
    with FakeTensorMode(allow_non_fake_inputs=True), ledger:
        _crop(tiles.with_every_tensor(torch.empty_like), crops)
    return ledger.peak_bytes


def _tiles(crops: CropsConfig, augmentation: Augmentation, num_samples: int, side_px: int) -> Uncropped:
    plans = draw_crops(augmentation, crops, [(side_px, side_px)] * num_samples, 0, range(num_samples))
    images = torch.empty(num_samples, side_px, side_px, 3, dtype=torch.uint8)
    return Uncropped(images, {name: torch.from_numpy(numbers) for name, numbers in vars(plans).items()})


def _crop(tiles: Uncropped, crops: CropsConfig) -> None:
    nothing = torch.empty(0)
    crop_on_device(Batch(nothing, nothing, nothing, nothing, nothing, nothing, nothing, uncropped=tiles), crops)


def _masked_patches(masks: MaskPlan, share: BatchPlan, seed: int, step: int) -> list[int]:
    """Of each part."""
    positions = [share.positions(step, part).tolist() for part in range(share.parts)]
    return [int(draw_masks(masks, seed, step, of_part, share.global_batch_size).sum()) for of_part in positions]


def _shapes(crops: CropsConfig, masks: MaskPlan, num_samples: int, num_masked: int, feature_width: int | None) -> Batch:
    channels, dtype = (3, torch.uint8) if feature_width is None else (feature_width, torch.float32)

    def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def crops_of(number: int, size: int) -> Tensor:
        return empty(number * num_samples, channels, size, size)

    return Batch(
        global_crops=crops_of(NUM_GLOBAL_CROPS, crops.global_crops_size),
        local_crops=crops_of(crops.local_crops_number, crops.local_crops_size),
        masks=empty(NUM_GLOBAL_CROPS * num_samples, masks.num_patches, dtype=torch.bool),
        mask_indices=empty(num_masked, dtype=torch.int64),
        mask_weights=empty(num_masked, dtype=torch.float32),
        positions=empty(num_samples, dtype=torch.int64),
        samples=empty(num_samples, dtype=torch.int64),
    )


def _without_contents(part: Batch) -> Batch:
    """On the CPU, which stands for the GPU: torch without CUDA cannot go backward on fake tensors of a GPU."""
    shapes = {name: value for name, value in vars(part).items() if isinstance(value, Tensor)}
    rooms: dict[str, Any] = {name: torch.empty_like(shape, device=_CPU) for name, shape in shapes.items()}
    return replace(part, **rooms)


def _give_room(module: nn.Module) -> None:
    """Parameters and buffers that have shapes alone get a storage each."""
    for owner in module.modules():
        for name, parameter in list(owner.named_parameters(recurse=False)):
            if parameter.is_meta:
                room = torch.empty_like(parameter, device=_CPU)
                owner.register_parameter(name, nn.Parameter(room, requires_grad=parameter.requires_grad))
        for name, buffer in list(owner.named_buffers(recurse=False)):
            if buffer.is_meta:
                setattr(owner, name, torch.empty_like(buffer, device=_CPU))


def _make_constants(backbone: ViT, part: Batch) -> None:
    """What the code makes once and keeps for the life of the process must not be made of fake tensors."""
    normalise_crops(torch.zeros(1, 3, 1, 1, dtype=torch.uint8))
    learned = torch.zeros(backbone.learned_grid**2, 1)
    for crops in (part.global_crops, part.local_crops):
        rows, columns = (size // backbone.patch_size for size in crops.shape[-2:])
        offset, antialias = backbone.interpolate_offset, backbone.interpolate_antialias
        resized_positions(learned, (rows, columns), antialias=antialias, offset=offset)

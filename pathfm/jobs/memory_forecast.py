"""What settings of a run take of each GPU's memory, by rehearsal, and which of them fit."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

from pathfm.augment.config import resolve
from pathfm.augment.masks import MaskPlan
from pathfm.batch import Batch
from pathfm.data.order import BatchPlan
from pathfm.errors import UserError
from pathfm.jobs.networks import method_of
from pathfm.parallel.config import ParallelConfig, shard_size
from pathfm.recipe import Recipe
from pathfm.training.memory import Peak, Recompute, Rehearsal, cropping_bytes, fullest_parts
from pathfm.training.plan import TrainingPlan, plan_training

GIB = 2**30
HEADROOM = (
    0.08  # of the forecast: for gaps between allocations, libraries' workspaces, and a batch that is fuller still
)

# What torch's allocator does not count is assumed, for it differs between drivers and libraries: a process's CUDA
# context with its kernels takes 0.3 to 0.6 GiB, the buffers of NCCL's few groups some tenths more.
CONTEXT_BYTES = GIB // 2
NCCL_BYTES = GIB // 2

Strategy = Literal["ddp", "hybrid", "fsdp"]

_STRATEGIES: tuple[Strategy, ...] = ("ddp", "hybrid", "fsdp")  # the fastest first
_RECOMPUTE: tuple[Recompute, ...] = ("none", "selective", "blocks")  # likewise


@dataclass(frozen=True)
class Setting:
    """How a run is spread over a GPU's time and memory; nothing of it changes what is trained."""

    strategy: Strategy
    recompute: Recompute
    micro_batch: int

    def words(self) -> str:
        """As a command takes them."""
        return (
            f"train.micro_batch_size={self.micro_batch} parallel.recompute={self.recompute} "
            f"parallel.strategy={self.strategy}"
        )

    @property
    def slowness(self) -> tuple[int, int]:
        """Computing twice costs more time than sharding does."""
        return _RECOMPUTE.index(self.recompute), _STRATEGIES.index(self.strategy)


@dataclass(frozen=True)
class Found:
    """A setting, and what a GPU has to hold with it."""

    setting: Setting
    peak: Peak  # of a step: what torch.cuda.max_memory_allocated will say
    cropping_bytes: int  # kept by the stream that makes the next step's crops
    context_bytes: int

    @property
    def headroom_bytes(self) -> int:
        return int(HEADROOM * self.peak.total_bytes)

    @property
    def needed_bytes(self) -> int:
        return self.peak.total_bytes + self.headroom_bytes + self.cropping_bytes + self.context_bytes

    def fits(self, gigabytes: float) -> bool:
        """On a GPU that is called so large."""
        return self.needed_bytes <= usable_bytes(gigabytes)


def usable_bytes(gigabytes: float) -> int:
    """Makers mean GiB, of which the driver keeps some: torch finds 7.8 on an RTX 3070 (8 GB), 23.5 on an A30."""
    return int(GIB * (gigabytes - max(0.5, 0.012 * gigabytes)))


class Forecast:
    """Peaks of a recipe's steps on so many GPUs, with one setting or another. A context: it holds what it built."""

    def __init__(self, recipe: Recipe, gpus: int = 1, gpus_per_node: int = 8, device_type: str = "cuda") -> None:
        """Raises `UserError` when the GPUs cannot share the batch."""
        if gpus < 1 or gpus_per_node < 1:
            raise UserError(f"--gpus {gpus} and --gpus-per-node {gpus_per_node} must be 1 or more")
        # What is fastest cannot be measured here; all backends that come into question keep as much as this one.
        student = recipe.student.model_copy(update={"attention": "sdpa"})
        self.recipe = recipe.model_copy(update={"student": student})
        self.gpus = gpus
        self.gpus_per_node = min(gpus, gpus_per_node)
        self.device_type = device_type
        self.known: dict[Setting, Found] = {}
        self.plan = self._plan()
        self.rank_batch = self.plan.global_batch_size // gpus
        self._built: tuple[Strategy, Rehearsal] | None = None
        self._stack = ExitStack()

    def __enter__(self) -> "Forecast":
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def setting(self) -> Setting:
        """The recipe's own."""
        parallel = self.recipe.parallel
        return Setting(parallel.strategy, parallel.recompute, self.rank_batch // self.plan.parts)

    def found(self, setting: Setting) -> Found:
        """Of rank 0, in a step whose batch has many masked patches."""
        if setting not in self.known:
            values = self.plan.schedules.at(self.plan.total_steps // 2)
            peak = self._rehearsal(setting.strategy).step(self.parts(setting), values, setting.recompute)
            context = CONTEXT_BYTES + (NCCL_BYTES if self.gpus > 1 else 0)
            self.known[setting] = Found(setting, peak, self._cropping_bytes(setting.micro_batch), context)
        return self.known[setting]

    def parts(self, setting: Setting) -> list[Batch]:
        """Of rank 0's share of a batch: shapes without contents (see `fullest_parts`)."""
        recipe, student = self.recipe, self.recipe.student
        share = BatchPlan(self.plan.global_batch_size, 0, self.gpus, self.rank_batch // setting.micro_batch)
        grid = recipe.crops.global_crops_size // student.patch_size
        masks = MaskPlan(grid, grid, recipe.ibot.mask_sample_probability, *recipe.ibot.mask_ratio_min_max)
        return fullest_parts(recipe.crops, masks, share, recipe.train.seed, student.feature_width)

    def proposals(self, gigabytes: float) -> list[Found]:
        """What fits on GPUs of this size, the fastest first, each with its largest micro batch, larger than before."""
        self.found(self.setting)  # from which others are guessed
        found: list[Found] = []
        for strategy in self._strategies():
            for recompute in _RECOMPUTE:
                slowness = Setting(strategy, recompute, 1).slowness
                of_faster = [one.setting.micro_batch for one in found if one.setting.slowness <= slowness]
                found += self._largest(strategy, recompute, gigabytes, above=max(of_faster, default=0))
        found.sort(key=lambda one: (self.sees_twice(one.setting), one.setting.slowness))
        largest = [one.setting.micro_batch for one in found]
        return [one for number, one in enumerate(found) if largest[number] > max(largest[:number], default=0)]

    def sees_twice(self, setting: Setting) -> bool:
        """Whether the student sees all parts once more, because KoLeo's groups are larger than they are."""
        is_in_parts = setting.micro_batch < self.rank_batch
        group = self.plan.koleo_group_size
        return bool(is_in_parts and self.recipe.dino.koleo_loss_weight and setting.micro_batch % group)

    def _strategies(self) -> Sequence[Strategy]:
        if self.gpus == 1:
            return ("ddp",)
        return _STRATEGIES if self.gpus > self.gpus_per_node else ("ddp", "fsdp")

    def _largest(self, strategy: Strategy, recompute: Recompute, gigabytes: float, above: int) -> list[Found]:
        """The setting with the largest micro batch that fits, if it is larger than `above`.

        By bisection, but not in the middle: where it will probably come to the limit, so that few are rehearsed.
        """
        settings = [Setting(strategy, recompute, size) for size in self._micro_batches() if size > above]
        fitting, too_large = 0, len(settings)
        while fitting < too_large:
            likely = sum(self._guessed(setting).fits(gigabytes) for setting in settings)
            tried = min(max(likely - 1, fitting), too_large - 1)
            if self._may_fit(settings[tried], gigabytes) and self.found(settings[tried]).fits(gigabytes):
                fitting = tried + 1
            else:
                too_large = tried
        return [self.found(settings[fitting - 1])] if fitting else []

    def _guessed(self, setting: Setting) -> Found:
        """From what is known of the setting that is most like it: but for the state, all grows with the micro batch."""
        other = min(self.known.values(), key=lambda known: _difference(known.setting, setting))
        grown = setting.micro_batch / other.setting.micro_batch
        rest = other.peak.total_bytes - other.peak.state_bytes
        peak = Peak({"state": other.peak.state_bytes, "all else": int(rest * grown)})
        return Found(setting, peak, int(other.cropping_bytes * grown), other.context_bytes)

    def _may_fit(self, setting: Setting, gigabytes: float) -> bool:
        """False when it is known that it would not even if sharing the state cost nothing."""
        unshared = self.known.get(replace(setting, strategy="ddp"))
        if unshared is None:
            return True
        shards = shard_size(self._parallel(setting.strategy), self.gpus, self.gpus_per_node)
        saved = int(unshared.peak.state_bytes * (1 - 1 / shards))
        return replace(unshared, peak=Peak({"all": unshared.peak.total_bytes - saved})).fits(gigabytes)

    def _cropping_bytes(self, num_samples: int) -> int:
        recipe = self.recipe
        if recipe.augment.device == "cpu" or recipe.student.feature_width is not None:
            return 0
        return cropping_bytes(recipe.crops, resolve(recipe.augment), num_samples)

    def _micro_batches(self) -> list[int]:
        if self.recipe.dino.use_bn_in_head:
            return [self.rank_batch]  # its statistics are those of all samples at once
        return [size for size in range(1, self.rank_batch + 1) if self.rank_batch % size == 0]

    def _plan(self) -> TrainingPlan:
        recipe = self.recipe
        # The length of an epoch only sets the schedules, which take no memory.
        train = recipe.train.model_copy(update={"epoch_length": recipe.train.epoch_length or 1000})
        return plan_training(train, recipe.optim, recipe.teacher, recipe.dino, self.gpus, None)

    def _rehearsal(self, strategy: Strategy) -> Rehearsal:
        """The networks as this strategy spreads them; those of the one before are let go."""
        if self._built is None or self._built[0] != strategy:
            self._stack.close()
            recipe = self.recipe
            rehearsal = Rehearsal(
                partial(method_of, recipe, self.plan.koleo_group_size),
                self._parallel(strategy),
                recipe.train,
                recipe.optim,
                self.gpus,
                self.gpus_per_node,
                self.device_type,
            )
            self._built = strategy, self._stack.enter_context(rehearsal)
        return self._built[1]

    def _parallel(self, strategy: Strategy) -> ParallelConfig:
        return self.recipe.parallel.model_copy(update={"strategy": strategy})


def _difference(one: Setting, other: Setting) -> tuple[bool, bool, float]:
    """The smallest is the most alike."""
    ratio = one.micro_batch / other.micro_batch
    return one.recompute != other.recompute, one.strategy != other.strategy, max(ratio, 1 / ratio)

"""A run's samples in their order, in batches, as crops and masks."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from pathfm.augment.apply_on_device import crop_on_device
from pathfm.augment.assemble import Assemble
from pathfm.augment.masks import MaskPlan
from pathfm.augment.windows import AssembleWindows
from pathfm.batch import Batch
from pathfm.data.datasets import Dataset
from pathfm.data.decode import DecodeError, decode
from pathfm.data.loader import Decode, load_batches
from pathfm.data.order import BatchPlan, BatchRange, batch_of_step
from pathfm.data.region_features import decode_grid
from pathfm.dist.env import Ranks
from pathfm.errors import UserError
from pathfm.jobs.training_set import order_of
from pathfm.recipe import Recipe
from pathfm.ssl.method import Method
from pathfm.training.plan import TrainingPlan
from pathfm.training.step import compute_dtype
from pathfm.training.throughput import Crops, Usage, flops_per_sample, peak_flops


class TrainingData:
    """What the trainer reads, and what is said about it."""

    def __init__(self, recipe: Recipe, plan: TrainingPlan, dataset: Dataset, device: torch.device) -> None:
        self.recipe, self.plan, self.dataset, self.device = recipe, plan, dataset, device
        self.order = order_of(recipe.train, dataset)
        grid = recipe.crops.global_crops_size // recipe.student.patch_size
        masks = MaskPlan(grid, grid, recipe.ibot.mask_sample_probability, *recipe.ibot.mask_ratio_min_max)
        self.assemble: Assemble | AssembleWindows
        self.decode: Decode
        if recipe.student.feature_width is None:
            self.assemble, self.decode = self._of_images(masks)
        else:
            self.assemble, self.decode = self._of_regions(masks, recipe.student.feature_width)

    def _of_images(self, masks: MaskPlan) -> tuple[Assemble, Decode]:
        recipe, batch = self.recipe, self.plan.global_batch_size
        on_device = augments_on_device(recipe.augment.device, self.device)
        patch, seed = recipe.student.patch_size, recipe.train.seed
        assemble = Assemble(recipe.crops, recipe.augment, masks, patch, seed, batch, on_device)
        return assemble, partial(decode, max_pixels=recipe.data.max_pixels)

    def _of_regions(self, masks: MaskPlan, width: int) -> tuple[AssembleWindows, Decode]:
        """Raises `UserError` when the first region shows that they were made for another recipe."""
        recipe, smallest = self.recipe, max(self.recipe.crops.global_crops_size, self.recipe.crops.local_crops_size)
        as_grid = partial(decode_grid, width=width, smallest=smallest)
        try:
            as_grid(self.dataset.read_bytes(0))
        except DecodeError as error:
            raise UserError(
                f"{self.dataset.name_of(0)} in {self.dataset.tar_of(0)} does not fit the recipe: {error}; set "
                "student.feature_width and crops.*_crops_size to what the regions are, or extract them again"
            ) from error
        assemble = AssembleWindows(recipe.crops, recipe.augment, masks, recipe.train.seed, self.plan.global_batch_size)
        return assemble, as_grid

    def batches(self, ranks: Ranks, from_step: int, passed_over: Sequence[BatchRange] = ()) -> Iterator[Batch]:
        """This rank's share of every batch from a step to the run's end, each in the plan's parts, not `cropped` yet.

        `passed_over`: batches that training leaves out.
        """
        share = BatchPlan(self.plan.global_batch_size, ranks.rank, ranks.world_size, self.plan.parts)
        numbers = _Batches(from_step, self.plan.total_steps, tuple(passed_over))
        return self._load(share, numbers, self.recipe.train.num_workers)

    def first_samples(self, number: int) -> Batch:
        """The run's first samples as the trainer gets them."""
        first = next(self._load(BatchPlan(min(number, self.plan.global_batch_size)), [0], num_workers=0))
        return self.cropped(first.to(self.device)).to(torch.device("cpu"))

    def cropped(self, batch: Batch) -> Batch:
        """A batch that is on the device, its crops made there where the loader has made none."""
        return crop_on_device(batch, self.recipe.crops) if batch.uncropped else batch

    def files_of(self, batch: int) -> list[str]:
        """The names of the samples in a global batch."""
        positions = BatchPlan(self.plan.global_batch_size).positions(batch)
        return [self.dataset.name_of(int(sample)) for sample in self.order.samples(positions)]

    def _load(self, share: BatchPlan, numbers: Iterable[int], num_workers: int) -> Iterator[Batch]:
        return load_batches(
            self.dataset,
            self.order,
            share,
            self.assemble,
            numbers=numbers,
            num_workers=num_workers,
            decode=self.decode,
            max_neighbours=self.recipe.data.max_neighbours,
            prefetch_batches=self.recipe.data.prefetch_batches,
            pin_memory=self.device.type == "cuda",
        )


def usage_of(recipe: Recipe, method: Method, ranks: Ranks, device: torch.device) -> Usage:
    """What a run's samples take of the GPUs."""
    student, crops, ibot = recipe.student, recipe.crops, recipe.ibot
    in_global, in_local = (student.tokens_of(side) for side in (crops.global_crops_size, crops.local_crops_size))
    patches = in_global - 1 - student.num_register_tokens
    masked = 2 * patches * ibot.mask_sample_probability * sum(ibot.mask_ratio_min_max) / 2 if ibot.loss_weight else 0.0
    of_teacher = Crops((in_global,) * 2, masked)
    of_student = Crops(of_teacher.tokens + (in_local,) * crops.local_crops_number, masked)
    peak = peak_flops(device, compute_dtype(recipe.train))
    flops = flops_per_sample(method.student, of_student, of_teacher)
    return Usage(device, flops, peak * ranks.world_size if peak else None)


@dataclass(frozen=True)
class _Batches:
    """The numbers of the batches that the steps [start, stop) take."""

    start: int
    stop: int
    passed_over: tuple[BatchRange, ...]

    def __iter__(self) -> Iterator[int]:
        return (batch_of_step(step, self.passed_over) for step in range(self.start, self.stop))


def augments_on_device(setting: str, device: torch.device) -> bool:
    """Whether the training device makes the crops, by `augment.device`; else the loader's workers do.

    Raises `UserError` when it is to be a GPU and there is none to train on.
    """
    if setting == "cuda" and device.type != "cuda":
        raise UserError(f"augment.device=cuda needs training on a GPU, but it runs on {device}; set it to cpu or auto")
    return setting != "cpu" and device.type == "cuda"

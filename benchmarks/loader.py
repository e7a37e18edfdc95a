"""How fast are tiles read, decoded, cropped and put into batches, beside a plain Pillow pipeline in the same run?

    python benchmarks/loader.py --data ../shared/data/osteosarcoma3/images --work build/bench_loader

DINOv2's augmentation: 2 crops of 224 and 8 of 98 pixels from each 256 px JPEG. The Pillow pipeline is what one would
write first: the same parameters, Pillow's own operations, float32 tensors normalised one by one, torch.stack.
"""

import mmap
import statistics
import time
from argparse import ArgumentParser
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from pathlib import Path
from unittest.mock import patch

import cv2
import numpy as np
import simplejpeg
import torch
from measuring import forget, spread, taking_turns
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from torch.utils.data import DataLoader

from pathfm.augment import apply
from pathfm.augment.apply import apply_plan
from pathfm.augment.apply_on_device import crop_on_device
from pathfm.augment.assemble import Assemble
from pathfm.augment.config import DINOV2, AugmentConfig, CropsConfig
from pathfm.augment.draw import BRIGHTNESS, CONTRAST, HUE, SATURATION, UNCHANGED_FACTORS, CropPlan, draw_crops
from pathfm.augment.masks import MaskPlan, draw_masks
from pathfm.batch import IMAGENET_MEAN, IMAGENET_STD, Batch
from pathfm.data.datasets import Dataset, open_dataset
from pathfm.data.decode import decode
from pathfm.data.loader import Sample, load_batches
from pathfm.data.order import BatchPlan, SampleOrder
from pathfm.data.pack import PackRequest, pack
from pathfm.errors import exit_status

BATCH, SEED, PATCH_SIZE = 64, 0, 14
CROPS = CropsConfig(local_crops_size=98)
MASKS = MaskPlan(CROPS.global_crops_size // PATCH_SIZE, CROPS.global_crops_size // PATCH_SIZE)
MEAN, STD = torch.tensor([IMAGENET_MEAN, IMAGENET_STD]).view(2, 3, 1, 1)
LOADER_STEPS = 12  # of which the first few, until every worker has handed over one, are not timed


def main(argv: Sequence[str] | None = None) -> int:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of JPEG tiles")
    parser.add_argument("--work", type=Path, default=Path("build/bench_loader"), help="where the packed tiles lie")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--copies", type=int, default=40, help="of each tile in the tar, so that it is no small file")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    dataset = packed(arguments.data, arguments.work, arguments.copies)
    print(f"{len(dataset):,} tiles, {arguments.rounds} rounds, batches of {BATCH}\n")
    print(one_core(dataset, arguments.rounds))
    print(single_operations(dataset, arguments.rounds))
    print(one_gpu(dataset, arguments.rounds))
    print(whole_loader(dataset, arguments.rounds))
    print(cold_reads(dataset, arguments.rounds))
    print(differences(dataset))
    return 0


def packed(tiles: Path, work: Path, copies: int) -> Dataset:
    """The tiles, many times over, in one tar with its index; made once."""
    root = work / f"{copies}_copies"
    if not (root / "pretrain_dataset.tar").exists():
        links = work / "tiles"
        links.mkdir(parents=True, exist_ok=True)
        for copy in range(copies):
            for tile in tiles.iterdir():
                link = links / f"{copy:03}_{tile.name}"
                link.unlink(missing_ok=True)
                link.symlink_to(tile.resolve())
        pack(PackRequest(links, "pretrain", root))
    return open_dataset(f"Pathology:root={root}")


# ---- one core


def one_core(dataset: Dataset, rounds: int) -> str:
    """Each part of the way from the tar to the batch."""
    order = SampleOrder(len(dataset), SEED)
    rows = order.samples(np.arange(BATCH)).tolist()
    encoded = [dataset.read_bytes(row) for row in rows]
    samples = [Sample(position, row, decode(e)) for position, (row, e) in enumerate(zip(rows, encoded, strict=True))]
    pictures = [Image.fromarray(sample.image) for sample in samples]
    finished = [pillow_crops(picture, position) for position, picture in enumerate(pictures)]
    ours = assembler()
    uncropped = assembler(crops_on_device=True)
    times = taking_turns(
        {
            "read (warm)": lambda: [dataset.read_bytes(row) for row in rows],
            "decode: pathfm": lambda: [decode(e) for e in encoded],
            "decode: simplejpeg": lambda: [simplejpeg.decode_jpeg(e) for e in encoded],
            "decode: OpenCV": lambda: [cv2.imdecode(np.frombuffer(e, np.uint8), cv2.IMREAD_COLOR_RGB) for e in encoded],
            "decode: Pillow": lambda: [pillow_decode(e) for e in encoded],
            "augment: pathfm": lambda: our_crops(samples),
            "augment: Pillow": lambda: [pillow_crops(picture, n) for n, picture in enumerate(pictures)],
            "collate: pathfm": with_finished_crops(ours, samples),
            "collate: Pillow, torch.stack": lambda: pillow_collate(finished),
            "of each collate, masks": lambda: draw_masks(MASKS, SEED, 0, range(BATCH), BATCH),
            "all: pathfm": lambda: ours(decoded(encoded), 0),
            "all: Pillow": lambda: pillow_collate([pillow_crops(pillow_decode(e), n) for n, e in enumerate(encoded)]),
            "all but the crops, for a GPU: pathfm": lambda: uncropped(decoded(encoded), 0),
        },
        rounds,
        clock=time.process_time,
    )
    lines = [f"| {name} | {rate(taken)} | {1e3 * statistics.median(taken):.1f} |" for name, taken in times.items()]
    ratio = [pillow / ours for pillow, ours in zip(times["augment: Pillow"], times["augment: pathfm"], strict=True)]
    return "\n".join(
        [
            f"| one core | images/s | ms per {BATCH} |\n| --- | --- | --- |",
            *lines,
            f"\nAugmentation: {spread(ratio, '.2f')} times Pillow's rate.\n",
        ]
    )


def decoded(encoded: Sequence[bytes]) -> list[Sample]:
    return [Sample(position, position, decode(e)) for position, e in enumerate(encoded)]


def assembler(crops_on_device: bool = False) -> Assemble:
    return Assemble(CROPS, AugmentConfig(preset="dinov2"), MASKS, PATCH_SIZE, SEED, BATCH, crops_on_device)


def plans_of(positions: Sequence[int], sizes: Sequence[tuple[int, int]]) -> list[list[CropPlan]]:
    plans = draw_crops(DINOV2, CROPS, sizes, SEED, positions)
    return [plans.of_sample(b) for b in range(len(positions))]


def our_crops(samples: Sequence[Sample]) -> list[list[np.ndarray]]:
    plans = plans_of([sample.position for sample in samples], [sample.image.shape[:2] for sample in samples])
    return [[apply_plan(plan, sample.image) for plan in own] for own, sample in zip(plans, samples, strict=True)]


def with_finished_crops(assemble: Assemble, samples: Sequence[Sample]) -> Callable[[], Batch]:
    """All of a batch's making but the crops themselves, which are there: storing, masks, bookkeeping."""
    images = [sample.image for sample in samples]
    plans = draw_crops(DINOV2, CROPS, [image.shape[:2] for image in images], SEED, range(len(samples)))
    crops = [crop for of_sample in our_crops(samples) for crop in of_sample]

    def collate() -> Batch:
        ready = iter(crops)
        with (
            patch("pathfm.augment.assemble.draw_crops", lambda *arguments: plans),
            patch("pathfm.augment.assemble.apply_plan", lambda plan, image: next(ready)),
        ):
            return assemble(samples, 0)

    return collate


def single_operations(dataset: Dataset, rounds: int) -> str:
    """Ways to do the same to one crop, the chosen one first; each is done ten times in its turn."""
    image = decode(dataset.read_bytes(0))
    columns = [of_operations(image, size, 10 * rounds) for size in (CROPS.global_crops_size, CROPS.local_crops_size)]
    lines = [
        f"| {way} | {' | '.join(f'{1e5 * statistics.median(times[way]):.0f}' for times in columns)} |"
        for way in columns[0]
    ]
    sizes = f"{CROPS.global_crops_size} px, µs | {CROPS.local_crops_size} px, µs"
    return "\n".join([f"| one operation on a crop of | {sizes} |\n| --- | --- | --- |", *lines, ""])


def of_operations(image: np.ndarray, size: int, rounds: int) -> dict[str, list[float]]:
    box = (8, 8, 7 * size // 8, 7 * size // 8)
    part = np.ascontiguousarray(image[8 : 8 + box[3], 8 : 8 + box[2]])
    crop = apply.resized_crop(image, box, size)
    picture, brighter = Image.fromarray(part), np.clip(1.2 * np.arange(256), 0, 255).astype(np.uint8)
    planes, pixels = np.empty((3, size, size), np.uint8), np.empty_like(crop)
    ways = {
        "resize: torch, antialiased": lambda: apply.resized_crop(image, box, size),
        "resize: OpenCV, another kernel": lambda: cv2.resize(part, (size, size), interpolation=cv2.INTER_CUBIC),
        "resize: Pillow": lambda: picture.resize((size, size), Image.Resampling.BICUBIC),
        "brightness: cv2.transform": lambda: apply.jitter_colour(crop, BRIGHTNESS, 1.2),
        "brightness: cv2.LUT": lambda: cv2.LUT(crop, brighter),
        "hue: HSV in float": lambda: apply.jitter_colour(crop, HUE, 0.05),
        "hue: HSV in 8 bits": lambda: hue_in_8_bits(crop, 0.05),
        "blur: cv2.sepFilter2D": lambda: apply.blur(crop, 1.5),
        "blur: cv2.GaussianBlur": lambda: cv2.GaussianBlur(crop, (9, 9), 1.5),
        "into the batch: height-width-channel": lambda: np.copyto(pixels, crop),
        "into the batch: three planes": lambda: cv2.split(crop, list(planes)),
    }
    repeated = {name: partial(ten_times, way) for name, way in ways.items()}
    return taking_turns(repeated, rounds, clock=time.process_time)


def ten_times(run: Callable[[], object]) -> None:
    for _ in range(10):
        run()


def hue_in_8_bits(crop: np.ndarray, turns: float) -> np.ndarray:
    hsv = cv2.cvtColor(crop, cv2.COLOR_RGB2HSV_FULL)
    hsv[..., 0] += np.uint8(round(256 * turns) % 256)
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL)


def one_gpu(dataset: Dataset, rounds: int) -> str:
    """Crops of a whole batch by the torch executor, copied there and normalised."""
    if not torch.cuda.is_available():
        return "There is no GPU here: the torch executor was not timed.\n"
    rows = SampleOrder(len(dataset), SEED).samples(np.arange(BATCH)).tolist()
    batch = assembler(crops_on_device=True)(decoded([dataset.read_bytes(row) for row in rows]), 0).pin_memory()

    def crops_there() -> None:
        crop_on_device(batch.to(torch.device("cuda")), CROPS).normalised(torch.bfloat16)
        torch.cuda.synchronize()

    (seconds,) = taking_turns({"": crops_there}, 10 * rounds).values()
    return f"The torch executor on one {torch.cuda.get_device_name()}: {rate(seconds)} images/s.\n"


# ---- the plain pipeline


def pillow_decode(encoded: bytes) -> Image.Image:
    return Image.open(BytesIO(encoded)).convert("RGB")


def pillow_crops(image: Image.Image, position: int) -> list[torch.Tensor]:
    """Normalised float32 tensors [3, S, S]."""
    (plans,) = plans_of([position], [image.size[::-1]])
    return [normalised(pillow_crop(plan, image)) for plan in plans]


def normalised(crop: Image.Image) -> torch.Tensor:
    return (torch.from_numpy(np.array(crop)).permute(2, 0, 1).float().div(255) - MEAN) / STD


def pillow_crop(plan: CropPlan, image: Image.Image) -> Image.Image:
    x, y, width, height = plan.box
    crop = image.crop((x, y, x + width, y + height)).resize((plan.size, plan.size), Image.Resampling.BICUBIC)
    for operation in plan.jitter_order:
        if plan.jitter_factor[operation] != UNCHANGED_FACTORS[operation]:
            crop = PILLOW_JITTER[operation](crop, plan.jitter_factor[operation])
    if plan.grayscale:
        crop = crop.convert("L").convert("RGB")
    if plan.blur_sigma:
        crop = crop.filter(ImageFilter.GaussianBlur(plan.blur_sigma))
    crop = ImageOps.solarize(crop, plan.solarise_threshold)
    return ImageOps.mirror(crop) if plan.horizontal_flip else crop


def pillow_hue(crop: Image.Image, turns: float) -> Image.Image:
    hue, saturation, value = crop.convert("HSV").split()
    turned = np.array(hue) + np.uint8(round(255 * turns) % 256)  # 8 bits of hue go round by themselves
    return Image.merge("HSV", (Image.fromarray(turned), saturation, value)).convert("RGB")


PILLOW_JITTER = {
    BRIGHTNESS: lambda crop, factor: ImageEnhance.Brightness(crop).enhance(factor),
    CONTRAST: lambda crop, factor: ImageEnhance.Contrast(crop).enhance(factor),
    SATURATION: lambda crop, factor: ImageEnhance.Color(crop).enhance(factor),
    HUE: pillow_hue,
}


def pillow_collate(samples: Sequence[Sequence[torch.Tensor]]) -> tuple[torch.Tensor, ...]:
    """View-major batches of both sizes, and masks."""
    views = [torch.stack(view) for view in zip(*samples, strict=True)]
    masks = torch.from_numpy(draw_masks(MASKS, SEED, 0, range(len(samples)), len(samples)))
    return torch.cat(views[:2]), torch.cat(views[2:]), masks, masks.flatten().nonzero().flatten()


@dataclass(frozen=True)
class PillowDataset(torch.utils.data.Dataset):
    dataset: Dataset
    rows: Sequence[int]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, position: int) -> list[torch.Tensor]:
        return pillow_crops(pillow_decode(self.dataset.read_bytes(self.rows[position])), position)


# ---- the loader


def whole_loader(dataset: Dataset, rounds: int) -> str:
    """From the tar to batches in the trainer's process, with workers."""
    rows = SampleOrder(len(dataset), SEED).samples(np.arange(LOADER_STEPS * BATCH)).tolist()
    contestants = {
        f"{name}, {workers} worker{'s' * (workers > 1)}": partial(timed_batches, make, workers)
        for workers in (1, 2)
        for name, make in (("pathfm", partial(our_loader, dataset)), ("Pillow", partial(pillow_loader, dataset, rows)))
    }
    seconds = {name: [] for name in contestants}
    for _ in range(max(2, rounds // 2)):
        for name, run in contestants.items():
            seconds[name].append(run())
    lines = [f"| {name} | {rate(times)} |" for name, times in seconds.items()]
    return "\n".join(["| whole loader | images/s |\n| --- | --- |", *lines, ""])


def our_loader(dataset: Dataset, workers: int) -> Iterator:
    order = SampleOrder(len(dataset), SEED)
    return load_batches(dataset, order, BatchPlan(BATCH), assembler(), numbers=range(LOADER_STEPS), num_workers=workers)


def pillow_loader(dataset: Dataset, rows: Sequence[int], workers: int) -> Iterator:
    tiles = PillowDataset(dataset, rows)
    return iter(DataLoader(tiles, BATCH, num_workers=workers, collate_fn=pillow_collate, worker_init_fn=one_thread))


def one_thread(worker: int) -> None:
    torch.set_num_threads(1)


def timed_batches(make: Callable[[int], Iterator], workers: int) -> float:
    """Seconds of the clock on the wall for one batch, workers warm, of all that come after the first ones."""
    batches = make(workers)
    for _ in range(workers):
        next(batches)
    start = time.perf_counter()
    num_batches = sum(1 for _ in batches)
    return (time.perf_counter() - start) / num_batches


# ---- cold reads


def cold_reads(dataset: Dataset, rounds: int) -> str:
    """Tiles at random places of a tar that is not in memory, batch by batch as the loader reads."""
    tar = dataset.tar_of(0)
    rng = np.random.default_rng(SEED)
    ways = {"mmap": mapped_reads, "pread": plain_reads, "pread, WILLNEED ahead": announced_reads}
    times: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(rounds):
        rows = rng.choice(len(dataset), (8, BATCH), replace=False).tolist()
        for way, read in ways.items():
            forget(tar)
            start = time.perf_counter()
            for batch in rows:
                read(dataset, batch)
            times[way].append((time.perf_counter() - start) / len(rows))
    lines = [f"| {way} | {rate(seconds)} |" for way, seconds in times.items()]
    size = f"{tar.stat().st_size / 1e6:,.0f} MB"
    return "\n".join([f"| cold random reads, tar of {size} | tiles/s |\n| --- | --- |", *lines, ""])


def mapped_reads(dataset: Dataset, rows: Sequence[int]) -> None:
    with dataset.tar_of(0).open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as memory:
        for row in rows:
            entry = dataset.entries[row]
            memory[int(entry["start_offset"]) : int(entry["end_offset"])]


def plain_reads(dataset: Dataset, rows: Sequence[int]) -> None:
    for row in rows:
        dataset.read_bytes(row)


def announced_reads(dataset: Dataset, rows: Sequence[int]) -> None:
    dataset.will_need(rows)
    plain_reads(dataset, rows)


# ---- numbers


def differences(dataset: Dataset) -> str:
    """Grey levels between our crops and Pillow's, of the same parameters."""
    rows = SampleOrder(len(dataset), SEED).samples(np.arange(BATCH)).tolist()
    images = [decode(dataset.read_bytes(row)) for row in rows]
    plans = plans_of(range(BATCH), [image.shape[:2] for image in images])
    of_crops = [
        np.abs(apply_plan(plan, image).astype(int) - np.array(pillow_crop(plan, Image.fromarray(image)))).mean()
        for own, image in zip(plans, images, strict=True)
        for plan in own
    ]
    return (
        f"Mean absolute difference from Pillow's crops: {np.mean(of_crops):.2f} grey levels, "
        f"99 % of the crops below {np.quantile(of_crops, 0.99):.2f}, the worst of {len(of_crops)}: {max(of_crops):.2f}."
    )


def rate(seconds_per_batch: Sequence[float]) -> str:
    return spread([BATCH / seconds for seconds in seconds_per_batch], ",.0f")


if __name__ == "__main__":
    raise SystemExit(exit_status(main))

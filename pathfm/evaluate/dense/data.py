"""Pictures and their masks, paired by name: folders, tars, data sets; masks of classes, of instances, of numbers."""

from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from pathfm.data.decode import DecodeError, decode, open_image
from pathfm.data.entries import printable
from pathfm.data.image_files import ImageFiles, distinct_stems, open_images
from pathfm.errors import UserError, listed
from pathfm.evaluate.dense.fit import Truth
from pathfm.evaluate.dense.losses import IGNORED

_ARRAYS = ".npy"
INSTANCE_CLASSES = ("background", "nucleus")

ReadMask = Callable[[bytes, str], Tensor]  # the bytes of a mask and its name -> target [H, W]


@dataclass(frozen=True)
class Pairs:
    """Pictures in the order of their names, each with its mask."""

    images: ImageFiles
    masks: ImageFiles
    names: tuple[str, ...]  # file names without suffix
    image_numbers: tuple[int, ...]
    mask_numbers: tuple[int, ...]
    read_mask: ReadMask

    def __len__(self) -> int:
        return len(self.names)

    def image(self, number: int) -> UInt8[np.ndarray, "H W 3"]:
        """Raises `UserError` that names a picture which cannot be decoded."""
        place = self.image_numbers[number]
        try:
            return decode(self.images.read_bytes(place))
        except DecodeError as error:
            said = self.images.name_for_people(place)
            raise UserError(f"{said} cannot be decoded: {error}; mend it or leave it out of the CSV") from error

    def target(self, number: int) -> Tensor:
        """[H, W]: class indices as uint8, or numbers as float32."""
        place = self.mask_numbers[number]
        return self.read_mask(self.masks.read_bytes(place), self.masks.name_for_people(place))

    def read(self, number: int) -> Truth:
        """Raises `UserError` when picture and mask differ in size."""
        image, target = self.image(number), self.target(number)
        self._demand_one_size(number, (image.shape[0], image.shape[1]), (target.shape[0], target.shape[1]))
        return Truth(image, target)

    def size_px(self, number: int) -> tuple[int, int]:
        """Height and width, from the header where that tells. Raises `UserError` when the mask's header says others."""
        size = self.images.size_px(self.image_numbers[number]) or self.image(number).shape[:2]
        of_mask = self.masks.size_px(self.mask_numbers[number])
        if of_mask is not None:
            self._demand_one_size(number, (size[0], size[1]), of_mask)
        return size[0], size[1]

    def _demand_one_size(self, number: int, of_image: tuple[int, int], of_mask: tuple[int, int]) -> None:
        if of_image != of_mask:
            (height, width), (rows, columns) = of_image, of_mask
            raise UserError(
                f"the mask of {self.names[number]} is {columns} x {rows} px, its picture {width} x {height}; "
                "make the mask again at the picture's size"
            )


def open_pairs(images: str, masks: str, read_mask: ReadMask) -> Pairs:
    """All pictures that have a mask of the same name, whatever its suffix. Either is a folder, a tar or a data set.

    Raises `UserError` when nothing is there, or no name is in both.
    """
    of_images, of_masks = open_images(images), _open_masks(masks)
    names = distinct_stems(of_images.paths)
    mask_of = {name: number for number, name in enumerate(distinct_stems(of_masks.paths))}
    both = sorted((name, number, mask_of[name]) for number, name in enumerate(names) if name in mask_of)
    if not both:
        shown = f"{listed(map(printable, names), 2)}; masks are {listed(map(printable, mask_of), 2)}"
        raise UserError(f"no picture of {images} has a mask of its name in {masks}: pictures are {shown}")
    matched, image_numbers, mask_numbers = zip(*both, strict=True)
    return Pairs(of_images, of_masks, matched, image_numbers, mask_numbers, read_mask)


def class_mask(encoded: bytes, name: str, *, ignored: int = IGNORED, classes: int = IGNORED) -> Int[Tensor, "H W"]:
    """A mask whose grey values, or palette indices, are classes 0.. `classes` - 1; the value `ignored` is none.

    Raises `UserError` for colours, and names a value that is no class.
    """
    values = _whole_numbers(encoded, name)
    is_ignored = values == ignored
    if (most := int(values[~is_ignored].max(initial=0))) >= classes:
        raise UserError(
            f"{name} has the value {most}, and classes are 0 to {classes - 1}; name them all by --classes, "
            f"say by --ignore which value is none, or take --instances for masks of single objects"
        )
    return torch.from_numpy(np.where(is_ignored, IGNORED, values).astype(np.uint8))


def instance_mask(encoded: bytes, name: str) -> Int[Tensor, "H W"]:
    """A mask whose values number single objects: 1 where there is any. No value is ignored."""
    return torch.from_numpy((_whole_numbers(encoded, name) > 0).astype(np.uint8))


def number_mask(encoded: bytes, name: str) -> Float[Tensor, "H W"]:
    """Numbers as they stand in a .npy [H, W], a grey PNG of 8 or 16 bits, or a TIFF. What is not above 0 is unknown."""
    values = _values(encoded, name)
    if not (np.issubdtype(values.dtype, np.floating) or np.issubdtype(values.dtype, np.integer)):
        raise UserError(f"{name} holds {values.dtype}, not numbers")
    return torch.from_numpy(values.astype(np.float32))


def _open_masks(source: str) -> ImageFiles:
    """As pictures are, but a folder may also hold arrays."""
    folder = Path(source).expanduser()
    files = sorted(folder.glob(f"*{_ARRAYS}")) if folder.is_dir() else []
    if not files:
        return open_images(source)
    spans = np.tile(np.array([0, -1]), (len(files), 1))
    return ImageFiles(source, [file.name for file in files], files, np.arange(len(files)), spans)


def _whole_numbers(encoded: bytes, name: str) -> Int[np.ndarray, "H W"]:
    values = _values(encoded, name)
    if values.dtype != bool and not np.issubdtype(values.dtype, np.integer):
        raise UserError(f"{name} holds {values.dtype}, not whole numbers; a mask of classes or instances does")
    return values.astype(np.int64)


def _values(encoded: bytes, name: str) -> np.ndarray:
    """Of one channel [H, W], as the file has them."""
    try:
        values = _array(encoded) if encoded.startswith(b"\x93NUMPY") else _pixels(encoded)
    except MemoryError:
        raise
    except Exception as error:  # Pillow's plugins raise whatever damaged bytes lead them to
        raise UserError(f"{name} cannot be decoded as a mask: {' '.join(str(error).split())}") from error
    if values.ndim != 2:
        raise UserError(f"{name} has {values.shape[-1]} channels; a mask has one, e.g. a grey PNG of class indices")
    return values


def _array(encoded: bytes) -> np.ndarray:
    array: np.ndarray = np.load(BytesIO(encoded), allow_pickle=False)
    return array


def _pixels(encoded: bytes) -> np.ndarray:
    with open_image(encoded) as image:
        return np.asarray(image)

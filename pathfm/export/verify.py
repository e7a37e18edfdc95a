"""Proof of an export: the library that it is for loads it and gives the backbone's features of random images."""

import importlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import pathfm
from pathfm.errors import UserError, listed
from pathfm.models.layers import FeatureEmbed
from pathfm.models.pretrained import load_backbone
from pathfm.models.vit import ViT

TOLERANCE = 1e-4  # of the largest feature, or of 1 where features are smaller
_IMAGES = 2

Model = Callable[[Tensor], tuple[Tensor, Tensor]]  # images -> [CLS], patch tokens


class _Check(NamedTuple):
    library: str  # that is imported, or "pathfm" where the file is read back
    load: Callable[[Path], Model]


class Missing(Exception):
    """The library cannot be had here; the message says why."""


@dataclass(frozen=True)
class Verdict:
    """`largest_difference` is None where nothing could be compared, and `reason` says why."""

    library: str
    sizes: tuple[int, ...]
    largest_difference: float | None
    reason: str = ""

    def in_words(self) -> str:
        if self.largest_difference is None:
            return f"not verified: {self.reason}"
        sizes = " and ".join(map(str, self.sizes))
        by = "read back by" if self.library.startswith("pathfm") else "loaded by"
        return (
            f"verified: {by} {self.library}, it gives the same [CLS] and patch tokens of random images of {sizes} px "
            f"(largest difference {self.largest_difference:.1e})"
        )


def verify(target: str, folder: Path, vit: ViT, sizes: Sequence[int]) -> Verdict:
    """Compare at these image sizes. Raises `UserError` when features differ by more than the tolerance."""
    check = _CHECKS[target]
    try:
        theirs = check.load(folder)
    except Missing as missing:
        return Verdict(check.library, (), None, str(missing))
    differences = [_difference(target, vit, theirs, size) for size in sizes]
    return Verdict(f"{check.library} {_version(check.library)}", tuple(sizes), max(differences))


@torch.inference_mode()
def _difference(target: str, vit: ViT, theirs: Model, size: int) -> float:
    channels = vit.embed.feature_width if isinstance(vit.embed, FeatureEmbed) else 3
    images = torch.randn(_IMAGES, channels, size, size, generator=torch.Generator().manual_seed(size))
    ours, largest = vit([images])[0], 0.0
    for name, expected, found in zip(("[CLS]", "patch tokens"), (ours.cls, ours.patches), theirs(images), strict=True):
        if found.shape != expected.shape:
            raise UserError(f"the export --to {target} gives {name} {[*found.shape]}, not {[*expected.shape]}")
        difference = (found - expected).abs().max().item()
        if not difference <= TOLERANCE * max(1.0, expected.abs().max().item()):
            raise UserError(
                f"the export --to {target} gives other {name} for images of {size} px: they differ by "
                f"{difference:.2g}; nothing was written. This is a fault of pathfm or of a new version of that library"
            )
        largest = max(largest, difference)
    return largest


def _with_huggingface(folder: Path) -> Model:
    transformers = _imported("transformers")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    architecture = _class_of(transformers, config["architectures"][0])
    model, report = architecture.from_pretrained(folder, output_loading_info=True)
    if wrong := [*report["missing_keys"], *report["unexpected_keys"], *report["mismatched_keys"]]:
        raise UserError(f"transformers finds tensors that do not fit: {listed(map(str, wrong))}")
    first_patch = 1 + config.get("num_register_tokens", 0)

    def tokens_of(images: Tensor) -> tuple[Tensor, Tensor]:
        tokens = model.eval()(pixel_values=images).last_hidden_state
        return tokens[:, 0], tokens[:, first_patch:]

    return tokens_of


def _with_timm(folder: Path) -> Model:
    timm = _imported("timm")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    weights = folder / "model.safetensors"
    model = timm.create_model(config["architecture"], **config["model_args"], checkpoint_path=str(weights)).eval()

    def tokens_of(images: Tensor) -> tuple[Tensor, Tensor]:
        tokens = model.forward_features(images)
        return tokens[:, 0], tokens[:, model.num_prefix_tokens :]

    return tokens_of


def _with_hub(folder: Path) -> Model:
    repository = Path(pathfm.__file__).resolve().parents[1]
    if not (repository / "hubconf.py").is_file():
        raise Missing("hubconf.py is in a checkout of pathfm, and this is none")
    model = torch.hub.load(str(repository), "pathfm", source="local", weights=str(folder / "weights.pth"))

    def tokens_of(images: Tensor) -> tuple[Tensor, Tensor]:
        features = model.forward_features(images)
        return features["x_norm_clstoken"], features["x_norm_patchtokens"]

    return tokens_of


def _with_onnxruntime(folder: Path) -> Model:
    onnxruntime = _imported("onnxruntime")
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])

    def tokens_of(images: Tensor) -> tuple[Tensor, Tensor]:
        cls, patches = (torch.from_numpy(found) for found in session.run(None, {"images": images.numpy()}))
        one = torch.from_numpy(session.run(["cls"], {"images": images[:1].numpy()})[0])  # another number of images
        return torch.cat([one, cls[1:]]), patches

    return tokens_of


def _read_back(name: str) -> Callable[[Path], Model]:
    def load(folder: Path) -> Model:
        vit = load_backbone(folder / name).vit

        def tokens_of(images: Tensor) -> tuple[Tensor, Tensor]:
            features = vit([images])[0]
            return features.cls, features.patches

        return tokens_of

    return load


_CHECKS = {
    "hub": _Check("torch", _with_hub),
    "timm": _Check("timm", _with_timm),
    "huggingface": _Check("transformers", _with_huggingface),
    "onnx": _Check("onnxruntime", _with_onnxruntime),
    "safetensors": _Check("pathfm", _read_back("model.safetensors")),
    "ancestor": _Check("pathfm", _read_back("teacher.pth")),
}


def _imported(name: str):  # type: ignore[no-untyped-def]  # an optional library
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise Missing(f"{name} cannot be imported ({_first_line(error)}); pip install 'pathfm[export]'") from error
    except Exception as error:  # a library that is there and does not fit another, as torchvision of another torch
        raise Missing(f"{name} cannot be imported: {_with_advice(error)}") from error


def _class_of(library, name: str):  # type: ignore[no-untyped-def]
    """transformers imports its models when they are asked for."""
    try:
        return getattr(library, name)
    except (ImportError, AttributeError, RuntimeError) as error:
        cause = error.__cause__ or error
        raise Missing(f"{library.__name__} has no {name} here: {_with_advice(cause)}") from error


def _with_advice(error: BaseException) -> str:
    line = _first_line(error)
    return f"{line}; install the torchvision that was built for this torch" if "torchvision" in line else line


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _version(library: str) -> str:
    try:
        return version(library)
    except PackageNotFoundError:
        return "of unknown version"

"""The whole run as one frozen tree: what to train. The same on every machine; reads the ancestors' YAML too."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import model_validator

from pathfm.augment.config import AugmentConfig, CropsConfig, patches_per_side, resolve
from pathfm.checkpoint.config import CheckpointConfig
from pathfm.config import Layer, Section, build, differences, find_file, overrides_layer, read_layer
from pathfm.data.config import DataConfig
from pathfm.errors import UserError
from pathfm.models.config import StudentConfig
from pathfm.parallel.config import ParallelConfig
from pathfm.ssl.config import DinoConfig, IbotConfig, MethodName, TeacherConfig
from pathfm.track.config import WandbConfig
from pathfm.training.config import OptimConfig, TrainConfig

# Groups and keys that may differ when a run is continued: where the data lie (that they are the same is checked by
# content), how fast it goes, what is reported and when it gives up.
_NOT_IDENTITY = (
    "train.dataset_path",
    "data.corrupt_samples",
    "data.max_neighbours",
    "optim.max_skipped_steps",
    "optim.max_roll_backs",
    "train.micro_batch_size",
    "train.stall_after_s",
    "train.lost_after_s",
    "train.examine",
    "train.num_workers",
    "train.device",
    "train.deterministic",
    "train.log_every_steps",
    "train.output_dir",
    "student.attention",
    "student.block_chunks",
    "data.prefetch_batches",
    "augment.device",
    "parallel.",
    "checkpoint.",
    "wandb.",
)


class Recipe(Section):
    """Every group of settings. The defaults are those of the DINOv2 family; `read_recipe` knows those of DINO."""

    method: MethodName = "dinov2"
    train: TrainConfig = TrainConfig()
    student: StudentConfig = StudentConfig()
    teacher: TeacherConfig = TeacherConfig()
    dino: DinoConfig = DinoConfig()
    ibot: IbotConfig = IbotConfig()
    optim: OptimConfig = OptimConfig()
    crops: CropsConfig = CropsConfig()
    augment: AugmentConfig = AugmentConfig()
    data: DataConfig = DataConfig()
    parallel: ParallelConfig = ParallelConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    wandb: WandbConfig = WandbConfig()

    @model_validator(mode="after")
    def _dino_masks_nothing(self) -> "Recipe":
        if self.method == "dino" and (self.ibot.loss_weight or self.ibot.mask_sample_probability):
            raise ValueError("method dino has no loss on masked patches; leave 'ibot' out, or take method: dinov2")
        return self

    @model_validator(mode="after")
    def _crops_are_whole_patches(self) -> "Recipe":
        for name in ("global_crops_size", "local_crops_size"):
            patches_per_side(getattr(self.crops, name), self.student.patch_size, f"crops.{name}")
        return self


# What DINO's default recipe (arXiv 2104.14294, section 3.2, and its code) has otherwise than DINOv2's. Both have 100
# epochs, ten of warm-up, and one in which the prototypes stay.
DEFAULTS_OF_DINO = Layer(
    "the defaults of method dino",
    {
        "dino": {"norm_last_layer": True, "koleo_loss_weight": 0.0},
        "ibot": {"loss_weight": 0.0, "mask_sample_probability": 0.0},
        "student": {
            "arch": "vit_small",
            "patch_size": 16,
            "drop_path_rate": 0.1,
            "drop_path_uniform": False,
            "layerscale": 0.0,
            "interpolate_offset": 0.0,  # as the ancestor's code; the public one has DINOv2's 0.1
        },
        "teacher": {"momentum_teacher": 0.996, "teacher_temp": 0.04, "warmup_teacher_temp_pct": 0.0},
        "optim": {
            "base_lr": 5e-4,
            "scaling_rule": "linear_wrt_256",
            "clip_grad_of": "parameter",
            "patch_embed_lr_mult": 1.0,
            "layerwise_decay": 1.0,
        },
        "crops": {"global_crops_scale": [0.4, 1.0], "local_crops_scale": [0.05, 0.4]},
    },
)


@dataclass(frozen=True)
class ReadRecipe:
    """A recipe and what was translated on the way to it."""

    recipe: Recipe
    notes: tuple[str, ...]


def read_recipe(path: Path | None, overrides: Sequence[str] = ()) -> ReadRecipe:
    """Defaults < the file < the overrides. Raises `UserError`, one line, for whatever is wrong."""
    layers = [*([read_layer(path)] if path else []), overrides_layer(overrides)]
    notes: list[str] = []
    epochs = _epochs(layers)
    layers = [_translate(layer, epochs, notes) for layer in layers]
    defaults = Layer("the defaults", Recipe().model_dump(mode="json"))  # so that ${group.key} may refer to them
    of_method = [DEFAULTS_OF_DINO] if _method(layers) == "dino" else []
    return ReadRecipe(build(Recipe, [defaults, *of_method, *layers]), tuple(notes))


def written_out(recipe: Recipe) -> Recipe:
    """The same recipe with every number of its presets, so that a preset that changes one day leaves it as it was."""
    numbers = resolve(recipe.augment).model_dump()
    return recipe.model_copy(update={"augment": recipe.augment.model_copy(update=numbers)})


def find_config(name: str, directory: Path) -> Path:
    """`name` is a path, or the stem of a YAML in `directory`. Raises `UserError` with what there is."""
    return find_file(name, directory, "recipe")


def changes_of_identity(old: Recipe, new: Recipe) -> list[str]:
    """What differs between a run's recipe and the one it is continued with, and may not."""
    return [
        f"{key}: {before} -> {after}"
        for key, before, after in differences(old.model_dump(mode="json"), new.model_dump(mode="json"))
        if not key.startswith(_NOT_IDENTITY)
    ]


# ---- the ancestors' keys. A rule takes (value, epochs) and gives (new key, new value), or a reason why the key goes.

_Rule = Callable[[Any, float], tuple[str, Any] | str]


def _same_meaning(key: str) -> _Rule:
    return lambda value, epochs: (key, value)


def _epochs_to_fraction(key: str) -> _Rule:
    """A value that is no number is handed on as it is: the new key's validation names it."""
    return lambda value, epochs: (key, value / epochs if isinstance(value, int | float) else value)


def _no_effect(reason: str, harmless: Callable[[Any], bool] = lambda value: True) -> _Rule:
    def rule(value: Any, epochs: float) -> tuple[str, Any] | str:
        if not harmless(value):
            raise UserError(reason)
        return reason

    return rule


def _is_empty(value: Any) -> bool:
    return value in (None, "", 0, [], {})


def _no_tuning_data(tune: Any) -> bool:
    return not isinstance(tune, dict) or all(_is_empty(tune.get(f"{s}_dataset_path")) for s in ("query", "test"))


_RULES: dict[str, _Rule] = {
    "train.save_frequency": _same_meaning("checkpoint.every_epochs"),
    "train.OFFICIAL_EPOCH_LENGTH": _same_meaning("train.epoch_length"),
    "optim.warmup_epochs": _epochs_to_fraction("optim.warmup_pct"),
    "optim.freeze_last_layer_epochs": _epochs_to_fraction("optim.freeze_last_layer_pct"),
    "teacher.warmup_teacher_temp_epochs": _epochs_to_fraction("teacher.warmup_teacher_temp_pct"),
    "optim.max_iter": _same_meaning("optim.total_steps"),
    "optim.lr": _no_effect("it was always computed from optim.base_lr and the batch", _is_empty),
    "train.cache_dataset": _no_effect("tiles are read through the operating system's cache"),
    "train.saveckp_freq": _no_effect("no code ever read it; see checkpoint.every_epochs"),
    "compute_precision": _no_effect("precision is train.precision: bf16 or fp32"),
    "MODEL": _no_effect("MODEL.WEIGHTS is not read when training starts from nothing", lambda v: _is_empty(v) or
                        (isinstance(v, dict) and all(map(_is_empty, v.values())))),
    "student.pretrained_weights": _no_effect(
        "student.pretrained_weights: this version starts from random weights only; set it to ''", _is_empty
    ),
    "wandb.dir": _no_effect("W&B files lie in the run directory"),
    "tune": _no_effect(
        "tune.*: this version does not tune while it trains; remove the data set paths under 'tune'", _no_tuning_data
    ),
}  # fmt: skip


def _translate(layer: Layer, epochs: float, notes: list[str]) -> Layer:
    """The layer with old keys renamed or dropped; each gets one note."""
    tree = {group: dict(keys) if isinstance(keys, dict) else keys for group, keys in layer.tree.items()}
    for old, rule in _RULES.items():
        group, _, key = old.partition(".")
        holder = tree.get(group) if key else tree
        name = key or group
        if not isinstance(holder, dict) or name not in holder:
            continue
        result = rule(holder.pop(name), epochs)
        if isinstance(result, str):
            notes.append(f"{layer.source}: {old} is passed over: {result}")
            continue
        new_group, _, new_key = result[0].partition(".")
        target = tree.setdefault(new_group, {})
        if not isinstance(target, dict):
            raise UserError(f"{layer.source}: {new_group} is a group of keys, not {target!r}")
        if new_key in target:
            raise UserError(f"{layer.source}: {old} is the old name of {result[0]}; give one of them")
        target[new_key] = result[1]
        notes.append(f"{layer.source}: {old} is read as {result[0]}={result[1]}")
    return Layer(layer.source, tree)


def _method(layers: Sequence[Layer]) -> Any:
    """What the layers ask for, the last first; what cannot be read is left to the validation."""
    return next((layer.tree["method"] for layer in reversed(layers) if "method" in layer.tree), None)


def _epochs(layers: Sequence[Layer]) -> float:
    """The number of epochs that the layers ask for; what cannot be read is left to the validation."""
    for layer in reversed(layers):
        optim = layer.tree.get("optim")
        if isinstance(optim, dict) and isinstance(epochs := optim.get("epochs"), int | float) and epochs > 0:
            return epochs
    return OptimConfig().epochs
